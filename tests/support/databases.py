"""Creates and drops databases for the tests, and runs statements in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg.rows import TupleRow

from chatdb.testing import servers
from chatdb.testing.databases import create_statement
from chatdb.testing.databases import database_of as database_of
from tests.support.roles import Roles

administrators: dict[str, psycopg.Connection[TupleRow]] = {}
"""An open session per server, by DSN. Most tests create and drop a database."""


def in_memory() -> str | None:
    """Return a folder in memory if it has 6 GiB free: a test server spends much of its time creating files."""
    return servers.in_memory(6 * 1024**3)


def own_name(suffix: object) -> str:
    """Return a name for a database of this process."""
    return f"chatdb_test_{os.getpid()}_{suffix}"


def as_role(dsn: str, role: str) -> str:
    """Return the DSN for another role. Its password is its name."""
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{role}:{role}@{parts.netloc.rpartition('@')[2]}"))


def execute(dsn: str, *statements: str) -> None:
    """Run each statement outside a transaction."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def administrator(server: str) -> psycopg.Connection[TupleRow]:
    """Return the open session on a server. Reconnect if a test killed the server."""
    if server in administrators:
        try:
            administrators[server].execute("select")
        except psycopg.OperationalError:
            administrators.pop(server).close()
    if server not in administrators:
        administrators[server] = psycopg.connect(server, autocommit=True)
    return administrators[server]


@contextmanager
def new_database(server: str, name: str, template: str = "template0", options: str = "") -> Iterator[str]:
    """Create a copy of a database under this name, yield its DSN and drop it."""
    session = administrator(server)
    session.execute(create_statement(name, template, session.info.server_version, options))
    try:
        yield database_of(server, name)
    finally:
        administrator(server).execute(f"drop database {name} with (force)")


@contextmanager
def cloned(server: str, roles: Roles, name: str) -> Iterator[str]:
    """Yield the DSN of a clone of the roles' database, for the role of the server's DSN."""
    with new_database(server, name, roles.database, f"owner {roles.owner}") as dsn:
        execute(server, *roles.on_database(name))
        yield dsn
