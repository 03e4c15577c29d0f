"""Physical replicas of a test's server, which can be paused, stopped, killed and promoted."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from chatdb.embedded.process import Launcher
from chatdb.embedded.server import EmbeddedServer
from tests.support.chaos import kill_server
from tests.support.databases import execute, in_memory


class Replica:
    """
    A physical replica of a server, or of another replica, in `folder`.

    Its `name` is its application_name, for synchronous_standby_names.
    """

    def __init__(self, server: EmbeddedServer, lock: int, folder: Path, name: str) -> None:
        self._server = server
        self._lock = lock
        self.folder = folder
        self.data = folder / "data"
        self.name = name
        self.dsn = dsn_of(folder)

    def copy(self, upstream: Path) -> None:
        """Copy the server whose socket is in a folder, and follow it from the next start on."""
        os.chown(self.folder, self._launcher()._choose_run_as().uid, self._launcher()._choose_run_as().gid)
        source = f"host={upstream} port=5432 user=postgres application_name={self.name}"
        self._run("pg_basebackup", "-d", source, "-R", "-X", "stream", "-c", "fast", "--no-sync")

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        for leftover in (self.data / "postmaster.pid", *self.folder.glob(".s.PGSQL.*")):
            leftover.unlink(missing_ok=True)  # from a killed server
        options = f"-k {self.folder} -c listen_addresses='' -c port=5432 -c wal_retrieve_retry_interval=100ms"
        options += " -c max_standby_streaming_delay=1s"  # or a read of a test before could delay a TRUNCATE by 30 s
        self._run("pg_ctl", "start", "-w", "-o", options, "-l", self.folder / "log")

    def copy_again(self, upstream: Path) -> None:
        """Replace the data by a copy of the server whose socket is in a folder, and follow it."""
        self.kill()
        shutil.rmtree(self.data)
        self.copy(upstream)
        self.start()

    def promote(self) -> None:
        """Make the replica a primary of its own, and wait until it is one."""
        self._run("pg_ctl", "promote", "-w")

    def pause(self) -> None:
        """Receive the primary's log, but do not replay it."""
        execute(self.dsn, "select pg_wal_replay_pause()")

    def resume(self) -> None:
        """Replay again."""
        execute(self.dsn, "select pg_wal_replay_resume()")

    def signal(self, number: int) -> None:
        """Send a signal, such as SIGSTOP or SIGCONT, to all processes of the server."""
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill all processes of the server, if it runs."""
        with contextlib.suppress(OSError):
            processes = self._processes()
            kill_server(self.data)
            while any(map(_is_running, processes)):
                time.sleep(0.01)

    def _processes(self) -> list[int]:
        postmaster = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        return [postmaster, *map(int, children)]

    def _launcher(self) -> Launcher:
        server = self._server
        return Launcher(server._folder, server._package, server._version, self._lock, time.monotonic() + 60)

    def _run(self, program: str, *arguments: str | Path) -> None:
        launcher = self._launcher()
        run_as = launcher._choose_run_as()
        path = launcher._find_programs(run_as) / program
        if not launcher._run(run_as, path, "-D", self.data, *arguments):
            log = self.folder / "log"
            pytest.fail(f"{program} failed: {log.read_text()[-2000:] if log.exists() else self._server._folder.log}")


def _is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def dsn_of(folder: Path) -> str:
    """Return the DSN of the server whose socket is in a folder."""
    return f"postgresql://postgres@/chatdb?host={quote(str(folder), safe='')}&port=5432"


@contextlib.contextmanager
def replica_of(server: EmbeddedServer, *, upstream: Replica | None = None, name: str = "replica") -> Iterator[Replica]:
    """Yield a started replica of the server, or of another replica of it, which is deleted after the block."""
    place = tempfile.TemporaryDirectory(prefix="chatdb-replica-", dir=in_memory(), ignore_cleanup_errors=True)
    with place as folder, server._folder.opened("server.lock") as lock:
        replica = Replica(server, lock, Path(folder), name)
        replica.copy(server._folder.socket if upstream is None else upstream.folder)
        replica.start()
        try:
            yield replica
        finally:
            with contextlib.suppress(OSError):
                replica.signal(signal.SIGCONT)
            replica.kill()
