"""The benchmark server: chatdb's embedded PostgreSQL with its own settings, in a folder that persists."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from benchmarks.workload import (
    Size,
    add_branched,
    add_keyed_and_archived,
    add_streamed,
    fingerprints,
    load,
    load_people,
)
from chatdb.admin.migrate import apply_migrations
from chatdb.admin.search_index import create_search_index
from chatdb.embedded.server import EmbeddedServer
from chatdb.formats.items import SourceMessage

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

LARGE_BUFFERS = {"shared_buffers": f"{(MEMORY >> 20) * 2 // 5}MB"}
"""40 % of memory, the most that PostgreSQL's manual suggests for a dedicated server. 10 M messages fit into 9 GB."""

SETTINGS = {
    "shared_preload_libraries": "pg_stat_statements",
    "pg_stat_statements.track": "top",
    "pg_stat_statements.track_planning": "off",
    # PostgreSQL's default: 1 M messages (0.9 GB) exceed it, as a service's table exceeds a larger one
    "shared_buffers": "128MB",
    "effective_cache_size": f"{(MEMORY >> 20) * 3 // 4}MB",
    "checkpoint_timeout": "1h",  # keeps checkpoints out of measurements; suites that need one request it
    "track_io_timing": "on",
    "max_connections": "200",
    "autovacuum_naptime": "1h",
    "jit": "off",
}


def folder() -> Path:
    """Return the folder of the server and its data."""
    return Path(os.environ.get("CHATDB_BENCH_HOME") or Path(__file__).parent.parent / ".benchmarks" / "server")


class BenchServer:
    """The server, which holds a database for each size."""

    def __init__(self) -> None:
        self._embedded = EmbeddedServer(folder())
        self.programs: Path = self._embedded._package / "pginstall" / "bin"

    def start(self) -> None:
        """Start the server with its settings."""
        self._embedded.start()
        self.restart()

    def restart(self, *, cold: bool = False, **other: str) -> None:
        """Restart the server with changed settings; `cold` also drops its files from the kernel's cache."""
        with self.connect() as connection:
            for name, value in (SETTINGS | other).items():
                connection.execute(sql.SQL("alter system set {} = {}").format(sql.SQL(name), sql.Literal(value)))
        self._embedded.stop()
        if cold:
            self._forget()
        self._embedded.start()

    def stop(self) -> None:
        """Stop the server."""
        self._embedded.stop()

    def _forget(self) -> None:
        os.sync()
        for path in (self._embedded.path / "data").rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def setting(self, name: str, value: str) -> Iterator[None]:
        """Change a setting that needs no restart until the end of the block, perhaps within another such block."""
        with self.connect() as connection:
            outer = connection.execute(
                "select setting from pg_file_settings where name = %s and sourcefile like '%%auto.conf'", [name]
            ).fetchone()
            connection.execute(sql.SQL("alter system set {} = {}").format(sql.SQL(name), sql.Literal(value)))
            connection.execute("select pg_reload_conf()")
            try:
                yield
            finally:
                connection.execute(
                    sql.SQL("alter system reset {}").format(sql.SQL(name))
                    if outer is None
                    else sql.SQL("alter system set {} = {}").format(sql.SQL(name), sql.Literal(outer[0]))
                )
                connection.execute("select pg_reload_conf()")

    def dsn(self, database: str = "postgres") -> str:
        """Return the DSN of a database."""
        return urlunsplit(urlsplit(self._embedded.dsn)._replace(path=f"/{database}"))

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """Connect in autocommit mode, for statements that are not measured."""
        return psycopg.connect(self.dsn(database), autocommit=True)

    def is_loaded(self, size: Size) -> bool:
        """Return whether a complete database of this size exists, perhaps with older migrations."""
        return self._loaded(size) in fingerprints(size)

    def _loaded(self, size: Size) -> str | None:
        with self.connect() as connection:
            found = connection.execute(
                "select shobj_description(oid, 'pg_database') from pg_database where datname = %s", [size.database]
            ).fetchone()
        return found and found[0]

    def load(self, size: Size, *, quiet: bool = False) -> str:
        """Load the database of this size, finish an interrupted load or add migrations, and return its name."""
        known, found = fingerprints(size), self._loaded(size)
        wanted = known[-1]
        if found == wanted:
            return size.database
        name = sql.Identifier(size.database)
        if found in known:
            apply_migrations(self.dsn(size.database))
            with self.connect(size.database) as connection:
                connection.execute("vacuum (freeze, analyze) chatdb.conversations")
                connection.execute(sql.SQL("comment on database {} is {}").format(name, wanted))
            return size.database
        begun = f"{wanted} begun"
        with self.connect() as connection:
            if found != begun:
                connection.execute(sql.SQL("drop database if exists {} with (force)").format(name))
                connection.execute(sql.SQL("create database {} template template0").format(name))
                connection.execute(sql.SQL("comment on database {} is {}").format(name, begun))
            asyncio.run(load(self.dsn(size.database), size, quiet=quiet))
            connection.execute(sql.SQL("comment on database {} is {}").format(name, wanted))
        return size.database

    def prewarm(self, size: Size) -> None:
        """Read a database's messages into memory, as on a long-running server."""
        with self.connect(size.database) as connection:
            connection.execute("create extension if not exists pg_prewarm")
            connection.execute(
                "select pg_prewarm(r) from pg_class as c cross join unnest(array["
                "'chatdb.pk_messages'::regclass, oid, reltoastrelid, "
                "(select indexrelid from pg_index where indrelid = c.reltoastrelid)]) as r "
                "where oid = 'chatdb.messages'::regclass"
            )

    @contextmanager
    def copied(self, size: Size, name: str) -> Iterator[str]:
        """Yield the DSN of a writable copy of a loaded database, and drop the copy afterwards."""
        source, copy = sql.Identifier(self.load(size)), sql.Identifier(name)
        with self.connect() as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(copy))
            connection.execute(sql.SQL("create database {} template {} strategy file_copy").format(copy, source))
        with self.connect(name) as connection:
            add_keyed_and_archived(connection, size)
            add_branched(connection, size)
            add_streamed(connection, size)
        try:
            yield self.dsn(name)
        finally:
            with self.connect() as connection:
                connection.execute(sql.SQL("drop database if exists {} with (force)").format(copy))

    @contextmanager
    def searched(self, conversations: list[list[SourceMessage]]) -> Iterator[tuple[str, str]]:
        """Yield the names of two databases with real conversations, without and with the search index."""
        plain, indexed = "bench_plain", "bench_indexed"
        names = [sql.Identifier(name) for name in (plain, indexed)]
        with self.connect() as connection:

            def drop() -> None:
                for name in names:
                    connection.execute(sql.SQL("drop database if exists {} with (force)").format(name))

            drop()
            connection.execute(sql.SQL("create database {} template template0").format(names[0]))
            asyncio.run(load_people(self.dsn(plain), conversations))
            connection.execute(sql.SQL("create database {} template {} strategy file_copy").format(names[1], names[0]))
            create_search_index(self.dsn(indexed))
            try:
                yield plain, indexed
            finally:
                drop()
