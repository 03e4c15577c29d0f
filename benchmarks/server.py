"""The server of the benchmarks: chatdb's embedded PostgreSQL, in a folder that is kept, with settings of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from benchmarks.workload import KEYS, Size, fingerprint, load
from chatdb.embedded.server import EmbeddedServer

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

LARGE_BUFFERS = {"shared_buffers": f"{(MEMORY >> 20) * 2 // 5}MB"}
"""40 % of the memory, the most that PostgreSQL's manual has for a server of its own: 10 M messages fit into 9 GB."""

SETTINGS = {
    "shared_preload_libraries": "pg_stat_statements",
    "pg_stat_statements.track": "top",
    "pg_stat_statements.track_planning": "off",
    # PostgreSQL's default, so that 1 M messages (0.9 GB) are to it what a service's table is to larger ones
    "shared_buffers": "128MB",
    "effective_cache_size": f"{(MEMORY >> 20) * 3 // 4}MB",
    "checkpoint_timeout": "1h",  # none in the middle of a measurement: the suites ask for theirs
    "track_io_timing": "on",
    "max_connections": "200",
    "autovacuum_naptime": "1h",
    "jit": "off",
}


def folder() -> Path:
    """Return where the server and its data are kept."""
    return Path(os.environ.get("CHATDB_BENCH_HOME") or Path(__file__).parent.parent / ".benchmarks" / "server")


class BenchServer:
    """A server with the databases of the sizes; `dsn(name)` is that of a database."""

    def __init__(self) -> None:
        self._embedded = EmbeddedServer(folder())
        self.programs: Path = self._embedded._package / "pginstall" / "bin"

    def start(self) -> None:
        """Start the server, with its settings."""
        self._embedded.start()
        self.restart()

    def restart(self, *, cold: bool = False, **other: str) -> None:
        """Stop and start the server, with other settings than usual; `cold` also has the kernel forget its files."""
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
        """Have another setting in force, which needs no restart."""
        with self.connect() as connection:
            connection.execute(sql.SQL("alter system set {} = {}").format(sql.SQL(name), sql.Literal(value)))
            connection.execute("select pg_reload_conf()")
            try:
                yield
            finally:
                connection.execute(sql.SQL("alter system reset {}").format(sql.SQL(name)))
                connection.execute("select pg_reload_conf()")

    def dsn(self, database: str = "postgres") -> str:
        """Return the DSN of a database."""
        return urlunsplit(urlsplit(self._embedded.dsn)._replace(path=f"/{database}"))

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """Connect, for statements about the benchmark."""
        return psycopg.connect(self.dsn(database), autocommit=True)

    def is_loaded(self, size: Size) -> bool:
        """Whether a database of this size is there as it should be."""
        return self._loaded(size) == fingerprint(size)

    def _loaded(self, size: Size) -> str | None:
        with self.connect() as connection:
            found = connection.execute(
                "select shobj_description(oid, 'pg_database') from pg_database where datname = %s", [size.database]
            ).fetchone()
        return found and found[0]

    def load(self, size: Size, *, quiet: bool = False) -> str:
        """Return the name of a database of this size, which is loaded, or loaded further, if it is not there."""
        wanted, found = fingerprint(size), self._loaded(size)
        if found == wanted:
            return size.database
        name = sql.Identifier(size.database)
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
        """Read a database's messages into memory, as if it had run for long."""
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
        """Give the DSN of a copy of a loaded database, to be written to and dropped."""
        source, copy = sql.Identifier(self.load(size)), sql.Identifier(name)
        with self.connect() as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(copy))
            connection.execute(sql.SQL("create database {} template {} strategy file_copy").format(copy, source))
        with self.connect(name) as connection:
            connection.execute(
                "insert into chatdb.conversations (user_id, key) "
                "select %s, 'key ' || n from generate_series(0, %s) as n",
                [size.keyed, KEYS - 1],
            )
        try:
            yield self.dsn(name)
        finally:
            with self.connect() as connection:
                connection.execute(sql.SQL("drop database if exists {} with (force)").format(copy))
