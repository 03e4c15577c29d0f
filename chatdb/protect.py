"""
The second wall: row-level security on chatdb's tables, so that a statement without its `user_id` reaches nothing.

FORCEd, it holds for the tables' owner too; only superusers and roles with BYPASSRLS are above it. The user is the one
that `chatdb.transaction(db, user_id=...)` names; where none is named there are no rows.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import psycopg

from chatdb.direct import locked, patiently, pinned_transaction
from chatdb.errors import ConfigurationError, SchemaError

TABLES = ("conversations", "messages")
WAIT = 60.0
"""How long by default, in seconds, another process may be at it, and tables may be busy."""

_CONDITION = "user_id = nullif(pg_catalog.current_setting('chatdb.user_id', true), '')"
_AS_STORED = "(user_id = NULLIF(current_setting('chatdb.user_id'::text, true), ''::text))"


class Wall(NamedTuple):
    """What a table has of the wall."""

    table: str
    is_on: bool
    is_forced: bool
    policy: tuple[bool, str, bool, str | None, str | None] | None
    others: list[str]
    """The names of the policies that would let more through."""


def protect_tables(dsn: str, *, off: bool = False, wait: float = WAIT) -> list[str]:
    """
    Switch row-level security on, or off, and return the statements that were run; none if it is as it should be.

    Blocks, and raises, as `chatdb.migrate.apply_migrations` does. One transaction, which holds each table for a moment
    and for that waits at most two seconds at a time.

    Raises ConfigurationError when another policy stands on a table, because it would let more rows through.
    """
    deadline = time.monotonic() + wait
    with locked(dsn, wait=wait) as connection:
        statements = _statements(connection, off=off)

        def carry_out() -> None:
            with connection.transaction():
                connection.execute("set local lock_timeout = '2s'")
                for statement in statements:
                    connection.execute(statement.encode())

        if statements:
            patiently(carry_out, deadline)
    return statements


def missing_protection(dsn: str, *, off: bool = False) -> list[str]:
    """Return the statements that `protect_tables` would run, without changing anything."""
    with pinned_transaction(dsn) as connection:
        return _statements(connection, off=off)


def _statements(connection: psycopg.Connection, *, off: bool) -> list[str]:
    return [statement for wall in walls(connection) for statement in (_down if off else missing)(wall)]


def walls(connection: psycopg.Connection) -> list[Wall]:
    """Return what each of chatdb's tables has of the wall. Raises SchemaError where one is not there."""
    return [_wall(connection, table) for table in TABLES]


def missing(wall: Wall) -> list[str]:
    """Return the statements by which a table gets what it lacks of the wall; ConfigurationError for another policy."""
    table = wall.table
    if wall.others:
        raise ConfigurationError(
            f"chatdb.{table} has a policy of someone's own, {wall.others[0]}, which would let more rows through than "
            "those of one user: drop it, or make it restrictive, and run this again"
        )
    statements: list[str] = []
    if wall.policy != (True, "*", True, _AS_STORED, _AS_STORED):
        if wall.policy is not None:
            statements.append(f"drop policy rls_{table} on chatdb.{table}")
        statements.append(f"create policy rls_{table} on chatdb.{table} using ({_CONDITION}) with check ({_CONDITION})")
    if not wall.is_on or not wall.is_forced:
        statements.append(f"alter table chatdb.{table} enable row level security, force row level security")
    return statements


def _down(wall: Wall) -> list[str]:
    table = wall.table
    statements: list[str] = []
    if wall.is_on or wall.is_forced:
        statements.append(f"alter table chatdb.{table} no force row level security, disable row level security")
    if wall.policy is not None:
        statements.append(f"drop policy rls_{table} on chatdb.{table}")
    return statements


def _wall(connection: psycopg.Connection, table: str) -> Wall:
    found = connection.execute(
        """
        select oid, relrowsecurity, relforcerowsecurity from pg_catalog.pg_class
        where relnamespace = pg_catalog.to_regnamespace('chatdb') and relname = %s
        """,
        [table],
    ).fetchone()
    if found is None:
        raise SchemaError(f"the database has no table chatdb.{table}: run yoyo apply, or chatdb migrate")
    policies = connection.execute(
        """
        select polname, polpermissive, polcmd, polroles = '{0}', pg_catalog.pg_get_expr(polqual, polrelid),
            pg_catalog.pg_get_expr(polwithcheck, polrelid)
        from pg_catalog.pg_policy where polrelid = %s order by polname
        """,
        [found[0]],
    ).fetchall()
    own = next((policy[1:] for policy in policies if policy[0] == f"rls_{table}"), None)
    others = [name for name, is_permissive, *_ in policies if is_permissive and name != f"rls_{table}"]
    return Wall(table, bool(found[1]), bool(found[2]), own, others)
