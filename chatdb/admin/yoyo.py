"""
yoyo's bookkeeping: its tables, its lock, and the records that yoyo or chatdb's first release left there.

yoyo keeps its tables in the first schema of a role's search_path. A host's own migrations may be recorded there too.
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
"""The first release's migrations and their checksums; all of them must run again."""


def _find_yoyo_schemas(connection: psycopg.Connection) -> dict[str, list[str]]:
    """
    Return the tables of yoyo and of chatdb's first release, by schema.

    Skips tables that belong to an untrusted role or that can run code, for example through a trigger.
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
    """Return the migrations among `names` that `yoyo apply` has recorded."""
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
    """Delete the record that `yoyo apply` made of a migration."""
    for schema, tables in _find_yoyo_schemas(connection).items():
        if "_yoyo_migration" in tables:
            connection.execute(f"delete from {schema}._yoyo_migration where migration_id = %s".encode(), [name])  # noqa: S608


def remove_first_release(connection: psycopg.Connection, objects: set[str], *, by_yoyo: bool) -> None:
    """
    Delete the records of the first release's migrations. A host's own migrations may have the same names.

    A record is chatdb's if `objects` contains what its migration creates and the first release's checksum is recorded
    with it; without checksums, if all three objects exist. A checksum alone proves nothing: the first release also
    recorded it for a host's migration of the same name.
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
    Hold a row in yoyo_lock, if that table exists, so that `yoyo apply` does not run during the block.

    With `in_transaction` the row is not committed: it disappears however this process ends, and `yoyo apply` waits in
    its INSERT. CREATE INDEX CONCURRENTLY would wait for that INSERT, so it needs a committed row, whose negative PID
    marks it as chatdb's if this process is killed.
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
                "yoyo's own lock is taken: wait until yoyo apply ends or, if it was killed, run yoyo break-lock, then "
                "run this again",
                sent=False,
            )
        time.sleep(0.2)
    if not in_transaction:
        connection.execute("commit")
    try:
        yield
    finally:
        with suppress(errors.Error):  # if the connection is lost, the server or the next run removes the row
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

# a row with a positive PID is yoyo's own; it is stale if no session is old enough to be that yoyo's
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
