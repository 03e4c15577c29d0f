"""Loading the data: an interrupted load continues, and its rows equal those of an uninterrupted one."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

import asyncpg
from psycopg import sql

from benchmarks.server import BenchServer
from benchmarks.workload import SIZES, fingerprints, load
from chatdb._core.dsn import connect_arguments
from chatdb.admin.migrate import missing_migrations, rollback_migrations

ROWS = """
    select
        count(*),
        md5(string_agg(md5((user_id, conversation_id, seq, role, content, created_at)::text), '' order by id))
    from chatdb.messages
"""
"""A digest of the rows without ids, because an interrupted COPY skips some."""
STORED = "select count(*) from chatdb.messages"
FILES = """
    select pg_relation_filenode('chatdb.messages'), pg_relation_filenode('chatdb.conversations'), count(*)
    from chatdb.messages
"""
"""The files of the tables, which stay if the tables are neither loaded again nor rewritten."""


def test_an_interrupted_load_goes_on(server: BenchServer) -> None:
    """A load that is cancelled twice ends with the same rows in the same order as an uninterrupted one."""
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


def test_an_older_database_is_migrated(server: BenchServer) -> None:
    """A stored database with fewer migrations keeps its rows, and its tables are migrated."""
    whole = SIZES["100k"]
    size = replace(whole, name="older")
    older, *_, newest = fingerprints(size)[-3:]
    source, name = sql.Identifier(server.load(whole)), sql.Identifier(size.database)
    with server.connect() as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(name))
        connection.execute(sql.SQL("create database {} template {} strategy file_copy").format(name, source))
        rollback_migrations(server.dsn(size.database), to="0003.chatdb-create-messages")
        connection.execute(sql.SQL("comment on database {} is {}").format(name, older))
        assert server.is_loaded(size)
        with server.connect(size.database) as kept:
            before = kept.execute(FILES).fetchone()
        server.load(size)
        with server.connect(size.database) as kept:
            assert kept.execute(FILES).fetchone() == before
        assert server._loaded(size) == newest
        assert not missing_migrations(server.dsn(size.database))
        connection.execute(sql.SQL("drop database {} with (force)").format(name))


async def _interrupted(dsn: str, before: int) -> None:
    """Load until more rows than `before` are stored, then cancel during a batch."""
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
