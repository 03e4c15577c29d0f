"""`chatdb prune` under kills, appends and load: it loses no append, leaves nothing half, and others stay fast."""

from __future__ import annotations

import asyncio
import random
import time
from datetime import timedelta

import pytest

import chatdb
from chatdb import ConversationNotFoundError
from chatdb.pool import Pool
from tests.support.chaos import figure, sized
from tests.support.command import PROGRAM, environment

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

TASKS = 8
OLD = timedelta(days=400)
COMMAND = ("prune", "--older-than", "365d", "--yes")


async def stored(db: Pool, prefix: str, *, users: int, conversations: int, messages: int, age: timedelta) -> None:
    """Create conversations for each user, whose messages lie among those of the others as traffic writes them."""
    await db.execute(
        "insert into chatdb.conversations (user_id, last_seq, updated_at) "
        "select $1 || u, $4, now() - $5::interval from generate_series(1, $2) as u, generate_series(1, $3)",
        *(prefix, users, conversations, messages, age),
    )
    await db.execute(
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
        "select user_id, id, seq, 'user', repeat(md5(id::text || seq), 28), now() "
        "from chatdb.conversations, generate_series(1, last_seq) as seq "
        "where starts_with(user_id, $1) order by seq, id",
        prefix,
        timeout=300,
    )


async def prune(dsn: str, *options: str) -> asyncio.subprocess.Process:
    """Start the command."""
    return await asyncio.create_subprocess_exec(
        str(PROGRAM),
        *COMMAND,
        "--database",
        dsn,
        *options,
        env=environment({}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def test_kills_and_appends(request: pytest.FixtureRequest, durable_dsn: str) -> None:
    """Killed again and again under appends to old conversations: no append is lost, and nothing is half deleted."""
    kills = sized(request, 20, 5)
    acknowledged: dict[tuple[str, int], set[int]] = {}
    refused = 0
    async with chatdb.create_pool(durable_dsn, max_size=TASKS) as db:
        users = 100 * kills
        await stored(db, "old", users=users, conversations=4, messages=10, age=OLD)
        await stored(db, "young", users=50, conversations=4, messages=10, age=timedelta(days=300))
        rows = await db.fetch("select user_id, id from chatdb.conversations where starts_with(user_id, 'old')")
        conversations = [(user, conversation) for user, conversation in rows]
        ended = False

        async def append() -> None:
            nonlocal refused
            while not ended:
                user, conversation = random.choice(conversations)
                try:
                    message = await chatdb.append_message(
                        db, user_id=user, conversation_id=conversation, role="user", content="late"
                    )
                    acknowledged.setdefault((user, conversation), set()).add(message.seq)
                except ConversationNotFoundError:
                    refused += 1
                await asyncio.sleep(0.2)

        async with asyncio.TaskGroup() as group:
            for _ in range(TASKS):
                group.create_task(append())
            count = "select count(*) from chatdb.conversations"
            for _ in range(kills):
                process = await prune(durable_dsn, "--rate", "500")
                before = await db.fetchval(count)
                while await db.fetchval(count) > before - 20:
                    assert process.returncode is None
                await asyncio.sleep(random.uniform(0, 0.1))
                assert process.returncode is None
                process.kill()
                await process.wait()
            left = await db.fetchval(count)
            process = await prune(durable_dsn)
            await process.communicate()
            ended = True
        assert process.returncode == 0
        process = await prune(durable_dsn)
        await process.communicate()
        assert 200 + len(acknowledged) < left < 4 * users + 200
        found: dict[tuple[str, int], set[int]] = {}
        for user, conversation, seqs in await db.fetch(
            "select c.user_id, c.id, (select array_agg(seq) from chatdb.messages as m "
            "where m.user_id = c.user_id and m.conversation_id = c.id) from chatdb.conversations as c"
        ):
            found[user, conversation] = set(seqs or ())
        for place, seqs in acknowledged.items():
            assert found.pop(place) == {*range(1, 11)} | seqs
        assert {user[:5] for user, _ in found} == {"young"}
        assert [len(seqs) for seqs in found.values()] == [10] * 200
    appends = sum(map(len, acknowledged.values()))
    assert appends > 0 < refused
    figure(f"{kills} kills: {appends} appends, {refused} to deleted conversations: 0 lost, 0 conversations in part")


async def test_others_stay_fast(request: pytest.FixtureRequest, durable_dsn: str) -> None:
    """While 100,000 messages are deleted, the histories of others take at most 4 times as long at p95, and 100 ms."""
    messages = sized(request, 100_000, 20_000)
    times: list[float] = []
    ended = False
    async with chatdb.create_pool(durable_dsn, max_size=4) as db:
        await stored(db, "old", users=messages // 100, conversations=5, messages=20, age=OLD)
        await stored(db, "live", users=100, conversations=10, messages=100, age=timedelta(days=1))
        await db.execute("vacuum analyze", timeout=300)
        rows = await db.fetch("select user_id, id from chatdb.conversations where starts_with(user_id, 'live')")

        async def read() -> None:
            while not ended:
                user, conversation = random.choice(rows)
                started = time.perf_counter()
                history = await chatdb.get_history(db, user_id=user, conversation_id=conversation, limit=50)
                times.append(1000 * (time.perf_counter() - started))
                assert len(history) == 50
                await asyncio.sleep(0.005)

        def taken() -> list[float]:
            """Return p50, p95 and the maximum in milliseconds, and begin anew."""
            ordered = sorted(times)
            times.clear()
            return [ordered[len(ordered) // 2], ordered[len(ordered) * 95 // 100], ordered[-1]]

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(read())
            await asyncio.sleep(2)
            times.clear()
            await asyncio.sleep(5)
            before = taken()
            process = await prune(durable_dsn)
            shown, _ = await process.communicate()
            during = taken()
            ended = True
    assert f"with {messages:,} messages" in shown.decode()
    milliseconds = [" / ".join(f"{each:.1f}" for each in percentiles) for percentiles in (before, during)]
    figure(f"histories of others, p50 / p95 / max in ms: {milliseconds[0]} before, {milliseconds[1]} while pruning")
    assert during[1] < min(4 * before[1], 100)
