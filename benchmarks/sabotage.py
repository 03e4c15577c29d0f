"""Ways to break chatdb on purpose. `nox -s bench_selftest` shows that a gate fails for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import chatdb
from benchmarks.server import BenchServer


@dataclass(frozen=True)
class Sabotage:
    """A way to break chatdb, the gates that must fail (others may), and the run that shows it."""

    what: str
    falls: tuple[str, ...]
    sql: str = ""
    target: str = ""
    replacement: Any = None
    run: tuple[str, ...] = ("test_counts.py", "--quick", "--benchmark-disable")


async def _looks_first(
    db: Any, *, user_id: str, conversation_id: int | None = None, conversation_key: str | None = None, **rest: Any
) -> list[chatdb.Message]:
    at = {"user_id": user_id, "conversation_id": conversation_id, "conversation_key": conversation_key}
    await chatdb.get_conversation(db, **at)
    return await _get_history(db, **at, **rest)


async def _reset(connection: Any) -> None:
    await connection.execute("select pg_advisory_unlock_all(); close all; unlisten *; reset all")


_get_history = chatdb.get_history
_create_pool = chatdb.create_pool

TIMED = ("test_operations.py", "-k", "test_operation and asyncio and last_20")
"""The run that times one small read with chatdb, a bare connection and SQLModel."""

ALL = {
    "nothing": Sabotage("changes nothing", ()),
    "drop_index": Sabotage(
        "drops the index that serves the list",
        ("plans.unexpected", "list_unarchived.buffers"),
        sql="drop index chatdb.ix_conversations_user_id_active_on_listed",
    ),
    "custom_plans": Sabotage(
        "makes the server plan every call",
        ("plans.custom",),
        sql="do $$ begin execute format("
        "'alter database %I set plan_cache_mode = force_custom_plan', current_database()); end $$",
    ),
    "reset_query": Sabotage(
        "makes the pool send asyncpg's reset query after each call",
        ("history_100.round_trips", "history_100.statements", "append.round_trips"),
        target="chatdb.create_pool",
        replacement=lambda *args, **options: _create_pool(*args, reset=_reset, **options),
    ),
    "two_statements": Sabotage(
        "looks up the conversation before reading its history",
        ("history_100.statements", "history_100.round_trips", "last_20.statements"),
        target="chatdb.get_history",
        replacement=_looks_first,
    ),
    "index_on_updated_at": Sabotage(
        "adds an index on updated_at",
        ("hot.single", "hot.turns"),
        sql="create index on chatdb.conversations (user_id, updated_at desc)",
    ),
    "nothing_timed": Sabotage("changes nothing and times the last 20", (), run=TIMED),
    "asyncpgs_way": Sabotage(
        "makes the pool fall back to asyncpg's own way, as if asyncpg had other private names",
        ("last_20.to_raw",),
        target="chatdb._core.asyncpg_private.FAST",
        replacement=False,
        run=TIMED,
    ),
}


@contextmanager
def applied(name: str | None, server: BenchServer, database: str) -> Iterator[None]:
    """Apply a sabotage, if one is named, until the end of the block."""
    chosen = ALL.get(name or "", Sabotage("", ()))
    if chosen.sql:
        with server.connect(database) as connection:
            connection.execute(chosen.sql)
    if chosen.target:
        with patch(chosen.target, chosen.replacement):
            yield
    else:
        yield
