"""The operations of chatdb and its alternatives, side by side in one run."""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

import chatdb
import chatdb.telemetry
from benchmarks.contenders import HISTORY, Chatdb, Contender, Keyed, Original, Psycopg, RawAsyncpg
from benchmarks.figures import JUDGED, Figures
from benchmarks.gates import OPERATIONS
from benchmarks.operations import TEXT, append_on, call_of, mixed_of
from benchmarks.proxy import far
from benchmarks.rounds import interleave
from benchmarks.server import BenchServer
from benchmarks.workload import Size
from chatdb._core import asyncpg_private
from chatdb._core.dsn import connect_arguments
from chatdb._core.hints import CHANNEL
from chatdb.admin.migrate import apply_migrations
from tests.support.embedded import temporary_server
from tests.support.replication import replica_of

pytestmark = pytest.mark.full

ROUNDS = {
    "history_100": (120, 20),
    "last_20": (80, 25),
    "turn": (120, 15),
    "append": (80, 25),
    "list_20": (80, 25),
    "create_first": (80, 20),
    "whole_10000": (15, 1),
    "delete": (20, 3),
    "list_20_busy": (20, 10),
}
"""Rounds and calls per round that differ from 40 and 25. Operations close to their gate have more."""

KEYED = {"append_keyed", "append_again", "get_or_create"}
"""Operations that only chatdb offers. Raw asyncpg runs a bare statement for comparison."""


@pytest.fixture(scope="module")
def everyone(copy: str, runner: asyncio.Runner, size: Size) -> Iterator[list[Contender]]:
    """Yield all clients, each with one connection."""
    kinds = [RawAsyncpg, Chatdb, Psycopg, *([Original] if size.has_original else [])]
    made = [kind(copy) for kind in kinds]
    for each in made:
        runner.run(each.open())
    yield made
    for each in made:
        runner.run(each.close())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(
    benchmark: Any,
    operation: str,
    everyone: list[Contender],
    size: Size,
    loop: str,
    runner: asyncio.Runner,
    figures: Figures,
) -> None:
    """Time each operation with all clients, in interleaved rounds."""
    able = [each for each in everyone if isinstance(each, Keyed) or operation not in KEYED]
    if operation == "page_middle":
        able = [each for each in able if not isinstance(each, Original)]  # the original has no pages
    calls = {each.name: call_of(operation, each, size) for each in able}
    rounds, each = ROUNDS.get(operation, (40, 25))
    figures.timed(operation, loop, interleave(benchmark, runner, calls, rounds=rounds, each=each))


@pytest.mark.parametrize("operation", ["append", "turn"])
def test_operation_far(
    benchmark: Any, operation: str, copy: str, size: Size, loop: str, runner: asyncio.Runner, figures: Figures
) -> None:
    """Time an append with 1 ms round trips, which dominate the time."""
    with far(copy, 0.001) as dsn:
        made = [Chatdb(dsn), Original(dsn)]
        for each in made:
            runner.run(each.open())
        calls = {each.name: call_of(operation, each, size) for each in made}
        figures.timed(f"{operation}_far", loop, interleave(benchmark, runner, calls, rounds=10, each=10))
        for each in made:
            runner.run(each.close())


def test_append_create(
    benchmark: Any, copy: str, size: Size, loop: str, runner: asyncio.Runner, figures: Figures
) -> None:
    """Time an append with create=True beside one without, to the same conversations."""
    client = Chatdb(copy)
    runner.run(client.open())
    calls = {"chatdb": call_of("append_create", client, size), "without": append_on(client, size)}
    times = interleave(benchmark, runner, calls, rounds=80, each=25)
    if loop == JUDGED:
        ratio = statistics.median(times["chatdb"]) / statistics.median(times["without"])
        figures.worst("append_create.to_append", ratio)
    runner.run(client.close())


def test_branch(benchmark: Any, copy: str, size: Size, loop: str, runner: asyncio.Runner, figures: Figures) -> None:
    """Time get_branch beside get_history, on conversations without branches."""
    client = Chatdb(copy)
    runner.run(client.open())
    calls = {"chatdb": call_of("branch_100", client, size), "history": call_of("history_100", client, size)}
    times = interleave(benchmark, runner, calls, rounds=400, each=10)
    if loop == JUDGED:
        figures.worst("branch_100.to_history", statistics.median(times["chatdb"]) / statistics.median(times["history"]))
    runner.run(client.close())


def test_telemetry(benchmark: Any, copy: str, size: Size, loop: str, runner: asyncio.Runner, figures: Figures) -> None:
    """Time histories with spans and metrics beside some without, and what a pool without listeners asks for them."""
    with _instrumented(copy, 1, runner) as (client, spans):
        history = call_of("history_100_hot", client, size)
        listeners = client.pool.call_listeners
        late: list[int] = []

        async def several() -> None:
            for _ in range(20):
                await history()
            await asyncio.sleep(0)  # the spans are made when the loop has nothing to resume

        async def with_spans() -> None:
            before, client.pool.call_listeners = spans.ended, listeners
            await several()
            late.append(before + 20 - spans.ended)

        async def without_spans() -> None:
            client.pool.call_listeners = None
            await several()

        times = interleave(benchmark, runner, {"chatdb": with_spans, "without": without_spans}, rounds=300, each=1)
        lookup = min(timeit.repeat(lambda: asyncpg_private.listeners_of(client.pool), number=10_000, repeat=9)) / 10_000
        if loop == JUDGED:
            without = statistics.median(times["without"])
            figures.worst("telemetry.to_without", statistics.median(times["chatdb"]) / without)
            figures.worst("telemetry.late", max(late))
            figures.worst("telemetry.unused", 100 * lookup / (without / 20))


def test_telemetry_load(
    benchmark: Any, copy: str, size: Size, loop: str, runner: asyncio.Runner, figures: Figures
) -> None:
    """Run 16 tasks, which leave the event loop no time to spare, with spans and metrics and without."""
    with _instrumented(copy, 16, runner) as (client, _):
        history = call_of("history_100_hot", client, size)
        rates: dict[str, list[float]] = {"chatdb": [], "without": []}
        listeners = {"chatdb": client.pool.call_listeners, "without": None}

        async def work() -> None:
            for _ in range(30):
                await history()

        async def together(name: str) -> None:
            client.pool.call_listeners = listeners[name]
            start = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(16)))
            rates[name].append(16 * 30 / (time.perf_counter() - start))

        benchmark.pedantic(
            lambda: runner.run(together("chatdb")),
            setup=lambda: runner.run(together("without")),
            rounds=20,
            warmup_rounds=2,
        )
        if loop == JUDGED:
            title = "16 tasks, history of 100, with and without spans and metrics"
            figures.beside("telemetry", title, {name: series[2:] for name, series in rates.items()})


@pytest.fixture(scope="module")
def replicated() -> Iterator[tuple[str, str]]:
    """Yield the DSNs of a migrated primary and of a replica of it."""
    with temporary_server() as server:
        apply_migrations(server.dsn)
        with replica_of(server) as replica:
            yield server.dsn, replica.dsn


def test_reader(
    benchmark: Any, copy: str, replicated: tuple[str, str], loop: str, runner: asyncio.Runner, figures: Figures
) -> None:
    """Time a history that a reader gets from a replica beside a pool on the replica."""
    primary, replica = replicated
    pool, direct = chatdb.create_pool(primary, replicas=[replica]), chatdb.create_pool(replica)
    messages = [{"role": "user", "content": TEXT} for _ in range(100)]

    async def prepare() -> dict[str, Any]:
        await pool
        await direct
        made = await chatdb.create_conversation(pool, user_id="reader", messages=messages)
        at = {"user_id": "reader", "conversation_id": made.id}
        async with asyncio.timeout(30):
            while not pool.replica_states()[0].answered:
                await asyncio.sleep(0.05)
                await chatdb.get_history(reader, **at)
        return at

    reader = pool.reader()
    at = runner.run(prepare())
    calls = {
        "chatdb": lambda: chatdb.get_history(reader, **at),
        "direct": lambda: chatdb.get_history(direct, **at),
    }
    times = interleave(benchmark, runner, calls, rounds=400, each=10)
    assert pool.replica_states()[0].answered > 4_000
    if loop == JUDGED:
        figures.worst("reader.to_history", statistics.median(times["chatdb"]) / statistics.median(times["direct"]))
    for each in (pool, direct):
        runner.run(each.close())


class _Nowhere(SpanExporter):
    """An exporter that drops the spans, because a real one works in another thread or process."""

    def export(self, spans: object) -> SpanExportResult:
        """Drop the spans."""
        return SpanExportResult.SUCCESS


class _Counting(BatchSpanProcessor):
    """A processor that counts the spans."""

    def __init__(self) -> None:
        super().__init__(_Nowhere())
        self.ended = 0

    def on_end(self, span: ReadableSpan) -> None:
        """Count a span."""
        self.ended += 1
        super().on_end(span)


@contextmanager
def _instrumented(dsn: str, connections: int, runner: asyncio.Runner) -> Iterator[tuple[Chatdb, _Counting]]:
    """
    Yield a client that OpenTelemetry's SDK hears of, and the processor that counts its spans.

    Without its listeners, the same client shows the time without them, on the same connections: two processes of the
    server differ by as much as the spans take.
    """
    tracers, meters, spans = TracerProvider(), MeterProvider([InMemoryMetricReader()]), _Counting()
    tracers.add_span_processor(spans)
    client = Chatdb(dsn, connections)
    runner.run(client.open())
    chatdb.telemetry.instrument(client.pool, tracer_provider=tracers, meter_provider=meters)
    yield client, spans
    runner.run(client.close())
    tracers.shutdown()
    meters.shutdown()


@pytest.mark.parametrize("tasks", [16, 64])
def test_mixed_load(
    benchmark: Any, tasks: int, copy: str, size: Size, loop: str, runner: asyncio.Runner, figures: Figures
) -> None:
    """Run tasks with 80 % reads of a history and 20 % appends; raw asyncpg has a connection per task, the others 16."""
    made: list[Contender] = [RawAsyncpg(copy, tasks), Chatdb(copy, 16), Original(copy, 16)]
    rates: dict[str, list[float]] = {each.name: [] for each in made}
    works = {each.name: mixed_of(each, size) for each in made}
    each_task = 480 // tasks

    def round_of(client: Contender) -> None:
        async def together() -> None:
            await asyncio.gather(*(works[client.name](lane, each_task) for lane in range(tasks)))

        start = time.perf_counter()
        runner.run(together())
        rates[client.name].append(tasks * each_task / (time.perf_counter() - start))

    for client in made:
        runner.run(client.open())
    raw, ours, theirs = made
    turns = iter(range(100))

    def others() -> None:
        for client in (raw, theirs) if next(turns) % 2 else (theirs, raw):
            round_of(client)

    benchmark.pedantic(lambda: round_of(ours), setup=others, rounds=12, warmup_rounds=2)
    for client in made:
        runner.run(client.close())
    figures.throughput(f"mixed_{tasks}", loop, {name: series[2:] for name, series in rates.items()})


WRITERS = 16


def test_hints(benchmark: Any, server: BenchServer, copy: str, size: Size, figures: Figures) -> None:
    """Append with 16 writers, with hints that a connection hears and without, on a server that flushes each commit."""
    with server.connect() as connection:
        for name in ("fsync", "synchronous_commit"):
            assert connection.execute(f"show {name}").fetchone() == ("on",)
    rates: dict[str, list[float]] = {"chatdb": [], "without": []}
    heard: list[object] = []
    places = iter(range(10**6))

    async def write(pool: chatdb.Pool) -> None:
        for _ in range(25):
            place = size.place(next(places) % (size.conversations * 2 // 3))
            await chatdb.append_message(
                pool, user_id=place.user_id, conversation_id=place.id, role="user", content=TEXT
            )

    with asyncio.Runner() as runner:
        pools = {
            name: runner.run(_opened(copy, notify=name == "chatdb", min_size=WRITERS, max_size=WRITERS))
            for name in rates
        }
        listener = runner.run(asyncpg.connect(**connect_arguments(copy)))
        runner.run(listener.add_listener(CHANNEL, lambda *arguments: heard.append(arguments)))

        def round_of(name: str) -> None:
            async def together() -> None:
                await asyncio.gather(*(write(pools[name]) for _ in range(WRITERS)))

            start = time.perf_counter()
            runner.run(together())
            rates[name].append(WRITERS * 25 / (time.perf_counter() - start))

        benchmark.pedantic(lambda: round_of("chatdb"), setup=lambda: round_of("without"), rounds=30, warmup_rounds=2)
        assert heard
        runner.run(listener.close())
        for pool in pools.values():
            runner.run(pool.close())
    title = "16 writers, appends, with and without hints"
    figures.beside("hints", title, {name: series[2:] for name, series in rates.items()})


async def _opened(dsn: str, **options: Any) -> chatdb.Pool:
    return await chatdb.create_pool(dsn, **options)


@pytest.mark.parametrize(("operation", "poll"), [("watch_hints", 2.0), ("watch_polls", 0.5)])
def test_watch(copy: str, size: Size, figures: Figures, operation: str, poll: float) -> None:
    """Measure the time from an append until each of 200 watchers has its message, one append every 20 ms or so."""
    sent: dict[int, float] = {}
    times: list[float] = []

    async def watch(watcher: chatdb.Watcher, number: int, last_seq: int) -> None:
        place = size.place(number)
        async for _ in watcher.watch(user_id=place.user_id, conversation_id=place.id, after_seq=last_seq):
            times.append(time.perf_counter() - sent[number])
            return

    async def run() -> None:
        is_hinted = operation == "watch_hints"
        async with (
            chatdb.create_pool(copy, max_size=8, notify=is_hinted) as pool,
            chatdb.Watcher(pool, listen_dsn=copy if is_hinted else None, poll=poll) as watcher,
        ):
            places = [size.place(number) for number in range(WATCHERS)]
            stored = [
                await chatdb.get_conversation(pool, user_id=place.user_id, conversation_id=place.id) for place in places
            ]
            tasks = [
                asyncio.create_task(watch(watcher, number, conversation.last_seq))
                for number, conversation in enumerate(stored)
            ]
            await asyncio.sleep(2 * poll)
            for number, place in enumerate(places):
                sent[number] = time.perf_counter()
                await chatdb.append_message(
                    pool, user_id=place.user_id, conversation_id=place.id, role="user", content=TEXT
                )
                await asyncio.sleep(0.02)
            await asyncio.gather(*tasks)

    asyncio.run(run())
    figures.timed(operation, JUDGED, {"chatdb": times})


WATCHERS = 200


def test_floor(server: BenchServer, copy: str, size: Size, tmp_path: Path, figures: Figures) -> None:
    """
    Time the server alone: pgbench runs the same prepared statement and creates no objects from the rows.
    """
    with server.connect("bench_run") as connection:
        connection.execute("create table public.places (n int primary key, u text, i bigint)")
        with connection.cursor().copy("copy public.places from stdin") as rows:
            for number in range(size.conversations * 2 // 3):
                rows.write_row((number, size.place(number).user_id, size.place(number).id))
    statement = (
        HISTORY.replace("$1", ":u").replace("$2", ":i").replace("$3", "9223372036854775807").replace("$4", "100")
    )
    script = tmp_path / "history.sql"
    script.write_text(
        f"\\set n random(0, {size.conversations * 2 // 3 - 1})\n"
        f"select u, i from public.places where n = :n \\gset\n{statement};\n"
    )
    command = [server.programs / "pgbench", "-n", "-M", "prepared", "-r", "-t", "3000", "-f", script, copy]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (mean,) = map(float, re.findall(r"^ +([\d.]+) +\d+ +select id,", done.stdout, re.MULTILINE))
    figures.run["floor"] = {"mean_us": mean * 1000, "text": "pgbench, 1 client, raw asyncpg's prepared statement"}
