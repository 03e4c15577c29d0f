"""
Row-level security on chatdb's tables: a statement that lacks its `user_id` condition reaches no other user's rows.

It is forced, so it also applies to the tables' owner; only superusers and roles with BYPASSRLS bypass it.
`chatdb.transaction(db, user_id=...)` sets the user, as does each call on a pool with `row_level_security=True`. If no
user is set, the policies raise an error: an empty result would look like an empty account.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from chatdb._core.driver_errors import RLS_USER_ID
from chatdb.admin.connection import (
    WAIT,
    advisory_lock,
    fetch_value,
    pinned_transaction,
    psycopg,
    refuse_distributed,
    retry_on_lock_timeout,
)
from chatdb.errors import ConfigurationError, SchemaError
from chatdb.schema import without_quotes

TABLES = ("conversations", "messages", "message_parts")

_FUNCTION = f"chatdb.{RLS_USER_ID}()"
_BODY = f"""
declare
    named constant pg_catalog.text := pg_catalog.current_setting('chatdb.user_id', true);
begin
    if named is null or pg_catalog.octet_length(named) operator(pg_catalog.=) 0 then
        raise exception using
            errcode = 'insufficient_privilege',
            constraint = '{RLS_USER_ID}',
            message = 'row-level security is on for chatdb''s tables, and no user is named',
            hint = 'Name one in the transaction: chatdb.transaction(db, user_id=...), or set local chatdb.user_id.';
    end if;
    return named;
end
"""
_CREATE = (
    f"create or replace function {_FUNCTION} returns pg_catalog.text language plpgsql stable parallel safe "
    f"as $rls${_BODY}$rls$"
)
# a subquery is evaluated once per statement, the bare function once per written row
_CONDITION = f"user_id operator(pg_catalog.=) (select {_FUNCTION})"
_AS_STORED = f"(user_id = ( SELECT {_FUNCTION} AS {RLS_USER_ID}))"


class TableProtection(NamedTuple):
    """The row-level security of one table."""

    table: str
    is_on: bool
    is_forced: bool
    policy: tuple[bool, str, bool, str, str] | None
    others: list[str]
    """The names of other permissive policies, which would let more rows through."""


def protect_tables(dsn: str, *, off: bool = False, wait: float = WAIT) -> list[str]:
    """
    Switch row-level security on or off, and return the statements that ran; none if nothing had to change.

    Blocks. One transaction locks each table briefly. It waits at most two seconds for a lock, then tries again.

    Raises as `chatdb.admin.migrate.apply_migrations` does, and ConfigurationError if a table has another permissive
    policy, which would let more rows through.
    """
    deadline = time.monotonic() + wait
    with advisory_lock(dsn, wait=wait) as connection:
        refuse_distributed(
            connection,
            "chatdb protect",
            "the setting that names the user does not reach the nodes, so keep the users apart in the service",
        )
        statements = _statements(connection, off=off)

        def run_statements() -> None:
            with connection.transaction():
                connection.execute("set local lock_timeout = '2s'")
                for statement in statements:
                    connection.execute(statement.encode())

        if statements:
            retry_on_lock_timeout(run_statements, deadline)
    return statements


def protection_statements(dsn: str, *, off: bool = False) -> list[str]:
    """Return the statements that `protect_tables` would run. Changes nothing."""
    with pinned_transaction(dsn) as connection:
        refuse_distributed(
            connection,
            "chatdb protect",
            "the setting that names the user does not reach the nodes, so keep the users apart in the service",
        )
        return _statements(connection, off=off)


def _statements(connection: psycopg.Connection, *, off: bool) -> list[str]:
    tables = read_protection(connection)
    if off:
        statements = [statement for table in tables for statement in _drop_statements(table)]
        exists = fetch_value(connection, "select pg_catalog.to_regprocedure(%s) is not null", _FUNCTION)
        return [*statements, f"drop function {_FUNCTION}"] if exists else statements
    return [*missing_function(connection), *(statement for table in tables for statement in missing_statements(table))]


def read_protection(connection: psycopg.Connection) -> list[TableProtection]:
    """Return the row-level security of each of chatdb's tables. Raises SchemaError if a table is missing."""
    return [_read_table(connection, table) for table in TABLES]


def missing_function(connection: psycopg.Connection) -> list[str]:
    """Return the statements that create or correct the function that the policies call."""
    ((owner, is_owners, is_open, is_right),) = connection.execute(
        """
        select
            pg_catalog.quote_ident(o.rolname::pg_catalog.text),
            coalesce(p.proowner operator(pg_catalog.=) o.oid, o.rolname operator(pg_catalog.=) current_user),
            pg_catalog.has_function_privilege('public', p.oid, 'execute'),
            p.prosrc operator(pg_catalog.=) %(body)s::pg_catalog.text
                and p.provolatile operator(pg_catalog.=) 's'
                and l.lanname operator(pg_catalog.=) 'plpgsql'
                and not p.prosecdef
                and p.proconfig is null
        from pg_catalog.pg_class as c
        inner join pg_catalog.pg_roles as o on o.oid operator(pg_catalog.=) c.relowner
        left join pg_catalog.pg_proc as p on p.oid operator(pg_catalog.=) pg_catalog.to_regprocedure(%(function)s)
        left join pg_catalog.pg_language as l on l.oid operator(pg_catalog.=) p.prolang
        where c.oid operator(pg_catalog.=) pg_catalog.to_regclass('chatdb.messages')
        """,
        {"body": _BODY, "function": _FUNCTION},
    ).fetchall()
    statements = [] if is_right else [_CREATE]
    if not is_open:
        statements.append(f"grant execute on function {_FUNCTION} to public")
    if not is_owners:  # its owner can replace its body
        statements.append(f"alter function {_FUNCTION} owner to {owner}")
    return statements


def missing_statements(protection: TableProtection) -> list[str]:
    """Return the statements that complete a table's protection. Raises ConfigurationError if it has another."""
    table = protection.table
    if protection.others:
        raise ConfigurationError(
            f"chatdb.{table} has another permissive policy, {protection.others[0]}, which would let other users' rows "
            "through: drop it or make it restrictive, then run this again"
        )
    statements: list[str] = []
    policy = protection.policy and (*protection.policy[:3], *map(without_quotes, protection.policy[3:]))
    if policy != (True, "*", True, _AS_STORED, _AS_STORED):
        if protection.policy is not None:
            statements.append(f"drop policy rls_{table} on chatdb.{table}")
        statements.append(f"create policy rls_{table} on chatdb.{table} using ({_CONDITION}) with check ({_CONDITION})")
    if not protection.is_on or not protection.is_forced:
        statements.append(f"alter table chatdb.{table} enable row level security, force row level security")
    return statements


def _drop_statements(protection: TableProtection) -> list[str]:
    table = protection.table
    statements: list[str] = []
    if protection.is_on or protection.is_forced:
        statements.append(f"alter table chatdb.{table} no force row level security, disable row level security")
    if protection.policy is not None:
        statements.append(f"drop policy rls_{table} on chatdb.{table}")
    return statements


def _read_table(connection: psycopg.Connection, table: str) -> TableProtection:
    row = connection.execute(
        """
        select oid, relrowsecurity, relforcerowsecurity from pg_catalog.pg_class
        where relnamespace = pg_catalog.to_regnamespace('chatdb') and relname = %s
        """,
        [table],
    ).fetchone()
    if row is None:
        raise SchemaError(f"the database has no table chatdb.{table}: run chatdb migrate or yoyo apply")
    policies = connection.execute(
        """
        select polname, polpermissive, polcmd, polroles = '{0}',
            coalesce(pg_catalog.pg_get_expr(polqual, polrelid), ''),
            coalesce(pg_catalog.pg_get_expr(polwithcheck, polrelid), '')
        from pg_catalog.pg_policy where polrelid = %s order by polname
        """,
        [row[0]],
    ).fetchall()
    own = next((policy[1:] for policy in policies if policy[0] == f"rls_{table}"), None)
    others = [name for name, is_permissive, *_ in policies if is_permissive and name != f"rls_{table}"]
    return TableProtection(table, bool(row[1]), bool(row[2]), own, others)
