"""Spans and metrics of chatdb's calls for OpenTelemetry."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import db_attributes as all_db_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics as all_db_metrics
from opentelemetry.semconv.attributes import db_attributes, error_attributes, server_attributes
from opentelemetry.semconv.metrics import db_metrics
from opentelemetry.trace import SpanKind, StatusCode

import chatdb
from chatdb import telemetry
from chatdb._core.asyncpg_private import listeners_of
from chatdb.telemetry import instrument
from tests.support.calls import CALLS, call, conversation_with_a_message
from tests.support.pools import kill_sessions, loop_errors

ALICE: dict[str, Any] = {"user_id": "alice", "conversation_key": "thread"}


class Told(NamedTuple):
    """What the SDK exports."""

    tracers: TracerProvider
    meters: MeterProvider
    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader

    async def spans(self) -> list[ReadableSpan]:
        """Return the spans since the last call, which are recorded when the loop is free."""
        await asyncio.sleep(0)
        spans = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return spans

    async def metrics(self) -> dict[str, dict[tuple[Any, ...], Any]]:
        """Return the points of each metric by the values of their attributes, and check that the scope is chatdb's."""
        await asyncio.sleep(0)
        data = self.reader.get_metrics_data()
        found = {}
        for scope in data.resource_metrics[0].scope_metrics if data else ():
            assert scope.scope.name == "chatdb"
            for metric in scope.metrics:
                found[metric.name] = {
                    tuple(value for _, value in sorted(point.attributes.items())): point
                    for point in metric.data.data_points
                }
        return found


@pytest.fixture
def told() -> Iterator[Told]:
    """Yield providers that export to memory."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    yield Told(tracers, meters, exporter, reader)
    tracers.shutdown()
    meters.shutdown()


def instrumented(pool: chatdb.Pool, told: Told, name: str | None = None) -> chatdb.Pool:
    """Instrument a pool."""
    instrument(pool, name=name, tracer_provider=told.tracers, meter_provider=told.meters)
    return pool


async def test_each_call_is_a_span(db: chatdb.Pool, told: Told) -> None:
    """Each call is a client span with the name of its function, and no attribute has anything of the user."""
    instrumented(db, told)
    for name, arguments in CALLS:
        await chatdb.delete_user(db, user_id="alice")
        conversation = await conversation_with_a_message(db)
        await told.spans()
        await call(db, name, arguments, conversation)
        called = {"iter_messages": "list_messages"}.get(name, name)
        if name.startswith("update") and arguments.keys() <= {"seq"}:
            called = name.replace("update", "get")
        elif arguments.get("messages") == [] and "create" not in arguments:
            called = "get_conversation"
        for span in await told.spans():
            assert (span.name, span.kind) == (f"chatdb.{called}", SpanKind.CLIENT)
            attributes = dict(span.attributes or {})
            assert not {"alice", "thread", "hello", "first"} & set(map(str, attributes.values()))
            assert attributes["db.system.name"] == "postgresql"
            assert attributes["db.operation.name"] == called
            assert str(attributes["db.query.summary"]).startswith(called)


async def test_the_attributes(dsn: str, told: Told) -> None:
    """A span has the attributes of the semantic conventions, its parent, and the time of the call."""
    async with instrumented(chatdb.create_pool(dsn), told) as db:
        [(host, port)] = db.hosts
        begin = time.time_ns()
        with told.tracers.get_tracer("service").start_as_current_span("request") as request:
            await chatdb.list_conversations(db, user_id="alice", archived=None)
        end = time.time_ns()
        span, parent = sorted(await told.spans(), key=lambda span: span.name)
        assert (parent.name, span.parent) == ("request", request.get_span_context())
        assert span.start_time is not None
        assert span.end_time is not None
        assert begin <= span.start_time < span.end_time <= end
        assert span.status.status_code is StatusCode.UNSET
        assert dict(span.attributes or {}) == {
            "db.system.name": "postgresql",
            "db.namespace": db.database,
            "db.operation.name": "list_conversations",
            "db.query.summary": "list_conversations_all",
            "db.response.returned_rows": 0,
            "server.address": host,
            **({} if port == 5432 else {"server.port": port}),
        }
        assert host in dsn.replace("%2F", "/")


def test_the_names_are_those_of_the_conventions() -> None:
    """Each name is one of OpenTelemetry's conventions, in the spelling of its newest release, or chatdb's own."""
    modules = (db_attributes, all_db_attributes, error_attributes, server_attributes, db_metrics, all_db_metrics)
    known = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    used = set(re.findall(r'"((?:db|server|error)\.[a-z_.]+)"', inspect.getsource(telemetry)))
    assert len(used) > 15
    assert used - known == set()
    stable = {
        value
        for module in (db_attributes, error_attributes, server_attributes, db_metrics)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    assert {name for name in used - stable if not name.startswith("db.client.connection.")} <= {
        "db.client.response.returned_rows",
        "db.response.returned_rows",
    }


async def test_concurrent_calls(db: chatdb.Pool, told: Told) -> None:
    """Each span and each exemplar belongs to the request whose call it measures."""
    instrumented(db, told)
    tracer = told.tracers.get_tracer("service")

    async def request(number: int) -> None:
        with tracer.start_as_current_span(f"request {number}"):
            await (chatdb.list_pinned if number % 2 else chatdb.list_conversations)(db, user_id="alice")

    await asyncio.gather(*map(request, range(6)))
    spans = await told.spans()
    parents = {span.context.span_id: span.name for span in spans if span.context and span.name.startswith("request")}
    calls = [span for span in spans if span.name.startswith("chatdb.")]
    found = sorted((parents[span.parent.span_id], span.name) for span in calls if span.parent)
    assert found == [
        (f"request {number}", f"chatdb.{'list_pinned' if number % 2 else 'list_conversations'}") for number in range(6)
    ]
    points = (await told.metrics())["db.client.operation.duration"]
    measured = {exemplar.span_id for point in points.values() for exemplar in point.exemplars}
    assert measured
    assert measured <= parents.keys()


def test_the_last_call_of_a_loop(dsn: str, told: Told) -> None:
    """The last call that a loop runs has its span too."""

    async def main() -> None:
        db = await instrumented(chatdb.create_pool(dsn), told)
        await chatdb.list_pinned(db, user_id="alice")
        db.terminate()  # without waiting for anything, unlike close()

    asyncio.run(main())
    assert [span.name for span in told.exporter.get_finished_spans()] == ["chatdb.list_pinned"]


async def test_an_error(dsn: str, told: Told) -> None:
    """A failed call has the error's class and the server's code, without its text; a missing conversation is none."""
    async with instrumented(chatdb.create_pool(dsn), told) as db:
        await conversation_with_a_message(db)
        await told.spans()
        with pytest.raises(chatdb.ConversationNotFoundError):
            await chatdb.get_history(db, user_id="bob", conversation_key="thread")
        with pytest.raises(chatdb.ConflictError):
            await chatdb.append_message(db, **ALICE, role="user", content="other", key="first")
        async with chatdb.transaction(db) as other:
            await chatdb.append_message(other, **ALICE, role="user", content="hello")
            await told.spans()
            async with db.acquire() as connection:
                await connection.execute("set statement_timeout = 1")
                with pytest.raises(chatdb.CommandTimeoutError):
                    await chatdb.append_message(connection, **ALICE, role="user", content="hello")
        [span] = await told.spans()
        assert (span.status.status_code, span.status.description, span.events) == (StatusCode.ERROR, None, ())
        attributes = span.attributes or {}
        assert (attributes["error.type"], attributes["db.response.status_code"]) == ("CommandTimeoutError", "57014")
        failed = [
            values
            for values in (await told.metrics())["db.client.operation.duration"]
            if "CommandTimeoutError" in values
        ]
        assert len(failed) == 1
        assert "57014" in failed[0]


async def test_the_metrics(dsn: str, told: Told) -> None:
    """The durations, rows, retries, waits and connections have the names of the semantic conventions."""
    async with instrumented(chatdb.create_pool(dsn, max_size=3), told, "main") as db:
        conversation = await conversation_with_a_message(db)
        for _ in range(3):
            await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
        kill_sessions(dsn)
        await chatdb.list_pinned(db, user_id="alice")
        async with db.acquire():
            found = await told.metrics()
        assert found.keys() == {
            "chatdb.retries",
            "db.client.connection.count",
            "db.client.connection.max",
            "db.client.connection.pending_requests",
            "db.client.connection.wait_time",
            "db.client.operation.duration",
            "db.client.response.returned_rows",
        }
        operations = {values[1]: point for values, point in found["db.client.operation.duration"].items()}
        rows = {values[1]: point for values, point in found["db.client.response.returned_rows"].items()}
        assert operations["get_history"].count == 3
        assert rows["get_history"].sum == 6
        assert 0 < operations["get_history"].sum < 10
        [retries] = found["chatdb.retries"].values()
        assert (retries.value, retries.attributes["db.operation.name"]) == (1, "list_pinned")
        [wait] = found["db.client.connection.wait_time"].values()
        assert wait.count == 1
        assert found["db.client.connection.max"][("main",)].value == 3
        assert found["db.client.connection.pending_requests"][("main",)].value == 0
        counts = {values: point.value for values, point in found["db.client.connection.count"].items()}
        assert counts == {("main", "idle"): 0, ("main", "used"): 1}
    assert (
        "db.client.connection.count" not in (await told.metrics())
        or not (await told.metrics())["db.client.connection.count"]
    )


async def test_two_pools(dsn: str, told: Told) -> None:
    """Each pool of a process reports its connections, until it is closed, without a warning of the SDK."""
    async with instrumented(chatdb.create_pool(dsn, max_size=2), told, "one"):
        async with instrumented(chatdb.create_pool(dsn, max_size=3), told, "two"):
            sizes = {
                values: point.value for values, point in (await told.metrics())["db.client.connection.max"].items()
            }
            assert sizes == {("one",): 2, ("two",): 3}
        assert (await told.metrics())["db.client.connection.max"].keys() == {("one",)}


async def test_the_default_name_of_a_pool(dsn: str, told: Told) -> None:
    """Without a name, a pool is named after its servers and its database, never its user or password."""
    named = "postgresql://alice:secret@one,two:6000/chat?sslmode=disable"
    pool = instrumented(chatdb.create_pool(named), told)
    assert (pool.hosts, pool.database) == ((("one", 5432), ("two", 6000)), "chat")
    assert pool.get_size() == 0
    async with instrumented(chatdb.create_pool(dsn), told) as db:
        names = {values[0] for values in (await told.metrics())["db.client.connection.max"]}
        assert names == {"one:5432,two:6000/chat", f"{db.hosts[0][0]}:{db.hosts[0][1]}/{db.database}"}
        await chatdb.list_pinned(db, user_id="alice")


async def test_misuse(db: chatdb.Pool, told: Told) -> None:
    """What is no pool of chatdb, and a second call, is refused with a sentence."""
    with pytest.raises(chatdb.InvalidInputError, match="pool: must be a pool of create_pool"):
        instrument("postgresql://localhost/chat")  # type: ignore[arg-type]
    instrumented(db, told)
    with pytest.raises(chatdb.ConfigurationError, match="instrumented already"):
        instrumented(db, told)


async def test_without_an_sdk(db: chatdb.Pool) -> None:
    """With OpenTelemetry's API alone, which records nothing, calls work."""
    instrument(db)
    assert await chatdb.list_pinned(db, user_id="alice") == []


async def test_a_pool_is_not_kept_alive(dsn: str, told: Told) -> None:
    """The metrics keep no pool alive that the service has dropped."""
    pool = instrumented(chatdb.create_pool(dsn), told)
    assert (await told.metrics())["db.client.connection.max"]
    del pool
    gc.collect()
    assert not (await told.metrics()).get("db.client.connection.max")


def test_it_is_not_installed() -> None:
    """Without OpenTelemetry, importing chatdb works, and chatdb.telemetry names the command that installs it."""
    program = (
        "import sys; sys.modules['opentelemetry'] = None; import chatdb\n"
        "assert not any(name.startswith('opentelemetry.') for name in sys.modules)\n"
        "try:\n    import chatdb.telemetry\nexcept chatdb.ConfigurationError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "OpenTelemetry is not installed: pip install 'chatdb[telemetry]'\n"


async def test_nothing_is_allocated_without_a_listener(db: chatdb.Pool) -> None:
    """A call on a pool without listeners allocates nothing for them."""
    listeners_of(db)
    tracemalloc.start()
    try:
        for _ in range(100):
            assert listeners_of(db) is None
        assert tracemalloc.get_traced_memory()[1] < 200  # the loop's own
    finally:
        tracemalloc.stop()


class BrokenProcessor(SpanProcessor):
    """A span processor that raises."""

    def on_end(self, span: ReadableSpan) -> None:
        """Raise an error."""
        raise RuntimeError("hello")


class SlowProcessor(SpanProcessor):
    """A span processor that exports in the event loop."""

    def on_end(self, span: ReadableSpan) -> None:
        """Block the event loop."""
        time.sleep(0.02)


async def test_a_span_processor_that_blocks(db: chatdb.Pool, told: Told, caplog: pytest.LogCaptureFixture) -> None:
    """A processor that exports in the event loop is reported once, and the calls succeed."""
    told.tracers.add_span_processor(SlowProcessor())
    instrumented(db, told)
    with caplog.at_level(logging.WARNING, "chatdb"):
        for _ in range(3):
            assert await chatdb.list_pinned(db, user_id="alice") == []
        assert len(await told.spans()) == 3
    [record] = caplog.records
    assert "runs in the event loop" in record.getMessage()


async def test_a_span_processor_that_raises(dsn: str, told: Told, caplog: pytest.LogCaptureFixture) -> None:
    """What the SDK raises reaches no caller and not the event loop; its class is logged once."""
    told.tracers.add_span_processor(BrokenProcessor())
    async with instrumented(chatdb.create_pool(dsn), told) as db:
        with loop_errors() as errors, caplog.at_level(logging.WARNING, "chatdb"):
            for _ in range(3):
                assert await chatdb.list_pinned(db, user_id="alice") == []
            assert len(await told.spans()) == 3
    assert errors == []
    assert [record.getMessage() for record in caplog.records] == [
        "a listener of calls raised RuntimeError; this is logged once"
    ]
