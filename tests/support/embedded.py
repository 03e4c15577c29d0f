"""Folders of embedded servers, and the processes behind them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chatdb.embedded.folder import try_lock
from tests.support.databases import in_memory


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
