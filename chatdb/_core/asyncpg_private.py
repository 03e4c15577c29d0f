"""
Everything in chatdb that uses a private name of asyncpg's.

A call costs least when chatdb takes a connection from the pool's queue, runs the statement and puts it back: asyncpg's
own way, by a context, a proxy, a task and a reset, costs more than half of what a small statement does. At import this
module looks for each private name that it needs. Where all are there, `FAST` is true. Where one is missing, which may
happen with another version of asyncpg, a warning names it, and chatdb takes asyncpg's own way, by public names only.

What still holds then: the order of the waiting tasks, the time limits, the errors, the checks of process and event loop
on the pool and on its connections, the reset of what a borrower left, and that no connection is used again whose state
is unknown. What is lost beside speed:

- Connections are opened one after another, and `Pool.fetch` resets what its statement left in the session.
- A transaction that names its user begins with two round trips more, and ends with one more.
- A connection whose BEGIN or COMMIT was cancelled is closed, one that the caller has opened too.
- Without `_get_statement` rows are validated, and a codec that the caller has set can make a call fail with
  ConfigurationError. So it is, whatever is missing, on a connection that is not of chatdb's pool.
- Without `_pool_release_ctr` a prepared statement or a cursor does not check its process and event loop, without
  `_transport` and `_cancel_current_command` a forked process can disturb its parent's connections, and without
  `Pool._loop` a pool must be made in a running event loop.

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

from chatdb._core.driver_errors import map_driver_error
from chatdb._core.dsn import server_of
from chatdb._core.handles import AcquireContext, AsyncpgPool, Connection
from chatdb._core.validate import check_handle
from chatdb.errors import AcquireTimeoutError, ConfigurationError, PoolClosedError, UnavailableError

if TYPE_CHECKING:
    AsyncpgConnection = asyncpg.Connection[asyncpg.Record]
else:
    AsyncpgConnection = asyncpg.Connection

Private = Any  # an object of asyncpg's of whose private parts its stubs say nothing

NEEDED: Final[dict[type, tuple[str, ...]]] = {
    asyncpg.Connection: (
        "_cancel_current_command", "_drop_global_statement_cache", "_drop_global_type_cache",
        "_drop_local_statement_cache", "_drop_local_type_cache", "_execute", "_get_statement", "_pool_holder",
        "_pool_release_ctr", "_protocol", "_top_xact", "_transport",
    ),
    asyncpg.Pool: (
        "_connect_kwargs", "_drop_statement_cache", "_drop_type_cache", "_generation", "_holders", "_loop", "_queue",
        "_reset", "_schedule_min_size_maintenance", "_setup",
    ),
    PoolConnectionHolder: ("_con", "_generation", "_in_use", "_max_queries", "_pool", "_proxy", "_release", "_timeout"),
    PoolConnectionProxy: ("_con", "_holder"),
    Protocol: ("_is_cancelling", "_wait_for_cancellation", "is_in_transaction", "queries_count"),
    Transaction: ("_connection", "_state"),
}  # fmt: skip
"""The names of asyncpg's that the fast way takes, by the class that has them."""

MISSING: Final = [
    f"{owner.__name__}.{name}" for owner, names in NEEDED.items() for name in names if not hasattr(owner, name)
]

FAST: bool = not MISSING

CANCEL_TIMEOUT: Final = 0.75
"""Seconds that a caller waits until the server has stopped a statement that was cancelled or ran into its limit."""

IDLE_CHECKS_PER_LIFETIME: Final = 8
"""How often the pool looks at its idle connections in the time that they may be idle."""

STATEMENTS: Final[set[str]] = set()
"""The statements of chatdb's own, which leave nothing in the session that they run in."""

BEGIN_FOR_USER: Final = "begin; select pg_catalog.set_config('chatdb.user_id', {}, true)"
"""Begins a transaction that names its user, in one round trip."""

_NO_LOOP: Final[Any] = None if "Pool._loop" in MISSING else object()
"""What a pool has for its event loop until it is opened."""

_FETCH: Final[Any] = inspect.unwrap(asyncpg.Connection.fetch)
"""asyncpg's own method, even where a tool that traces has wrapped it."""

_PID: Final = "select pg_catalog.pg_backend_pid()"

_RESET: Final = (
    "set session authorization default; reset all; close all; unlisten *; "
    "select pg_catalog.pg_advisory_unlock_all(); discard temp; discard sequences"
)
"""What DISCARD ALL does but for prepared statements and plans, which the driver and the pool keep."""

_TRANSACTION: Final = re.compile(
    r"(?:begin|commit|rollback|(?:savepoint|release savepoint|rollback to) \w+);?"
    + f"|{re.escape(BEGIN_FOR_USER)}".replace(r"\{\}", r"E'(?:[^'\\]|''|\\\\)*'"),
    re.IGNORECASE,
)
"""What leaves nothing in the session."""

_DISCARDS: Final = re.compile(r"\b(?:discard\s+(?:all|plans)|deallocate)\b", re.IGNORECASE)
"""What drops prepared statements that the driver believes to be there."""

_KNOWN_STATE: Final = (asyncpg.PostgresError, asyncpg.DataError, asyncio.CancelledError, TimeoutError)
"""The errors after which asyncpg knows whether the connection is ready, or is still cancelling its statement."""

_log = logging.getLogger("chatdb")

if MISSING:
    _log.warning(
        "asyncpg %s has no %s: chatdb's pool takes asyncpg's own way, which is slower",
        asyncpg.__version__,
        ", ".join(MISSING),
    )


_get_statement: Final[Private] = getattr(asyncpg.Connection, "_get_statement", None)

_release_counter: Final[Private] = getattr(asyncpg.Connection, "_pool_release_ctr", None)


class DefaultCodecRecord(asyncpg.Record):
    """A row whose values have the driver's own types, whatever codecs the caller has set: it need not be validated."""

    __slots__ = ()


def check_process_and_loop(
    process: int, loop: asyncio.AbstractEventLoop, what: str, *, may_be_stopped: bool = False
) -> None:
    """
    Raise ConfigurationError unless this is the process and the running event loop that opened a pool or connection.

    With `may_be_stopped` the loop need not run now.
    """
    if os.getpid() != process:
        raise ConfigurationError(
            f"this {what} belongs to another process: a forked process opens a pool of its own, after the fork"
        )
    running = asyncio._get_running_loop()
    if running is loop or (may_be_stopped and running is None and not loop.is_running()):
        return
    if loop.is_closed():
        raise ConfigurationError(
            f"the event loop of this {what} has ended: open a pool in each event loop, such as in each asyncio.run()"
        )
    raise ConfigurationError(
        f"this {what} belongs to another event loop: call it there (asyncio.run_coroutine_threadsafe), or open a pool "
        "in this one"
    )


class PoolConnection(AsyncpgConnection):
    """
    A connection of chatdb's pool.

    In another process or event loop than its own it raises ConfigurationError before anything is sent. When it comes
    back to the pool it is reset if statements ran on it that are not chatdb's own, which leave nothing in the session.

    When one statement finds a table changed, the whole pool forgets what it cached of it: asyncpg finds the pool by the
    proxy that a connection is used through, and `Pool.fetch` uses none.
    """

    __slots__ = ("_home", "_name", "_needs_reset", "_process")

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - asyncpg's own
        super().__init__(*args, **options)
        self._process = os.getpid()
        self._home = asyncio.get_running_loop()
        self._needs_reset = False
        self._name = str(getattr(self.get_settings(), "application_name", ""))
        _connections.add(self)

    def __del__(self) -> None:
        if os.getpid() == self._process:  # else there is nothing to close, and nobody to warn
            super().__del__()

    def check_process_and_loop(self, *, may_be_stopped: bool = False) -> None:
        """Raise ConfigurationError in another process or event loop."""
        check_process_and_loop(self._process, self._home, "connection", may_be_stopped=may_be_stopped)

    def terminate(self) -> None:
        self.check_process_and_loop(may_be_stopped=True)
        super().terminate()

    def _cancel_current_command(self, waiter: asyncio.Future[None], *args: Private) -> None:
        if os.getpid() == self._process:
            super()._cancel_current_command(waiter, *args)  # type: ignore[misc]
        else:  # a request to the server would cancel what the parent runs
            waiter.set_result(None)
            self._home.call_soon(super().terminate)

    def disconnect_after_fork(self, nowhere: socket.socket) -> None:
        """
        Have the socket lead nowhere, in a forked process.

        Else, where an exception ends the inherited event loop there, that takes the answers to the parent's statements,
        and unregisters the parent's sockets from the epoll that both share.
        """
        if not self.is_closed():
            with contextlib.suppress(Exception):  # nobody could be told in here
                transport: Private = self._transport  # type: ignore[attr-defined]
                os.dup2(nowhere.fileno(), transport.get_extra_info("socket").fileno(), inheritable=False)

    def get_reset_query(self) -> str:
        if not self._needs_reset:
            return ""
        # a pooler's server connection has the name of another client to go back to
        return f"{_RESET}; set application_name to {literal(self._name)}"

    async def reset(self, *, timeout: float | None = None) -> None:
        await super().reset(timeout=timeout)
        self._needs_reset = False  # which the reset query, run by execute(), has set

    def cursor(self, query: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - asyncpg's own
        _begin_call(self, query)
        return super().cursor(query, *args, **options)

    def transaction(self, **options: Any) -> Transaction:  # noqa: ANN401 - asyncpg's own
        self.check_process_and_loop()
        return super().transaction(**options)

    if "Connection._get_statement" not in MISSING:

        def _get_statement(self, query: str, timeout: float | None, **options: Any) -> Any:  # noqa: ANN401
            if query in STATEMENTS:
                options |= {"ignore_custom_codec": True, "record_class": DefaultCodecRecord}
            return _get_statement(self, query, timeout, **options)

    if "Connection._pool_release_ctr" not in MISSING:

        def _releases(self) -> object:
            # a prepared statement, a cursor and a transaction ask for it before each use, and for nothing else
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
    """Take the sockets of its parent's connections from a forked process."""
    nowhere, other = socket.socketpair()
    other.close()
    with nowhere:
        for connection in _connections:
            connection.disconnect_after_fork(nowhere)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cut_off_all)


def _begin_call(connection: PoolConnection, query: object) -> bool:
    """Check the owner of a connection, and return whether a statement drops what the driver has prepared."""
    connection.check_process_and_loop()
    if query is None or query in STATEMENTS or (isinstance(query, str) and _TRANSACTION.fullmatch(query)):
        return False
    connection._needs_reset = True
    return isinstance(query, str) and _DISCARDS.search(query) is not None


def _guarded(name: str, *, runs: bool) -> Any:  # noqa: ANN401 - a method of any signature
    """
    Return asyncpg's method, made to check the connection's owner first.

    One that `runs` the statement that it is given records that this may leave something in the session.
    """

    @functools.wraps(getattr(AsyncpgConnection, name))
    async def call(self: PoolConnection, *args: Any, **options: object) -> object:  # noqa: ANN401
        if _begin_call(self, (args[0] if args else options.get("query", "")) if runs else None):
            await _forget_statements(self)
        # looked up now, because a tool that traces may have wrapped it since
        return await getattr(AsyncpgConnection, name)(self, *args, **options)

    return call


for _name in ("add_listener", "execute", "executemany", "fetch", "fetchmany", "fetchrow", "fetchval", "prepare"):
    setattr(PoolConnection, _name, _guarded(_name, runs=True))
for _name in (
    "close", "copy_from_query", "copy_from_table", "copy_records_to_table", "copy_to_table", "reset_type_codec",
    "set_builtin_type_codec", "set_type_codec",
):  # fmt: skip
    setattr(PoolConnection, _name, _guarded(_name, runs=False))


async def fetch_rows(db: Any, sql: str, args: tuple[object, ...], timeout: float | None) -> list[Any]:  # noqa: ANN401
    """
    Run a statement of chatdb's own on a handle that is not chatdb's pool, and return its rows.

    On an asyncpg connection that is what its `fetch` does, without the codecs that the caller has set.
    """
    # not isinstance, after which the type checkers know only what asyncpg's stubs say
    is_pool, is_lent = (issubclass(db.__class__, kind) for kind in (asyncpg.Pool, PoolConnectionProxy))
    if is_pool:
        async with db.acquire() as lent:
            return await fetch_rows(lent, sql, args, timeout)
    connection: Private = getattr(db, "_con", None) if is_lent and FAST else db
    is_known = issubclass(type(connection), asyncpg.Connection)
    # what overrides it, or a tool that traces and has wrapped it, is to see the statement
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
                rows = await db.fetch(sql, *args, timeout=timeout)
        except asyncpg.InvalidSQLStatementNameError:
            if not is_known or not await _may_prepare_anew(connection):
                raise
            is_known = False  # once is enough
        else:
            return rows


def _execute(
    connection: Private, query: str, args: tuple[Any, ...], timeout: float | None, record_class: type[Any] | None = None
) -> Private:
    """Do what a connection's `fetch` does, which would check its owner once more; chatdb's own rows are native ones."""
    if not FAST or AsyncpgConnection.fetch is not _FETCH:  # a tool that traces is to see the statement
        return connection.fetch(query, *args, timeout=timeout, record_class=record_class)
    if query in STATEMENTS:
        return connection._execute(query, args, 0, timeout, ignore_custom_codec=True, record_class=DefaultCodecRecord)
    return connection._execute(query, args, 0, timeout, record_class=record_class)


async def _may_prepare_anew(connection: Private) -> bool:
    """
    Have a connection prepare its statements anew, after the server has said that it does not know one of them.

    Return whether that one can be sent again: not in a transaction, which is lost, nor behind a pooler that gives each
    transaction another session, where statements of other clients may have the same names.
    """
    await _forget_statements(connection)
    if connection.is_in_transaction():
        return False
    try:
        is_own_session: bool = await connection.fetchval(_PID) == connection.get_server_pid()
    except asyncpg.PostgresError:
        return False
    if is_own_session:
        _log.warning("prepared statements were gone from a session: something in it ran DISCARD ALL or DEALLOCATE")
    return is_own_session


async def _forget_statements(connection: Private) -> None:
    """Have asyncpg take none of a connection's statements for prepared; by public names, none of its whole pool's."""
    if FAST:
        connection._drop_local_statement_cache()
    else:
        await connection.reload_schema_state()


class _AcquireContext(AcquireContext):
    """What `acquire` returns: asyncpg's, of a connection that the pool lends in order."""

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
    """Lends the connections of an asyncpg pool in order, within a time limit, in their own process and event loop."""

    _loop: asyncio.AbstractEventLoop  # asyncpg's too
    _process: int
    _state: str

    def __init__(self, *, acquire_timeout: float, max_inactive_connection_lifetime: float, **options: Any) -> None:  # noqa: ANN401
        # asyncpg's limit is a timer set and cancelled a call: see _close_idle
        options["max_inactive_connection_lifetime"] = 0 if FAST else max_inactive_connection_lifetime
        super().__init__(loop=_NO_LOOP, connection_class=PoolConnection, **options)
        self._state = "new"  # then "opening", "open", "closed"
        self._acquire_timeout = acquire_timeout
        self._max_idle = max_inactive_connection_lifetime if FAST else 0
        self._fifo_lock = asyncio.Lock()
        self._waiting = 0  # tasks that have asked for a connection and have none yet
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
        self._state = "open"
        self._schedule_idle_check()
        return self

    def _check_process_and_loop(self) -> None:
        if self._state == "new":
            self._check_init()
        # written out, because a call costs: check_process_and_loop says what is wrong
        elif os.getpid() != self._process or asyncio._get_running_loop() is not self._loop:
            check_process_and_loop(self._process, self._loop, "pool")

    def _check_init(self) -> None:
        if self._state == "closed":
            raise PoolClosedError("the pool is closed", sent=False)
        if self._state != "open":
            raise PoolClosedError("the pool is not open: await it, or enter it by async with, first", sent=False)

    def _raise_acquire_error(self, error: Exception, timeout: float, *, is_exhausted: bool = False) -> NoReturn:
        """Raise the error of a connection that was not to be had: of its statement, nothing was sent."""
        if is_exhausted:
            raise AcquireTimeoutError(
                f"no connection became free within {timeout:g} s: all {self.get_max_size()} of the pool are in use",
                sent=False,
            ) from error
        options: Any = getattr(self, "_connect_kwargs", None)
        server = server_of(options) if options else "the server"
        if isinstance(error, TimeoutError):
            raise AcquireTimeoutError(
                f"no connection to {server} could be made within {timeout:g} s: check that the server answers",
                sent=False,
            ) from error
        found = map_driver_error(error, server)
        if found is None:
            raise error
        raise (UnavailableError(str(found), sent=False) if isinstance(found, UnavailableError) else found) from error

    def acquire(self, *, timeout: float | None = None) -> AcquireContext:  # type: ignore[override] # see handles.pyi
        """Take a connection from the pool, by `await` or `async with`."""
        return _AcquireContext(self, timeout)

    async def acquire_fifo(self, timeout: float | None) -> Connection:
        """Return a connection: one task at a time waits at asyncpg's unfair queue, the others in order before it."""
        self._check_process_and_loop()
        self._check_init()
        if self.is_closing():
            raise PoolClosedError("the pool is closed", sent=False)
        timeout = self._acquire_timeout if timeout is None else timeout
        deadline = self._loop.time() + timeout
        private: Private = self
        if not FAST:
            try:
                async with asyncio.timeout_at(deadline), self._fifo_lock:
                    return await super().acquire()
            except Exception as error:  # noqa: BLE001 - raised again, as what it means
                are_all_in_use = self.get_size() - self.get_idle_size() == self.get_max_size()
                self._raise_acquire_error(
                    error, timeout, is_exhausted=isinstance(error, TimeoutError) and are_all_in_use
                )
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
        """Reset a connection and give it back; if a cancelled statement is still running, that goes on by itself."""
        self._check_process_and_loop()
        inner = getattr(connection, "_con", None)
        releasing = super().release(connection, timeout=timeout)
        may_take_long = not FAST or (inner is not None and inner._protocol._is_cancelling())
        await (_release_with_timeout(releasing) if may_take_long else releasing)

    async def _run(
        self, query: str, args: tuple[Any, ...], timeout: float | None, record_class: type[Any] | None
    ) -> list[Any]:
        """Run a statement on a connection of the pool, where one is idle without asyncpg's way to and from it."""
        holder: Private = self._take_idle() if FAST else None
        lent: Private = None if holder else await self.acquire_fifo(None)
        if FAST:
            holder = holder or lent._holder
        connection = holder._con if FAST else lent
        try:
            # connect= may give another class, for which asyncpg's isinstance is true as well
            if FAST and query not in STATEMENTS and connection.__class__ is PoolConnection:
                connection._needs_reset = True
            rows: list[Any]
            try:
                rows = await _execute(connection, query, args, timeout, record_class)
            except asyncpg.InvalidSQLStatementNameError:
                if not await _may_prepare_anew(connection):
                    raise
                rows = await _execute(connection, query, args, timeout, record_class)
        except _KNOWN_STATE:
            raise
        except BaseException:  # what the connection is in the middle of is unknown
            with contextlib.suppress(Exception):
                connection.terminate()
            raise
        finally:
            if not FAST:
                await self.release(lent)
            elif not self._give_back(holder, connection):
                await _release_with_timeout(holder.release(self._acquire_timeout))
        return rows

    def _take_idle(self: Private) -> Private | None:
        """Take a connection that is ready, if there is one and nobody waits for it."""
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
        """Give a connection back as `holder.release` does, or return False if that has something to wait for."""
        if holder._con is not connection:  # it was lost: the holder is given back, and may be in use again
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
            pool: weakref.ref[PoolBase] = weakref.ref(self)  # the timer does not keep it alive
            self._loop.call_later(self._max_idle / IDLE_CHECKS_PER_LIFETIME, _run_idle_check, pool)

    def _close_idle(self: Private) -> None:
        """Close the connections that no look has found used for so long, down to the floor: one timer for them all."""
        for holder in self._holders:
            # in use it has a proxy or, from `fetch`, a future only; and a proxy only while `setup` runs
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
    """Have a pool close idle connections, now and later on, unless it is closed or gone."""
    pool = reference()
    if pool is not None and not pool.is_closing():
        pool._close_idle()
        pool._schedule_idle_check()


async def _release_with_timeout(release: Coroutine[Any, Any, None]) -> None:
    """Have a connection given back, and wait for it, but not long: a silent server would draw the error out."""
    releasing = asyncio.ensure_future(release)
    releasing.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if nobody waits any more
    if (await asyncio.wait([releasing], timeout=CANCEL_TIMEOUT))[0]:
        releasing.result()


async def begin_for_user(connection: Connection, block: Private, user: str) -> None:
    """Begin a transaction that names its user, as asyncpg's own `start` begins one, to which nothing can be added."""
    await connection.execute(BEGIN_FOR_USER.format(literal(user)))
    block._connection._top_xact = block
    block._state = TransactionState.STARTED


async def commit(connection: Connection, block: Private) -> bool:
    """Commit a transaction, and return whether the server did: asyncpg's own `commit` throws the answer away."""
    if FAST:
        _mark_transaction_ended(block)
        return await connection.execute("commit") == "COMMIT"
    try:
        await connection.execute("savepoint chatdb")  # fails where COMMIT would be answered with ROLLBACK
    except asyncpg.InFailedSQLTransactionError:
        await block.rollback()
        return False
    await block.commit()
    return True


async def roll_back(connection: Private, block: Private, *, is_savepoint: bool) -> None:
    """Undo the block, and let the error that led here be the one that is seen."""
    with contextlib.suppress(Exception):
        if not FAST:
            try:
                async with asyncio.timeout(CANCEL_TIMEOUT):
                    await block.rollback()
            except BaseException as error:
                # of a savepoint that could not be set, asyncpg and the server say so, and its transaction goes on
                if not is_savepoint or not isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError):
                    connection.terminate()
                raise
            return
        # asyncpg ends the connection of a server that has not stopped a cancelled statement by then
        await connection._protocol._wait_for_cancellation(CANCEL_TIMEOUT)
        if is_savepoint:
            await block.rollback()
        else:
            _mark_transaction_ended(block)
            await connection.execute("rollback")  # even if BEGIN was cancelled: it may have come through


def _mark_transaction_ended(block: Private) -> None:
    """Mark asyncpg's Transaction finished; otherwise the next one becomes a savepoint."""
    block._connection._top_xact = None
    block._state = TransactionState.ROLLEDBACK


def literal(text: str) -> str:
    """Return a text as SQL writes it, whatever the session's settings say of backslashes."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
