"""
A direct connection to the database, for the operators' commands: migrate, rollback, protect, adopt and link-users.

They change tables, so one at a time does: by an advisory lock of the session, which a transaction pooler would lose.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import asyncpg

from chatdb._core.driver_errors import RLS_USER_ID, map_driver_error
from chatdb._core.dsn import connect_arguments, libpq_dsn, server_of
from chatdb._core.sqlstate import Kind, classify
from chatdb.errors import ChatDBError, ConfigurationError, UnavailableError

try:
    import psycopg as psycopg  # for the other modules, too, as here it is said what to install
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
    from psycopg.rows import dict_row as dict_row
except ImportError:
    raise ConfigurationError("the drivers for migrations are not installed: pip install 'chatdb[migrate]'") from None

if TYPE_CHECKING:
    from psycopg.abc import RV, PQGen

errors = psycopg.errors
APPLICATION = "chatdb operator"
WAIT = 60.0
"""Maximum wait, in seconds, for another operator command and for table locks."""
_LOCK = 0x636861746462  # "chatdb"
_NO_ROUTE = "set CHATDB_MIGRATE_URL to the direct connection (on Neon the host without -pooler)"

_CONNECT_SECONDS = 10
_SILENT_SECONDS = 5.0
"""How long a server may be silent during a statement before it is asked, by another connection, if it still answers."""

_UNKNOWN_SECONDS = 300.0
"""The same where the server cannot say, as through a pooler, whose process numbers are its own: the bound of looks."""

_IN_TRANSIT = 1.0
"""How long an answer may be on its way."""

_SILENT = "the server has gone silent"
_ACTIVITY = "select state from pg_catalog.pg_stat_activity where pid operator(pg_catalog.=) %s"

# the kernel's own signs of a peer that is gone, which need no answer of the server's
_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 30_000}


class _Connection(psycopg.Connection):
    """
    A connection whose statements may take as long as they need, but only while the server is at work on them.

    A long statement, such as the build of an index, and a server that has gone silent look the same on a connection.
    """

    conninfo = ""
    silent_seconds = _SILENT_SECONDS
    is_probe = False

    def wait(self, gen: PQGen[RV], *args: Any, **options: Any) -> RV:  # noqa: ANN401 - psycopg's own
        return super().wait(self._watched(gen), *args, **options)

    def _watched(self, gen: PQGen[RV]) -> PQGen[RV]:
        """Run psycopg's generator, which waits for the socket, and raise where nothing more will come."""
        heard = asked = time.monotonic()
        lost_at: float | None = None
        try:
            state = next(gen)
            while True:
                ready = yield state
                now = time.monotonic()
                if ready:
                    heard = asked = now
                    lost_at = None
                elif lost_at is not None and now > lost_at + _IN_TRANSIT:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(_SILENT)
                elif lost_at is None and now > asked + self.silent_seconds:
                    is_at_work = False if self.is_probe else self._is_at_work()
                    asked = time.monotonic()
                    if is_at_work is False or (is_at_work is None and asked > heard + _UNKNOWN_SECONDS):
                        lost_at = asked
                state = gen.send(ready)
        except StopIteration as end:
            result: RV = end.value
            return result

    def _is_at_work(self) -> bool | None:
        """Ask by a new connection if the server is at work on the statement; None where that is not to be known."""
        try:
            with _Connection.connect(self.conninfo, autocommit=True, application_name=APPLICATION) as probe:
                probe.is_probe, probe.silent_seconds = True, self.silent_seconds
                row = probe.execute(_ACTIVITY, [self.info.backend_pid]).fetchone()
        except psycopg.errors.ConnectionTimeout:
            return False
        except psycopg.Error as error:
            if _SILENT in str(error):
                return False
            # any other answer than of the host itself is the server's, such as that all connections are taken
            return None if "Connection refused" in str(error) else True
        return None if row is None or row[0] is None else not row[0].startswith("idle")


def open_connection(dsn: str, **options: Any) -> psycopg.Connection:  # noqa: ANN401 - psycopg's own
    """
    Return a connection, in the making and the use of which no silence lasts.

    The DSN's `connect_timeout` goes before the default of 10 seconds.

    Raises ConfigurationError and UnavailableError, which name the server, and say which of its answers it was.
    """
    conninfo = libpq_dsn(dsn, scheme="postgresql")
    there = conninfo_to_dict(conninfo)
    defaults: dict[str, Any] = dict(_KEEPALIVES)
    if "PGCONNECT_TIMEOUT" not in os.environ:
        defaults["connect_timeout"] = _CONNECT_SECONDS
    missing = {name: value for name, value in defaults.items() if name not in there}
    try:
        connection = _Connection.connect(conninfo, **missing, **options)
    except psycopg.Error as error:
        raise _refused(dsn, error) from None
    connection.conninfo = make_conninfo(conninfo, **missing)
    with suppress(ValueError):
        seconds = float(there.get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT") or _CONNECT_SECONDS)
        if seconds > 0:
            connection.silent_seconds = min(seconds, _SILENT_SECONDS)
    return connection


@contextmanager
def connected(dsn: str) -> Generator[psycopg.Connection]:
    """Give a connection in autocommit mode, and with the role's settings; the driver's errors become chatdb's."""
    try:
        with open_connection(
            dsn,
            autocommit=True,
            fallback_application_name=APPLICATION,
            client_encoding="UTF8",  # else names come as bytes from a database without an encoding
        ) as connection:
            yield connection
    except psycopg.Error as error:
        # whose text may quote a row, and a traceback would show it
        raise map_psycopg_error(error, server_of(connect_arguments(dsn))) from None


def _refused(dsn: str, error: psycopg.Error) -> ChatDBError:
    """
    Return why no connection could be made.

    libpq tells it by a sentence only, in the server's language. asyncpg has the SQLSTATE, so it tries again.
    """
    arguments = connect_arguments(dsn)
    server = server_of(arguments)
    second: Exception = TimeoutError()
    if not isinstance(error, psycopg.errors.ConnectionTimeout):
        with ThreadPoolExecutor(1) as executor:  # this thread may have an event loop
            try:
                executor.submit(asyncio.run, _connect_once(arguments)).result()
            except Exception as caught:  # noqa: BLE001 - mapped below
                second = caught
            else:
                return UnavailableError(f"the connection to {server} failed, and then did not: try again", sent=False)
    if isinstance(second, TimeoutError):
        return UnavailableError(f"{server} does not answer: check that the server runs, host and port", sent=False)
    if isinstance(second, asyncpg.InsufficientPrivilegeError):
        return ConfigurationError(f"the role may not connect to this database at {server}: grant it connect")
    found = map_driver_error(second, server)
    if found is None or isinstance(found, UnavailableError):
        sentence = str(found) if found else f"no connection to {server} could be made ({type(second).__name__})"
        return UnavailableError(sentence, sent=False)
    return found


async def _connect_once(arguments: dict[str, Any]) -> None:
    options: dict[str, Any] = {"timeout": _CONNECT_SECONDS}
    connection = await asyncpg.connect(**(options | arguments))
    connection.terminate()


@contextmanager
def pinned_transaction(dsn: str) -> Generator[psycopg.Connection]:
    """
    Give a connection in a transaction that finds functions, operators and types in pg_catalog only.

    For what only looks, also through a pooler, which would give a session with other settings to the next client.
    """
    with connected(dsn) as connection, connection.transaction():
        prepare_session(connection, "local")
        connection.execute("set local lock_timeout = '10s'")
        connection.execute("set local statement_timeout = '5min'")  # some of it counts the rows of large tables
        yield connection


def prepare_session(connection: psycopg.Connection, scope: Literal["session", "local"] = "session") -> None:
    """
    Have functions, operators and types found in pg_catalog only, and no time limit end the session or its lock.

    For a session, which no pooler gives to others, until its end; or for the transaction that is open. Otherwise an
    operator in `public` that fits the types better is taken, and anyone may have put one there.
    """
    connection.execute(f"set {scope} search_path to pg_catalog, pg_temp".encode())
    connection.execute(
        "select pg_catalog.set_config(name, '0', %s) from pg_catalog.pg_settings where name in "
        "('idle_session_timeout', 'idle_in_transaction_session_timeout', 'statement_timeout', 'transaction_timeout')",
        [scope == "local"],
    )


@contextmanager
def advisory_lock(dsn: str, *, wait: float) -> Generator[psycopg.Connection]:
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
        while not fetch_value(connection, "select pg_catalog.pg_try_advisory_lock(%s)", _LOCK):
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
    process = "select pg_catalog.pg_backend_pid()"
    if fetch_value(connection, process) == connection.info.backend_pid:
        return False
    for _ in range(3):  # others may be quicker to take the process
        with connected(dsn) as second:
            before = fetch_value(connection, process)
            with second.transaction():
                if fetch_value(second, process) == before or fetch_value(connection, process) != before:
                    return True
    return False


def retry_on_lock_timeout(work: Callable[[], object], deadline: float) -> None:
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


def fetch_value(connection: psycopg.Connection, statement: str, *arguments: object) -> Any:  # noqa: ANN401 - any type
    """Return the first value of a statement's first row, None without a row."""
    row = connection.execute(statement.encode(), arguments or None).fetchone()
    return row[0] if row else None


def map_psycopg_error(error: psycopg.Error, server: str = "the database server") -> ChatDBError:
    """Return chatdb's own error for the driver's, whose text may hold rows, or a password."""
    state, kind = error.sqlstate or "", classify(error)
    if error.diag.constraint_name == RLS_USER_ID or error.diag.source_function == "check_enable_rls":
        return ConfigurationError(
            f"row-level security hides rows from this role ({error.diag.message_primary}): run this as a superuser or "
            "a role with BYPASSRLS"
        )
    if kind is Kind.PRIVILEGE:  # the message has names of objects only
        return ConfigurationError(
            f"the database role lacks a privilege ({error.diag.message_primary}): grant it, or run this as the "
            "owner of the database and of what is named"
        )
    if kind is Kind.READ_ONLY:
        return ConfigurationError("the server takes no writes: is it a standby? connect to the primary")
    if kind in {Kind.LOCK_TIMEOUT, Kind.DEADLOCK, Kind.CANCELED}:
        return UnavailableError(
            f"the server gave up waiting for a lock or for time (SQLSTATE {state}), and undid the statement: run this "
            "again when fewer long transactions are open",
            sent=True,
        )
    if kind is Kind.CONNECTION or (kind is Kind.CLIENT and isinstance(error, psycopg.OperationalError)):
        return UnavailableError(
            f"the connection to {server} was lost, or the server no longer answers: check that it runs, and run this "
            "again",
            sent=None,
        )
    names = [name for name in (error.diag.table_name, error.diag.constraint_name) if name]
    place = f" at {', '.join(names)}" if names else ""
    return ChatDBError(f"the server refused a statement (SQLSTATE {state}){place}; run this again once that is fixed")


def _holder(connection: psycopg.Connection) -> str:
    found = fetch_value(
        connection,
        "select pid from pg_catalog.pg_locks where locktype = 'advisory' and granted and database = "
        "(select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()) "
        "and (classid::bigint << 32 | objid::bigint) = %s",
        _LOCK,
    )
    return f" (server process {found})" if found else ""
