"""
Links conversations to the host's own users table: deleting a user there deletes the user's conversations.

The foreign key is added NOT VALID, which does not scan the rows, and then validated, which does not block writers. A
run finishes what a killed run left half done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from typing import NamedTuple

from chatdb._core.driver_errors import LINK
from chatdb._core.validate import utf8_length
from chatdb.admin.connection import (
    WAIT,
    advisory_lock,
    fetch_value,
    is_distributed,
    pinned_transaction,
    psycopg,
    retry_on_lock_timeout,
)
from chatdb.errors import ConfigurationError, InvalidInputError, SchemaError

SHOWN = 20
_TEXTS = ("text", "varchar", "bpchar", "name")
"""Types that the server can compare with text through an index, as a foreign key requires."""


class UsersMissingError(InvalidInputError):
    """The host's table lacks users who have conversations: `users` lists up to 20 of them, `total` counts all."""

    users: list[str]
    total: int

    def __init__(self, column: str, users: Sequence[str], total: int) -> None:
        more = f" and {total - len(users)} more" if total > len(users) else ""
        super().__init__(
            "table",
            f"{column} lacks {total} users who have conversations: {', '.join(map(repr, users))}{more}; add them "
            "or delete their conversations, then run this again",
        )
        self.users = list(users)
        self.total = total


class Link(NamedTuple):
    """The host's column, named as in SQL, and the steps that link to it (or would, in a dry run)."""

    table: str
    column: str
    steps: list[str]


class _Target(NamedTuple):
    oid: int
    number: int
    table: str
    column: str


def link_users(dsn: str, *, table: str, column: str = "id", wait: float = WAIT, dry_run: bool = False) -> Link:
    """
    Make `chatdb.conversations.user_id` a foreign key to a column of the host's table, with ON DELETE CASCADE.

    Blocks; in a coroutine, call it with `asyncio.to_thread`. Writers wait at most two seconds and get no errors. From
    then on, creating a conversation for an unknown user raises an InvalidInputError for `user_id`.

    Raises UsersMissingError; InvalidInputError if the column cannot be referenced or another one is linked; SchemaError
    without chatdb's tables; ConfigurationError and UnavailableError as `apply_migrations` does; ConfigurationError if
    Citus distributes chatdb's tables and the other is no reference table. It is safe to call it again after any of
    these errors.
    """
    deadline = time.monotonic() + wait
    with pinned_transaction(dsn) if dry_run else advisory_lock(dsn, wait=wait) as connection:
        target = _target(connection, table, column)
        _refuse_unreferenced(connection, target)
        steps = _steps(connection, target)
        if "add" in steps:
            _refuse_missing(connection, target)
            if not dry_run:
                _add(connection, target, deadline)
        if "validate" in steps and not dry_run:
            try:
                retry_on_lock_timeout(lambda: _validate(connection), deadline)
            except psycopg.errors.ForeignKeyViolation:
                _drop(connection, target.oid, deadline)
                _refuse_missing(connection, target)
                raise
        return Link(target.table, target.column, steps)


def unlink_users(dsn: str, *, wait: float = WAIT, dry_run: bool = False) -> bool:
    """Drop the foreign key to the host's users and return whether it existed. Raises as `link_users` does."""
    deadline = time.monotonic() + wait
    with pinned_transaction(dsn) if dry_run else advisory_lock(dsn, wait=wait) as connection:
        link = _link(connection)
        if link is not None and not dry_run:
            _drop(connection, link[0], deadline)
        return link is not None


def _target(connection: psycopg.Connection, table: str, column: str) -> _Target:
    """Return the host's column. Raises InvalidInputError if a foreign key cannot reference it."""
    oid = _table(connection, table)
    name = _column(connection, oid, column)
    row = connection.execute(
        """
        select
            pg_catalog.format('%%I.%%I', n.nspname, c.relname), c.relkind in ('r', 'p') and c.relpersistence = 'p',
            a.attnum, pg_catalog.quote_ident(a.attname::text), pg_catalog.format_type(a.atttypid, a.atttypmod),
            b.typnamespace = 'pg_catalog'::regnamespace and b.typname = any(%(texts)s),
            exists (
                select from pg_catalog.pg_index as i
                where i.indrelid = c.oid and i.indnkeyatts = 1 and i.indkey[0] = a.attnum and i.indisunique
                  and i.indimmediate and i.indisvalid and i.indpred is null
            )
        from pg_catalog.pg_class as c
        inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
        left join pg_catalog.pg_attribute as a
            on a.attrelid = c.oid and a.attname = %(column)s and a.attnum > 0 and not a.attisdropped
        left join pg_catalog.pg_type as t on t.oid = a.atttypid
        left join pg_catalog.pg_type as b on b.oid = coalesce(nullif(t.typbasetype, 0), t.oid)
        where c.oid = %(oid)s
        """,
        {"oid": oid, "column": name, "texts": [*_TEXTS]},
    ).fetchone()
    if row is None:
        raise InvalidInputError("table", "was dropped while this ran")
    name, is_table, number, quoted, kind, is_text, is_unique = row
    if not is_table:
        raise InvalidInputError("table", f"{name} is not an ordinary table, so it cannot be referenced")
    if number is None:
        raise InvalidInputError(
            "column", f'{name} has no column {column!r}: write the name as in SQL, like id or "userId"'
        )
    if not is_text:
        raise InvalidInputError(
            "column",
            f"{name}.{quoted} has the type {kind}, which a foreign key cannot compare with chatdb's text user_id: "
            "link to a column that holds the same value as text. To add one, run "
            f"alter table {name} add column user_key text unique generated always as ({quoted}::text) stored",
        )
    if not is_unique:
        raise InvalidInputError(
            "column",
            f"{name}.{quoted} is neither the primary key nor unique, so it cannot be referenced: run alter table "
            f"{name} add unique ({quoted})",
        )
    return _Target(oid, number, name, quoted)


def _refuse_unreferenced(connection: psycopg.Connection, target: _Target) -> None:
    """Refuse a table that Citus does not have on every node, if it distributes chatdb's."""
    if is_distributed(connection) and not fetch_value(
        connection,
        "select true from pg_catalog.pg_dist_partition where logicalrelid = %s::oid::regclass and partmethod = 'n'",
        target.oid,
    ):
        raise ConfigurationError(
            f"Citus distributes chatdb's tables, and {target.table} is not a reference table, which is on every node: "
            f"run select create_reference_table('{target.table}') first"
        )


def _table(connection: psycopg.Connection, table: str) -> int:
    """Return the OID of the table with this name, read as in SQL or, failing that, as the exact spelling."""
    utf8_length("table", table)
    schema, _, rest = table.partition(".")
    statement = "select pg_catalog.to_regclass(%s::pg_catalog.text)::pg_catalog.oid"
    for name in (table, _quoted(table), f"{_quoted(schema)}.{_quoted(rest)}"):
        # older servers raise an error for an invalid name, newer ones return null
        with suppress(psycopg.errors.SyntaxError, psycopg.errors.InvalidName, psycopg.errors.FeatureNotSupported):
            with connection.transaction(force_rollback=True):  # to resolve the name in the role's own search_path
                connection.execute("set local search_path to default")
                oid: int | None = fetch_value(connection, statement, name)
            if oid is not None:
                return oid
    problem = f'the database has no table {table!r}: write the name as in SQL, like public.users or public."Users"'
    raise InvalidInputError("table", problem)


def _column(connection: psycopg.Connection, table: int, column: str) -> str:
    """Return a column's name without quotes, by the same rule, or `column` itself if no such column exists."""
    utf8_length("column", column)
    try:
        with connection.transaction():
            folded: list[str] = fetch_value(connection, "select pg_catalog.parse_ident(%s::text)", column)
    except psycopg.errors.InvalidParameterValue:  # not a valid SQL name, for example because of a space
        return column
    statement = (
        "select attname::text from pg_catalog.pg_attribute "
        "where attrelid = %s::oid and attnum > 0 and not attisdropped and attname = any(%s::name[])"
    )
    there = {name for (name,) in connection.execute(statement.encode(), [table, folded]).fetchall()}
    return folded[0] if folded[0] in there and len(folded) == 1 else column


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _link(connection: psycopg.Connection) -> tuple[int, list[int], str, bool, str] | None:
    if fetch_value(connection, "select pg_catalog.to_regclass('chatdb.conversations')") is None:
        raise SchemaError("the database has no chatdb tables: run chatdb migrate or yoyo apply")
    return connection.execute(
        "select confrelid, confkey, confdeltype::text, convalidated, pg_catalog.pg_get_constraintdef(oid) "
        "from pg_catalog.pg_constraint where conrelid = 'chatdb.conversations'::regclass and conname = %s",
        [LINK],
    ).fetchone()


def _steps(connection: psycopg.Connection, target: _Target) -> list[str]:
    link = _link(connection)
    if link is None:
        return ["add", "validate"]
    oid, numbers, on_delete, is_valid, definition = link
    if (oid, numbers, on_delete) != (target.oid, [target.number], "c"):
        raise InvalidInputError(
            "table",
            f"conversations already have a link, {definition}: run chatdb link-users --unlink, then run this again",
        )
    return [] if is_valid else ["validate"]


def _refuse_missing(connection: psycopg.Connection, target: _Target) -> None:
    with connection.transaction():
        connection.execute("set local row_security to off")  # fail instead of missing rows that a policy hides
        rows = connection.execute(
            f"""
            select user_id, pg_catalog.count(*) over ()
            from (select distinct user_id from chatdb.conversations) as c
            where not exists (select from {target.table} as u where u.{target.column} collate "C" = c.user_id)
            order by user_id
            limit {SHOWN}
            """.encode()  # noqa: S608 - the server quoted the names
        ).fetchall()
    if rows:
        raise UsersMissingError(f"{target.table}({target.column})", [user for user, _ in rows], rows[0][1])


def _add(connection: psycopg.Connection, target: _Target, deadline: float) -> None:
    statement = (
        f"alter table chatdb.conversations add constraint {LINK} foreign key (user_id) "
        f"references {target.table} ({target.column}) on delete cascade not valid"
    )
    _alter(connection, target.oid, "share row exclusive", statement, deadline)


def _validate(connection: psycopg.Connection) -> None:
    with connection.transaction():
        connection.execute("set local lock_timeout = '2s'")
        connection.execute(f"alter table chatdb.conversations validate constraint {LINK}".encode())


def _drop(connection: psycopg.Connection, users: int, deadline: float) -> None:
    statement = f"alter table chatdb.conversations drop constraint if exists {LINK}"
    _alter(connection, users, "access exclusive", statement, deadline)


def _alter(connection: psycopg.Connection, users: int, mode: str, statement: str, deadline: float) -> None:
    """
    Run a statement that locks both the conversations and the users.

    The wait for the second lock is shorter than deadlock_timeout: if a writer locks the tables in the opposite order,
    this statement gives up before the server cancels the writer. The order alternates, so one attempt matches the
    writers' order.
    """
    name = fetch_value(connection, "select %s::oid::regclass::text", users)
    privileges = "select pg_catalog.has_table_privilege(%s::oid, 'update, delete, truncate')"
    may_lock = fetch_value(connection, privileges, users)
    firsts = cycle([name, "chatdb.conversations"] if may_lock else ["chatdb.conversations"])

    def work() -> None:
        first = next(firsts)
        with connection.transaction():
            connection.execute("set local lock_timeout = '2s'")
            connection.execute(f"lock table {first} in {mode} mode".encode())
            connection.execute("set local lock_timeout = '500ms'")
            connection.execute(statement.encode())

    retry_on_lock_timeout(work, deadline)
