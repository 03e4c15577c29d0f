"""The cost of the history as the table grows from 100 k to 10 M messages, with all sizes side by side."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.contenders import Chatdb
from benchmarks.figures import Figures
from benchmarks.server import LARGE_BUFFERS, BenchServer
from benchmarks.workload import MESSAGES, SIZES, Size

pytestmark = pytest.mark.full

ROUNDS, EACH = 40, 25


@pytest.fixture(scope="module")
def sizes(server: BenchServer, pytestconfig: pytest.Config, figures: Figures) -> Iterator[list[Size]]:
    """Yield the sizes, on a server with the buffers of a dedicated one, filled with messages."""
    largest = SIZES[pytestconfig.getoption("--largest")]
    sizes = [size for size in SIZES.values() if size.messages <= largest.messages]
    for size in sizes:
        server.load(size)
    server.restart(**LARGE_BUFFERS)
    for size in reversed(sizes):
        server.prewarm(size)
    figures.run["sizes"] = [size.name for size in sizes]
    yield sizes
    server.restart()


def test_growth(
    benchmark: Any, server: BenchServer, sizes: list[Size], plain: asyncio.Runner, figures: Figures
) -> None:
    """Read random histories of each size in turns: neither time nor blocks grow with the table."""
    clients = {size: Chatdb(server.dsn(size.database)) for size in sizes}
    chance = random.Random(0)
    times: dict[Size, list[float]] = {size: [] for size in sizes}

    async def block(size: Size) -> None:
        for _ in range(EACH):
            place = size.place(chance.randrange(size.conversations))
            start = time.perf_counter()
            await clients[size].history(place, MESSAGES)
            times[size].append(time.perf_counter() - start)

    turns = itertools.count()

    def one_round() -> None:
        turn = next(turns) % len(sizes)
        for size in sizes[turn:] + sizes[:turn]:
            plain.run(block(size))

    for client in clients.values():
        plain.run(client.open())
        # maps every buffer into the backend's page table, as in a long-lived one; otherwise first accesses cost time
        plain.run(client.pool.fetch("set max_parallel_workers_per_gather = 0"))
        plain.run(client.pool.fetch("select count(*) from chatdb.messages where role = ''", timeout=600))
    for _ in range(4):
        one_round()
    with server.connect() as connection:
        connection.execute("create extension if not exists pg_stat_statements")
        connection.execute("select pg_stat_statements_reset()")
    for series in times.values():
        series.clear()
    benchmark.pedantic(one_round, rounds=ROUNDS)
    for client in clients.values():
        plain.run(client.close())
    with server.connect() as connection:
        found = dict(
            connection.execute(
                "select d.datname, ((shared_blks_hit + shared_blks_read) / calls)::float8 "
                "from pg_stat_statements as s inner join pg_database as d on d.oid = s.dbid "
                "where calls = %s",
                [ROUNDS * EACH],
            ).fetchall()
        )
    figures.grown({size: (times[size], found[size.database]) for size in sizes})
