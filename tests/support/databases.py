"""Statements in databases, and clones of the database of tests/support/roles.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg

from chatdb.testing import servers
from chatdb.testing.databases import Databases
from chatdb.testing.databases import database_of as database_of
from tests.support.roles import Roles


def in_memory() -> str | None:
    """Return a folder in memory if it has 6 GiB free: a test server spends much of its time creating files."""
    return servers.in_memory(6 * 1024**3)


def as_role(dsn: str, role: str) -> str:
    """Return the DSN for another role. Its password is its name."""
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{role}:{role}@{parts.netloc.rpartition('@')[2]}"))


def execute(dsn: str, *statements: str) -> None:
    """Run each statement outside a transaction."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


@contextmanager
def cloned(databases: Databases, roles: Roles) -> Iterator[str]:
    """Yield the DSN of a clone of the roles' database, for the role of the server's DSN."""
    with databases.new(roles.database, f"owner {roles.owner}") as dsn:
        execute(dsn, *roles.on_database(urlsplit(dsn).path[1:]))
        yield dsn
