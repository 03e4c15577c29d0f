"""
yoyo's side of the bookkeeping: its tables, its lock, and what it or the first release of chatdb recorded in them.

yoyo keeps its tables in the first schema of a role's search_path, beside those of a host's own migrations.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress

from chatdb.admin.connection import APPLICATION, errors, fetch_value, psycopg
from chatdb.errors import UnavailableError

_FIRST_RELEASE = {
    "0001.create-schema": "ca8762c20fe438de5a9206b91001b125a171d40ea0933dd9f134f163ecfe9ed2",
    "0002.create-conversations": "d5c2f640603ae6ecda98e4795965b7f037968ae3775acf516ddef6d1348d2d97",
    "0003.create-messages": "04cc9c66f9f0e4e6e869f8e58df0f3b7dc3acf95e6a6f49310380f7a9f9bc43a",
}
"""The names and checksums of the first release's migrations, each of which has to be run again."""


def _find_yoyo_schemas(connection: psycopg.Connection) -> dict[str, list[str]]:
    """
    Return the schemas in which yoyo, and the first release of chatdb, have tables that record what was applied.

    Of these tables without those that are another role's or run code.
    """
    statement = """
        select pg_catalog.quote_ident(n.nspname::text), pg_catalog.array_agg(c.relname::text)
        from pg_catalog.pg_class as c
        inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
        inner join pg_catalog.pg_roles as r on r.oid = c.relowner
        where c.relname in ('_yoyo_migration', '_chatdb_migration', 'yoyo_lock')
          and n.nspname <> 'chatdb'
          and c.relkind = 'r'
          and not (c.relhastriggers or c.relhasrules or c.relrowsecurity or c.relhassubclass)
          and (
              r.rolsuper or r.rolname = current_user
              or r.oid = (
                  select d.datdba from pg_catalog.pg_database as d
                  where d.datname = pg_catalog.current_database()
              )
          )
          and pg_catalog.has_schema_privilege(n.oid, 'usage')
          and pg_catalog.has_table_privilege(c.oid, 'select')
          and (
              c.relname <> 'yoyo_lock'
              or pg_catalog.has_table_privilege(c.oid, 'insert') and pg_catalog.has_table_privilege(c.oid, 'delete')
          )
        group by n.nspname
        order by n.nspname <> 'public', n.nspname
        """
    return dict(connection.execute(statement).fetchall())


def applied_by_yoyo(connection: psycopg.Connection, names: list[str]) -> set[str]:
    """Return which of the migrations `yoyo apply` has recorded."""
    return {
        name
        for schema, tables in _find_yoyo_schemas(connection).items()
        if "_yoyo_migration" in tables
        for (name,) in connection.execute(
            f"select migration_id from {schema}._yoyo_migration where migration_id = any(%s)".encode(),  # noqa: S608
            [names],
        )
    }


def remove_yoyo_record(connection: psycopg.Connection, name: str) -> None:
    """Remove a migration from what `yoyo apply` has recorded."""
    for schema, tables in _find_yoyo_schemas(connection).items():
        if "_yoyo_migration" in tables:
            connection.execute(f"delete from {schema}._yoyo_migration where migration_id = %s".encode(), [name])  # noqa: S608


def remove_first_release(connection: psycopg.Connection, objects: set[str], *, by_yoyo: bool) -> None:
    """
    Remove the rows of the first release's migrations, whose names a host's own may have.

    They are chatdb's if what they create is among `objects` and its checksums are beside them; without checksums, if
    all three were created. The first release wrote its checksum also beside a host's migration that had hidden its own.
    """
    names, sums = [*_FIRST_RELEASE], [*_FIRST_RELEASE.values()]
    created = [name for name in names if name.partition(".create-")[2] in objects]
    for schema, tables in _find_yoyo_schemas(connection).items():
        rows, checksums = f"{schema}._yoyo_migration", f"{schema}._chatdb_migration"
        if {"_yoyo_migration", "_chatdb_migration"} <= {*tables}:
            connection.execute(
                f"delete from {rows} as y using {checksums} as c where y.migration_id = c.migration_id "  # noqa: S608
                "and y.applied_at_utc = c.applied_at_utc and c.sha256 = any(%s) and y.migration_id = any(%s)".encode(),
                [sums, created],
            )
            connection.execute(f"delete from {checksums} where sha256 = any(%s)".encode(), [sums])  # noqa: S608
            if fetch_value(connection, f"select true from {checksums} limit 1") is None:  # noqa: S608
                connection.execute(f"drop table {checksums}".encode())
        elif created == names and not by_yoyo and "_yoyo_migration" in tables:
            mine = f"from {rows} where migration_id = any(%s)"
            if fetch_value(connection, f"select pg_catalog.count(*) {mine}", names) == len(names):
                connection.execute(f"delete {mine}".encode(), [names])


@contextmanager
def yoyo_lock(connection: psycopg.Connection, *, in_transaction: bool, deadline: float) -> Generator[None]:
    """
    Insert the row in yoyo_lock that keeps `yoyo apply` away, if that table exists; delete it at the end of the block.

    In an open transaction the row disappears with this process, however that ends, and `yoyo apply` waits in its
    INSERT. But CREATE INDEX CONCURRENTLY would wait for that INSERT: for it the row is committed. Its negative number
    tells the next process that the row was chatdb's, in case this one is killed.
    """
    schemas = _find_yoyo_schemas(connection).items()
    schema = next((schema for schema, tables in schemas if "yoyo_lock" in tables), None)
    if schema is None:
        yield
        return
    while True:
        connection.execute(_DELETE_STALE_LOCK.format(schema=schema).encode(), {"application": APPLICATION})
        connection.execute("begin")
        connection.execute("set local idle_in_transaction_session_timeout = 0")
        if fetch_value(connection, _INSERT_LOCK.format(schema=schema)) is not None:
            break
        connection.execute("rollback")
        if time.monotonic() > deadline:
            raise UnavailableError(
                "yoyo's own lock is taken: yoyo apply is at work, or was killed; in the second case run yoyo "
                "break-lock, and this again",
                sent=False,
            )
        time.sleep(0.2)
    if not in_transaction:
        connection.execute("commit")
    try:
        yield
    finally:
        with suppress(errors.Error):  # one that is lost has lost the row with its transaction
            connection.execute(
                b"rollback"
                if in_transaction
                else f"delete from {schema}.yoyo_lock where pid = -pg_catalog.pg_backend_pid()".encode()  # noqa: S608
            )


_INSERT_LOCK = """
    insert into {schema}.yoyo_lock (locked, ctime, pid)
    values (1, pg_catalog.now() at time zone 'UTC', -pg_catalog.pg_backend_pid())
    on conflict do nothing returning pid
"""

# a row with a positive number is yoyo's own, and left over if no session is old enough to be that yoyo's
_DELETE_STALE_LOCK = """
    delete from {schema}.yoyo_lock as l
    where l.pid < 0 or not exists (
        select from pg_catalog.pg_stat_activity as a
        where a.datname = pg_catalog.current_database()
          and coalesce(a.backend_type, 'client backend') = 'client backend'
          and coalesce(a.application_name, '') <> %(application)s
          and coalesce(a.backend_start < l.ctime at time zone 'UTC' + interval '1 minute', true)
    )
"""
