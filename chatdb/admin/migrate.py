"""
Applies and rolls back the files under `migrations/`. They are in yoyo's format, so `yoyo apply` can run them too.

`chatdb._chatdb_migration` records each applied file with its checksum, because yoyo records only the name. A migration
and its record are one transaction, unless the file opts out. Records that `yoyo apply` made are copied into it.

Decision: docs/decisions/0006-yoyo.md
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple, cast

from chatdb._core.query import data_folder
from chatdb._core.validate import type_name
from chatdb.admin.connection import (
    REPACK_LOCK,
    WAIT,
    advisory_lock,
    connected,
    fetch_value,
    pinned_transaction,
    prepare_session,
    psycopg,
    retry_on_lock_timeout,
    wait_for_lock,
)
from chatdb.admin.ownership import foreign_objects, may_create_schemas
from chatdb.admin.yoyo import applied_by_yoyo, remove_first_release, remove_yoyo_record, yoyo_lock
from chatdb.errors import ConfigurationError, InvalidInputError, SchemaError

try:
    import sqlparse  # as in yoyo, splits the files into statements
except ImportError:
    raise ConfigurationError("the extra for migrations is not installed: run pip install 'chatdb[migrate]'") from None

SUMS = "SHA256SUMS"

Report = Callable[[str, float], None]
"""Called after each migration with its name and its duration in seconds."""

_MAX_WAIT: Final = 86_400.0

_OUTSIDE: Final = re.compile(r"--\s*transactional:\s*false\n")
"""The first line of a file that runs outside a transaction, as yoyo reads it."""

_log = logging.getLogger("chatdb")


class MigrationFile(NamedTuple):
    """A migration of this release, with its rollback."""

    name: str
    path: Path
    sql: str
    rollback: str
    checksum: str

    @property
    def warning(self) -> str:
        """The effect of the rollback, from the first comment of its file."""
        return _OUTSIDE.sub("", self.rollback).partition("\n")[0].removeprefix("-- ")


def migration_files(folder: Path | None = None) -> list[MigrationFile]:
    """
    Return the migrations of this release, in order.

    Raises ConfigurationError, which names the file, if a file is missing or does not match SHA256SUMS.
    """
    folder = folder or data_folder("migrations")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    released = {name: checksum for checksum, name in (line.split() for line in lines)}
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.sql"))}
    for name in sorted(released.keys() | texts.keys()):
        if name not in texts:
            raise ConfigurationError(f"the migration {name} is missing from {folder}: reinstall chatdb")
        if released.get(name) != hashlib.sha256(texts[name].encode()).hexdigest():
            raise ConfigurationError(
                f"the migration {name} does not match its checksum in {SUMS}: restore the released file, and put "
                "changes into a new migration"
            )
    return [
        MigrationFile(stem, folder / name, sql, texts[f"{stem}.rollback.sql"], released[name])
        for name, sql in texts.items()
        if not (stem := name.removesuffix(".sql")).endswith(".rollback")
    ]


def apply_migrations(
    dsn: str, *, to: str | None = None, wait: float = WAIT, report: Report | None = None, folder: Path | None = None
) -> list[str]:
    """
    Apply the missing migrations, up to and including `to`, and return their names.

    Blocks; in a coroutine, call it with `asyncio.to_thread`. `dsn` must not go through a transaction pooler, and its
    role must be allowed to create schemas. Concurrent calls are safe: one works, and the others wait and find nothing
    to do. A call also finishes what a killed process left half done, and rebuilds invalid indexes.

    Raises ConfigurationError; SchemaError if a migration was applied with different content than this release's; and
    UnavailableError if the server cannot be reached, or if another process or transaction still holds a lock after
    `wait` seconds. It is safe to call it again after any of these errors.
    """
    _check_arguments(to, wait)
    files = migration_files(folder)
    deadline = time.monotonic() + wait
    with advisory_lock(dsn, wait=wait) as connection:
        _refuse_foreign_objects(connection)
        _warn_of_encoding(connection)
        missing = _pending(connection, files, to)
        _check_contents(connection, files)
        _rebuild_indexes(connection, deadline)
        if not missing and _applied(connection, files).keys() <= _recorded(connection).keys():
            return []
        if not may_create_schemas(connection):
            if not missing:
                return []
            raise ConfigurationError("the database role may not create a schema: run this as the database's owner")
        _wait_for_repack(connection, deadline)
        with _worker(dsn, connection, missing, deadline) as worker:
            retry_on_lock_timeout(lambda: _prepare_bookkeeping(worker, files), deadline)
            for file in missing:
                _run(worker, file, file.sql, _record, deadline, report)
    return [file.name for file in missing]


def rollback_migrations(
    dsn: str,
    *,
    to: str | None = None,
    expected: list[str] | None = None,
    wait: float = WAIT,
    report: Report | None = None,
    folder: Path | None = None,
) -> list[str]:
    """
    Roll back the last migration, or all after `to` ("0": all), and return their names. This deletes their data.

    `expected` lists the names that the caller agreed to roll back. If the list has changed, nothing is rolled back.

    Blocks, and raises the errors of `apply_migrations`. Also raises SchemaError if `expected` no longer holds, or if a
    newer release has migrated the database: roll back that release's migrations first.
    """
    _check_arguments(to, wait)
    files = migration_files(folder)
    deadline = time.monotonic() + wait
    with advisory_lock(dsn, wait=wait) as connection:
        last = _last(connection, files, to)
        if expected is not None and [file.name for file in last] != expected:
            raise SchemaError(
                "another process has migrated this database in the meantime, so nothing was rolled back: review the "
                "list again"
            )
        if not last:
            return []
        _refuse_foreign_objects(connection)
        _wait_for_repack(connection, deadline)
        with _worker(dsn, connection, last, deadline) as worker:
            for file in last:
                _run(worker, file, file.rollback, _remove_record, deadline, report)
    return [file.name for file in last]


def missing_migrations(dsn: str, *, to: str | None = None, folder: Path | None = None) -> list[MigrationFile]:
    """Return the migrations that `apply_migrations` would apply. Writes nothing."""
    _check_arguments(to, WAIT)
    files = migration_files(folder)
    with pinned_transaction(dsn) as connection:
        _warn_of_encoding(connection)
        _check_contents(connection, files)
        return _pending(connection, files, to)


def last_migrations(
    dsn: str, *, to: str | None = None, folder: Path | None = None
) -> list[tuple[MigrationFile, dict[str, int | None]]]:
    """
    Return what `rollback_migrations` would roll back, with the row count of each table that it drops.

    A count is None if row-level security hides rows from the role, even from the tables' owner if it is forced.
    """
    files = migration_files(folder)
    with pinned_transaction(dsn) as connection:
        return [
            (file, {f"chatdb.{table}": _count(connection, table) for table in _drops(file) & _tables(connection)})
            for file in _last(connection, files, to)
        ]


def applied_migrations(dsn: str, *, folder: Path | None = None) -> dict[str, str | None]:
    """Return the applied migrations by name, each with its checksum, or None if only yoyo has recorded it."""
    with pinned_transaction(dsn) as connection:
        return _applied(connection, migration_files(folder))


def _check_arguments(to: object, wait: object) -> None:
    if to is not None and not isinstance(to, str):
        raise InvalidInputError("to", f"must be a str or None, not {type_name(type(to))}")
    if type(wait) not in {int, float} or not 0 <= cast("float", wait) <= _MAX_WAIT:
        raise InvalidInputError("wait", f"must be a number of seconds from 0 to {_MAX_WAIT:,.0f}")


def _warn_of_encoding(connection: psycopg.Connection) -> None:
    encoding = fetch_value(connection, "show server_encoding")
    if encoding != "UTF8":
        _log.warning(
            "the database's encoding is %s, which cannot store every character: create the service's database with "
            "encoding 'UTF8' template template0",
            encoding,
        )


def _refuse_foreign_objects(connection: psycopg.Connection) -> None:
    foreign = foreign_objects(connection)
    if foreign:
        raise ConfigurationError(
            f"the {'; '.join(map(str, foreign))}, which could run code with this role's privileges: drop the object, "
            "or transfer it to the database's owner (alter ... owner to)"
        )


def _tables(connection: psycopg.Connection) -> set[str]:
    rows = connection.execute(
        "select c.relname::text from pg_catalog.pg_class as c "
        "inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace "
        "where n.nspname = 'chatdb' and c.relkind in ('r', 'p')"
    )
    return {name for (name,) in rows}


def _recorded(connection: psycopg.Connection) -> dict[str, str]:
    """Return chatdb's own records: names and checksums."""
    if "_chatdb_migration" not in _tables(connection):
        return {}
    try:
        return dict(connection.execute("select migration_id, sha256 from chatdb._chatdb_migration").fetchall())
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            "the database role may not read chatdb._chatdb_migration: run this as its owner"
        ) from None


def _index(files: list[MigrationFile], to: str) -> int:
    for index, file in enumerate(files):
        if to in {file.name, file.name.partition(".")[0]}:
            return index
    raise InvalidInputError("to", f"must be one of {', '.join(file.name for file in files)}")


def _pending(connection: psycopg.Connection, files: list[MigrationFile], to: str | None) -> list[MigrationFile]:
    applied = _applied(connection, files)
    wanted = files if to is None else files[: _index(files, to) + 1]
    if to is not None and any(file.name in applied for file in files[len(wanted) :]):
        raise InvalidInputError("to", "is older than the applied migrations: roll back with chatdb rollback --to")
    # yoyo rollback drops columns and indexes, and a killed rollback some of them, but chatdb's record stays
    existing = _columns_indexes_and_parameters(connection)
    not_valid = _constraints_not_valid(connection)
    pending: list[MigrationFile] = []
    for file in wanted:
        # a constraint that is added again is not valid either
        added = {name for name in _validates(file) for each in pending if f"add constraint {name} " in each.sql}
        is_dropped = not _drops_from_tables(file) <= existing
        if file.name not in applied or is_dropped or added or _validates(file) & not_valid:
            pending.append(file)
    return pending


def _last(connection: psycopg.Connection, files: list[MigrationFile], to: str | None) -> list[MigrationFile]:
    newer = sorted(_recorded(connection).keys() - {file.name for file in files})
    if newer:
        raise SchemaError(
            f"a newer release has applied {', '.join(newer)}: roll it back first with that release's chatdb rollback"
        )
    applied = _applied(connection, files)
    if not applied and "conversations" in _tables(connection):
        raise SchemaError("chatdb's tables exist, but no migration is recorded: run chatdb migrate first")
    last = [file for file in reversed(files) if file.name in applied]
    if to is None:
        return last[:1]
    kept = 0 if to == "0" else _index(files, to) + 1
    return [file for file in last if file not in files[:kept]]


def _applied(connection: psycopg.Connection, files: list[MigrationFile]) -> dict[str, str | None]:
    """Return the migrations that chatdb or yoyo has recorded and whose tables exist."""
    tables = _tables(connection)
    by_yoyo = applied_by_yoyo(connection, [file.name for file in files])
    recorded: dict[str, str | None] = dict.fromkeys(by_yoyo) | _recorded(connection)
    if not _has_schema(connection):
        return {}
    # yoyo rollback drops tables but keeps chatdb's record
    dropped = {file.name for file in files if not _drops(file) | _alters(file) <= tables}
    return {name: recorded[name] for name in sorted(recorded) if name not in dropped}


def _has_schema(connection: psycopg.Connection) -> bool:
    return fetch_value(connection, "select oid from pg_catalog.pg_namespace where nspname = 'chatdb'") is not None


def _check_contents(connection: psycopg.Connection, files: list[MigrationFile]) -> None:
    recorded = _applied(connection, files)
    for file in files:
        if (recorded.get(file.name) or file.checksum) != file.checksum:
            raise SchemaError(
                f"the migration {file.name} was applied to this database with different content than {file.path.name} "
                "in this release: use the release that applied it, or roll the migration back first"
            )


def _prepare_bookkeeping(connection: psycopg.Connection, files: list[MigrationFile]) -> None:
    """Create chatdb's bookkeeping, copy yoyo's records into it, and remove those of the first release."""
    with connection.transaction():
        connection.execute("set local lock_timeout = '2s'")
        is_new = "_chatdb_migration" not in _tables(connection)
        objects = _tables(connection) | ({"schema"} if _has_schema(connection) else set[str]())
        by_yoyo = applied_by_yoyo(connection, [*_applied(connection, files)])
        connection.execute("create schema if not exists chatdb")
        connection.execute(
            "create table if not exists chatdb._chatdb_migration (migration_id text primary key, sha256 text not null, "
            "chatdb_version text not null, applied_at_utc timestamp not null)"
        )
        if is_new:
            connection.execute(_REVOKE)
        for file in files:
            if file.name in by_yoyo:
                _record(connection, file, replace=False)
        if is_new:
            remove_first_release(connection, objects, by_yoyo=bool(by_yoyo))


# default privileges are meant for the data tables, not for the bookkeeping
_REVOKE = """
    do $$
    declare
        grantee pg_catalog.regrole;
    begin
        for grantee in
            select distinct a.grantee::pg_catalog.regrole
            from pg_catalog.pg_class as c, pg_catalog.aclexplode(c.relacl) as a
            where c.oid = 'chatdb._chatdb_migration'::pg_catalog.regclass and a.grantee not in (0, c.relowner)
        loop
            execute pg_catalog.format('revoke all on chatdb._chatdb_migration from %s', grantee);
        end loop;
        revoke all on chatdb._chatdb_migration from public;
    end $$
"""


def _record(connection: psycopg.Connection, file: MigrationFile, *, replace: bool = True) -> None:
    action = "do nothing"
    if replace:
        action = (
            "do update set sha256 = excluded.sha256, chatdb_version = excluded.chatdb_version, "
            "applied_at_utc = excluded.applied_at_utc"
        )
    connection.execute(
        "insert into chatdb._chatdb_migration (migration_id, sha256, chatdb_version, applied_at_utc) "  # noqa: S608
        f"values (%s, %s, %s, pg_catalog.now() at time zone 'UTC') on conflict (migration_id) {action}".encode(),
        [file.name, file.checksum, version("chatdb")],
    )


def _remove_record(connection: psycopg.Connection, file: MigrationFile) -> None:
    """Delete both records of a migration; the first migration's rollback has dropped chatdb's table."""
    if "_chatdb_migration" in _tables(connection):
        connection.execute("delete from chatdb._chatdb_migration where migration_id = %s", [file.name])
    remove_yoyo_record(connection, file.name)


def _run(
    worker: psycopg.Connection,
    file: MigrationFile,
    sql: str,
    record: Callable[[psycopg.Connection, MigrationFile], None],
    deadline: float,
    report: Report | None,
) -> None:
    """Run and record a migration, in one transaction unless its first line opts out."""

    def work() -> None:
        with worker.transaction() if _is_transactional(sql) else nullcontext():
            for statement in sqlparse.split(sql):
                worker.execute(statement.encode())
            record(worker, file)

    start = time.monotonic()
    try:
        retry_on_lock_timeout(work, deadline)
    finally:
        if not _is_transactional(sql):
            with suppress(psycopg.Error):
                worker.execute("reset lock_timeout")
    if report is not None:
        report(file.name, time.monotonic() - start)


def _is_transactional(sql: str) -> bool:
    return _OUTSIDE.match(sql) is None


@contextmanager
def _worker(
    dsn: str, lock: psycopg.Connection, work: list[MigrationFile], deadline: float
) -> Generator[psycopg.Connection]:
    """Yield a second connection for the work; the first one holds the locks."""
    in_transaction = all(_is_transactional(file.sql) for file in work)
    with connected(dsn) as worker:
        prepare_session(worker)
        with yoyo_lock(lock, in_transaction=in_transaction, deadline=deadline):
            yield worker


def _rebuild_indexes(connection: psycopg.Connection, deadline: float) -> None:
    """Rebuild the indexes that a failed or killed CREATE INDEX CONCURRENTLY left invalid."""

    def rebuild() -> None:
        connection.execute("set lock_timeout = '2s'")  # not local: CONCURRENTLY cannot run in a transaction
        invalid = connection.execute(_INVALID).fetchall()
        if invalid:
            _wait_for_repack(connection, deadline)
        for name, identifier in invalid:
            leftover = re.search(r"_cc(new|old)\d*$", name)  # from REINDEX CONCURRENTLY; the original exists
            action = "drop index concurrently if exists" if leftover else "reindex index concurrently"
            connection.execute(f"{action} {identifier}".encode())

    retry_on_lock_timeout(rebuild, deadline)
    connection.execute("reset lock_timeout")


def _wait_for_repack(connection: psycopg.Connection, deadline: float) -> None:
    """Keep chatdb repack from working at the same time: pg_repack would cancel statements that alter the table."""
    wait_for_lock(connection, REPACK_LOCK, wait=max(0.0, deadline - time.monotonic()))


# skips indexes that are being built; during another role's build, which hides its index, it skips all of them. It also
# skips the search index, which can take hours and would hold up a deployment: chatdb search-index create rebuilds it
_INVALID = """
    select c.relname, pg_catalog.quote_ident(n.nspname::text) || '.' || pg_catalog.quote_ident(c.relname::text)
    from pg_catalog.pg_index as i
    inner join pg_catalog.pg_class as c on c.oid = i.indexrelid
    inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
    where n.nspname = 'chatdb'
      and not i.indisvalid
      and c.relname <> 'ix_messages_search'
      and not exists (
          select from pg_catalog.pg_stat_progress_create_index as p
          where p.datname = pg_catalog.current_database() and coalesce(p.index_relid = i.indexrelid, true)
      )
    order by c.relname !~ '_cc(new|old)[0-9]*$', c.relname
"""


def _drops(file: MigrationFile) -> set[str]:
    """Return the tables that a migration's rollback drops."""
    return {*re.findall(r"^drop table if exists chatdb\.([a-z]\w*)", file.rollback, re.MULTILINE)}


def _alters(file: MigrationFile) -> set[str]:
    """Return the tables from which a migration's rollback drops columns."""
    return {*re.findall(r"^alter table chatdb\.([a-z]\w*)", file.rollback, re.MULTILINE)}


def _drops_from_tables(file: MigrationFile) -> set[str]:
    """Return the columns and storage parameters, after their table's name, and the indexes that a rollback drops."""
    statements = re.findall(r"^alter table chatdb\.([a-z]\w*)([^;]*);", file.rollback, re.MULTILINE)
    columns = {
        f"{table}.{column}"
        for table, actions in statements
        for column in re.findall(r"\bdrop column if exists ([a-z]\w*)", actions)
    }
    parameters = {
        f"{table}.{parameter.strip()}"
        for table, actions in statements
        for reset in re.findall(r"\breset \(([^)]*)\)", actions)
        for parameter in reset.split(",")
    }
    return (
        columns
        | parameters
        | {*re.findall(r"^drop index concurrently if exists chatdb\.([a-z]\w*)", file.rollback, re.MULTILINE)}
    )


def _validates(file: MigrationFile) -> set[str]:
    """Return the constraints that a migration validates."""
    return {*re.findall(r"^alter table chatdb\.[a-z]\w* validate constraint (\w+)", file.sql, re.MULTILINE)}


def _constraints_not_valid(connection: psycopg.Connection) -> set[str]:
    statement = """
        select k.conname::text
        from pg_catalog.pg_constraint as k
        inner join pg_catalog.pg_namespace as n on n.oid = k.connamespace
        where n.nspname = 'chatdb' and not k.convalidated
        """
    return {name for (name,) in connection.execute(statement)}


def _columns_indexes_and_parameters(connection: psycopg.Connection) -> set[str]:
    statement = """
        select c.relname::text || coalesce('.' || a.attname::text, '')
        from pg_catalog.pg_class as c
        inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
        left join pg_catalog.pg_attribute as a on a.attrelid = c.oid and c.relkind in ('r', 'p')
        where n.nspname = 'chatdb' and not coalesce(a.attisdropped, false)
        union
        select pg_catalog.concat(c.relname, '.', pg_catalog.split_part(o.option, '=', 1))
        from pg_catalog.pg_class as c
        inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
        cross join pg_catalog.unnest(c.reloptions) as o (option)
        where n.nspname = 'chatdb'
        """
    return {name for (name,) in connection.execute(statement)}


def _count(connection: psycopg.Connection, table: str) -> int | None:
    if fetch_value(connection, "select pg_catalog.row_security_active(%s)", f"chatdb.{table}"):
        return None
    count: int = fetch_value(connection, f"select pg_catalog.count(*) from chatdb.{table}")  # noqa: S608 - named in a released file
    return count
