"""Counts without noise: statements, round trips, buffers, WAL, plans and HOT updates."""

from __future__ import annotations

import asyncio
import base64
import random
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql

import chatdb
from benchmarks.contenders import Chatdb
from benchmarks.figures import Figures
from benchmarks.gates import COUNTED, WAL
from benchmarks.operations import call_of
from benchmarks.plans import PLANS, nodes
from benchmarks.server import BenchServer
from benchmarks.workload import FLUSH, FLUSHES, START, STREAMED, YEAR, Size
from chatdb._core.query import Query
from chatdb.messages import _append_message, _append_messages_two
from tests.support.proxy import Proxy

CALLS = 100

GROWING = {"append", "turn", "append_keyed", "create_first"}
"""Operations that add an entry to each index of the conversations."""


@pytest.fixture(scope="module")
def counter(server: BenchServer, copy: str) -> Iterator[psycopg.Connection]:
    """Yield a separate connection that reads the server's counters."""
    with psycopg.connect(copy, autocommit=True) as connection:
        connection.execute("create extension if not exists pg_stat_statements")
        connection.execute("create extension if not exists pg_walinspect")
        # otherwise the first change of a page after a checkpoint writes the whole page, and WAL counts vary
        with server.setting("full_page_writes", "off"):
            yield connection


@pytest.fixture(scope="module")
def proxied(copy: str, plain: asyncio.Runner) -> Iterator[tuple[Proxy, Chatdb]]:
    """Yield chatdb with one connection through a proxy that counts round trips."""
    proxy = Proxy(copy)
    contender = Chatdb(proxy.dsn)
    plain.run(contender.open())
    yield proxy, contender
    plain.run(contender.close())
    proxy.close()


@pytest.mark.parametrize("operation", COUNTED)
def test_counts(
    operation: str,
    size: Size,
    plain: asyncio.Runner,
    proxied: tuple[Proxy, Chatdb],
    counter: psycopg.Connection,
    figures: Figures,
) -> None:
    """
    Each operation takes one statement and one round trip, and touches no more blocks than its gate allows.

    WAL is counted without the splits of index pages, which have a gate of their own: a split takes 4 kB, and whether
    100 calls make two or seven depends on what ran before them.
    """
    proxy, contender = proxied
    call = call_of(operation, contender, size)

    async def repeat(times: int) -> None:
        for _ in range(times):
            await call()

    plain.run(repeat(CALLS // 5))  # prepares the statement, makes its plan generic, and writes most pages once
    (start,) = counter.execute("select pg_current_wal_insert_lsn()").fetchone()
    counter.execute("select pg_stat_statements_reset()")
    before = proxy.round_trips
    plain.run(repeat(CALLS))
    trips = (proxy.round_trips - before) / CALLS
    statements, buffers, wal, end = counter.execute(
        "select sum(calls)::float8, sum(shared_blks_hit + shared_blks_read)::float8, "
        "sum(wal_bytes)::float8, pg_current_wal_insert_lsn() from pg_stat_statements "
        "where dbid = (select oid from pg_database where datname = current_database()) "
        "and query not like '%pg_stat_statements%'"
    ).fetchone()
    splits, written = counter.execute(_SPLITS, [start, end]).fetchone() if operation in WAL else (0, 0)
    if operation in GROWING:
        figures.worst("index.splits", splits / CALLS)
    figures.counted(operation, statements / CALLS, trips, buffers / CALLS, (wal - written) / CALLS)


_SPLITS = """
    select coalesce(sum(count), 0)::int8, coalesce(sum(combined_size), 0)::float8
    from pg_get_wal_stats(%s, %s, per_record => true)
    where "resource_manager/record_type" like 'Btree/SPLIT%%'
"""


def test_extend(
    size: Size, plain: asyncio.Runner, proxied: tuple[Proxy, Chatdb], counter: psycopg.Connection, figures: Figures
) -> None:
    """
    A flush reads and writes few blocks, and neither writes to the conversation's row nor locks it.

    The blocks are evicted before each flush, so that each that it touches is read once. `test_counts` also counts those
    that it touches again: the message is locked for the statement and for the foreign key.
    """
    call = call_of("extend", proxied[1], size)
    rows = sql.SQL("select ctid, xmin, xmax from chatdb.conversations where user_id = {} order by id").format(
        sql.Literal(size.streaming)
    )
    counter.execute("create extension if not exists pg_buffercache")
    before = counter.execute(rows).fetchall()
    plain.run(call())
    counter.execute("select pg_stat_statements_reset()")
    for _ in range(CALLS):
        counter.execute("select pg_buffercache_evict_all()")
        plain.run(call())
    (blocks,) = counter.execute(
        "select shared_blks_read / calls::float8 from pg_stat_statements "
        "where query like '%/* chatdb.extend_message */%'"
    ).fetchone()
    figures.worst("extend.blocks", blocks)
    changed = sum(row != old for row, old in zip(counter.execute(rows).fetchall(), before, strict=True))
    figures.worst("extend.conversations", changed)


@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("after_checkpoint", [False, True])
def test_stream_wal(
    is_random: bool,
    after_checkpoint: bool,
    size: Size,
    plain: asyncio.Runner,
    proxied: tuple[Proxy, Chatdb],
    counter: psycopg.Connection,
    server: BenchServer,
    figures: Figures,
) -> None:
    """A message of 100 kB in 100 flushes writes little more WAL than its text, its parts and its final row need."""
    proxy, client = proxied
    length = FLUSHES * FLUSH
    history = plain.run(chatdb.get_history(client.pool, user_id=size.long.user_id, conversation_id=size.long.id))
    natural = "".join(message.content for message in history if message.content.isascii())
    while len(natural) < length:
        natural += natural
    text = base64.b64encode(random.Random(0).randbytes(length)).decode() if is_random else natural
    text = text[:length]
    streams = 5
    stored: list[str] = []

    async def stream(number: int) -> None:
        at = {"user_id": size.streaming, "conversation_id": size.started_place(number % STREAMED).id}
        message = await chatdb.start_message(client.pool, **at)
        for offset in range(0, length, FLUSH):
            part = text[offset : offset + FLUSH]
            await chatdb.extend_message(client.pool, **at, seq=message.seq, offset=offset, text=part)
        finished = await chatdb.finish_message(client.pool, **at, seq=message.seq)
        stored.append(finished.content)

    def position() -> int:
        return counter.execute("select (pg_current_wal_insert_lsn() - '0/0')::int8").fetchone()[0]

    plain.run(stream(0))
    name = "stream" + ("_random" if is_random else "") + ("_checkpoint" if after_checkpoint else "")
    trips, wal = proxy.round_trips, 0
    counter.execute("select pg_stat_statements_reset()")
    with server.setting("full_page_writes", "on" if after_checkpoint else "off"):
        for number in range(streams):
            if after_checkpoint:
                counter.execute("checkpoint")
            before = position()
            plain.run(stream(number))
            wal += position() - before
    statements, buffers = counter.execute(
        "select sum(calls)::float8, sum(shared_blks_hit + shared_blks_read)::float8 from pg_stat_statements "
        "where query like '%/* chatdb.%_message */%'"
    ).fetchone()
    figures.counted(name, statements / streams, (proxy.round_trips - trips) / streams, buffers / streams, wal / streams)
    figures.worst(f"{name}.wal_to_size", wal / streams / length)
    assert set(stored) == {text}


def test_generic_plans(
    size: Size, copy: str, plain: asyncio.Runner, counter: psycopg.Connection, figures: Figures
) -> None:
    """
    The server plans no statement anew for each call, even if it takes PostgreSQL's default for a slow disk's costs.

    After five calls it compares the estimated costs of a plan for all values with those of plans for the given values.
    A subquery that the given values make superfluous counts only in the former.
    """
    name = sql.Identifier(counter.info.dbname)
    client = Chatdb(copy)
    counter.execute(sql.SQL("alter database {} set random_page_cost = 4").format(name))
    try:
        plain.run(client.open())
    finally:
        counter.execute(sql.SQL("alter database {} reset random_page_cost").format(name))

    async def repeat() -> list[str]:
        for operation in COUNTED:
            call = call_of(operation, client, size)
            for _ in range(8):
                await call()
        return [row["name"] for row in await client.pool.fetch(_PLANNED_EACH_TIME)]

    planned = plain.run(repeat())
    plain.run(client.close())
    if planned:
        print("planned for each call:", *planned)
    figures.worst("plans.custom", len(planned))


_PLANNED_EACH_TIME = """
    select substring(statement from '^--chatdb.(.*?)\n') as name
    from pg_catalog.pg_prepared_statements
    where custom_plans > 5
"""


def test_plans(counter: psycopg.Connection, figures: Figures) -> None:
    """The generic plan of each hot statement uses its index, without a full sort or a sequential scan."""
    wrong = []
    for query, index, allowed in PLANS:
        plan = psycopg.RawCursor(counter).execute(f"explain (generic_plan, format json) {query.sql}").fetchone()[0]
        kinds, indexes = nodes(plan[0]["Plan"])
        if index not in indexes or kinds - allowed:
            wrong.append(f"{query.name}: {', '.join(sorted(kinds))} on {', '.join(sorted(indexes))}")
    if wrong:
        print(*wrong, sep="\n")
    figures.worst("plans.unexpected", len(wrong))


HOT_DAYS = 5
HOT_CONVERSATIONS = 300


@pytest.mark.parametrize(
    ("kind", "query", "times"), [("single", _append_message, 10), ("turns", _append_messages_two, 5)]
)
def test_hot(
    kind: str,
    query: Query,
    times: int,
    size: Size,
    copy: str,
    plain: asyncio.Runner,
    proxied: tuple[Proxy, Chatdb],
    counter: psycopg.Connection,
    figures: Figures,
) -> None:
    """Most appends do not update the list's index: ten appends or five turns a day, for five days."""
    clock = "statement_timestamp()"
    assert query.sql.count(clock) == 1
    text = query.sql.replace(clock, "current_setting('bench.now')::timestamptz")  # simulates days without waiting
    chance = random.Random(kind)
    first = 0 if kind == "single" else HOT_CONVERSATIONS
    places = [size.place(first + number) for number in range(HOT_CONVERSATIONS)]
    body = ["user", "A short message.", None, None, None]
    body = [None, *body] if kind == "single" else body + body
    # otherwise the server counts that connection's last updates up to ten seconds later
    plain.run(proxied[1].pool.execute("select pg_stat_force_next_flush()"))
    before = _updates(counter)
    with psycopg.connect(copy, autocommit=True) as writer:
        writer.execute("set synchronous_commit = off")
        cursor = psycopg.RawCursor(writer)
        for day in range(HOT_DAYS):
            for at in range(times):
                now = START + 2 * YEAR + timedelta(days=day, hours=2 * at)
                writer.execute("select set_config('bench.now', %s, false)", [now.isoformat()])
                for place in chance.sample(places, len(places)):
                    cursor.execute(text, [place.user_id, place.id, *body], prepare=True)
        writer.execute("select pg_stat_force_next_flush()")
    updates, hot = (after - first for after, first in zip(_updates(counter), before, strict=True))
    assert updates == HOT_DAYS * times * HOT_CONVERSATIONS
    figures.worst(f"hot.{kind}", 100 * hot / updates)


def _updates(counter: psycopg.Connection) -> tuple[int, int]:
    counter.execute("select pg_stat_clear_snapshot()")
    return counter.execute(
        "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables "
        "where schemaname = 'chatdb' and relname = 'conversations'"
    ).fetchone()


def test_memory(size: Size, plain: asyncio.Runner, proxied: tuple[Proxy, Chatdb], figures: Figures) -> None:
    """Reading a whole conversation of 10,000 messages takes bounded memory."""
    _, contender = proxied
    plain.run(contender.whole(size.long))
    tracemalloc.start()
    try:
        assert plain.run(contender.whole(size.long)) == 10_000
        figures.worst("whole_10000.memory", tracemalloc.get_traced_memory()[1] / 2**20)
    finally:
        tracemalloc.stop()
