"""How scattered messages are, what a rewrite in the order of conversations saves, and the size of a message."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from benchmarks import sabotage
from benchmarks.contenders import Chatdb
from benchmarks.figures import Figures
from benchmarks.rounds import interleave
from benchmarks.server import BenchServer
from benchmarks.workload import MESSAGES, Size
from chatdb.admin import locality

AGED = (0, 10, 25, 50, 100)
"""Numbers of messages that each conversation got after the rewrite, in turn with the others."""

BLOCKS = """
    select avg(blocks)::float8
    from (
        select count(distinct (ctid::text::point)[0]) as blocks
        from chatdb.messages
        where seq > %(later)s and seq <= %(later)s + 100 and conversation_id <= %(conversations)s
        group by conversation_id
    ) as history
"""


@pytest.fixture(scope="module")
def packed(server: BenchServer, size: Size, pytestconfig: pytest.Config) -> Iterator[str]:
    """Yield the name of a copy of the data whose messages are in the order of conversations."""
    name = "bench_packed"
    source, copy = sql.Identifier(server.load(size)), sql.Identifier(name)
    with server.connect() as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(copy))
        connection.execute(sql.SQL("create database {} template {} strategy file_copy").format(copy, source))
    with sabotage.applied(pytestconfig.getoption("--sabotage"), server, name):
        with server.connect(name) as there:
            for statement in locality.CLUSTER.split("; "):
                there.execute(statement)
        yield name
    with server.connect() as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(copy))


def _blocks(connection: psycopg.Connection, size: Size, later: int) -> float:
    """Return the mean number of blocks of the newest 100 messages, after so many later ones."""
    values = {"later": later, "conversations": size.conversations}
    return connection.execute(BLOCKS, values).fetchone()[0]


def test_size(server: BenchServer, size: Size, packed: str, figures: Figures) -> None:
    """A message takes no more bytes than its gate allows."""
    with server.connect(packed) as connection:
        heap, indexes, toast, messages = connection.execute(
            "select pg_relation_size(c.oid), pg_indexes_size(c.oid), pg_total_relation_size(reltoastrelid), "
            "(select count(*) from chatdb.messages) from pg_class as c where oid = 'chatdb.messages'::regclass"
        ).fetchone()
        conversations = connection.execute(
            "select pg_total_relation_size('chatdb.conversations')::float8 / count(*) from chatdb.conversations"
        ).fetchone()[0]
    parts = {"rows": heap / messages, "indexes": indexes / messages, "TOAST": toast / messages}
    listed = ", ".join(f"{name} {value:.0f}" for name, value in parts.items())
    figures.local(f"a message: {listed}", sum(parts.values()), "bytes")
    figures.local("a conversation, with its indexes", conversations, "bytes")
    figures.worst("message.bytes", sum(parts.values()))


@pytest.mark.full
def test_time(
    benchmark: Any, server: BenchServer, size: Size, packed: str, plain: asyncio.Runner, figures: Figures
) -> None:
    """A history of 100 is read faster after the rewrite, from a table that exceeds the memory: most reads are cold."""
    server.restart(cold=True)
    clients = {"scattered": Chatdb(server.dsn(size.database)), "chatdb": Chatdb(server.dsn(packed))}
    chance = random.Random(0)

    def call(name: str) -> Callable[[], Awaitable[object]]:
        return lambda: clients[name].history(size.place(chance.randrange(size.conversations)), MESSAGES)

    for client in clients.values():
        plain.run(client.open())
    times = interleave(benchmark, plain, {name: call(name) for name in clients}, rounds=40, each=25)
    for client in clients.values():
        plain.run(client.close())
    medians = {name: statistics.median(series) for name, series in times.items()}
    figures.local("a cold history of 100, scattered, median", medians["scattered"] * 1e3, "ms")
    figures.local("a cold history of 100, kept together, median", medians["chatdb"] * 1e3, "ms")
    figures.worst("locality.time", medians["chatdb"] / medians["scattered"])


def test_blocks(server: BenchServer, size: Size, packed: str, figures: Figures) -> None:
    """A history of 100 is on few blocks after the rewrite, and on more with each message that is appended in turn."""
    with server.connect(size.database) as scattered:
        figures.local("a history of 100, as written: blocks", _blocks(scattered, size, 0), "")
        scattered.execute("set track_io_timing = off")
        plan = scattered.execute(f"explain (analyze, buffers, format json) {locality.statement('sample_locality')}")
        root = plan.fetchone()[0][0]["Plan"]
        figures.worst("locality.sample_buffers", root["Shared Hit Blocks"] + root["Shared Read Blocks"])
        figures.worst(
            "locality.sample_error", abs(locality.read_scatter(scattered).per_history / _blocks(scattered, size, 0) - 1)
        )
    with server.connect(packed) as connection:
        figures.worst("locality.blocks", _blocks(connection, size, 0))
        # the conversations get their messages once more, in the order that traffic writes them
        connection.execute(
            "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
            "select user_id, conversation_id, seq + 100, role, content, created_at from chatdb.messages "
            "where conversation_id <= %s and seq <= 100 order by seq, conversation_id",
            [size.conversations],
        )
        for later in AGED:
            title = f"a history of 100, {later} messages after the rewrite: blocks"
            figures.local(title, _blocks(connection, size, later), "")
