"""
Applies the files under `migrations/`, and takes them back, by yoyo: the same files and bookkeeping as `yoyo apply`.

What yoyo lacks is here: a lock that ends with its process, a look at the files' contents (yoyo knows their names only),
and patience with busy tables. `_chatdb_migration`, beside yoyo's own tables, remembers the contents that were applied.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from chatdb._query import data_folder
from chatdb.direct import APPLICATION, connected, locked, one, patiently, without_timeouts
from chatdb.dsn import libpq_dsn
from chatdb.errors import ConfigurationError, InvalidInputError, SchemaError, UnavailableError

try:
    import psycopg
    import psycopg.conninfo
    import yoyo
except ImportError:
    raise ConfigurationError("yoyo is not installed: pip install 'chatdb[migrate]'") from None

SUMS = "SHA256SUMS"
WAIT = 60.0
"""How long by default, in seconds, another process may be at it, and tables may be busy."""

Report = Callable[[str, float], None]
"""What is called with a migration's name and its seconds when it is done."""


class MigrationFile(NamedTuple):
    """A migration of this release."""

    name: str
    path: Path
    sql: str
    rollback: str
    checksum: str

    @property
    def warning(self) -> str:
        """What the rollback does, as its first line says."""
        return self.rollback.partition("\n")[0].removeprefix("-- ")


def migration_files(folder: Path | None = None) -> list[MigrationFile]:
    """
    Return the migrations of this release, in their order.

    Raises ConfigurationError, which names the file, if one of them is not as it was released.
    """
    folder = folder or data_folder("migrations")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    released = {name: checksum for checksum, name in (line.split() for line in lines)}
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.sql"))}
    for name in sorted(released.keys() | found.keys()):
        if name not in found:
            raise ConfigurationError(f"the migration {name} is missing from {folder}: install chatdb again")
        if released.get(name) != _checksum(found[name]):
            raise ConfigurationError(
                f"the migration {name} is not as it was released: its checksum differs from that in {SUMS}. Restore "
                "the file, and put the change into a new migration"
            )
    return [
        MigrationFile(
            name.removesuffix(".sql"),
            folder / name,
            sql,
            found[f"{name.removesuffix('.sql')}.rollback.sql"],
            released[name],
        )
        for name, sql in found.items()
        if not name.endswith(".rollback.sql")
    ]


def apply_migrations(
    dsn: str, *, to: str | None = None, wait: float = WAIT, report: Report | None = None, folder: Path | None = None
) -> list[str]:
    """
    Apply the migrations that the database lacks, up to and with `to`, and return their names.

    Blocks; in a coroutine call it by `asyncio.to_thread`. `dsn` is that of a direct connection, not of a pooler, by a
    role that may create things. Many may be called at once: one works, and the others find nothing to do. What a
    process that was killed has left half done is brought to its end, an invalid index rebuilt.

    Raises ConfigurationError, SchemaError when the database has another content of a migration than this release, and
    UnavailableError when the server cannot be reached, or another process or transaction was not done after `wait`
    seconds; all can be run again.
    """
    files = migration_files(folder)
    deadline = time.monotonic() + wait
    with locked(dsn, wait=wait) as connection:
        _settle(connection, files)
        missing = _missing(connection, files, to)
        _compare(connection, files)
        _rebuild_indexes(connection, deadline)
        if not missing and to is None and one(connection, _TABLES) is None:
            raise SchemaError(
                "yoyo's tables say that all migrations are applied, and chatdb's tables are not there: either another "
                "project's migrations have the same names, and chatdb's need yoyo's tables in a schema of their own (a "
                "role with another search_path), or the tables were dropped by hand (yoyo unmark, and run this again)"
            )
        if not missing and _applied(connection) & {file.name for file in files} <= _remembered(connection).keys():
            return []
        if not one(connection, "select pg_catalog.has_database_privilege(current_database(), 'create')"):
            if not missing:
                return []
            raise ConfigurationError("the database role may not create a schema: migrate as the database's owner")
        with _yoyo(dsn, connection, files, missing, deadline) as yoyos:
            _remember(yoyos.connection, files)
            missing = _missing(yoyos.connection, files, to)
            for file in missing:
                yoyos.carry_out("apply", file, report)
                _remember(yoyos.connection, files)
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
    Take back the last migration, or all after `to` ("0": all), and return their names. Their data are deleted.

    `expected` are the names that somebody has agreed to; nothing is done if it would be others by now.

    Blocks, and raises, as `apply_migrations` does; SchemaError also when a newer release has migrated the database,
    whose own migrations have to go first.
    """
    files = migration_files(folder)
    with locked(dsn, wait=wait) as connection:
        _settle(connection, files)
        last = _last(connection, files, to)
        if expected is not None and [file.name for file in last] != expected:
            raise SchemaError(
                "another process has migrated this database meanwhile: nothing was taken back, look again"
            )
        if not last:
            if one(connection, "select pg_catalog.to_regclass('_chatdb_migration')") is not None:
                _remember(connection, files)
            return []
        with _yoyo(dsn, connection, files, last, time.monotonic() + wait) as yoyos:
            for file in last:
                yoyos.carry_out("rollback", file, report)
                _remember(yoyos.connection, files)
    return [file.name for file in last]


def missing_migrations(dsn: str, *, to: str | None = None, folder: Path | None = None) -> list[MigrationFile]:
    """Return what `apply_migrations` would apply, without writing anything."""
    files = migration_files(folder)
    with connected(dsn) as connection:
        _settle(connection, files)
        _compare(connection, files)
        return _missing(connection, files, to)


def last_migrations(
    dsn: str, *, to: str | None = None, folder: Path | None = None
) -> list[tuple[MigrationFile, dict[str, int | None]]]:
    """
    Return what `rollback_migrations` would take back, each with the tables that go and their numbers of rows.

    A number is None where row-level security hides rows from the role, as FORCEd it does from the tables' owner.
    """
    files = migration_files(folder)
    with connected(dsn) as connection:
        _settle(connection, files)
        return [
            (file, {table: _count(connection, table) for table in _dropped(file) if _exists(connection, table)})
            for file in _last(connection, files, to)
        ]


def applied_migrations(dsn: str, *, folder: Path | None = None) -> dict[str, str | None]:
    """Return the names of what yoyo has applied, each with the checksum that chatdb remembers of it."""
    with connected(dsn) as connection:
        _settle(connection, migration_files(folder))
        remembered = _remembered(connection)
        return {name: remembered.get(name) for name in sorted(_applied(connection))}


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _settle(connection: psycopg.Connection, files: list[MigrationFile]) -> None:
    """Have the session see one schema, that of yoyo's tables: where these migrations are, else the first there is."""
    found = connection.execute(
        """
        select pg_catalog.quote_ident(n.nspname), pg_catalog.has_schema_privilege(n.oid, 'usage')
            and pg_catalog.has_table_privilege(c.oid, 'select')
        from pg_catalog.pg_class as c
        inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
        inner join pg_catalog.pg_attribute as a on a.attrelid = c.oid and a.attname = 'migration_id'
        where c.relname = '_yoyo_migration' and c.relkind = 'r'
        order by n.nspname is distinct from pg_catalog.current_schema(), n.nspname <> 'public', n.nspname
        """
    ).fetchall()
    names = [file.name for file in files]
    statement = "select true from {}._yoyo_migration where migration_id = any(%s) limit 1"
    readable = [schema for schema, is_readable in found if is_readable]
    if found and not readable:
        raise ConfigurationError("the database role may not read which migrations were applied: ask the owner")
    having = [schema for schema in readable if one(connection, statement.format(schema), names)]
    schema = having[0] if having else one(connection, "select pg_catalog.quote_ident(current_schema())")
    if schema is None:
        raise ConfigurationError(
            "the role's search_path has no schema that there is: set one, such as public, for yoyo's tables"
        )
    connection.execute("select pg_catalog.set_config('search_path', %s, false)", [schema])


_TABLES = """
    select c.oid from pg_catalog.pg_class as c inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
    where n.nspname = 'chatdb' and c.relname = 'conversations'
"""


def _named(files: list[MigrationFile], to: str) -> int:
    """Return the place of a migration, given by its name or number."""
    for place, file in enumerate(files):
        if to in {file.name, file.name.partition(".")[0]}:
            return place
    raise InvalidInputError("to", f"must be one of {', '.join(file.name for file in files)}")


def _missing(connection: psycopg.Connection, files: list[MigrationFile], to: str | None) -> list[MigrationFile]:
    applied = _applied(connection)
    wanted = files if to is None else files[: _named(files, to) + 1]
    if to is not None and any(file.name in applied for file in files[len(wanted) :]):
        raise InvalidInputError("to", "is behind the database: chatdb rollback --to takes migrations back")
    return [file for file in wanted if file.name not in applied]


def _last(connection: psycopg.Connection, files: list[MigrationFile], to: str | None) -> list[MigrationFile]:
    newer = sorted(_remembered(connection).keys() - {file.name for file in files})
    if newer:
        raise SchemaError(
            f"a newer release has applied {', '.join(newer)}: take that back first, by that release's chatdb rollback"
        )
    applied = _applied(connection)
    last = [file for file in reversed(files) if file.name in applied]
    if to is None:
        return last[:1]
    kept = 0 if to == "0" else _named(files, to) + 1
    return [file for file in last if file not in files[:kept]]


def _applied(connection: psycopg.Connection) -> set[str]:
    if one(connection, "select pg_catalog.to_regclass('_yoyo_migration')") is None:
        return set()
    return {row[0] for row in connection.execute("select migration_id from _yoyo_migration")}


def _remembered(connection: psycopg.Connection) -> dict[str, str]:
    """Return the checksums of the applied contents; what yoyo alone has applied since is not among them."""
    if one(
        connection,
        "select pg_catalog.to_regclass('_yoyo_migration') is null "
        "or pg_catalog.to_regclass('_chatdb_migration') is null",
    ):
        return {}
    return dict(
        connection.execute(
            "select c.migration_id, c.sha256 from _chatdb_migration as c "
            "inner join _yoyo_migration as y using (migration_id, applied_at_utc)"
        ).fetchall()
    )


def _compare(connection: psycopg.Connection, files: list[MigrationFile]) -> None:
    remembered = _remembered(connection)
    for file in files:
        if remembered.get(file.name, file.checksum) != file.checksum:
            raise SchemaError(
                f"the migration {file.name} was applied to this database with another content than that of "
                f"{file.path.name} in this release: use the release that applied it, or take the migration back first"
            )


def _remember(connection: psycopg.Connection, files: list[MigrationFile]) -> None:
    """Have `_chatdb_migration` say what yoyo's table says, with checksums."""
    connection.execute(
        "create table if not exists _chatdb_migration (migration_id text primary key, sha256 text not null, "
        "chatdb_version text not null, applied_at_utc timestamp not null)"
    )
    connection.execute(
        "delete from _chatdb_migration as c where not exists (select from _yoyo_migration as y "
        "where y.migration_id = c.migration_id and y.applied_at_utc = c.applied_at_utc)"
    )
    connection.cursor().executemany(
        "insert into _chatdb_migration (migration_id, sha256, chatdb_version, applied_at_utc) "
        "select migration_id, %s, %s, applied_at_utc from _yoyo_migration where migration_id = %s "
        "on conflict (migration_id) do nothing",
        [(file.checksum, version("chatdb"), file.name) for file in files],
    )


def _rebuild_indexes(connection: psycopg.Connection, deadline: float) -> None:
    """Rebuild the indexes that CREATE INDEX CONCURRENTLY left invalid when it failed or was killed."""

    def rebuild() -> None:
        connection.execute("set lock_timeout = '2s'")  # CONCURRENTLY is for no transaction
        for name, identifier in connection.execute(_INVALID).fetchall():
            leftover = re.search(r"_cc(new|old)\d*$", name)  # of a REINDEX CONCURRENTLY, whose own index is there
            action = "drop index concurrently if exists" if leftover else "reindex index concurrently"
            connection.execute(f"{action} {identifier}".encode())

    patiently(rebuild, deadline)
    connection.execute("reset lock_timeout")


# not those that are being built; which one another role builds is not to be seen
_INVALID = """
    select c.relname, pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)
    from pg_catalog.pg_index as i
    inner join pg_catalog.pg_class as c on c.oid = i.indexrelid
    inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
    where n.nspname = 'chatdb'
      and not i.indisvalid
      and not exists (
          select from pg_catalog.pg_stat_progress_create_index as p
          where p.datname = pg_catalog.current_database() and coalesce(p.index_relid = i.indexrelid, true)
      )
    order by c.relname !~ '_cc(new|old)[0-9]*$', c.relname
"""


def _dropped(file: MigrationFile) -> list[str]:
    return re.findall(r"^drop table if exists (chatdb\.\w+)", file.rollback, re.MULTILINE)


def _exists(connection: psycopg.Connection, table: str) -> bool:
    return one(connection, "select pg_catalog.to_regclass(%s)", table) is not None


def _count(connection: psycopg.Connection, table: str) -> int | None:
    if one(connection, "select pg_catalog.row_security_active(%s)", table):
        return None
    return int(str(one(connection, f"select pg_catalog.count(*) from {table}")))  # noqa: S608 - a name in a released file


class _Yoyo:
    """yoyo on a database whose locks are held."""

    def __init__(self, backend: Any, read: Any, lock: psycopg.Connection, deadline: float) -> None:  # noqa: ANN401
        self.connection: psycopg.Connection = backend.connection
        self._backend = backend
        self._read = read
        self._lock = lock
        self._deadline = deadline

    def carry_out(self, direction: str, file: MigrationFile, report: Report | None) -> None:
        """Apply a migration, or take it back."""
        start = time.monotonic()
        self._lock.execute("select 1")  # or another may be at it by now
        migrations = self._read.filter(lambda each: each.id == file.name)  # pyright: ignore[reportUnknownLambdaType]
        work = self._backend.apply_migrations if direction == "apply" else self._backend.rollback_migrations
        patiently(lambda: work(migrations), self._deadline)
        if report is not None:
            report(file.name, time.monotonic() - start)


@contextmanager
def _yoyo(
    dsn: str, connection: psycopg.Connection, files: list[MigrationFile], work: list[MigrationFile], deadline: float
) -> Generator[_Yoyo]:
    """Give yoyo, which has read the files, with its tables made and its lock taken for the work."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name, and yoyo writes it into its log
        os.environ["LOGNAME"] = str(os.geteuid())
    # its keywords, because yoyo reads a DSN in another way than libpq; the schema is for each of yoyo's connections
    options = psycopg.conninfo.conninfo_to_dict(libpq_dsn(dsn, scheme="postgresql")) | {
        "schema": one(connection, "select pg_catalog.quote_ident(current_schema())"),
        "client_encoding": "UTF8",
        "fallback_application_name": APPLICATION,
    }
    backend = yoyo.get_backend(f"postgresql+psycopg:///?{urlencode(options, quote_via=quote)}")
    try:
        without_timeouts(backend.connection)
        backend._is_locked = True  # by this module's locks; its own would outlive a killed process
        patiently(backend.ensure_internal_schema_updated, deadline)
        read = _yoyos(files)
        names = {file.name for file in work}
        held = all(each.use_transactions for each in read if each.id in names)
        with _yoyos_lock(connection, held=held, deadline=deadline):
            yield _Yoyo(backend, read, connection, deadline)
    finally:
        backend.connection.close()


@contextmanager
def _yoyos_lock(connection: psycopg.Connection, *, held: bool, deadline: float) -> Generator[None]:
    """
    Have the row in yoyo_lock that keeps `yoyo apply` away.

    `held` in an open transaction it goes with its process, however that ends, and `yoyo apply` waits in its INSERT. But
    CREATE INDEX CONCURRENTLY waits for such a waiting one: for it the row is committed, with a negative number, by
    which the next process knows it for the row of one that was killed.
    """
    while True:
        connection.execute(_FREE_YOYOS_LOCK, {"application": APPLICATION})
        connection.execute("begin")
        connection.execute("set local idle_in_transaction_session_timeout = 0")
        if one(connection, _TAKE_YOYOS_LOCK) is not None:
            break
        connection.execute("rollback")
        if time.monotonic() > deadline:
            raise UnavailableError(
                "yoyo's own lock is taken: yoyo apply is at work, or was killed; in the second case run yoyo "
                "break-lock, and this again",
                sent=False,
            )
        time.sleep(0.2)
    if not held:
        connection.execute("commit")
    try:
        yield
    finally:
        with suppress(psycopg.Error):  # one that is lost has lost the row with its transaction
            connection.execute("rollback" if held else "delete from yoyo_lock where pid = -pg_catalog.pg_backend_pid()")


_TAKE_YOYOS_LOCK = """
    insert into yoyo_lock (locked, ctime, pid) values (1, now() at time zone 'UTC', -pg_catalog.pg_backend_pid())
    on conflict do nothing returning pid
"""

# a row with a positive number is yoyo's own, and left over if no session is old enough to be that yoyo's
_FREE_YOYOS_LOCK = """
    delete from yoyo_lock as l
    where l.pid < 0 or not exists (
        select from pg_catalog.pg_stat_activity as a
        where a.datname = pg_catalog.current_database()
          and coalesce(a.backend_type, 'client backend') = 'client backend'
          and coalesce(a.application_name, '') <> %(application)s
          and coalesce(a.backend_start < l.ctime at time zone 'UTC' + interval '1 minute', true)
    )
"""


def _yoyos(files: list[MigrationFile]) -> Any:  # noqa: ANN401 - yoyo is untyped
    """Return yoyo's own objects of these migrations, read."""
    names = {file.name for file in files}
    found: Any = yoyo.read_migrations(*{str(file.path.parent) for file in files})
    found = found.filter(lambda each: each.id in names)  # pyright: ignore[reportUnknownLambdaType]
    for each in found:
        each.load()
    return found
