"""A proxy between a client and PostgreSQL that counts messages and can disturb them."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import NamedTuple
from urllib.parse import quote

from chatdb._core.dsn import connect_arguments

CHUNK = 1 << 16
SIMPLE, PARSE, READY = "Q", "P", "Z"


class Statement(NamedTuple):
    """A statement in transit: its text on one line, and whether the server has answered."""

    sql: str
    answered: bool


Watch = Callable[[Statement], bool]


class Message(NamedTuple):
    """A message of PostgreSQL's protocol: its type, empty for the startup message, and all its bytes."""

    kind: str
    data: bytes


class Proxy:
    """
    A proxy on a loopback port, reached through `dsn`. It runs in threads until `close`.

    `sent` records the types of the client's messages, `statements` the texts of its statements. `round_trips` counts
    client messages that follow a server message, `ready` the server's ReadyForQuery messages. Each message is recorded
    before it is forwarded. The startup message is not recorded.

    `watch` is called before a statement is forwarded, and again before the ReadyForQuery that ends it. The connection
    waits until it returns, and is cut if it returns True. After `answer_bytes` of answers the server's side of a
    connection goes silent. `delay` adds latency in seconds in each direction.
    """

    def __init__(
        self, dsn: str, *, watch: Watch | None = None, answer_bytes: int | None = None, delay: float = 0.0
    ) -> None:
        arguments = connect_arguments(dsn)
        host, port = arguments["host"][0], arguments.get("port") or 5432
        self._target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self.watch, self.answer_bytes, self.delay = watch, answer_bytes, delay
        self.passing = threading.Event()
        self.passing.set()
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self.clear()
        self._listener = socket.create_server(("127.0.0.1", 0))
        place = f"127.0.0.1:{self._listener.getsockname()[1]}/{quote(arguments['database'], safe='')}"
        login = ":".join(quote(arguments[name], safe="") for name in ("user", "password") if arguments.get(name))
        self.dsn = f"postgresql://{login}@{place}?sslmode=disable"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def clear(self) -> None:
        """Clear the recorded messages."""
        self.sent: list[str] = []
        self.statements: list[str] = []
        self.round_trips = 0
        self.ready = 0

    def pause(self) -> None:
        """Forward nothing until `resume`. Connections are still accepted."""
        self.passing.clear()

    def resume(self) -> None:
        """Forward again, starting with the messages received during the pause."""
        self.passing.set()

    def cut(self) -> None:
        """Cut all connections. Data not yet forwarded is lost."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut()

    def close(self) -> None:
        """Cut all connections, and stop accepting."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        self._accepting.join()
        self._listener.close()
        self.cut()
        self.passing.set()
        for link in self._links:
            link.thread.join()

    def connect(self) -> socket.socket:
        """Connect to the server."""
        if not isinstance(self._target, str):
            return socket.create_connection(self._target)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self._target)
        except OSError:
            server.close()
            raise
        return server

    def note_sent(self, kind: str, sql: str | None, *, first: bool) -> None:
        """Record a client's message, and whether it follows a server message."""
        with self._lock:
            self.sent.append(kind)
            self.round_trips += first
            if sql is not None:
                self.statements.append(sql)

    def note_ready(self) -> None:
        """Record a ReadyForQuery."""
        with self._lock:
            self.ready += 1

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._links = [link for link in self._links if link.thread.is_alive()]
                    self._links.append(_Link(self, client))


class _Link:
    """A connection with one thread per direction."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = [client]
        self._ended = threading.Event()
        self._client_spoke = False
        self._under_way: list[Statement] = []
        self.thread = threading.Thread(target=self._run, args=(client,), daemon=True)
        self.thread.start()

    def cut(self) -> None:
        self._ended.set()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _run(self, client: socket.socket) -> None:
        with suppress(OSError), closing(client):
            self._proxy.passing.wait()
            if self._ended.is_set():
                return
            with closing(self._proxy.connect()) as server:
                self._sockets.append(server)
                to_server = _Outlet(server, self._proxy.delay)
                to_client = _Outlet(client, self._proxy.delay, self._proxy.answer_bytes)
                answers = threading.Thread(
                    target=self._pass_on, args=(_messages(server), to_client, self._answered), daemon=True
                )
                answers.start()
                self._pass_on(_messages(client, startup=True), to_server, self._sent)
                answers.join()

    def _pass_on(
        self, messages: Iterator[list[Message]], outlet: _Outlet, note: Callable[[Message], Statement | None]
    ) -> None:
        """Forward messages in the batches received, until one side ends or the connection is cut."""
        watch = self._proxy.watch
        try:
            for came in messages:
                self._proxy.passing.wait()
                noted = bytearray()
                for message in came:
                    if self._ended.is_set():
                        return
                    statement = note(message)
                    if statement and watch:
                        outlet.send(bytes(noted))
                        noted.clear()
                        if watch(statement):
                            self.cut()
                            return
                    noted += message.data
                outlet.send(bytes(noted))
                if outlet.is_silent:
                    self._ended.wait()
        except OSError:
            pass  # the connection has ended
        finally:
            outlet.flush()
            self.cut()

    def _sent(self, message: Message) -> Statement | None:
        if not message.kind:
            return None
        text = None
        if message.kind in (SIMPLE, PARSE):
            text = message.data[5:].split(b"\0")[0 if message.kind == SIMPLE else 1].decode(errors="replace")
            text = " ".join(text.split())
        self._proxy.note_sent(message.kind, text, first=not self._client_spoke)
        self._client_spoke = True
        if text is None:
            return None
        self._under_way.append(Statement(text, answered=True))
        return Statement(text, answered=False)

    def _answered(self, message: Message) -> Statement | None:
        self._client_spoke = False
        if message.kind != READY:
            return None
        self._proxy.note_ready()
        return self._under_way.pop(0) if self._under_way else None


class _Outlet:
    """Sends to a socket in order, with an optional delay and limit of bytes."""

    def __init__(self, target: socket.socket, delay: float, most: int | None = None) -> None:
        self._target, self._delay, self._most = target, delay, most
        self._waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True) if delay else None
        if self._thread:
            self._thread.start()

    @property
    def is_silent(self) -> bool:
        return self._most == 0

    def send(self, data: bytes) -> None:
        if self._most is not None:
            data = data[: self._most]
            self._most -= len(data)
        if self._thread:
            self._waiting.put((time.monotonic() + self._delay, data))
        else:
            self._target.sendall(data)

    def flush(self) -> None:
        if self._thread:
            self._waiting.put((0.0, b""))
            self._thread.join()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                due, data = self._waiting.get()
                if not data:
                    return
                time.sleep(max(0.0, due - time.monotonic()))
                self._target.sendall(data)


def _messages(source: socket.socket, *, startup: bool = False) -> Iterator[list[Message]]:
    """Yield batches of complete messages. The startup message has no type."""
    data = bytearray()
    while more := source.recv(CHUNK):
        data += more
        messages: list[Message] = []
        at = 0
        while True:
            length = at if startup else at + 1  # offset of the length field
            end = length + int.from_bytes(data[length : length + 4])
            if len(data) < length + 4 or len(data) < end:
                break
            messages.append(Message(data[at:length].decode(), bytes(data[at:end])))
            startup = False
            at = end
        del data[:at]
        if messages:
            yield messages
