"""
Creates and drops the index for mode "words" of `search_messages`, for `chatdb search-index`.

The index is optional, because every append pays for it. It is not a migration, because a build can take hours. Writers
go on meanwhile. It has a lock of its own, so that `chatdb migrate` does not wait for it during a deployment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from chatdb._core.query import data_folder
from chatdb.admin.all_users import STANDBY
from chatdb.admin.connection import (
    SEARCH_LOCK,
    WAIT,
    advisory_lock,
    fetch_value,
    pinned_transaction,
    psycopg,
    retry_on_lock_timeout,
)
from chatdb.errors import ChatDBError, ConfigurationError, SchemaError

SEARCH_INDEX: Final = "ix_messages_search"
SEARCH_INDEX_DEFINITION: Final = (
    f"CREATE INDEX {SEARCH_INDEX} ON chatdb.messages USING gin (user_id, to_tsvector('simple'::regconfig, "
    "translate(left(content, 100000), '_-+./:@~&<'::text, '          '::text)))"
)
"""The index as the server prints it, without quotes and storage parameters."""

_EXTENSION: Final = "btree_gin"
_POLL: Final = 0.5
"""Seconds between two reads of the progress."""

# measured on 129,132 messages; see docs/operations/search-index.md
_INDEX_BYTES: Final = 0.37
_BUILD_SECONDS: Final = 0.5 / 2**20
"""Bytes of the index, and seconds of the build, for each byte of the table."""


class SearchIndex(NamedTuple):
    """
    The state of the index. `phase`, `done` and `total` are what the server reports of a build.

    Row-level security on the table keeps PostgreSQL from using the index.
    """

    exists: bool
    is_valid: bool
    is_building: bool
    size: int
    definition: str
    phase: str | None
    done: int
    total: int
    has_row_security: bool

    @property
    def is_current(self) -> bool:
        """Whether it is defined as in this release; the storage parameters are the operator's choice."""
        return self.definition.replace('"', "").partition(" WITH (")[0] == SEARCH_INDEX_DEFINITION


class Cost(NamedTuple):
    """What a build would read, and estimates of the index's size and of the duration."""

    messages: int
    table_bytes: int
    index_bytes: int
    seconds: float


class Build(NamedTuple):
    """What `create_search_index` did; nothing if the index was valid already."""

    created: bool
    dropped_invalid: bool
    size: int
    seconds: float


class Step(NamedTuple):
    """The progress: blocks of the table for a build, or transactions to wait for, of which `locker` is the next."""

    phase: str
    done: int
    total: int
    locker: int | None


Progress = Callable[[Step], object]


def search_index_status(dsn: str) -> SearchIndex:
    """
    Return the state of the index. Reads the catalog only.

    Raises SchemaError without chatdb's tables.
    """
    with pinned_transaction(dsn) as connection:
        return read_search_index(connection)


def estimate_search_index(dsn: str) -> tuple[SearchIndex, Cost]:
    """
    Return the state of the index and what its build would cost, from the statistics and the size of the table.

    Checks the role, the definition and the extension as `create_search_index` does, but no standby, pooler or lock.
    """
    with pinned_transaction(dsn) as connection:
        state = read_search_index(connection)
        _check_role(connection)
        _check_definition(state)
        if not state.is_valid:
            _check_extension(connection)
        return state, _cost(connection)


def create_search_index(
    dsn: str,
    *,
    wait: float = WAIT,
    progress: Progress = lambda _: None,
    on_start: Callable[[Cost], object] | None = None,
) -> Build:
    """
    Build the index if it is missing or invalid. Blocks; writers go on meanwhile.

    Waits up to `wait` seconds for another run and for the table's lock, then for as long as the server works, also
    for the transactions that were open when it started. If the process ends, the server stops within a second, and the
    next call drops what is left and starts again.

    Raises ConfigurationError on a standby, behind a transaction pooler, for a role that does not own the table or may
    not create the extension, and for an index of another definition; SchemaError without chatdb's tables;
    UnavailableError.
    """
    with _locked(dsn, wait) as connection:
        state = read_search_index(connection)
        _check_definition(state)
        if state.is_valid:
            return Build(created=False, dropped_invalid=False, size=state.size, seconds=0)
        _check_extension(connection)
        if on_start is not None:
            on_start(_cost(connection))
        start = time.monotonic()
        _create_extension(connection)
        statement = (data_folder("sql") / "admin" / "create_search_index.sql").read_text(encoding="utf-8")
        with _reported(dsn, connection.info.backend_pid, progress):
            if state.exists:
                _drop(connection)
            connection.execute(statement.encode())
        size = read_search_index(connection).size
        return Build(created=True, dropped_invalid=state.exists, size=size, seconds=time.monotonic() - start)


def drop_search_index(dsn: str, *, wait: float = WAIT, progress: Progress = lambda _: None) -> SearchIndex:
    """
    Drop the index, valid or not, and return what it was. Blocks; writers go on meanwhile. The extension stays.

    Raises as `create_search_index` does. If the process ends before, call it again.
    """
    with _locked(dsn, wait) as connection:
        state = read_search_index(connection)
        if state.exists:
            with _reported(dsn, connection.info.backend_pid, progress):
                _drop(connection)
        return state


@contextmanager
def _locked(dsn: str, wait: float) -> Generator[psycopg.Connection]:
    """
    Yield the connection that does the work, once the table's lock was free.

    A lock timeout during the work would throw away the hours before it. So the wait for the table is a statement before
    it, and the later ones, for open transactions, have no limit: they hold up nobody but VACUUM.
    """
    deadline = time.monotonic() + wait
    with advisory_lock(dsn, wait=wait, key=SEARCH_LOCK) as connection:
        if fetch_value(connection, "select pg_catalog.pg_is_in_recovery()"):
            raise ConfigurationError(STANDBY)
        read_search_index(connection)
        _check_role(connection)

        def lock_table() -> None:
            with connection.transaction():
                connection.execute("set local lock_timeout = '2s'")
                connection.execute("lock table chatdb.messages in share update exclusive mode")

        retry_on_lock_timeout(lock_table, deadline)
        connection.execute("set lock_timeout = 0")
        with suppress(psycopg.errors.InvalidParameterValue):  # a platform that cannot watch a connection
            connection.execute("set client_connection_check_interval = '1s'")
        yield connection


def _drop(connection: psycopg.Connection) -> None:
    connection.execute("drop index concurrently if exists chatdb.ix_messages_search")


def read_search_index(connection: psycopg.Connection) -> SearchIndex:
    """Return the state of the index. Raises SchemaError without chatdb's tables."""
    row = connection.execute(_STATE).fetchone()
    if row is None:
        raise SchemaError("the database has no chatdb tables: run chatdb migrate or yoyo apply")
    return SearchIndex(*row)


# a session sees which index another role's session builds only with the privileges of pg_read_all_stats
_STATE = """
    select
        x.oid is not null,
        coalesce(i.indisvalid, false),
        x.oid is not null and not i.indisvalid and p.pid is not null,
        coalesce(pg_catalog.pg_relation_size(x.oid), 0),
        coalesce(pg_catalog.pg_get_indexdef(x.oid), ''),
        p.phase,
        coalesce(p.blocks_done, 0),
        coalesce(p.blocks_total, 0),
        c.relrowsecurity
    from pg_catalog.pg_class as c
    inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
    left join pg_catalog.pg_class as x on x.relnamespace = n.oid and x.relname = 'ix_messages_search'
    left join pg_catalog.pg_index as i on i.indexrelid = x.oid
    left join pg_catalog.pg_stat_progress_create_index as p
        on p.datname = pg_catalog.current_database() and coalesce(p.index_relid = x.oid, true)
    where n.nspname = 'chatdb' and c.relname = 'messages'
    order by p.index_relid
    limit 1
"""


def _check_definition(state: SearchIndex) -> None:
    if state.is_valid and not state.is_current:
        raise ConfigurationError(
            f"the index chatdb.{SEARCH_INDEX} is defined differently, so no statement uses it: run chatdb search-index "
            "drop, then chatdb search-index create"
        )


def _check_role(connection: psycopg.Connection) -> None:
    statement = (
        "select pg_catalog.pg_has_role(relowner, 'usage') from pg_catalog.pg_class "
        "where oid = 'chatdb.messages'::regclass"
    )
    if not fetch_value(connection, statement):
        raise ConfigurationError("the role does not own the table chatdb.messages: run this as its owner")


def _check_extension(connection: psycopg.Connection) -> None:
    if fetch_value(connection, "select exists (select from pg_catalog.pg_extension where extname = %s)", _EXTENSION):
        return
    statement = "select exists (select from pg_catalog.pg_available_extensions where name = %s)"
    if not fetch_value(connection, statement, _EXTENSION):
        raise ConfigurationError(
            f"the server lacks the extension {_EXTENSION}: install PostgreSQL's additional modules (often the package "
            "postgresql-contrib), then run this again"
        )


def _create_extension(connection: psycopg.Connection) -> None:
    schema = fetch_value(
        connection, "select nspname from pg_catalog.pg_namespace where nspname in ('public', 'chatdb') order by 1 desc"
    )
    try:
        connection.execute(f"create extension if not exists btree_gin schema {schema}".encode())
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            f"the role may not create the extension {_EXTENSION}: run create extension {_EXTENSION} as a superuser or "
            "the database's owner, then run this again"
        ) from None


def _cost(connection: psycopg.Connection) -> Cost:
    row = connection.execute(_SIZE).fetchone()
    messages, size = row or (0, 0)
    return Cost(int(messages), int(size), int(size * _INDEX_BYTES), size * _BUILD_SECONDS)


# as the planner does, because a count would read the whole table; without statistics, 800 bytes a message
_SIZE = """
    select
        case
            when c.relpages > 0 and c.reltuples >= 0
                then c.reltuples / c.relpages * pg_catalog.pg_relation_size(c.oid)
                    / pg_catalog.current_setting('block_size')::bigint
            else pg_catalog.pg_relation_size(c.oid) / 800
        end,
        pg_catalog.pg_table_size(c.oid)
    from pg_catalog.pg_class as c
    where c.oid = 'chatdb.messages'::regclass
"""


@contextmanager
def _reported(dsn: str, pid: int, progress: Progress) -> Generator[None]:
    """Call `progress` with the progress of a server process during the block, from a thread of its own."""
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(_POLL):
            with suppress(ChatDBError), pinned_transaction(dsn) as connection:
                row = connection.execute(_PROGRESS, {"pid": pid}).fetchone()
                if row is not None:
                    progress(Step(*row))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()


_PROGRESS = """
    select
        phase,
        case when phase like 'waiting%%' then lockers_done else blocks_done end,
        case when phase like 'waiting%%' then lockers_total else blocks_total end,
        nullif(current_locker_pid, 0)
    from pg_catalog.pg_stat_progress_create_index
    where pid = %(pid)s
    union all
    -- the server reports no progress of a drop
    select 'waiting for transactions before the drop', 0, 0, locker
    from pg_catalog.unnest(pg_catalog.pg_blocking_pids(%(pid)s)) as locker
    limit 1
"""
