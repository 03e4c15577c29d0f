"""
Links conversations to the host's own table of users: deleting a user there deletes the user's conversations.

The foreign key is added NOT VALID, which does not read the rows, and then validated, which blocks no writer. A run
finishes what an earlier one that was killed has left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from typing import NamedTuple

from chatdb._core.driver_errors import LINK
from chatdb._core.validate import utf8_length
from chatdb.admin.connection import WAIT, advisory_lock, fetch_value, pinned_transaction, psycopg, retry_on_lock_timeout
from chatdb.errors import InvalidInputError, SchemaError

SHOWN = 20
_TEXTS = ("text", "varchar", "bpchar", "name")
"""The types with which the server can compare a text by an index, as a foreign key needs it."""


class UsersMissingError(InvalidInputError):
    """The host's table lacks users who have conversations: `users` are the first of them, `total` says how many."""

    users: list[str]
    total: int

    def __init__(self, column: str, users: Sequence[str], total: int) -> None:
        more = f" and {total - len(users)} more" if total > len(users) else ""
        super().__init__(
            "table",
            f"{column} lacks {total} users who have conversations: {', '.join(map(repr, users))}{more}; add them "
            "there, or delete their conversations, and run this again",
        )
        self.users = list(users)
        self.total = total


class Link(NamedTuple):
    """A column of the host's table, by names in the form of SQL, and what was done, or is to be done, to link to it."""

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
    Make `chatdb.conversations.user_id` a foreign key to a column of the host's, with ON DELETE CASCADE.

    Blocks; in a coroutine call it by `asyncio.to_thread`. Writers wait for two seconds at most, and get no errors. From
    then on a conversation of an unknown user is an InvalidInputError of `user_id`.

    Raises UsersMissingError, InvalidInputError where the column cannot be referenced or another is, SchemaError without
    chatdb's tables, and ConfigurationError and UnavailableError as `apply_migrations` does; all can be run again.
    """
    deadline = time.monotonic() + wait
    with pinned_transaction(dsn) if dry_run else advisory_lock(dsn, wait=wait) as connection:
        target = _target(connection, table, column)
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
    """Drop the foreign key to the host's users, and return whether there was one. Raises as `link_users` does."""
    deadline = time.monotonic() + wait
    with pinned_transaction(dsn) if dry_run else advisory_lock(dsn, wait=wait) as connection:
        link = _link(connection)
        if link is not None and not dry_run:
            _drop(connection, link[0], deadline)
        return link is not None


def _target(connection: psycopg.Connection, table: str, column: str) -> _Target:
    """Return the host's column, if a foreign key can reference it."""
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
        raise InvalidInputError("table", "was dropped meanwhile")
    name, is_table, number, quoted, kind, is_text, is_unique = row
    if not is_table:
        raise InvalidInputError("table", f"{name} is no ordinary table, and cannot be referenced")
    if number is None:
        raise InvalidInputError("column", f'{name} has no column {column!r}: write it as in SQL, like id or "userId"')
    if not is_text:
        raise InvalidInputError(
            "column",
            f"{name}.{quoted} is of the type {kind}, and a foreign key cannot compare that with chatdb's user_id, "
            "which is a text. Link to a column that has the same as text: "
            f"alter table {name} add column user_key text unique generated always as ({quoted}::text) stored",
        )
    if not is_unique:
        raise InvalidInputError(
            "column",
            f"{name}.{quoted} is neither the primary key nor unique, so it cannot be referenced: alter table {name} "
            f"add unique ({quoted})",
        )
    return _Target(oid, number, name, quoted)


def _table(connection: psycopg.Connection, table: str) -> int:
    """Return the table of a name as in SQL, or else the one that is spelled so, capital letters and all."""
    utf8_length("table", table)
    schema, _, rest = table.partition(".")
    statement = "select pg_catalog.to_regclass(%s::pg_catalog.text)::pg_catalog.oid"
    for name in (table, _quoted(table), f"{_quoted(schema)}.{_quoted(rest)}"):
        # what is no name in SQL is an error; the server's later releases answer null
        with suppress(psycopg.errors.SyntaxError, psycopg.errors.InvalidName, psycopg.errors.FeatureNotSupported):
            with connection.transaction(force_rollback=True):  # tables are found as the role does by default
                connection.execute("set local search_path to default")
                oid: int | None = fetch_value(connection, statement, name)
            if oid is not None:
                return oid
    problem = f'the database has no table {table!r}: write it as in SQL, like public.users or public."Users"'
    raise InvalidInputError("table", problem)


def _column(connection: psycopg.Connection, table: int, column: str) -> str:
    """Return a column's name without quotes, by the same rule; as it is given where there is no such column."""
    utf8_length("column", column)
    try:
        with connection.transaction():
            folded: list[str] = fetch_value(connection, "select pg_catalog.parse_ident(%s::text)", column)
    except psycopg.errors.InvalidParameterValue:  # it is no name in SQL, such as one with a space
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
        raise SchemaError("the database has no chatdb tables: run yoyo apply, or chatdb migrate")
    return connection.execute(
        "select confrelid, confkey, confdeltype::text, convalidated, pg_catalog.pg_get_constraintdef(oid) "
        "from pg_catalog.pg_constraint where conrelid = 'chatdb.conversations'::regclass and conname = %s",
        [LINK],
    ).fetchone()


def _steps(connection: psycopg.Connection, target: _Target) -> list[str]:
    """Return what is to be done."""
    link = _link(connection)
    if link is None:
        return ["add", "validate"]
    oid, numbers, on_delete, is_valid, definition = link
    if (oid, numbers, on_delete) != (target.oid, [target.number], "c"):
        raise InvalidInputError(
            "table",
            f"conversations are linked otherwise, by {definition}: chatdb link-users --unlink, and run this again",
        )
    return [] if is_valid else ["validate"]


def _refuse_missing(connection: psycopg.Connection, target: _Target) -> None:
    with connection.transaction():
        connection.execute("set local row_security to off")  # rows that chatdb protect hides are an error
        rows = connection.execute(
            f"""
            select user_id, pg_catalog.count(*) over ()
            from (select distinct user_id from chatdb.conversations) as c
            where not exists (select from {target.table} as u where u.{target.column} collate "C" = c.user_id)
            order by user_id
            limit {SHOWN}
            """.encode()  # noqa: S608 - names that the server has quoted
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
    Run a statement that locks the conversations and the users.

    It waits for the second lock for less than deadlock_timeout, so that no writer who has them the other way round is
    whom the server picks to end a deadlock. Which one is the first changes from try to try: whichever order the writers
    have, there is one that lets them end.
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
