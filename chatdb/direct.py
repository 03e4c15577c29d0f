"""
A direct connection to the database, for the operators' commands: migrate, rollback, protect, adopt and link-users.

They change tables, so one at a time does: by an advisory lock of the session, which a transaction pooler would lose.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from chatdb.dsn import libpq_dsn
from chatdb.errors import RLS_USER_ID, ChatDBError, ConfigurationError, UnavailableError

try:
    import psycopg
except ImportError:
    raise ConfigurationError("the drivers for migrations are not installed: pip install 'chatdb[migrate]'") from None

errors = psycopg.errors
"""The driver's, for modules that import this one first, because it says what to install."""

APPLICATION = "chatdb operator"
_LOCK = 0x636861746462  # "chatdb"
_NO_ROUTE = "set CHATDB_MIGRATE_URL to the direct connection (on Neon the host without -pooler)"


@contextmanager
def connected(dsn: str) -> Generator[psycopg.Connection]:
    """Give a connection in autocommit mode, and with the role's settings; the driver's errors become chatdb's."""
    try:
        with psycopg.connect(
            libpq_dsn(dsn, scheme="postgresql"),
            autocommit=True,
            fallback_application_name=APPLICATION,
            client_encoding="UTF8",  # else names come as bytes from a database without an encoding
        ) as connection:
            yield connection
    except psycopg.Error as error:
        raise explained(error) from None  # whose text may quote a row, and a traceback would show it


@contextmanager
def pinned_transaction(dsn: str) -> Generator[psycopg.Connection]:
    """
    Give a connection in a transaction that finds functions, operators and types in pg_catalog only.

    For what only looks, also through a pooler, which would give a session with other settings to the next client.
    """
    with connected(dsn) as connection, connection.transaction():
        _prepare(connection, "local")
        yield connection


def prepare_session(connection: psycopg.Connection) -> None:
    """Have a session, which no pooler gives to others, be as the operators' commands need it until its end."""
    _prepare(connection, "session")


def _prepare(connection: psycopg.Connection, scope: str) -> None:
    """
    Have functions, operators and types found in pg_catalog only, and no time limit end the session or its lock.

    Otherwise an operator in `public` that fits the types better is taken, and anyone may have put one there.
    """
    connection.execute(f"set {scope} search_path to pg_catalog, pg_temp".encode())
    connection.execute(
        "select pg_catalog.set_config(name, '0', %s) from pg_catalog.pg_settings where name in "
        "('idle_session_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')",
        [scope == "local"],
    )


@contextmanager
def locked(dsn: str, *, wait: float) -> Generator[psycopg.Connection]:
    """
    Give a connection that holds the lock of the operators' commands on this database until the end of the block.

    It is as `prepare_session` makes it. The lock is polled for: who waits in `pg_advisory_lock` keeps a snapshot, for
    whose end CREATE INDEX CONCURRENTLY waits, and both would wait for ever.

    Raises ConfigurationError behind a transaction pooler, UnavailableError when the lock is not free within `wait`
    seconds.
    """
    with connected(dsn) as connection:
        if is_pooled(dsn, connection):
            raise ConfigurationError(
                f"a transaction pooler stands in front of the database, through which no lock lasts: {_NO_ROUTE}"
            )
        prepare_session(connection)
        deadline = time.monotonic() + wait
        while not one(connection, "select pg_catalog.pg_try_advisory_lock(%s)", _LOCK):
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"another process has worked on this database's tables for {wait:g} s{_holder(connection)}: "
                    "wait for its end, and run this again",
                    sent=False,
                )
            time.sleep(random.uniform(0.05, 0.15))  # noqa: S311 - so that many do not ask in step
        yield connection


def is_pooled(dsn: str, connection: psycopg.Connection) -> bool:
    """
    Whether what answers this connection is a pooler in transaction mode.

    A pooler announces a process number of its own. If so, a second connection opens a transaction, and gets the server
    process that the idle first one believes to have.
    """
    if one(connection, "select pg_catalog.pg_backend_pid()") == connection.info.backend_pid:
        return False
    for _ in range(3):  # others may be quicker to take the process
        with connected(dsn) as second:
            before = one(connection, "select pg_catalog.pg_backend_pid()")
            with second.transaction():
                if one(second, "select pg_catalog.pg_backend_pid()") == before:
                    return True
                if one(connection, "select pg_catalog.pg_backend_pid()") != before:
                    return True
    return False


def patiently(work: Callable[[], object], deadline: float) -> None:
    """Do something, again while a lock_timeout or a deadlock ends it and the deadline is not over."""
    while True:
        try:
            work()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)  # lets those through who queued behind the waiting lock
        else:
            return


@contextmanager
def original_search_path(connection: psycopg.Connection) -> Generator[None]:
    """Have a session find tables as its role does by default, until the end of the block, which changes nothing."""
    with connection.transaction(force_rollback=True):
        connection.execute("set local search_path to default")
        yield


def one(connection: psycopg.Connection, statement: str, *arguments: object) -> object:
    """Return the first value of a statement's first row, None without a row."""
    row = connection.execute(statement.encode(), arguments or None).fetchone()
    return row[0] if row else None


def explained(error: psycopg.Error) -> ChatDBError:
    """Return chatdb's own error for the driver's, whose text may hold rows, or a password."""
    state = error.sqlstate or ""
    if error.diag.constraint_name == RLS_USER_ID or error.diag.source_function == "check_enable_rls":
        return ConfigurationError(
            f"row-level security hides rows from this role ({error.diag.message_primary}): run this as a superuser or "
            "a role with BYPASSRLS"
        )
    if state == "42501":  # the message has names of objects only
        return ConfigurationError(
            f"the database role lacks a privilege ({error.diag.message_primary}): grant it, or run this as the "
            "owner of the database and of what is named"
        )
    if state == "25006":
        return ConfigurationError("the server takes no writes: is it a standby? connect to the primary")
    if state[:2] in {"28", "3D"}:
        return ConfigurationError("the server refused the user, the password or the database name: check the DSN")
    if state in {"55P03", "40P01", "57014"}:
        return UnavailableError(
            f"the server gave up waiting for a lock or for time (SQLSTATE {state}), and undid the statement: run this "
            "again when fewer long transactions are open",
            sent=True,
        )
    if state[:2] in {"08", "57"} or (isinstance(error, psycopg.OperationalError) and not state):
        return UnavailableError(
            "the database server cannot be reached, went away, or refused the user, the password or the database name: "
            "check that it runs, and the DSN; then run this again",
            sent=False,
        )
    names = [name for name in (error.diag.table_name, error.diag.constraint_name) if name]
    place = f" at {', '.join(names)}" if names else ""
    return ChatDBError(f"the server refused a statement (SQLSTATE {state}){place}; run this again once that is mended")


def _holder(connection: psycopg.Connection) -> str:
    found = one(
        connection,
        "select pid from pg_catalog.pg_locks where locktype = 'advisory' and granted and database = "
        "(select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()) "
        "and (classid::bigint << 32 | objid::bigint) = %s",
        _LOCK,
    )
    return f" (server process {found})" if found else ""
