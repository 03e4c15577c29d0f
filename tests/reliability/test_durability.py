"""Servers killed under load: acknowledged messages survive, and keyed messages are stored once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

import pytest

import chatdb
from chatdb import CommandTimeoutError, UnavailableError
from chatdb.embedded.server import EmbeddedServer
from tests.support.chaos import figure, kill_sessions, query, restart, sized, until
from tests.support.databases import execute

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.usefixtures("repetitions")]

USER = "ada"
HANG = 300
WRITERS = 32
STORED = "select conversation_id, seq, content from chatdb.messages"


async def write_under_kills(
    server: EmbeddedServer, dsn: str, *, messages: int, kills: int
) -> dict[tuple[int, int], str]:
    """Write concurrently while the server is killed repeatedly; return the acknowledged messages."""
    acknowledged: dict[tuple[int, int], str] = {}
    done = asyncio.Event()

    async def write(pool: chatdb.pool.Pool, writer: int, conversation_id: int) -> None:
        chance = random.Random(writer)
        at = {"user_id": USER, "conversation_id": conversation_id}
        number = 0
        while not done.is_set():
            size = chance.choice((1, 1, 1, 5, 20))
            batch = [{"role": "user", "content": f"{writer} {number + place}"} for place in range(size)]
            number += size
            try:
                if size == 1:
                    stored = [await chatdb.append_message(pool, **batch[0], **at)]
                else:
                    stored = await chatdb.append_messages(pool, messages=batch, **at)
            except UnavailableError:
                await asyncio.sleep(0.02)
            else:
                acknowledged.update({(conversation_id, message.seq): message.content for message in stored})

    async def kill() -> None:
        for number in range(1, kills + 1):
            await until(lambda number=number: len(acknowledged) >= messages * number / (kills + 1), HANG)
            await asyncio.to_thread(restart, server)
        await until(lambda: len(acknowledged) >= messages, HANG)
        done.set()

    async with chatdb.create_pool(dsn, max_size=16, acquire_timeout=10, command_timeout=10) as pool:
        conversations = [await chatdb.create_conversation(pool, user_id=USER) for _ in range(WRITERS // 2)]
        await pool.execute("checkpoint")  # otherwise the conversations could be lost too without synchronous_commit
        async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
            group.create_task(kill())
            for writer in range(WRITERS):
                group.create_task(write(pool, writer, conversations[writer // 2].id))
    await asyncio.to_thread(restart, server)
    return acknowledged


def lost(dsn: str, acknowledged: dict[tuple[int, int], str]) -> int:
    """Return how many acknowledged messages are not stored at their seq."""
    stored = {(conversation, seq): content for conversation, seq, content in query(dsn, STORED)}
    return sum(stored.get(place) != content for place, content in acknowledged.items())


async def test_no_acknowledged_message_is_lost(request, durable, durable_dsn):
    """After kill -9 of all server processes under load, every returned message is stored at its seq."""
    kills = sized(request, 22, 2)
    settings = {name: query(durable_dsn, f"show {name}")[0][0] for name in ("fsync", "synchronous_commit")}
    assert settings == {"fsync": "on", "synchronous_commit": "on"}
    acknowledged = await write_under_kills(durable, durable_dsn, messages=sized(request, 100_000, 3_000), kills=kills)
    missing = lost(durable_dsn, acknowledged)
    gaps = query(
        durable_dsn,
        "select count(*) from chatdb.conversations c where last_seq <> "
        "(select count(*) from chatdb.messages m where m.user_id = c.user_id and m.conversation_id = c.id)",
    )
    figure(f"acknowledged messages lost: {missing} of {len(acknowledged):,} in {kills + 1} kills")
    assert missing == 0
    assert gaps == [(0,)]


async def test_what_is_lost_without_synchronous_commit(request, durable, durable_dsn):
    """With synchronous_commit=off the same load loses messages, which proves that the test above can fail."""
    kills = sized(request, 6, 1)
    database = urlsplit(durable_dsn).path[1:]
    execute(durable_dsn, f"alter database {database} set synchronous_commit = off")
    # commits can lag by three times this; a longer delay than the default makes a lucky run rare
    execute(durable_dsn, "alter system set wal_writer_delay = '1s'", "select pg_reload_conf()")
    acknowledged = await write_under_kills(durable, durable_dsn, messages=sized(request, 20_000, 3_000), kills=kills)
    missing = lost(durable_dsn, acknowledged)
    execute(durable_dsn, "alter system reset wal_writer_delay", "select pg_reload_conf()")
    figure(f"with synchronous_commit=off, lost: {missing:,} of {len(acknowledged):,} in {kills + 1} kills")
    assert missing > 0


# --- once ------------------------------------------------------------------------------------------------------------


async def append_under_disturbances(
    server: EmbeddedServer, dsn: str, *, messages: int, kills: int, keyed: bool
) -> tuple[Counter[str], Counter[str]]:
    """Append each message until it succeeds, through kills; return what is stored and which failures occurred."""
    troubles: Counter[str] = Counter()
    answers: dict[str, tuple[int, int]] = {}
    numbers = iter(range(messages))

    async def until_stored(
        chance: random.Random, contents: list[str], call: Callable[[], Coroutine[Any, Any, Any]]
    ) -> None:
        while True:
            patience = chance.uniform(0, 0.01) if chance.random() < 0.1 else 60
            task = asyncio.create_task(call())
            try:
                done, _ = await asyncio.wait([task], timeout=patience)
                if not done:
                    task.cancel()
                found = await task
            except asyncio.CancelledError:
                troubles["cancelled"] += 1
            except CommandTimeoutError:
                troubles["timed out"] += 1
            except UnavailableError:
                troubles["lost"] += 1
                await asyncio.sleep(0.02)
            else:
                stored = found if isinstance(found, list) else [found]
                assert [message.content for message in stored] == contents
                answers.update({message.content: (message.conversation_id, message.seq) for message in stored})
                return

    async def write(pools: list[chatdb.pool.Pool], writer: int, conversation_id: int) -> None:
        chance = random.Random(writer)
        at = {"user_id": USER, "conversation_id": conversation_id}
        while contents := [f"{number}" for _, number in zip(range(chance.choice((1, 1, 1, 4))), numbers, strict=False)]:
            batch = [{"role": "user", "content": text, "key": text if keyed else None} for text in contents]

            def call(batch: list[dict[str, Any]] = batch) -> Coroutine[Any, Any, Any]:
                pool = pools[chance.random() < 0.2]
                if len(batch) == 1:
                    return chatdb.append_message(pool, **batch[0], **at)
                return chatdb.append_messages(pool, messages=batch, **at)

            await until_stored(chance, contents, call)

    async def disturb() -> None:
        for number in range(1, 2 * kills + 1):
            await until(lambda number=number: len(answers) >= messages * number / (2 * kills + 1), HANG)
            await (asyncio.to_thread(restart, server) if number % 2 else asyncio.to_thread(kill_sessions, dsn))

    patient = chatdb.create_pool(dsn, max_size=12, command_timeout=10)
    hasty = chatdb.create_pool(dsn, max_size=4, command_timeout=0.02)
    async with patient, hasty:
        conversations = [await chatdb.create_conversation(patient, user_id=USER) for _ in range(WRITERS // 2)]
        async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
            group.create_task(disturb())
            for writer in range(WRITERS):
                group.create_task(write([patient, hasty], writer, conversations[writer // 2].id))
    rows = query(dsn, STORED)
    stored = {(conversation, seq): content for conversation, seq, content in rows}
    assert all(stored[place] == content for content, place in answers.items())
    return Counter(content for _, _, content in rows), troubles


async def test_a_keyed_append_is_applied_once(request, durable, durable_dsn, repetitions):
    """A caller that retries through kills, cancellations and timeouts until success stores each message once."""
    messages, kills = sized(request, 50_000, 2_000), sized(request, 10, 1)
    stored, troubles = await append_under_disturbances(durable, durable_dsn, messages=messages, kills=kills, keyed=True)
    doubled = sum(count > 1 for count in stored.values())
    missing = messages - len(stored)
    met = ", ".join(f"{count:,} {name}" for name, count in sorted(troubles.items()))
    figure(
        f"keyed appends doubled: {doubled}, missing: {missing} of {messages:,}; attempts that failed: {met}; "
        f"repeated by chatdb itself: {len(repetitions):,}"
    )
    assert (doubled, missing) == (0, 0)
    assert {"cancelled", "lost", "timed out"} <= set(troubles)


async def test_without_keys_the_same_caller_doubles(request, durable, durable_dsn):
    """Blind retries without a key store messages twice, which proves that the test above can fail."""
    messages = sized(request, 10_000, 1_000)
    stored, _ = await append_under_disturbances(durable, durable_dsn, messages=messages, kills=1, keyed=False)
    doubled = sum(count > 1 for count in stored.values())
    figure(f"without keys, doubled: {doubled:,} of {messages:,}")
    assert doubled > 0
    assert len(stored) == messages
