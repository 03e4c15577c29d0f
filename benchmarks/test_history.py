"""The history of 100 messages, to be read in less than 100 ms, among 50,000 that are written as traffic writes them."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

import chatdb
from chatdb.pool import Pool
from tests.conftest import database_of, execute

TARGET = 0.100
CONVERSATIONS = 500
MESSAGES = 100
CALLS = 20

pytestmark = pytest.mark.filterwarnings("default::pytest_benchmark.logger.PytestBenchmarkWarning")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """Give one event loop for all calls: making one is not what is measured."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def loaded(server: str, template: str, runner: asyncio.Runner) -> Iterator[tuple[Pool, list[int]]]:
    """Give a pool on a database of 50,000 messages, one of each conversation in turn, and the conversations' ids."""
    name = f"{template}_history"
    execute(server, f"create database {name} template {template}")
    pool = runner.run(_load(database_of(server, name)))
    yield pool
    runner.run(pool[0].close())
    execute(server, f"drop database {name} with (force)")


async def _load(dsn: str) -> tuple[Pool, list[int]]:
    pool = await chatdb.create_pool(dsn)
    created = [await chatdb.create_conversation(pool, user_id=f"user-{n % 50}") for n in range(CONVERSATIONS)]
    text = random.Random(0)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [
        (
            c.user_id,
            c.id,
            seq,
            "user" if seq % 2 else "assistant",
            "word " * text.randint(10, 300),
            start + timedelta(seconds=seq),
        )
        for seq in range(1, MESSAGES + 1)
        for c in created
    ]
    columns = ("user_id", "conversation_id", "seq", "role", "content", "created_at")
    async with pool.acquire() as connection:
        await connection.copy_records_to_table("messages", schema_name="chatdb", columns=columns, records=rows)
        await connection.execute(f"update chatdb.conversations set last_seq = {MESSAGES}")
        await connection.execute("vacuum analyze chatdb.messages, chatdb.conversations")
    return pool, [c.id for c in created]


def test_history_of_100(benchmark, loaded: tuple[Pool, list[int]], runner: asyncio.Runner) -> None:
    """
    20 histories of 100 messages of random conversations, one after another, each under the target at p99.
    """
    pool, ids = loaded
    choose = random.Random(1)
    times: list[float] = []

    async def read() -> None:
        for _ in range(CALLS):
            index = choose.randrange(CONVERSATIONS)
            start = time.perf_counter()
            history = await chatdb.get_history(
                pool, user_id=f"user-{index % 50}", conversation_id=ids[index], limit=MESSAGES
            )
            times.append(time.perf_counter() - start)
            assert len(history) == MESSAGES

    benchmark(lambda: runner.run(read()))
    percentiles = statistics.quantiles(times, n=100)
    benchmark.extra_info["p50_ms"] = round(percentiles[49] * 1000, 3)
    benchmark.extra_info["p99_ms"] = round(percentiles[98] * 1000, 3)
    print(f"\nhistory of 100: p50 {percentiles[49] * 1000:.2f} ms, p99 {percentiles[98] * 1000:.2f} ms")
    assert percentiles[98] < TARGET, f"p99 of a history of 100 is {percentiles[98] * 1000:.1f} ms, the target 100 ms"
