"""
Connections for the operator commands.

The commands that change tables hold a session-level advisory lock, so that one of them runs at a time; search-index and
repack have locks of their own. A transaction pooler would lose it.
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
    import psycopg as psycopg  # re-exported, so that only this module has to report a missing extra
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
    from psycopg.rows import dict_row as dict_row
except ImportError:
    raise ConfigurationError("the extra for migrations is not installed: run pip install 'chatdb[migrate]'") from None

if TYPE_CHECKING:
    from psycopg.abc import RV, PQGen

errors = psycopg.errors
APPLICATION = "chatdb operator"
WAIT = 60.0
"""Maximum wait, in seconds, for another operator command and for table locks."""
_LOCK = 0x636861746462  # "chatdb"
SEARCH_LOCK = 0x736561726368  # "search"
"""The lock of search-index, which may take hours, so that a deployment does not wait for it."""
REPACK_LOCK = 0x72657061636B  # "repack"
"""The lock of repack, which may take hours too. A deployment waits for it only if it has a migration to apply."""
_NO_ROUTE = "set CHATDB_MIGRATE_URL to a direct connection (on Neon, the host without -pooler)"

_CONNECT_SECONDS = 10
_SILENT_SECONDS = 5.0
"""Seconds of silence during a statement before a second connection asks whether the server is still working on it."""

_UNKNOWN_SECONDS = 300.0
"""Maximum silence if the server cannot tell, for example behind a pooler, which reports PIDs of its own."""

_IN_TRANSIT = 1.0
"""Seconds to wait for an answer that may still be on the network."""

_SILENT = "the server stopped responding"
_ACTIVITY = "select state from pg_catalog.pg_stat_activity where pid operator(pg_catalog.=) %s"

# the kernel detects a dead peer without any help from the server
_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 30_000}


class _Connection(psycopg.Connection):
    """
    A connection whose statements may run for as long as the server works on them.

    To the client, a long index build looks the same as a server that stopped responding.
    """

    conninfo = ""
    silent_seconds = _SILENT_SECONDS
    is_probe = False

    def wait(self, gen: PQGen[RV], *args: Any, **options: Any) -> RV:  # noqa: ANN401 - psycopg's own
        return super().wait(self._watched(gen), *args, **options)

    def _watched(self, gen: PQGen[RV]) -> PQGen[RV]:
        """Run psycopg's generator, which waits for the socket; raise OperationalError once no answer can come."""
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
        """Ask through a new connection whether the server is working on our statement; None if it cannot tell."""
        try:
            with _Connection.connect(self.conninfo, autocommit=True, application_name=APPLICATION) as probe:
                probe.is_probe, probe.silent_seconds = True, self.silent_seconds
                row = probe.execute(_ACTIVITY, [self.info.backend_pid]).fetchone()
        except psycopg.errors.ConnectionTimeout:
            return False
        except psycopg.Error as error:
            if _SILENT in str(error):
                return False
            # any other error comes from a live server, such as "too many connections"
            return None if "Connection refused" in str(error) else True
        return None if row is None or row[0] is None else not row[0].startswith("idle")


def open_connection(dsn: str, **options: Any) -> psycopg.Connection:  # noqa: ANN401 - psycopg's own
    """
    Return a connection that notices an unresponsive server, both while it connects and while a statement runs.

    `connect_timeout` in the DSN, or PGCONNECT_TIMEOUT, overrides the default of 10 seconds.

    Raises ConfigurationError or UnavailableError, which names the server and the reason.
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
    """Yield a connection in autocommit mode with the role's own settings; map the driver's errors to chatdb's."""
    try:
        with open_connection(
            dsn,
            autocommit=True,
            fallback_application_name=APPLICATION,
            client_encoding="UTF8",  # otherwise psycopg returns bytes from a SQL_ASCII database
        ) as connection:
            yield connection
    except psycopg.Error as error:
        # from None: the driver's text may quote a row, which a traceback would show
        raise map_psycopg_error(error, server_of(connect_arguments(dsn))) from None


def _refused(dsn: str, error: psycopg.Error) -> ChatDBError:
    """
    Return the error that explains a failed connection attempt.

    libpq reports only a sentence in the server's language. asyncpg reports the SQLSTATE, so connect again with it.
    """
    arguments = connect_arguments(dsn)
    server = server_of(arguments)
    second: Exception = TimeoutError()
    if not isinstance(error, psycopg.errors.ConnectionTimeout):
        with ThreadPoolExecutor(1) as executor:  # asyncio.run fails in a thread with a running event loop
            try:
                executor.submit(asyncio.run, _connect_once(arguments)).result()
            except Exception as caught:  # noqa: BLE001 - mapped below
                second = caught
            else:
                return UnavailableError(
                    f"a first connection to {server} failed, but a second succeeded: try again", sent=False
                )
    if isinstance(second, TimeoutError):
        return UnavailableError(
            f"{server} does not answer: check the host and port, and that the server is running", sent=False
        )
    if isinstance(second, asyncpg.InsufficientPrivilegeError):
        return ConfigurationError(f"the role may not connect to this database at {server}: grant it CONNECT")
    found = map_driver_error(second, server)
    if found is None or isinstance(found, UnavailableError):
        sentence = str(found) if found else f"could not connect to {server} ({type(second).__name__})"
        return UnavailableError(sentence, sent=False)
    return found


async def _connect_once(arguments: dict[str, Any]) -> None:
    options: dict[str, Any] = {"timeout": _CONNECT_SECONDS}
    connection = await asyncpg.connect(**(options | arguments))
    connection.terminate()


@contextmanager
def pinned_transaction(dsn: str) -> Generator[psycopg.Connection]:
    """
    Yield a connection in a transaction that resolves functions, operators and types in pg_catalog only.

    Use it for read-only work. It changes no session settings, which a pooler would pass on to its next client.
    """
    with connected(dsn) as connection, connection.transaction():
        prepare_session(connection, "local")
        connection.execute("set local lock_timeout = '10s'")
        connection.execute("set local statement_timeout = '5min'")  # counting the rows of a large table takes time
        yield connection


def prepare_session(connection: psycopg.Connection, scope: Literal["session", "local"] = "session") -> None:
    """
    Resolve functions, operators and types in pg_catalog only, and disable the timeouts that could end the session.

    Otherwise an operator in `public` with better matching types, which any role may have created, would win. `scope` is
    the session, which must not be a pooler's, or the open transaction.
    """
    connection.execute(f"set {scope} search_path to pg_catalog, pg_temp".encode())
    connection.execute(
        "select pg_catalog.set_config(name, '0', %s) from pg_catalog.pg_settings where name in "
        "('idle_session_timeout', 'idle_in_transaction_session_timeout', 'statement_timeout', 'transaction_timeout')",
        [scope == "local"],
    )


@contextmanager
def advisory_lock(dsn: str, *, wait: float, key: int = _LOCK) -> Generator[psycopg.Connection]:
    """
    Yield a connection, set up by `prepare_session`, that holds the operator commands' lock on this database.

    `key` is another lock, for a command that may take hours and does not get in the way of the others.

    Polls for the lock: a session that waits in `pg_advisory_lock` holds a snapshot, and a CREATE INDEX CONCURRENTLY by
    the lock's holder would wait for that snapshot forever.

    Raises ConfigurationError behind a transaction pooler, UnavailableError if the lock is not free within `wait`
    seconds.
    """
    with connected(dsn) as connection:
        if is_pooled(dsn, connection):
            raise ConfigurationError(
                f"the connection goes through a transaction pooler, which cannot keep a session's lock: {_NO_ROUTE}"
            )
        prepare_session(connection)
        wait_for_lock(connection, key, wait=wait)
        yield connection


def wait_for_lock(connection: psycopg.Connection, key: int, *, wait: float) -> None:
    """Take another of the operator commands' locks until the session ends. Raises as `advisory_lock` does."""
    deadline = time.monotonic() + wait
    while not fetch_value(connection, "select pg_catalog.pg_try_advisory_lock(%s)", key):
        if time.monotonic() > deadline:
            holder = _holder(connection, key)
            raise UnavailableError(
                f"another operator command is still running on this database after {wait:g} s{holder}: wait until "
                "it ends, then run this again",
                sent=False,
            )
        time.sleep(random.uniform(0.05, 0.15))  # noqa: S311 - keeps many waiters from polling in step


def libpq_variables(dsn: str, connection: psycopg.Connection) -> dict[str, str]:
    """
    Return the environment variables with which another program connects to the same server and database.

    A password in them is visible to the user who runs the program, and one in its arguments to everybody.
    """
    options = psycopg.pq.Conninfo.parse(libpq_dsn(dsn, scheme="postgresql").encode())
    named = {
        option.envvar.decode(): option.val.decode() for option in options if option.envvar and option.val is not None
    }
    there = {"PGHOST": connection.info.host, "PGPORT": str(connection.info.port), "PGDATABASE": connection.info.dbname}
    return named | there | {"PGUSER": connection.info.user, "PGHOSTADDR": connection.info.hostaddr}


def is_pooled(dsn: str, connection: psycopg.Connection) -> bool:
    """
    Return whether this connection goes through a transaction pooler.

    A pooler reports its own PID. In transaction mode it gives a second connection's transaction the server process
    that the idle first connection used.
    """
    process = "select pg_catalog.pg_backend_pid()"
    if fetch_value(connection, process) == connection.info.backend_pid:
        return False
    for _ in range(3):  # another client may take that process first
        with connected(dsn) as second:
            before = fetch_value(connection, process)
            with second.transaction():
                if fetch_value(second, process) == before or fetch_value(connection, process) != before:
                    return True
    return False


def retry_on_lock_timeout(work: Callable[[], object], deadline: float) -> None:
    """Call `work`; repeat it after a lock timeout or a deadlock until the deadline has passed."""
    while True:
        try:
            work()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)  # lets through the sessions that queue behind our lock request
        else:
            return


def fetch_value(connection: psycopg.Connection, statement: str, *arguments: object) -> Any:  # noqa: ANN401 - any type
    """Return the first value of a statement's first row, or None if it returns no row."""
    row = connection.execute(statement.encode(), arguments or None).fetchone()
    return row[0] if row else None


def map_psycopg_error(error: psycopg.Error, server: str = "the database server") -> ChatDBError:
    """Return chatdb's own error for the driver's, whose text may contain a row or a password."""
    state, kind = error.sqlstate or "", classify(error)
    if error.diag.constraint_name == RLS_USER_ID or error.diag.source_function == "check_enable_rls":
        return ConfigurationError(
            f"row-level security hides rows from this role ({error.diag.message_primary}): run this as a superuser or "
            "a role with BYPASSRLS"
        )
    if kind is Kind.PRIVILEGE:  # its message names objects only
        return ConfigurationError(
            f"the database role lacks a privilege ({error.diag.message_primary}): grant it, or run this as the "
            "owner of the database and of the named object"
        )
    if kind is Kind.READ_ONLY:
        return ConfigurationError("the server is read-only, probably because it is a standby: connect to the primary")
    if kind in {Kind.LOCK_TIMEOUT, Kind.DEADLOCK, Kind.CANCELED}:
        return UnavailableError(
            f"a lock, a timeout or a deadlock stopped the statement (SQLSTATE {state}), and the server rolled it back: "
            "end long transactions, then run this again",
            sent=True,
        )
    if kind is Kind.CONNECTION or (kind is Kind.CLIENT and isinstance(error, psycopg.OperationalError)):
        return UnavailableError(
            f"the connection to {server} was lost, or the server no longer answers: check that it is running, then "
            "run this again",
            sent=None,
        )
    names = [name for name in (error.diag.table_name, error.diag.constraint_name) if name]
    place = f" on {', '.join(names)}" if names else ""
    return ChatDBError(f"the server rejected a statement{place} (SQLSTATE {state}): fix the cause, then run this again")


def _holder(connection: psycopg.Connection, key: int) -> str:
    found = fetch_value(
        connection,
        "select pid from pg_catalog.pg_locks where locktype = 'advisory' and granted and database = "
        "(select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()) "
        "and (classid::bigint << 32 | objid::bigint) = %s",
        key,
    )
    return f" (server process {found})" if found else ""


def has_citus(connection: psycopg.Connection) -> bool:
    """Return whether the database has the extension citus."""
    return bool(fetch_value(connection, "select true from pg_catalog.pg_extension where extname = 'citus'"))


def is_distributed(connection: psycopg.Connection) -> bool:
    """Return whether Citus distributes chatdb's tables."""
    statement = (
        "select true from pg_catalog.pg_dist_partition "
        "where logicalrelid::oid = pg_catalog.to_regclass('chatdb.conversations')::oid and partmethod = 'h'"
    )
    return has_citus(connection) and bool(fetch_value(connection, statement))


def refuse_distributed(connection: psycopg.Connection, command: str, instead: str) -> None:
    """Raise ConfigurationError if Citus distributes chatdb's tables: `command` does not work on them."""
    if is_distributed(connection):
        raise ConfigurationError(f"{command} does not work on tables that Citus distributes: {instead}")
