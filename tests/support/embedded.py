"""Folders of embedded servers, and the processes behind them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chatdb.admin.migrate import apply_migrations
from chatdb.embedded.folder import try_lock
from chatdb.embedded.server import EmbeddedServer
from tests.support.databases import execute, in_memory


def new_place() -> Iterator[Path]:
    """Yield a temporary folder that all users can enter, with a path short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="chatdb-", dir=in_memory() or "/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def lock_is_free(folder: Path) -> bool:
    """Return whether no process of the server is alive."""
    with (folder / "server.lock").open("a") as lock:
        return try_lock(lock.fileno())


def postmaster(folder: Path) -> int:
    """Return the process ID of the postmaster."""
    return int((folder / "data/postmaster.pid").read_text().split()[0])


@contextmanager
def temporary_server() -> Iterator[EmbeddedServer]:
    """Yield a started server, whose data is deleted after the block."""
    with tempfile.TemporaryDirectory(prefix="chatdb-test-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)  # without user namespaces, root's server runs as nobody
        with EmbeddedServer(Path(folder) / "server") as server:
            yield server


@contextmanager
def standby(*statements: str) -> Iterator[str]:
    """Yield the DSN of a migrated server on which these statements ran and which is in recovery since."""
    with temporary_server() as server:
        apply_migrations(server.dsn)
        execute(server.dsn, *statements)
        owner = (server.path / "data" / "PG_VERSION").stat()
        server.stop()
        signal_file = server.path / "data" / "standby.signal"
        signal_file.touch()
        os.chown(signal_file, owner.st_uid, owner.st_gid)
        server.start()
        yield server.dsn
