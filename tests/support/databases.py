"""What the tests do to databases: run statements as a role, and make and drop one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg.rows import TupleRow

from tests.support.roles import Roles

administrators: dict[str, psycopg.Connection[TupleRow]] = {}
"""By its DSN, a session on each server of the tests, kept because most of them have a database made and dropped."""


def in_memory() -> str | None:
    """Return a folder that is kept in memory, if there is one with room: much of a server's work is making files."""
    folder = "/dev/shm"
    if not os.path.ismount(folder):
        return None
    there = os.statvfs(folder)
    room = there.f_bavail * there.f_frsize > 6 * 1024**3
    return folder if room and not there.f_flag & os.ST_NOEXEC else None


def not_durable(dsn: str) -> None:
    """Spare a server that goes with the tests its waiting for the disk; a killed process loses nothing by it."""
    execute(dsn, "alter system set fsync = off", "alter system set full_page_writes = off", "select pg_reload_conf()")


def database_of(server: str, name: str) -> str:
    """Return the DSN of another database on the server."""
    return urlunsplit(urlsplit(server)._replace(path=f"/{name}"))


def as_role(dsn: str, role: str) -> str:
    """Return the DSN for another role, whose password is its name."""
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{role}:{role}@{parts.netloc.rpartition('@')[2]}"))


def execute(dsn: str, *statements: str) -> None:
    """Run statements on their own, outside a transaction."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def administrator(server: str) -> psycopg.Connection[TupleRow]:
    """Return the session that is kept on a server, or a new one after a test killed the server."""
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
    """Give the DSN of a copy of a database; of its files, which takes a third of the time of the server's own way."""
    session = administrator(server)
    if session.info.server_version >= 150_000:  # older ones know no other way
        options += " strategy file_copy"
    session.execute(f"create database {name} template {template} {options}")
    try:
        yield database_of(server, name)
    finally:
        administrator(server).execute(f"drop database {name} with (force)")


@contextmanager
def cloned(server: str, roles: Roles, name: str) -> Iterator[str]:
    """Give the DSN, for the server's own role, of a clone of the roles' database."""
    with new_database(server, name, roles.database, f"owner {roles.owner}") as dsn:
        execute(server, *roles.on_database(name))
        yield dsn
