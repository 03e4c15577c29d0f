"""A proxy for PostgreSQL's protocol that sees each statement on its way, and can hold it or its answer back."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from chatdb._core.dsn import connect_arguments

_SIMPLE, _PARSE, _READY = b"Q", b"P", b"Z"


class Statement(NamedTuple):
    """A statement on its way: its number in the order of all connections, its text, and whether it was answered."""

    number: int
    sql: str
    answered: bool


Watch = Callable[[Statement], bool]
"""What is called before each statement is passed on, and when its answer is there; True cuts the connection."""


class Wire:
    """The proxy, on a Unix socket in a folder, in threads; `dsn` leads through it."""

    def __init__(self, server: str, folder: Path, watch: Watch) -> None:
        arguments = connect_arguments(server)
        host, port = arguments["host"][0], arguments.get("port", 5432)
        self._target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._watch = watch
        self._count = 0
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen(64)
        parts = urlsplit(server)
        login = f"{parts.netloc.rpartition('@')[0]}@"
        self.dsn = urlunsplit(parts._replace(netloc=login, query=f"host={quote(str(folder), safe='')}&port=5432"))

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET)
            self._sockets += [client, server]
            try:
                server.connect(self._target)
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._connection, args=(client, server), daemon=True).start()

    def _connection(self, client: socket.socket, server: socket.socket) -> None:
        under_way: list[Statement] = []
        back = threading.Thread(target=self._back, args=(server, client, under_way), daemon=True)
        with contextlib.suppress(OSError):
            size = _exactly(client, 4)
            server.sendall(size + _exactly(client, int.from_bytes(size) - 4))
            back.start()
            while True:
                kind, body = _message(client)
                if kind in (_SIMPLE, _PARSE):
                    text = body[4:].split(b"\0")[0 if kind == _SIMPLE else 1].decode()
                    with self._lock:
                        statement = Statement(self._count, " ".join(text.split()), answered=False)
                        self._count += 1
                    if self._watch(statement):
                        break
                    under_way.append(statement)
                server.sendall(kind + body)
        _cut(client, server)

    def _back(self, server: socket.socket, client: socket.socket, under_way: list[Statement]) -> None:
        with contextlib.suppress(OSError):
            while True:
                kind, body = _message(server)
                if kind == _READY and under_way and self._watch(under_way.pop(0)._replace(answered=True)):
                    break
                client.sendall(kind + body)
        _cut(client, server)


def _cut(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def _message(source: socket.socket) -> tuple[bytes, bytes]:
    """Read a message: its kind, and its length and content."""
    head = _exactly(source, 5)
    return head[:1], head[1:] + _exactly(source, int.from_bytes(head[1:]) - 4)


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return data
