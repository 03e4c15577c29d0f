"""chatdb's calls in tracing tools and in the server's statistics."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator

import asyncpg
import pytest
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pglast import parse_sql

import chatdb
from chatdb._core.query import STATEMENTS
from chatdb.transfer.exporter import export_conversations
from tests.support.calls import CALLS, VARIANTS, call, conversation_with_a_message


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """Enable OpenTelemetry for asyncpg after chatdb's import, and yield the exporter."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    AsyncPGInstrumentor().instrument(tracer_provider=provider)
    yield exporter
    AsyncPGInstrumentor().uninstrument()
    provider.shutdown()


def taken(spans: InMemorySpanExporter) -> list[str]:
    """Return the names of the spans since the last call, and clear them."""
    names = [span.name for span in spans.get_finished_spans()]
    spans.clear()
    return names


@pytest.mark.parametrize("lent", [False, True], ids=["pool", "transaction"])
async def test_each_call_is_a_span_of_its_name(dsn: str, spans: InMemorySpanExporter, lent: bool) -> None:
    """OpenTelemetry records one span per call, named after the function, on a pool and on a connection."""
    async with chatdb.create_pool(dsn) as db:
        for name, arguments in CALLS:
            await chatdb.delete_user(db, user_id="alice")
            conversation = await conversation_with_a_message(db)
            taken(spans)
            if lent:
                async with chatdb.transaction(db) as connection:
                    await call(connection, name, arguments, conversation)
            else:
                await call(db, name, arguments, conversation)
            called = "list_messages" if name == "iter_messages" else name
            if name.startswith("update") and arguments.keys() <= {"seq"}:
                called = name.replace("update", "get")
            elif arguments.get("messages") == [] and "create" not in arguments:
                called = "get_conversation"
            begin, names, end = (["BEGIN;"], taken(spans)[1:-1], ["commit"]) if lent else ([], taken(spans), [])
            if name == "export_user":
                assert names.pop() == "--chatdb.export_user_messages"
            assert len(names) == 1, (begin, end)
            assert names[0] in {f"--chatdb.{called}{variant}" for variant in VARIANTS}
        await chatdb.check_schema(db)
        assert taken(spans) == ["--chatdb.check_schema"]
        async for _ in export_conversations(db, user_id="alice"):
            pass
        assert "--chatdb.export_user" in taken(spans)


async def test_a_span_has_its_error(dsn: str, spans: InMemorySpanExporter) -> None:
    """A failed statement is a span with status ERROR, and the connection stays usable."""
    async with chatdb.create_pool(dsn, max_size=1) as db:
        with pytest.raises(Exception, match="division by zero"):
            await db.fetch("select 1/0")
        assert [span.status.status_code.name for span in spans.get_finished_spans()] == ["ERROR"]
        assert await db.fetch("select 1")


EARLY = """
import asyncio, sys
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=lambda span: span.name + "\\n")))
AsyncPGInstrumentor().instrument(tracer_provider=provider)
import chatdb

async def main():
    async with chatdb.create_pool(sys.argv[1]) as db:
        await chatdb.list_conversations(db, user_id="alice")
        async with db.acquire() as connection:
            await chatdb.list_conversations(connection, user_id="alice")
        AsyncPGInstrumentor().uninstrument()
        await chatdb.list_conversations(db, user_id="alice")
        async with db.acquire() as connection:
            await chatdb.list_conversations(connection, user_id="alice")

asyncio.run(main())
"""


def test_tracing_from_the_start(dsn: str) -> None:
    """Tracing that is enabled before chatdb's import records calls until it is disabled."""
    done = subprocess.run([sys.executable, "-c", EARLY, dsn], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--chatdb.list_conversations"] * 2


async def test_a_tool_that_wraps_what_asyncpg_executes(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that wraps asyncpg's private method sees each call from then on, prepared statements included."""
    async with chatdb.create_pool(dsn, max_size=1) as db:
        await chatdb.list_conversations(db, user_id="alice")
        seen: list[str] = []
        execute = asyncpg.Connection._execute  # type: ignore[attr-defined]

        def wrapped(self: object, query: str, *args: object, **options: object) -> object:
            seen.append(query.partition("\n")[0])
            return execute(self, query, *args, **options)

        monkeypatch.setattr(asyncpg.Connection, "_execute", wrapped)
        await chatdb.list_conversations(db, user_id="alice")
        await chatdb.list_conversations(db, user_id="alice")
        assert seen == ["--chatdb.list_conversations"] * 2


async def test_a_query_logger_gets_each_call(dsn: str) -> None:
    """A logger of queries that a program adds to a pool's connection gets each call of chatdb."""
    logged: list[str] = []
    async with chatdb.create_pool(dsn, max_size=1) as db:
        await chatdb.list_conversations(db, user_id="alice")
        for holder in db._holders:  # type: ignore[attr-defined]
            holder._con.add_query_logger(lambda query: logged.append(query.query.partition("\n")[0]))
        await chatdb.list_conversations(db, user_id="alice")
        await chatdb.list_conversations(db, user_id="alice")
        await asyncio.sleep(0)
        assert logged == ["--chatdb.list_conversations"] * 2


def test_the_statistics_name_the_function() -> None:
    """From PostgreSQL 18 on, pg_stat_statements drops a leading comment; the remaining text also names the function."""
    for sql in STATEMENTS:
        name, is_named = sql.partition("\n")[0].removeprefix("--"), sql.startswith("--chatdb.")
        [statement] = parse_sql(sql)
        text = sql[statement.stmt_location :]
        if is_named:
            assert re.search(rf"/\* {name}( on a replica)? \*/", text[:70])
        else:  # those of row-level security and of hints
            assert "chatdb.user_id" in text or "pg_notify" in text


async def test_the_sessions_have_a_name(dsn: str) -> None:
    """The sessions of a pool and of a watcher say so in pg_stat_activity, unless the DSN or an option names them."""
    others = (
        "select application_name from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    )
    async with chatdb.create_pool(dsn) as db, chatdb.Watcher(db, listen_dsn=dsn):
        assert await db.fetchval("select current_setting('application_name')") == "chatdb"
        assert "chatdb watcher" in [row[0] for row in await db.fetch(others)]
    for named in (
        chatdb.create_pool(f"{dsn}&application_name=support"),
        chatdb.create_pool(dsn, server_settings={"application_name": "support"}),
    ):
        async with named as db:
            await db.execute("set application_name = other")
            assert await db.fetchval("select current_setting('application_name')") == "support"  # after a reset


@pytest.mark.owner
async def test_the_names_in_the_servers_statistics(dsn: str) -> None:
    """pg_stat_activity shows the name of a statement that runs, at the beginning."""
    async with chatdb.create_pool(dsn, max_size=1) as db:
        await chatdb.list_conversations(db, user_id="alice")
        async with chatdb.create_pool(dsn) as other:
            [row] = await other.fetch(
                "select query from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            )
    assert row["query"].startswith("--chatdb.list_conversations\n")
