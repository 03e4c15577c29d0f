"""A Citus cluster of our own, whose nodes a test can kill and restart, and whose disks it can fill."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from chatdb.embedded.process import RunAs, without_libpq_variables
from tests.support.chaos import kill_server
from tests.support.databases import in_memory

_SETTINGS = """
shared_preload_libraries = 'citus'
listen_addresses = '127.0.0.1'
fsync = off
synchronous_commit = off
wal_level = logical
max_prepared_transactions = 100
max_wal_size = '64MB'
citus.node_conninfo = 'sslmode=disable'
citus.enable_statistics_collection = off
"""


_DISK = "400m"


class Node:
    """A server of the cluster, in `folder`."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._run_as = RunAs.candidates()[-1]
        self._has_disks = False
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.dsn = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def create(self) -> None:
        """Create the server's files. As root, its tables and its log are on a disk of their own each."""
        os.chown(self._folder, self._run_as.uid, self._run_as.gid)
        for disk in ("data", "log") if os.geteuid() == 0 else ():
            (self._folder / disk).mkdir()
            self._has_disks = not subprocess.call(
                ["mount", "-t", "tmpfs", "-o", f"size={_DISK},mode=700", "tmpfs", self._folder / disk],
                stderr=subprocess.DEVNULL,
            )
            os.chown(self._folder / disk, self._run_as.uid, self._run_as.gid)
        options = ("-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "-N", "--wal-segsize=1")
        self._run("initdb", *options, f"--waldir={self._folder / 'log'}")
        with (self._folder / "data" / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(f"{_SETTINGS}port = {self.port}\nunix_socket_directories = '{self._folder}'\n")

    def start(self) -> None:
        """Start the server, also after a kill, and wait until it accepts connections."""
        for leftover in (self._folder / "data" / "postmaster.pid", *self._folder.glob(".s.PGSQL.*")):
            leftover.unlink(missing_ok=True)
        self._run("pg_ctl", "start", "-w", "-l", str(self._folder / "server.log"))

    def kill(self) -> None:
        """Kill all processes of the server."""
        kill_server(self._folder / "data")

    @contextlib.contextmanager
    def full(self, disk: str) -> Iterator[None]:
        """Leave 2 MiB of the disk of the tables, `data`, or of the log, `log`."""
        if not self._has_disks:
            pytest.skip("only root can mount a disk to fill")
        free = os.statvfs(self._folder / disk)
        filler = self._folder / disk / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize - 2 * 1024**2)
        try:
            yield
        finally:
            filler.unlink()

    def remove(self) -> None:
        """Kill the server, and unmount its disks."""
        with contextlib.suppress(OSError):
            self.kill()
        for disk in ("data", "log") if self._has_disks else ():
            subprocess.call(["umount", "--lazy", self._folder / disk])

    def await_standby(self, name: str) -> None:
        """Let each commit of a session with synchronous_commit wait for this standby; for none with ''."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("alter system set synchronous_standby_names = {}").format(sql.Literal(name)))
            connection.execute("select pg_reload_conf()")

    def wait_for(self, query: str, event: str | None = None) -> None:
        """Wait until a session of the server runs a statement like this pattern, and waits for the event."""
        deadline = time.monotonic() + 30
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            while time.monotonic() < deadline:
                found = connection.execute(
                    "select true from pg_stat_activity where state = 'active' and query ilike %s "
                    "and wait_event_type is distinct from 'Lock' and pid <> pg_backend_pid() "
                    "and (%s::text is null or wait_event = %s)",
                    [query, event, event],
                )
                if found.fetchone():
                    return
                time.sleep(0.005)
        pytest.fail(f"no session runs {query}")

    def _run(self, program: str, *arguments: str) -> None:
        self._run_program(self._programs / program, "-D", str(self._folder / "data"), *arguments)

    def _run_program(self, program: str | Path, *arguments: str) -> None:
        drop = self._run_as.uid != os.geteuid()
        done = subprocess.run(
            [*self._run_as.prefix, program, *arguments],
            cwd=self._folder,
            env={**without_libpq_variables(), "HOME": str(self._folder)},  # where libpq looks for certificates
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open while the server runs
            stderr=subprocess.DEVNULL,
            user=self._run_as.uid if drop else None,
            group=self._run_as.gid if drop else None,
            extra_groups=[] if drop else None,
        )
        assert done.returncode == 0, program


@contextlib.contextmanager
def cluster() -> Iterator[list[Node]]:
    """Yield a coordinator and two workers, of an installed PostgreSQL that has Citus; skip the test without one."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/lib/citus.so"))
    if not found:
        pytest.skip("no installed PostgreSQL has Citus")
    programs = found[-1].parent.parent / "bin"
    place = tempfile.TemporaryDirectory(prefix="chatdb-citus-", dir=in_memory(), ignore_cleanup_errors=True)
    with place as name, contextlib.ExitStack() as stack:
        Path(name).chmod(0o711)
        nodes: list[Node] = []
        for number in range(3):
            folder = Path(name) / f"node{number}"
            folder.mkdir()
            node = Node(programs, folder)
            stack.callback(node.remove)
            node.create()
            node.start()
            nodes.append(node)
        yield nodes
