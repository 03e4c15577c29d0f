"""
A proxy in front of the server that counts round trips and makes the way longer.

Threads and blocking sockets, because an event loop's timers are a millisecond coarse; in a process of its own where
time matters, so that it does not take part in the client's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from urllib.parse import parse_qs, urlsplit

CHUNK = 1 << 18


class Proxy:
    """A proxy on a port of the loopback interface, to the Unix socket in a DSN."""

    def __init__(self, dsn: str, delay: float = 0.0) -> None:
        options = parse_qs(urlsplit(dsn).query)
        self._target = f"{options['host'][0]}/.s.PGSQL.{options.get('port', ['5432'])[0]}"
        self._database = urlsplit(dsn).path
        self._delay = delay
        self.round_trips = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = f"postgresql://postgres@127.0.0.1:{self._listener.getsockname()[1]}{self._database}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                _Link(self, client, server)

    @property
    def delay(self) -> float:
        """Half of what a round trip takes longer, in seconds."""
        return self._delay


class _Link:
    """A connection: what one side sends comes out at the other after the delay, in order."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._asked = False
        for source, target, is_question in ((client, server, True), (server, client, False)):
            line: deque[tuple[float, bytes]] = deque()
            ready = threading.Semaphore(0)
            threading.Thread(target=self._read, args=(source, line, ready, is_question), daemon=True).start()
            threading.Thread(target=self._write, args=(target, line, ready), daemon=True).start()

    def _read(
        self, source: socket.socket, line: deque[tuple[float, bytes]], ready: threading.Semaphore, is_question: bool
    ) -> None:
        data = b"start"
        while data:
            try:
                data = source.recv(CHUNK)
            except OSError:
                data = b""
            if data and is_question and not self._asked:
                self._proxy.round_trips += 1  # the client speaks, after the server did
            self._asked = is_question if data else self._asked
            line.append((time.monotonic() + self._proxy.delay, data))
            ready.release()

    def _write(self, target: socket.socket, line: deque[tuple[float, bytes]], ready: threading.Semaphore) -> None:
        with contextlib.suppress(OSError):
            while ready.acquire():
                due, data = line.popleft()
                if (wait := due - time.monotonic()) > 0:
                    time.sleep(wait)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)


def _serve(dsn: str, delay: float, parent: Connection) -> None:
    proxy = Proxy(dsn, delay)
    parent.send(proxy.dsn)
    parent.recv()  # until the parent closes, or ends


@contextlib.contextmanager
def far(dsn: str, round_trip: float) -> Iterator[str]:
    """Give the DSN of a proxy in a process of its own that makes each round trip longer, by so many seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(dsn, round_trip / 2, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()
        ours.close()
        theirs.close()
