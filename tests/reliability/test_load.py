"""Many callers for a long time: slow ones starve nobody, and nothing grows."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import chatdb
from chatdb import AcquireTimeoutError, ChatDBError
from tests.support.chaos import OTHERS, assert_whole, figure, outcome, query, sized

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

USER = "ada"
TASKS, SIZE = 500, 4


# --- slow callers ----------------------------------------------------------------------------------------------------


async def test_slow_callers_starve_nobody(request, dsn):
    """Of 500 tasks on 4 connections, some in slow model calls, none overtakes another or waits more than a round."""
    rounds, slow, model = sized(request, 4, 2), 40, 0.2
    tickets, overtakes, waits = itertools.count(), 0, []
    last = -1
    async with chatdb.create_pool(dsn, min_size=SIZE, max_size=SIZE, acquire_timeout=60) as pool:
        conversation = await chatdb.create_conversation(pool, user_id=USER)
        at = {"user_id": USER, "conversation_id": conversation.id}

        async def ask(task: int) -> None:
            nonlocal last, overtakes
            for _ in range(rounds):
                begun, ticket = time.monotonic(), next(tickets)
                if task % 3 == 1:  # the pool's fast path
                    await chatdb.get_history(pool, limit=5, **at)
                    waits.append(time.monotonic() - begun)
                    continue
                async with pool.acquire() as connection:
                    waits.append(time.monotonic() - begun)
                    overtakes += ticket < last
                    last = ticket
                    async with chatdb.transaction(connection):
                        if task < slow:
                            await asyncio.sleep(model)
                        await chatdb.get_history(connection, limit=5, **at)

        begun = time.monotonic()
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for task in range(TASKS):
                group.create_task(ask(task))
        round_trip = (time.monotonic() - begun) / rounds
        await assert_whole(pool, dsn)
    figure(
        f"{TASKS} tasks on {SIZE} connections, {slow} of them slow: overtaken {overtakes} times of {len(waits):,}, "
        f"longest wait {max(waits):.2f} s, where a round of all takes {round_trip:.2f} s"
    )
    assert overtakes == 0
    assert max(waits) <= 1.5 * round_trip + model


async def test_past_the_acquire_timeout_the_error_is_clear(dsn):
    """While slow callers hold every connection, others get AcquireTimeoutError in time, and service afterwards."""
    limit, clock = 0.5, time.monotonic
    async with chatdb.create_pool(dsn, max_size=SIZE, acquire_timeout=limit) as pool:
        call_model, holding = asyncio.Event(), asyncio.Semaphore(0)

        async def hold() -> None:
            async with chatdb.transaction(pool):
                holding.release()
                await call_model.wait()

        async def ask() -> tuple[float, Any]:
            begun = clock()
            answer = await outcome(chatdb.list_conversations(pool, user_id=USER), AcquireTimeoutError)
            return clock() - begun, answer

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(SIZE):
                group.create_task(hold())
            for _ in range(SIZE):
                await holding.acquire()
            answers = await asyncio.gather(*(ask() for _ in range(TASKS - SIZE)))
            call_model.set()
        begun = clock()
        assert await chatdb.list_conversations(pool, user_id=USER) == []
        again = clock() - begun
        await assert_whole(pool, dsn)
    errors = [answer for _, answer in answers if isinstance(answer, AcquireTimeoutError)]
    longest = max(seconds for seconds, _ in answers)
    figure(
        f"{len(errors)} of {TASKS - SIZE} told by AcquireTimeoutError, the last after {longest:.2f} s of {limit:g}; "
        f"service again after {again:.2f} s"
    )
    assert len(errors) == TASKS - SIZE
    assert {(str(error), error.sent) for error in errors} == {
        ("no connection became free within 0.5 s (max_size is 4): release connections sooner or raise max_size", False)
    }
    assert longest <= limit + 1


# --- growth ----------------------------------------------------------------------------------------------------------


class Standing(NamedTuple):
    """Resources in use between two stretches of work."""

    resident: int
    objects: int
    files: int
    tasks: int
    sessions: int
    statements: int
    backend: int
    locks: int
    in_transaction: int


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def standing(pool: chatdb.pool.Pool, dsn: str) -> Standing:
    """Measure everything that could grow; per-backend values are the maximum of all backends."""
    held = [await pool.acquire() for _ in range(pool.get_max_size())]
    statements = [await each.fetchval("select count(*) from pg_prepared_statements") for each in held]
    memory = [await each.fetchval("select sum(total_bytes)::int8 from pg_backend_memory_contexts") for each in held]
    for each in held:
        await pool.release(each)
    del each, held
    gc.collect()
    return Standing(
        resident=resident(),
        objects=len(gc.get_objects()),
        files=len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        tasks=len(asyncio.all_tasks()),
        sessions=query(dsn, f"select count(*) {OTHERS}")[0][0],
        statements=max(statements),
        backend=max(memory),
        locks=query(dsn, f"select count(*) from pg_locks where database is not null and pid in (select pid {OTHERS})")[
            0
        ][0],
        in_transaction=query(dsn, f"select count(*) {OTHERS} and xact_start is not null")[0][0],
    )


async def operate(pool: chatdb.pool.Pool, worker: int, operations: int, conversations: list[int]) -> None:
    """Do what a service does, including errors and cancelled calls."""
    chance = random.Random(worker)
    for number in range(operations):
        at = {"user_id": USER, "conversation_id": chance.choice(conversations)}
        new = {"role": "user", "content": f"{worker} {number} " + "x" * chance.randrange(500)}
        match chance.randrange(100):
            case kind if kind < 30:
                await chatdb.append_message(pool, **new, **at)
            case kind if kind < 45:
                await chatdb.append_message(pool, **new, key=f"{worker} {operations} {number}", **at)
            case kind if kind < 70:
                await chatdb.get_history(pool, limit=20, **at)
            case kind if kind < 78:
                await chatdb.list_messages(pool, after_seq=chance.randrange(100), limit=20, **at)
            case kind if kind < 82:
                await chatdb.list_conversations(pool, user_id=USER)
            case kind if kind < 87:
                await chatdb.append_messages(pool, messages=[new, new], **at)
            case kind if kind < 90:
                async with chatdb.transaction(pool) as connection:
                    await chatdb.append_message(connection, **new, **at)
                    await chatdb.update_conversation(connection, title=f"{number}", **at)
            case kind if kind < 93:
                await outcome(chatdb.update_message(pool, seq=1, token_count=number, **at), ChatDBError)
            case 93 | 94:
                await outcome(chatdb.get_message(pool, seq=1 << 40, **at), ChatDBError)
            case 95 | 96:
                await outcome(chatdb.append_message(pool, **new, key="the same", **at), ChatDBError)
            case 97:
                task = asyncio.create_task(chatdb.get_history(pool, **at))
                await asyncio.sleep(chance.uniform(0, 0.002))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            case 98:
                async for message in chatdb.iter_messages(pool, batch=10, **at):
                    if message.seq > 30:
                        break
            case _:
                found = await chatdb.create_conversation(pool, user_id=USER, key=f"{worker} {number}")
                await chatdb.delete_conversation(pool, user_id=USER, conversation_id=found.id)


async def test_nothing_grows(request, dsn):
    """Over 200,000 operations, memory, files, connections, statements, locks and transactions do not grow."""
    operations, workers, stretches = sized(request, 200_000, 20_000), 16, 4
    seen: list[Standing] = []
    async with chatdb.create_pool(dsn, min_size=8, max_size=8) as pool:
        conversations = [(await chatdb.create_conversation(pool, user_id=USER)).id for _ in range(50)]
        for stretch in range(stretches):
            async with asyncio.timeout(300):
                each = operations // workers // stretches
                await asyncio.gather(
                    *(operate(pool, stretch * workers + worker, each, conversations) for worker in range(workers))
                )
            seen.append(await standing(pool, dsn))
    after, end = seen[0], seen[-1]  # the first stretch is the warm-up
    grown = end.resident - after.resident
    figure(
        f"after {operations:,} operations: {end.resident >> 20} MiB resident, "
        f"{grown / 2**20:+.1f} MiB since the warm-up; "
        f"{end.objects - after.objects:+,} objects, {end.files - after.files:+d} files, "
        f"{end.tasks - after.tasks:+d} tasks, {end.sessions - after.sessions:+d} connections, "
        f"{end.statements - after.statements:+d} prepared statements a backend ({end.statements}), "
        f"{(end.backend - after.backend) / 2**10:+.0f} KiB of a backend's memory; "
        f"{end.locks} locks, {end.in_transaction} open transactions"
    )
    assert grown < 6 << 20
    assert end.objects - after.objects < 3_000
    assert end.backend - after.backend < 1 << 20
    assert end.statements <= after.statements + 2 <= 40
    assert end.files <= after.files
    assert end.tasks == after.tasks
    assert end.sessions == after.sessions == 8
    assert (end.locks, end.in_transaction) == (0, 0)
