"""The history of 100 where it might exceed 100 ms: a large table, load, a cold disk, a distant server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.contenders import Chatdb
from benchmarks.figures import Figures
from benchmarks.proxy import far
from benchmarks.server import LARGE_BUFFERS, BenchServer
from benchmarks.workload import MESSAGES, SIZES, Size

CALLS = 200
TASKS, CONNECTIONS = 64, 16
LARGE = "10m"


@pytest.fixture(scope="module", params=["main", pytest.param(LARGE, marks=pytest.mark.full)])
def at(request: pytest.FixtureRequest, pytestconfig: pytest.Config, size: Size, server: BenchServer) -> Iterator[Size]:
    """Yield the size of the run, then the largest one."""
    if request.param == LARGE and pytestconfig.getoption("--largest") != LARGE:
        pytest.skip("--largest excludes this size")
    chosen = SIZES[LARGE] if request.param == LARGE else size
    server.load(chosen)
    server.restart(**(LARGE_BUFFERS if request.param == LARGE else {}))
    server.prewarm(chosen)
    yield chosen
    server.restart()


async def _read(client: Chatdb, size: Size, chance: random.Random, times: int) -> list[float]:
    """Read random histories one after another, and return the time of each."""
    taken = []
    for _ in range(times):
        place = size.place(chance.randrange(size.conversations))
        start = time.perf_counter()
        history = await client.history(place, MESSAGES)
        taken.append(time.perf_counter() - start)
        assert len(history) == MESSAGES
    return taken


def _measured(benchmark: Any, runner: asyncio.Runner, dsn: str, size: Size, *, tasks: int = 1) -> list[list[float]]:
    """Return the times of all tasks' reads by round, without the warm-up round."""
    client = Chatdb(dsn, CONNECTIONS if tasks > 1 else 1)
    chance = random.Random(f"{size} {tasks}")
    rounds: list[list[float]] = []

    async def together() -> None:
        each = max(10, CALLS // tasks)
        series = await asyncio.gather(*(_read(client, size, chance, each) for _ in range(tasks)))
        rounds.append([time for times in series for time in times])

    runner.run(client.open())
    benchmark.pedantic(lambda: runner.run(together()), rounds=5, warmup_rounds=1)
    runner.run(client.close())
    return rounds[1:]


def _name(size: Size, place: str) -> tuple[str, str]:
    return (f"large_{place}" if place != "warm" else "large", "10 M messages, ") if size.name == LARGE else (place, "")


def test_warm(benchmark: Any, server: BenchServer, at: Size, plain: asyncio.Runner, figures: Figures) -> None:
    """Read random conversations one after another."""
    name, where = _name(at, "warm")
    times = _measured(benchmark, plain, server.dsn(at.database), at)
    figures.place(name, f"{where}warm", times)


def test_tasks(benchmark: Any, server: BenchServer, at: Size, plain: asyncio.Runner, figures: Figures) -> None:
    """Read with 64 tasks on a pool of 16; the times include the wait for a connection."""
    name, where = _name(at, "tasks")
    times = _measured(benchmark, plain, server.dsn(at.database), at, tasks=TASKS)
    figures.place(name, f"{where}64 tasks on a pool of 16", times)


@pytest.mark.parametrize(("place", "away"), [("near", 1), ("far", 10)])
def test_far(
    benchmark: Any, place: str, away: int, server: BenchServer, at: Size, plain: asyncio.Runner, figures: Figures
) -> None:
    """Read with round trips of 1 ms and 10 ms."""
    name, where = _name(at, place)
    with far(server.dsn(at.database), away / 1000) as dsn:
        times = _measured(benchmark, plain, dsn, at)
    figures.place(name, f"{where}{away} ms round trip", times)


def test_cold(benchmark: Any, server: BenchServer, at: Size, plain: asyncio.Runner, figures: Figures) -> None:
    """Read after a restart, with the server's files dropped from the kernel's cache: each history comes from disk."""
    name, where = _name(at, "cold")
    chance = random.Random(str(at))
    client = Chatdb(server.dsn(at.database))
    reads = 20 if at.messages < 1_000_000 else 50  # few reads, so that they rarely hit pages cached by earlier ones
    times: list[float] = []

    def restarted() -> None:
        server.restart(cold=True, **(LARGE_BUFFERS if at.name == LARGE else {}))
        plain.run(client.open())

    def read() -> None:
        times.extend(plain.run(_read(client, at, chance, reads)))
        plain.run(client.close())

    benchmark.pedantic(read, setup=restarted, rounds=5)
    figures.place(name, f"{where}cold", [times])
