"""
All code that uses asyncpg's private names.

The fast path takes an idle connection from the pool's queue, runs the statement and puts the connection back. asyncpg's
own path adds a context manager, a proxy, a task and a reset, which cost more than half as much as a small statement. At
import, this module checks every private name it needs and sets `FAST` if all exist. If a version of asyncpg lacks one,
a warning names it and chatdb falls back to asyncpg's public API.

The fallback keeps FIFO order, timeouts, errors, the process and event loop checks on the pool and its connections, and
the reset of session state. It never reuses a connection whose state is unknown. It is slower and has these limits:

- Connections open one at a time, and `Pool.fetch` resets the session after its statement.
- A transaction with a `user_id` needs two more round trips to begin and one more to end.
- If BEGIN or COMMIT is cancelled, the connection is closed, even if the caller opened it.
- Without `_get_statement`, rows are validated, and a codec set by the caller can make a call raise ConfigurationError.
  On a connection outside chatdb's pool, both apply whichever name is missing.
- Without `_pool_release_ctr`, prepared statements and cursors do not check their process and event loop.
- Without `_transport` and `_cancel_current_command`, a forked process can disturb its parent's connections.
- Without `PoolConnectionProxy._holder` or `PoolConnectionHolder._pool`, listeners do not hear of calls on a connection
  of the pool.
- Without `Pool._get_new_connection`, on Citus a pool runs the statements that it splits.
- Without `Pool._loop`, a pool must be created in a running event loop.

Decision: docs/decisions/0007-the-pools-fast-path.md
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import re
import socket
import weakref
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import asyncpg
from asyncpg.pool import PoolConnectionHolder, PoolConnectionProxy
from asyncpg.protocol import Protocol
from asyncpg.transaction import Transaction, TransactionState

from chatdb._core.calls import CallListeners
from chatdb._core.driver_errors import map_driver_error
from chatdb._core.dsn import server_of
from chatdb._core.handles import AcquireContext, AsyncpgPool, Connection
from chatdb._core.validate import check_handle
from chatdb.errors import AcquireTimeoutError, ConfigurationError, PoolClosedError, UnavailableError

if TYPE_CHECKING:
    AsyncpgConnection = asyncpg.Connection[asyncpg.Record]
else:
    AsyncpgConnection = asyncpg.Connection

Private = Any  # an asyncpg object with attributes that its stubs omit

NEEDED: Final[dict[type, tuple[str, ...]]] = {
    asyncpg.Connection: (
        "_cancel_current_command", "_drop_global_statement_cache", "_drop_global_type_cache",
        "_drop_local_statement_cache", "_drop_local_type_cache", "_execute", "_get_statement", "_pool_holder",
        "_pool_release_ctr", "_protocol", "_query_loggers", "_stmt_cache", "_top_xact", "_transport",
    ),
    asyncpg.Pool: (
        "_connect_kwargs", "_drop_statement_cache", "_drop_type_cache", "_generation", "_get_new_connection",
        "_holders", "_loop", "_queue", "_reset", "_schedule_min_size_maintenance", "_setup",
    ),
    PoolConnectionHolder: ("_con", "_generation", "_in_use", "_max_queries", "_pool", "_proxy", "_release", "_timeout"),
    PoolConnectionProxy: ("_con", "_holder"),
    Protocol: (
        "_is_cancelling", "_wait_for_cancellation", "bind_execute", "is_in_transaction", "queries_count", "query",
    ),
    Transaction: ("_connection", "_state"),
}  # fmt: skip
"""The private names that the fast path uses, by class."""

MISSING: Final = [
    f"{owner.__name__}.{name}" for owner, names in NEEDED.items() for name in names if not hasattr(owner, name)
]

FAST: bool = not MISSING

CANCEL_TIMEOUT: Final = 0.75
"""Maximum seconds that a caller waits for the server to stop a statement that was cancelled or timed out."""

IDLE_CHECKS_PER_LIFETIME: Final = 8
"""Number of idle checks within `max_inactive_connection_lifetime`."""

STATEMENTS: Final[set[str]] = set()
"""chatdb's own statements, which leave no session state behind."""

BEGIN_FOR_USER: Final = "begin; select pg_catalog.set_config('chatdb.user_id', {}, true)"
"""Begins a transaction and sets its user, in one round trip."""

_NO_LOOP: Final[Any] = None if "Pool._loop" in MISSING else object()
"""Placeholder for the event loop of a pool that is not open yet."""

_FETCH: Final[Any] = inspect.unwrap(asyncpg.Connection.fetch)
"""asyncpg's own method, without the wrapper of a tracing tool."""

_EXECUTE: Final[Any] = inspect.unwrap(getattr(asyncpg.Connection, "_execute", _FETCH))
"""The same; a tool that wraps it without naming what it wraps is found by its module."""

_PID: Final = "select pg_catalog.pg_backend_pid()"

FUNCTIONS: Final[set[str]] = set()
"""The database functions that chatdb's statements for Citus call."""

_FIND_FUNCTIONS: Final = (
    "select from pg_catalog.pg_proc as p where p.proname in ({}) "
    "and p.pronamespace = (select n.oid from pg_catalog.pg_namespace as n where n.nspname = 'chatdb')"
)

_RESET: Final = (
    "set session authorization default; reset all; close all; unlisten *; "
    "select pg_catalog.pg_advisory_unlock_all(); discard temp; discard sequences"
)
"""DISCARD ALL without prepared statements and plans, which the driver and the pool keep."""

_TRANSACTION: Final = re.compile(
    r"(?:begin|commit|rollback|(?:savepoint|release savepoint|rollback to) \w+);?"
    + f"|{re.escape(BEGIN_FOR_USER)}".replace(r"\{\}", r"E'(?:[^'\\]|''|\\\\)*'"),
    re.IGNORECASE,
)
"""Transaction control, which leaves no session state behind."""

_DISCARDS: Final = re.compile(r"\b(?:discard\s+(?:all|plans)|deallocate)\b", re.IGNORECASE)
"""Statements that drop prepared statements without the driver's knowledge."""

_KNOWN_STATE: Final = (asyncpg.PostgresError, asyncpg.DataError, asyncio.CancelledError, TimeoutError)
"""Errors after which asyncpg knows whether the connection is ready or still cancelling its statement."""

_log = logging.getLogger("chatdb")

if MISSING:
    _log.warning(
        "asyncpg %s lacks %s: chatdb's pool falls back to asyncpg's public API, which is slower",
        asyncpg.__version__,
        ", ".join(MISSING),
    )


_get_statement: Final[Private] = getattr(asyncpg.Connection, "_get_statement", None)

_release_counter: Final[Private] = getattr(asyncpg.Connection, "_pool_release_ctr", None)


class DefaultCodecRows(list[Any]):
    """
    The rows of one of chatdb's own statements, decoded with the driver's default codecs: they need no validation.

    A class of rows instead would cost 11 µs for 100 rows, because asyncpg reuses the memory only of its own class.
    """

    __slots__ = ()


def check_process_and_loop(
    process: int, loop: asyncio.AbstractEventLoop, what: str, *, may_be_stopped: bool = False
) -> None:
    """
    Raise ConfigurationError outside the process and event loop that opened a pool or connection.

    `may_be_stopped` also accepts the owning loop when it is not running.
    """
    if os.getpid() != process:
        raise ConfigurationError(
            f"this {what} belongs to another process: open a new pool in the child process after the fork"
        )
    running = asyncio._get_running_loop()
    if running is loop or (may_be_stopped and running is None and not loop.is_running()):
        return
    if loop.is_closed():
        raise ConfigurationError(
            f"the event loop of this {what} is closed: open a new pool in each event loop or asyncio.run() call"
        )
    raise ConfigurationError(
        f"this {what} belongs to another event loop: use it there (asyncio.run_coroutine_threadsafe) or open a new "
        "pool in this loop"
    )


class PoolConnection(AsyncpgConnection):
    """
    A connection of chatdb's pool.

    Outside its process or event loop it raises ConfigurationError before it sends anything. On release, the pool
    resets it only if statements other than chatdb's own ran on it; chatdb's own leave no session state behind.

    When a statement finds that a table has changed, the whole pool drops its caches. asyncpg finds the pool through
    the connection's proxy, which `Pool.fetch` does not use; the overrides below use the holder instead.
    """

    __slots__ = ("_home", "_name", "_needs_reset", "_process", "functions")

    functions: set[str]
    """The pool's set of the functions in the database's schema chatdb."""

    ignores_codecs = "Connection._get_statement" not in MISSING
    """Whether chatdb's own statements bypass the caller's codecs, also in `fetch`."""

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - asyncpg's own
        super().__init__(*args, **options)
        self._process = os.getpid()
        self._home = asyncio.get_running_loop()
        self._needs_reset = False
        self.functions = set()
        self._name = str(getattr(self.get_settings(), "application_name", ""))
        _connections.add(self)

    def __del__(self) -> None:
        if os.getpid() == self._process:  # a forked process has nothing to close
            super().__del__()

    def check_process_and_loop(self, *, may_be_stopped: bool = False) -> None:
        """Raise ConfigurationError outside the owning process or event loop."""
        check_process_and_loop(self._process, self._home, "connection", may_be_stopped=may_be_stopped)

    def terminate(self) -> None:
        self.check_process_and_loop(may_be_stopped=True)
        super().terminate()

    def _cancel_current_command(self, waiter: asyncio.Future[None], *args: Private) -> None:
        if os.getpid() == self._process:
            super()._cancel_current_command(waiter, *args)  # type: ignore[misc]
        else:  # a cancel request would stop the parent's statement
            waiter.set_result(None)
            self._home.call_soon(super().terminate)

    def disconnect_after_fork(self, nowhere: socket.socket) -> None:
        """
        Replace the socket with a dead one in a forked process.

        Otherwise an exception that ends the inherited event loop would consume the answers to the parent's statements
        and unregister the parent's sockets from the shared epoll.
        """
        if not self.is_closed():
            with contextlib.suppress(Exception):  # a fork hook has no caller to report to
                transport: Private = self._transport  # type: ignore[attr-defined]
                os.dup2(nowhere.fileno(), transport.get_extra_info("socket").fileno(), inheritable=False)

    def get_reset_query(self) -> str:
        if not self._needs_reset:
            return ""
        # behind a pooler, "reset all" restores another client's name
        return f"{_RESET}; set application_name to {literal(self._name)}"

    async def reset(self, *, timeout: float | None = None) -> None:
        await super().reset(timeout=timeout)
        self._needs_reset = False  # execute() set it when it ran the reset query

    def cursor(self, query: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - asyncpg's own
        _begin_call(self, query)
        return super().cursor(query, *args, **options)

    def transaction(self, **options: Any) -> Transaction:  # noqa: ANN401 - asyncpg's own
        self.check_process_and_loop()
        return super().transaction(**options)

    if ignores_codecs:

        def _get_statement(self, query: str, timeout: float | None, **options: Any) -> Any:  # noqa: ANN401
            if query in STATEMENTS:
                options |= {"ignore_custom_codec": True, "record_class": asyncpg.Record}
            return _get_statement(self, query, timeout, **options)

    if "Connection._pool_release_ctr" not in MISSING:

        def _releases(self) -> object:
            # prepared statements, cursors and transactions read it before each use; nothing else does
            self.check_process_and_loop()
            return _release_counter.__get__(self)

        _pool_release_ctr = property(_releases, _release_counter.__set__)

    if not MISSING:

        def _drop_global_statement_cache(self: Private) -> None:
            holder = self._pool_holder and self._pool_holder()
            (holder._pool._drop_statement_cache if holder else self._drop_local_statement_cache)()

        def _drop_global_type_cache(self: Private) -> None:
            holder = self._pool_holder and self._pool_holder()
            (holder._pool._drop_type_cache if holder else self._drop_local_type_cache)()


_connections: Final[weakref.WeakSet[PoolConnection]] = weakref.WeakSet()


def _cut_off_all() -> None:
    """Disconnect a forked process from its parent's connections."""
    nowhere, other = socket.socketpair()
    other.close()
    with nowhere:
        for connection in _connections:
            connection.disconnect_after_fork(nowhere)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cut_off_all)


def _begin_call(connection: PoolConnection, query: object) -> bool:
    """Check the connection's process and loop, and return whether the statement drops prepared statements."""
    connection.check_process_and_loop()
    if query is None or query in STATEMENTS or (isinstance(query, str) and _TRANSACTION.fullmatch(query)):
        return False
    connection._needs_reset = True
    return isinstance(query, str) and _DISCARDS.search(query) is not None


def _guarded(name: str, *, runs: bool) -> Any:  # noqa: ANN401 - a method of any signature
    """
    Wrap asyncpg's method with a check of the process and event loop.

    If it `runs` a statement, its first argument or the table that it copies, the connection may need a reset.
    """

    @functools.wraps(getattr(AsyncpgConnection, name))
    async def call(self: PoolConnection, *args: Any, **options: object) -> object:  # noqa: ANN401
        if _begin_call(self, (args[0] if args else options.get("query", name)) if runs else None):
            await _forget_statements(self)
        # looked up on each call because a tracing tool may wrap it later
        return await getattr(AsyncpgConnection, name)(self, *args, **options)

    return call


for _name in (
    "add_listener", "copy_from_query", "copy_from_table", "copy_records_to_table", "copy_to_table", "execute",
    "executemany", "fetch", "fetchmany", "fetchrow", "fetchval", "prepare",
):  # fmt: skip
    setattr(PoolConnection, _name, _guarded(_name, runs=True))
for _name in ("close", "reset_type_codec", "set_builtin_type_codec", "set_type_codec"):
    setattr(PoolConnection, _name, _guarded(_name, runs=False))


def listeners_of(db: object) -> CallListeners | None:
    """Return the listeners of a pool, or of the pool that lent a connection."""
    holder: Private = getattr(db, "_holder", None)
    return getattr(db if holder is None else getattr(holder, "_pool", None), "call_listeners", None)


async def fetch_rows(db: Any, sql: str, args: tuple[object, ...], timeout: float | None) -> list[Any]:  # noqa: ANN401
    """
    Run one of chatdb's statements on a handle other than chatdb's pool, and return its rows.

    On an asyncpg connection, ignore the codecs that the caller has set.
    """
    # isinstance would narrow the types to asyncpg's stubs
    is_pool, is_lent = (issubclass(db.__class__, kind) for kind in (asyncpg.Pool, PoolConnectionProxy))
    if is_pool:
        async with db.acquire() as lent:
            return await fetch_rows(lent, sql, args, timeout)
    connection: Private = getattr(db, "_con", None) if is_lent and FAST else db
    is_known = issubclass(type(connection), asyncpg.Connection)
    # an override of fetch, or a tracing tool that wraps it, must see the statement
    is_plain = FAST and is_known and type(connection).fetch is _FETCH
    while True:
        try:
            if is_plain:
                if connection.is_closed():
                    raise asyncpg.InterfaceError("connection is closed")
                rows: list[Any] = await _execute(connection, sql, args, timeout)
            else:
                if not is_known:
                    check_handle(db, "fetch")
                rows = _marked(await db.fetch(sql, *args, timeout=timeout), db)
        except asyncpg.InvalidSQLStatementNameError:
            if not is_known or not await _may_prepare_anew(connection):
                raise
            is_known = False  # retry only once
        else:
            return rows


async def _execute(
    connection: Private, query: str, args: tuple[Any, ...], timeout: float | None, record_class: type[Any] | None = None
) -> list[Any]:
    """Run `fetch` without a second check of process and loop; chatdb's own statements bypass the caller's codecs."""
    is_own = query in STATEMENTS
    rows: list[Any]
    if not FAST or AsyncpgConnection.fetch is not _FETCH:  # a tracing tool must see the statement
        rows = await connection.fetch(query, *args, timeout=timeout, record_class=record_class)
        return _marked(rows, connection) if is_own else rows
    if is_own:
        record_class = asyncpg.Record
    rows = await connection._execute(query, args, 0, timeout, ignore_custom_codec=is_own, record_class=record_class)
    return DefaultCodecRows(rows) if is_own else rows


def _marked(rows: list[Any], connection: object) -> list[Any]:
    """Mark the rows of one of chatdb's own statements if a connection of chatdb's pool has decoded them."""
    # a handle that wraps the connection may return other rows
    is_default = getattr(connection, "ignores_codecs", False) and (not rows or type(rows[0]) is asyncpg.Record)
    return DefaultCodecRows(rows) if is_default else rows


def _prepared(connection: Private, query: str) -> Private | None:
    """Return chatdb's own statement if it is prepared on the connection and no tool watches its execution."""
    base: Private = AsyncpgConnection
    kind: Private = PoolConnection
    if (
        query not in STATEMENTS
        or connection.__class__ is not kind
        or connection._query_loggers
        or base.fetch is not _FETCH
        or base._execute is not _EXECUTE
        or _EXECUTE.__module__ != base.__module__
    ):
        return None
    return connection._stmt_cache.get((query, asyncpg.Record, True))


async def _may_prepare_anew(connection: Private) -> bool:
    """
    Drop the connection's prepared statements after the server reported one as unknown.

    Return whether the statement can be sent again. It cannot in a transaction, which has failed, or behind a
    transaction pooler, where another client's statement may have the same name.
    """
    await _forget_statements(connection)
    if connection.is_in_transaction():
        return False
    try:
        is_own_session: bool = await connection.fetchval(_PID) == connection.get_server_pid()
    except asyncpg.PostgresError:
        return False
    if is_own_session:
        _log.warning("a session lost its prepared statements, because DISCARD ALL or DEALLOCATE was run in it")
    return is_own_session


async def _forget_statements(connection: Private) -> None:
    """Drop the connection's statement cache or, without private names, the caches of its whole pool."""
    if FAST:
        connection._drop_local_statement_cache()
    else:
        await connection.reload_schema_state()


class _AcquireContext(AcquireContext):
    """The return value of `acquire`, which lends connections in FIFO order."""

    pool: Any

    async def __aenter__(self) -> Connection:
        if self.connection is not None or self.done:
            raise asyncpg.InterfaceError("a connection is already acquired")
        connection: Connection = await self.pool.acquire_fifo(self.timeout)
        self.connection = connection
        return connection

    def __await__(self) -> Generator[Any, None, Connection]:
        self.done = True
        lending: Coroutine[Any, Any, Connection] = self.pool.acquire_fifo(self.timeout)
        return lending.__await__()


class PoolBase(AsyncpgPool):
    """An asyncpg pool with FIFO order, an acquire timeout, and process and event loop checks."""

    functions: set[str]
    """The functions in the database's schema chatdb, which a database with Citus has."""

    _loop: asyncio.AbstractEventLoop  # asyncpg uses it too
    _process: int
    _state: str
    call_listeners: CallListeners | None = None

    def __init__(self, *, acquire_timeout: float, max_inactive_connection_lifetime: float, **options: Any) -> None:  # noqa: ANN401
        # asyncpg would set and cancel a timer on every call: see _close_idle
        options["max_inactive_connection_lifetime"] = 0 if FAST else max_inactive_connection_lifetime
        super().__init__(loop=_NO_LOOP, connection_class=PoolConnection, **options)
        self.functions = set()
        self._has_looked = False
        self._state = "new"  # then "opening", "open", "closed"
        self._acquire_timeout = acquire_timeout
        self._max_idle = max_inactive_connection_lifetime if FAST else 0
        self._fifo_lock = asyncio.Lock()
        self._waiting = 0  # tasks waiting for a connection
        self._idle_checks: dict[Private, tuple[object, int]] = {}

    def __await__(self) -> Generator[Any, None, Self]:
        return self._open().__await__()

    async def __aenter__(self) -> Self:
        return await self._open()

    async def _open(self) -> Self:
        if self._state in {"open", "closed"}:
            self._check_process_and_loop()
            return self
        is_first = self._state == "new"
        if is_first:
            self._process, self._loop, self._state = os.getpid(), asyncio.get_running_loop(), "opening"
        try:
            async with asyncio.timeout(self._acquire_timeout):
                await super().__aenter__()
        except BaseException as error:
            if is_first:
                self._state = "closed"
            if isinstance(error, Exception):
                self._raise_acquire_error(error, self._acquire_timeout)
            raise
        was_closed = self._state == "closed"
        self._state = "open"
        if was_closed:
            self.terminate()
            raise PoolClosedError("the pool was closed while it opened", sent=False)
        self._schedule_idle_check()
        return self

    async def _get_new_connection(self) -> Any:  # noqa: ANN401 - asyncpg's own
        private: Private = super()
        connection: Private = await private._get_new_connection()
        if connection.__class__ is not PoolConnection:  # from a connect= hook
            return connection
        if not self._has_looked:  # once per pool, on its first connection
            try:
                await self._look_for_functions(connection)
            except BaseException:
                connection.terminate()
                raise
            self._has_looked = True
        connection.functions = self.functions
        return connection

    async def look_for_functions(self) -> set[str]:
        """Look again for the functions for Citus, and return their names."""
        connection = await self.acquire_fifo(None)
        try:
            if FAST:
                await self._look_for_functions(getattr(connection, "_con", None))
        finally:
            await self.release(connection)
        return self.functions

    async def _look_for_functions(self, connection: Private) -> None:
        """Find out in one round trip whether the database has the functions for Citus. Tracing tools do not see it."""
        # not to_regproc(), which fails without a privilege on the schema
        names = ", ".join(f"'{name}'" for name in sorted(FUNCTIONS))
        query = _FIND_FUNCTIONS.format(names)
        answer = await (connection._protocol.query(query, None) if FAST else connection.execute(query))
        if answer == f"SELECT {len(FUNCTIONS)}":
            self.functions.update(FUNCTIONS)

    def _check_process_and_loop(self) -> None:
        if self._state == "new":
            self._check_init()
        # inlined for speed; check_process_and_loop raises the error
        elif os.getpid() != self._process or asyncio._get_running_loop() is not self._loop:
            check_process_and_loop(self._process, self._loop, "pool")

    def _check_init(self) -> None:
        if self._state == "closed":
            raise PoolClosedError("the pool is closed", sent=False)
        if self._state != "open":
            raise PoolClosedError("the pool is not open: await it or use async with first", sent=False)

    def _raise_acquire_error(self, error: Exception, timeout: float, *, is_exhausted: bool = False) -> NoReturn:
        """Raise chatdb's error for a failed acquire. Nothing was sent."""
        if is_exhausted:
            raise AcquireTimeoutError(
                f"no connection became free within {timeout:g} s (max_size is {self.get_max_size()}): release "
                "connections sooner or raise max_size",
                sent=False,
            ) from error
        options: Any = getattr(self, "_connect_kwargs", None)
        server = server_of(options) if options else "the server"
        if isinstance(error, TimeoutError):
            raise AcquireTimeoutError(
                f"could not connect to {server} within {timeout:g} s: check that the server is running and reachable",
                sent=False,
            ) from error
        found = map_driver_error(error, server)
        if found is None:
            raise error
        raise (UnavailableError(str(found), sent=False) if isinstance(found, UnavailableError) else found) from error

    def acquire(self, *, timeout: float | None = None) -> AcquireContext:  # type: ignore[override] # see handles.pyi
        """Acquire a connection with `await` or `async with`; `timeout` in seconds overrides the pool's."""
        return _AcquireContext(self, timeout)

    def acquire_fifo(self, timeout: float | None) -> Coroutine[Any, Any, Connection]:
        """Acquire a connection in FIFO order."""
        acquiring = self._acquire_fifo(timeout)
        if self.call_listeners is None or (self._waiting == 0 and self.get_idle_size() > 0):
            return acquiring
        return self.call_listeners.measure_wait(acquiring)

    async def _acquire_fifo(self, timeout: float | None) -> Connection:
        """Acquire a connection in FIFO order: a lock admits one task at a time to asyncpg's unfair queue."""
        self._check_process_and_loop()
        self._check_init()
        if self.is_closing():
            raise PoolClosedError("the pool is closed", sent=False)
        timeout = self._acquire_timeout if timeout is None else timeout
        deadline = self._loop.time() + timeout
        private: Private = self
        if not FAST:
            self._waiting += 1
            try:
                async with asyncio.timeout_at(deadline), self._fifo_lock:
                    return await super().acquire()
            except Exception as error:  # noqa: BLE001 - raised again as chatdb's error
                are_all_in_use = self.get_size() - self.get_idle_size() == self.get_max_size()
                self._raise_acquire_error(
                    error, timeout, is_exhausted=isinstance(error, TimeoutError) and are_all_in_use
                )
            finally:
                self._waiting -= 1
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline), self._fifo_lock:
                holder: Private = await private._queue.get()
                if self.is_closing():
                    private._queue.put_nowait(holder)
                    raise PoolClosedError("the pool is closed", sent=False)
        except TimeoutError as error:
            self._raise_acquire_error(error, timeout, is_exhausted=True)
        finally:
            self._waiting -= 1
        try:
            async with asyncio.timeout_at(deadline):
                connection: Connection = await holder.acquire()
        except BaseException as error:
            private._queue.put_nowait(holder)
            private._schedule_min_size_maintenance()
            if isinstance(error, Exception):
                self._raise_acquire_error(error, timeout)
            raise
        holder._timeout = timeout
        return connection

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:  # noqa: ANN401 - asyncpg's proxy
        """
        Reset a connection and return it to the pool; a pending cancellation finishes in the background.

        A connection that cannot be reset is terminated, with a warning in the log.
        """
        self._check_process_and_loop()
        inner = getattr(connection, "_con", None)
        releasing = super().release(connection, timeout=timeout)
        may_take_long = not FAST or (inner is not None and inner._protocol._is_cancelling())
        try:
            await (_release_with_timeout(releasing) if may_take_long else releasing)
        # TimeoutError is an OSError; on uvloop, asyncpg can notice the end of a session in the middle of the reset
        except (OSError, asyncpg.PostgresError, asyncpg.InternalClientError) as error:
            _log.warning("a connection was terminated because it could not be reset: %s", type(error).__name__)

    async def _run(
        self, query: str, args: tuple[Any, ...], timeout: float | None, record_class: type[Any] | None
    ) -> list[Any]:
        """Run a statement on a pooled connection, on the fast path if one is idle."""
        holder: Private = self._take_idle() if FAST else None
        lent: Private = None if holder else await self.acquire_fifo(None)
        if FAST:
            holder = holder or lent._holder
        connection = holder._con if FAST else lent
        try:
            rows: list[Any]
            prepared = _prepared(connection, query) if FAST and timeout is None else None
            try:
                if prepared is not None:  # without asyncpg's layers, which cost 5 µs
                    rows = DefaultCodecRows(await connection._protocol.bind_execute(prepared, args, "", 0, False, None))
                else:
                    # a connect= hook may return another class that passes asyncpg's isinstance check
                    if FAST and query not in STATEMENTS and connection.__class__ is PoolConnection:
                        connection._needs_reset = True
                    rows = await _execute(connection, query, args, timeout, record_class)
            except asyncpg.InvalidSQLStatementNameError:
                if not await _may_prepare_anew(connection):
                    raise
                rows = await _execute(connection, query, args, timeout, record_class)
            except asyncpg.InvalidCachedStatementError:  # a table has changed
                if prepared is None:
                    raise
                connection._drop_global_statement_cache()
                rows = await _execute(connection, query, args, timeout, record_class)
        except _KNOWN_STATE:
            raise
        except BaseException:  # the connection's state is unknown
            with contextlib.suppress(Exception):
                connection.terminate()
            raise
        finally:
            if not FAST:
                await self.release(lent)
            elif not self._give_back(holder, connection):
                with contextlib.suppress(Exception):  # the holder has terminated the connection
                    await _release_with_timeout(holder.release(self._acquire_timeout))
        return rows

    def _take_idle(self: Private) -> Private | None:
        """Take an idle, connected holder, unless a task is waiting for one."""
        is_open = self._state == "open" and not self.is_closing()
        if self._waiting or not is_open or self._setup is not None or self._queue.empty():
            return None
        holder = self._queue.get_nowait()
        if not holder.is_connected() or holder._generation != self._generation:
            self._queue.put_nowait(holder)
            return None
        holder._in_use = self._loop.create_future()
        return holder

    def _give_back(self: Private, holder: Private, connection: Private) -> bool:
        """Release a connection without waiting, or return False if the release has to wait."""
        if holder._con is not connection:  # it was lost: its holder is already released and may be in use
            return True
        protocol = connection._protocol
        if (
            connection.is_closed()
            or protocol._is_cancelling()
            or protocol.is_in_transaction()
            or protocol.queries_count >= holder._max_queries
            or holder._generation != self._generation
            or self._reset is not None
        ):
            return False
        holder._release()
        return True

    def _schedule_idle_check(self) -> None:
        if self._max_idle:
            pool: weakref.ref[PoolBase] = weakref.ref(self)  # so the timer does not keep the pool alive
            self._loop.call_later(self._max_idle / IDLE_CHECKS_PER_LIFETIME, _run_idle_check, pool)

    def _close_idle(self: Private) -> None:
        """Close connections unused for the idle lifetime, down to `min_size`; one timer serves the whole pool."""
        for holder in self._holders:
            # a connection in use has a proxy or, in `fetch`, only a future; while `setup` runs, it has only a proxy
            if not holder.is_connected() or not holder.is_idle() or holder._proxy is not None:
                self._idle_checks.pop(holder, None)
                continue
            state = holder._con, holder._con._protocol.queries_count
            before, looks = self._idle_checks.get(holder, (None, 0))
            looks = looks + 1 if state == before else 0
            self._idle_checks[holder] = state, looks
            if looks >= IDLE_CHECKS_PER_LIFETIME and self.get_size() > self.get_min_size():
                holder.terminate()


def _run_idle_check(reference: weakref.ref[PoolBase]) -> None:
    """Close a pool's idle connections and schedule the next check, unless the pool is closed or collected."""
    pool = reference()
    if pool is not None and not pool.is_closing():
        pool._close_idle()
        pool._schedule_idle_check()


async def _release_with_timeout(release: Coroutine[Any, Any, None]) -> None:
    """Wait for a release up to CANCEL_TIMEOUT, so that a silent server does not delay the caller's error."""
    releasing = asyncio.ensure_future(release)
    releasing.add_done_callback(lambda done: done.cancelled() or done.exception())  # marks it retrieved
    if (await asyncio.wait([releasing], timeout=CANCEL_TIMEOUT))[0]:
        releasing.result()


async def begin_for_user(connection: Connection, block: Private, user: str) -> None:
    """Begin a transaction and set its user, like asyncpg's `start`, which cannot add a statement to BEGIN."""
    await connection.execute(BEGIN_FOR_USER.format(literal(user)))
    block._connection._top_xact = block
    block._state = TransactionState.STARTED


async def commit(connection: Connection, block: Private) -> bool:
    """Commit and return whether the server did; asyncpg's `commit` discards the server's answer."""
    if FAST:
        _mark_transaction_ended(block)
        return await connection.execute("commit") == "COMMIT"
    try:
        await connection.execute("savepoint chatdb")  # fails where COMMIT would roll back
    except asyncpg.InFailedSQLTransactionError:
        await block.rollback()
        return False
    await block.commit()
    return True


async def roll_back(connection: Private, block: Private, *, is_savepoint: bool) -> None:
    """Roll back the block without hiding the error that caused it."""
    with contextlib.suppress(Exception):
        if not FAST:
            try:
                async with asyncio.timeout(CANCEL_TIMEOUT):
                    await block.rollback()
            except BaseException as error:
                # if setting a savepoint failed, asyncpg or the server raises here, and the outer transaction continues
                if not is_savepoint or not isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError):
                    connection.terminate()
                raise
            return
        # after this timeout, asyncpg terminates the connection
        await connection._protocol._wait_for_cancellation(CANCEL_TIMEOUT)
        if is_savepoint:
            await block.rollback()
        else:
            _mark_transaction_ended(block)
            await connection.execute("rollback")  # even if BEGIN was cancelled: the server may have executed it


def _mark_transaction_ended(block: Private) -> None:
    """Mark asyncpg's Transaction finished; otherwise the next one becomes a savepoint."""
    block._connection._top_xact = None
    block._state = TransactionState.ROLLEDBACK


def literal(text: str) -> str:
    """Return an SQL literal that is valid under any setting of standard_conforming_strings."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
