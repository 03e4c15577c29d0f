"""Migrations in other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yoyo

from chatdb._core.dsn import libpq_dsn
from chatdb.admin.migrate import apply_migrations, migration_files, rollback_migrations

if TYPE_CHECKING:
    import multiprocessing
    import threading

NAMES = [file.name for file in migration_files()]


def migrate_at(barrier: threading.Barrier, queue: multiprocessing.Queue[list[str]], dsn: str) -> None:
    """Migrate once all processes are ready."""
    barrier.wait()
    queue.put(apply_migrations(dsn))


def up(dsn: str, place: int) -> None:
    """Apply migrations up to the one at this index."""
    apply_migrations(dsn, to=NAMES[place])


def down(dsn: str, place: int) -> None:
    """Roll back the migration at this index."""
    rollback_migrations(dsn, to=NAMES[place - 1] if place else "0")


def over(dsn: str, place: int) -> None:
    """Migrate a database of the first release."""
    apply_migrations(dsn)


def by_yoyo(dsn: str, place: int) -> None:
    """Apply all migrations as `yoyo apply` does."""
    backend = yoyo.get_backend(libpq_dsn(dsn, scheme="postgresql"))
    with backend.lock():
        backend.apply_migrations(backend.to_apply(yoyo.read_migrations(str(migration_files()[0].path.parent))))
