"""A reader that follows seq while many callers write misses nothing, and times never decrease."""

from __future__ import annotations

import asyncio
import contextlib
import random
from itertools import pairwise
from typing import Any

import pytest

import chatdb
from tests.support.chaos import figure, sized

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

USER = "ada"
HANG = 120


class _Rollback(Exception):  # noqa: N818 - not an error: it ends a transaction
    """Ends a transaction without its writes."""


async def write(pool: chatdb.pool.Pool, writer: int, at: dict[str, Any], messages: int) -> int:
    """Write in every way, including long and rolled-back transactions; return the number of stored messages."""
    chance = random.Random(writer)
    stored = 0
    while stored < messages:
        new = {"role": "user", "content": f"{writer} {stored}"}
        match chance.randrange(20):
            case 0:
                async with chatdb.transaction(pool) as connection:
                    await chatdb.append_message(connection, **new, **at)
                    await asyncio.sleep(chance.uniform(0, 0.02))
                    await chatdb.append_message(connection, **new, **at)
                stored += 2
            case 1:
                with contextlib.suppress(_Rollback):
                    async with chatdb.transaction(pool) as connection:
                        await chatdb.append_message(connection, **new, **at)
                        await asyncio.sleep(chance.uniform(0, 0.005))
                        raise _Rollback
            case 2:  # statements that start long before they lock the row
                async with chatdb.transaction(pool) as connection:
                    await connection.fetchval("select now()")
                    await asyncio.sleep(chance.uniform(0, 0.02))
                    await chatdb.append_messages(connection, messages=[new, new], **at)
                stored += 2
            case 3 | 4 | 5:
                batch = [{**new, "key": f"{writer} {stored} {place}"} for place in range(chance.randint(1, 5))]
                stored += len(await chatdb.append_messages(pool, messages=batch, **at))
            case number:
                key = f"{writer} {stored}" if number % 2 else None
                await chatdb.append_message(pool, **new, key=key, **at)
                stored += 1
    return stored


async def follow(pool: chatdb.pool.Pool, at: dict[str, Any], limit: int, done: asyncio.Event) -> list[chatdb.Message]:
    """Read on from the last seq until the writers are done and nothing is left."""
    seen: list[chatdb.Message] = []
    while True:
        last = done.is_set()
        page = await chatdb.list_messages(pool, after_seq=seen[-1].seq if seen else 0, limit=limit, **at)
        seen += page
        if last and not page:
            return seen


@pytest.mark.parametrize("writers", [8, 16, 32, 64])
async def test_a_reader_misses_nothing(request, dsn, writers):
    """Two readers beside 8 to 64 writers see every message once, without gaps, in order of commit and time."""
    messages = sized(request, 4_000, 500)
    done = asyncio.Event()
    writing = chatdb.create_pool(dsn, max_size=writers, acquire_timeout=60, command_timeout=60)
    reading = chatdb.create_pool(dsn, max_size=2)
    async with writing, reading:
        conversation = await chatdb.create_conversation(writing, user_id=USER)
        at = {"user_id": USER, "conversation_id": conversation.id}

        async def write_all() -> int:
            counts = await asyncio.gather(
                *(write(writing, writer, at, messages // writers) for writer in range(writers))
            )
            done.set()
            return sum(counts)

        async with asyncio.timeout(HANG):
            stored, *readers = await asyncio.gather(
                write_all(), follow(reading, at, 100, done), follow(reading, at, 3, done)
            )
        everything = [message async for message in chatdb.iter_messages(reading, **at)]
        last = (await chatdb.get_conversation(reading, **at)).last_seq
    missed = sum(len({message.seq for message in everything} - {message.seq for message in seen}) for seen in readers)
    gaps = sum(after.seq != before.seq + 1 for seen in readers for before, after in pairwise(seen))
    inversions = sum(after.created_at < before.created_at for before, after in pairwise(everything))
    figure(
        f"missed: {missed}, gaps: {gaps}, inversions of created_at: {inversions}, "
        f"of {stored:,} messages by {writers} writers"
    )
    assert (missed, gaps, inversions) == (0, 0, 0)
    assert readers == [everything, everything]
    assert len(everything) == last == stored
