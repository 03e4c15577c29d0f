"""Migrations of a large database while a service writes to it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import chatdb
from chatdb.admin.migrate import apply_migrations
from tests.support.databases import execute
from tests.support.migrations import CONCURRENTLY, NAMES, add

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

LOCK_TIMEOUT = 2.0
"""The lock_timeout that each migration sets, in seconds."""

FILL = (
    "insert into chatdb.conversations (user_id, id, last_seq) select 'user ' || n % 1000, n, 100 "
    "from generate_series(1, {conversations}) as n",
    "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
    "select c.user_id, c.id, n, 'user', repeat('word ', 40), c.created_at "
    "from chatdb.conversations as c, generate_series(1, 100) as n",
    "analyze chatdb.conversations, chatdb.messages",
)


async def work(db: chatdb.pool.Pool, place: int, waits: list[float], done: asyncio.Event) -> None:
    """Append to a conversation and read it until `done` is set, and record the duration of each call."""
    user = {"user_id": f"user {place % 1000}", "conversation_id": place}
    while not done.is_set():
        for call in (
            chatdb.append_message(db, **user, role="user", content="hello"),
            chatdb.get_history(db, **user, limit=20),
        ):
            start = time.perf_counter()
            await call
            waits.append(time.perf_counter() - start)


async def test_nobody_notices(request: pytest.FixtureRequest, dsn: str, folder: Path) -> None:
    """Each migration, and two typical later ones, stalls no writer on a million messages beyond lock_timeout."""
    conversations = 1_000 if request.config.getoption("--quick") else 10_000
    execute(dsn, *(statement.format(conversations=conversations) for statement in FILL))
    add(
        folder,
        "0098.add-messages-model",
        "set local lock_timeout = '2s';\nalter table chatdb.messages add column if not exists model text;",
        "alter table chatdb.messages drop column if exists model;",
    )
    add(folder, "0099.index-created-at", CONCURRENTLY, "drop index if exists chatdb.ix_messages_created_at;")
    names = [*NAMES, "0098.add-messages-model", "0099.index-created-at"]
    execute(dsn, "delete from chatdb._chatdb_migration")
    longest: dict[str, float] = {}
    async with chatdb.create_pool(dsn, min_size=8, max_size=8) as db:
        for name in names:
            waits: list[float] = []
            done = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                for place in range(1, 9):
                    tasks.create_task(work(db, place, waits, done))
                await asyncio.sleep(0.2)
                applied = await asyncio.to_thread(apply_migrations, dsn, to=name, folder=folder)
                await asyncio.sleep(0.2)
                done.set()
            assert applied == [name]
            assert len(waits) > 100
            longest[name] = max(waits)
    print("longest stall in seconds:", longest)
    assert max(longest.values()) < LOCK_TIMEOUT, longest
