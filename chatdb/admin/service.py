"""Operator commands as coroutines, for services that run them at their start."""

from __future__ import annotations

import asyncio
import os

from chatdb._core.dsn import AnyDsn, dsn_to_str
from chatdb.errors import ConfigurationError


async def migrate(dsn: AnyDsn | None = None, *, wait: float = 60.0) -> list[str]:
    """
    Apply the missing migrations, as `chatdb migrate` does, and return their names.

    `dsn` is a direct connection, not through a pooler, as a role that may create a schema. It defaults to the
    environment variable `CHATDB_MIGRATE_URL`, then to `DATABASE_URL`. Any number of processes may call this at the same
    time: one applies the migrations, and the others wait up to `wait` seconds for it. It runs in a thread, which a
    cancellation does not stop. Requires the extra `migrate`.

    Raises ConfigurationError, SchemaError if a migration was applied with different content, or UnavailableError; call
    it again after any of them.
    """
    text = "" if dsn is None else dsn_to_str(dsn)
    text = text or os.environ.get("CHATDB_MIGRATE_URL") or os.environ.get("DATABASE_URL") or ""
    if not text:
        raise ConfigurationError("no database is configured: pass dsn, or set DATABASE_URL=postgresql://...")
    from chatdb.admin.migrate import apply_migrations

    return await asyncio.to_thread(apply_migrations, text, wait=wait)
