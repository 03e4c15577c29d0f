"""The load of the data: interrupted, it goes on where it was, and the rows are those of one that was not."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import asyncpg
from psycopg import sql

from benchmarks.server import BenchServer
from benchmarks.workload import SIZES, load
from chatdb._core.dsn import connect_arguments

ROWS = """
    select
        count(*),
        md5(string_agg(md5((user_id, conversation_id, seq, role, content, created_at)::text), '' order by id))
    from chatdb.messages
"""
"""Without the ids, of which an interrupted COPY leaves some out."""
STORED = "select count(*) from chatdb.messages"


def test_an_interrupted_load_goes_on(server: BenchServer) -> None:
    """A load that was cancelled twice ends with the rows, in the order, of a whole one."""
    whole = SIZES["100k"]
    size = replace(whole, name="interrupted")
    database = server.load(whole)
    with server.connect() as connection, server.connect(database) as kept:
        name = sql.Identifier(size.database)
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(name))
        connection.execute(sql.SQL("create database {} template template0").format(name))
        stored: list[int] = []
        for _ in range(2):
            asyncio.run(_interrupted(server.dsn(size.database), stored[-1] if stored else 0))
            with server.connect(size.database) as partial:
                stored += partial.execute(STORED).fetchone() or ()
        assert 0 < stored[0] < stored[1] < size.messages
        asyncio.run(load(server.dsn(size.database), size, quiet=True))
        with server.connect(size.database) as done:
            assert done.execute(ROWS).fetchone() == kept.execute(ROWS).fetchone()
        connection.execute(sql.SQL("drop database {} with (force)").format(name))


async def _interrupted(dsn: str, before: int) -> None:
    """Load until there is more than before, and a batch is under way."""
    loading = asyncio.create_task(load(dsn, replace(SIZES["100k"], name="interrupted"), quiet=True))
    connection = await asyncpg.connect(**connect_arguments(dsn))
    stored = 0
    while stored <= before and not loading.done():
        await asyncio.sleep(0.01)
        with suppress(asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            stored = await connection.fetchval(STORED)
    loading.cancel()
    await asyncio.wait([loading])
    await connection.close()
