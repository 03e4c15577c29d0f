"""The handles: chatdb's own pool, and transactions that tell when they were not committed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import socket
import weakref
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, Unpack

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from asyncpg.transaction import Transaction, TransactionState

from chatdb._core.driver_errors import map_driver_error, mapped_driver_errors
from chatdb._core.dsn import AnyDsn, ConnectionInfo, read_dsn, server_of, text_of
from chatdb._core.options import OF_CONNECTION, DriverOptions, checked
from chatdb._core.query import FETCH, STATEMENTS, check_handle, fetch_rows, may_prepare_anew
from chatdb._core.validate import check_user_id
from chatdb.errors import AcquireTimeoutError, ChatDBError, ConfigurationError, PoolClosedError, UnavailableError

if TYPE_CHECKING:
    AsyncpgPool = asyncpg.Pool[asyncpg.Record]

    class _Base(AsyncpgPool):
        """asyncpg's pool, with those of its private parts that chatdb's uses."""

        _closed: bool
        _closing: bool
        _connect_kwargs: dict[str, Any]
        _generation: int
        _holders: list[Any]
        _initialized: bool
        _initializing: bool
        _loop: asyncio.AbstractEventLoop
        _queue: asyncio.Queue[Any]
        _reset: object
        _setup: object

        async def _async__init__(self) -> Any: ...  # noqa: ANN401
        def _check_init(self) -> None: ...
        def _schedule_min_size_maintenance(self) -> None: ...

    class _BaseConnection(asyncpg.Connection[asyncpg.Record]):
        """asyncpg's connection, with those of its private parts that chatdb's uses."""

        _loop: asyncio.AbstractEventLoop
        _pool_holder: Any
        _pool_release_ctr: ClassVar[Any]
        _transport: asyncio.Transport

        def _cancel_current_command(self, waiter: asyncio.Future[None], cancel_waiter: Private = None) -> None: ...
        def _check_open(self) -> None: ...
        def _drop_local_statement_cache(self) -> None: ...
        def _drop_local_type_cache(self) -> None: ...
        def _get_statement(self, query: str, timeout: float | None, **options: Any) -> Any: ...  # noqa: ANN401

    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Private = Any  # asyncpg's PoolConnectionHolder or what is in it, of whose private parts the stubs say nothing
else:
    _Base = asyncpg.Pool
    _BaseConnection = asyncpg.Connection

CANCEL_TIMEOUT: Final = 0.75
"""Seconds that a caller waits until the server has stopped a statement that was cancelled or ran into its limit."""

IDLE_CHECKS_PER_LIFETIME: Final = 8
"""How often the pool looks at its idle connections in the time that they may be idle."""

_OWN_OPTIONS: Final = ("acquire_timeout", "retries", "row_level_security", "max_inactive_connection_lifetime")
"""Those of which asyncpg is told nothing."""

_RESET: Final = (
    "set session authorization default; reset all; close all; unlisten *; "
    "select pg_catalog.pg_advisory_unlock_all(); discard temp; discard sequences"
)
"""What DISCARD ALL does but for prepared statements and plans, which the driver and the pool keep."""

_BEGIN_AS: Final = "begin; select pg_catalog.set_config('chatdb.user_id', {}, true)"
"""Begins a transaction that names its user, in one round trip."""

_TRANSACTION: Final = re.compile(
    r"(?:begin|commit|rollback|(?:savepoint|release savepoint|rollback to) \w+);?"
    + f"|{re.escape(_BEGIN_AS)}".replace(r"\{\}", r"E'(?:[^'\\]|''|\\\\)*'"),
    re.IGNORECASE,
)
"""What leaves nothing in the session."""

_DISCARDS: Final = re.compile(r"\b(?:discard\s+(?:all|plans)|deallocate)\b", re.IGNORECASE)
"""What drops prepared statements that the driver believes to be there."""

_log = logging.getLogger("chatdb")

_get_statement: Final[Any] = _BaseConnection._get_statement  # pyright: ignore[reportPrivateUsage] - asyncpg's

_NO_LOOP: Final[Any] = object()
"""What a pool has for its event loop until it is opened."""

_KNOWN_STATE: Final = (asyncpg.PostgresError, asyncpg.DataError, asyncio.CancelledError, TimeoutError)
"""The errors after which asyncpg knows whether the connection is ready, or is still cancelling its statement."""


class _PoolsConnection(_BaseConnection):
    """
    A connection of chatdb's pool.

    In another process or event loop than its own it raises ConfigurationError before anything is sent. When it comes
    back to the pool it is reset if statements ran on it that are not chatdb's own, which leave nothing in the session.

    When one statement finds a table changed, the whole pool forgets what it cached of it: asyncpg finds the pool by the
    proxy that a connection is used through, and `Pool.fetch` uses none.
    """

    __slots__ = ("_name", "_needs_reset", "_process")

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - asyncpg's own
        super().__init__(*args, **options)
        self._process = os.getpid()
        self._needs_reset = False
        self._name = str(getattr(self.get_settings(), "application_name", ""))
        _connections.add(self)

    def __del__(self) -> None:
        if os.getpid() == self._process:  # else there is nothing to close, and nobody to warn
            super().__del__()

    def _check_open(self) -> None:
        # asyncpg calls it at the start of each operation
        check_owner(self._process, self._loop, "connection")
        super()._check_open()

    def _releases(self) -> object:
        # a prepared statement, a cursor and a transaction ask for it before each use, and for nothing else
        check_owner(self._process, self._loop, "connection")
        return _BaseConnection._pool_release_ctr.__get__(self)

    _pool_release_ctr = property(_releases, _BaseConnection._pool_release_ctr.__set__)

    def _get_statement(self, query: str, timeout: float | None, **options: Any) -> Any:  # noqa: ANN401 - asyncpg's own
        if query in STATEMENTS:  # their rows are those of chatdb's records, whatever codecs the caller has set
            options["ignore_custom_codec"] = True
        return _get_statement(self, query, timeout, **options)

    async def close(self, *, timeout: float | None = None) -> None:
        check_owner(self._process, self._loop, "connection")
        await super().close(timeout=timeout)

    def terminate(self) -> None:
        check_owner(self._process, self._loop, "connection", may_be_stopped=True)
        super().terminate()

    def _cancel_current_command(self, waiter: asyncio.Future[None], cancel_waiter: Private = None) -> None:
        if os.getpid() == self._process:
            super()._cancel_current_command(waiter, cancel_waiter)
        else:  # a request to the server would cancel what the parent runs
            waiter.set_result(None)
            self._loop.call_soon(super().terminate)

    def cut_off(self, nowhere: socket.socket) -> None:
        """
        Have the socket lead nowhere, in a forked process.

        Else, where an exception ends the inherited event loop there, that takes the answers to the parent's statements,
        and unregisters the parent's sockets from the epoll that both share.
        """
        if not self.is_closed():
            with contextlib.suppress(Exception):  # nobody could be told in here
                os.dup2(nowhere.fileno(), self._transport.get_extra_info("socket").fileno(), inheritable=False)

    def get_reset_query(self) -> str:
        if not self._needs_reset:
            return ""
        # a pooler's server connection has the name of another client to go back to
        return f"{_RESET}; set application_name to {_literal(self._name)}"

    async def reset(self, *, timeout: float | None = None) -> None:
        await super().reset(timeout=timeout)
        self._needs_reset = False  # which the reset query, run by execute(), has set

    def _drop_global_statement_cache(self) -> None:
        holder = self._pool_holder and self._pool_holder()
        (holder._pool._drop_statement_cache if holder else self._drop_local_statement_cache)()

    def _drop_global_type_cache(self) -> None:
        holder = self._pool_holder and self._pool_holder()
        (holder._pool._drop_type_cache if holder else self._drop_local_type_cache)()


_connections: Final[weakref.WeakSet[_PoolsConnection]] = weakref.WeakSet()


def _cut_off_all() -> None:
    """Take the sockets of its parent's connections from a forked process."""
    nowhere, other = socket.socketpair()
    other.close()
    with nowhere:
        for connection in _connections:
            connection.cut_off(nowhere)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cut_off_all)


def _marking_for_reset(name: str) -> Any:  # noqa: ANN401 - a method of any signature
    """Return asyncpg's method, made to record that a statement ran that may leave something in the session."""

    @functools.wraps(getattr(_BaseConnection, name))
    def call(self: _PoolsConnection, query: object, *args: object, **options: object) -> object:
        if query not in STATEMENTS and not (isinstance(query, str) and _TRANSACTION.fullmatch(query)):
            self._needs_reset = True  # pyright: ignore[reportPrivateUsage] - a method of the class
            if isinstance(query, str) and _DISCARDS.search(query):
                self._drop_local_statement_cache()  # pyright: ignore[reportPrivateUsage]
        # looked up now, because a tool that traces may have wrapped it since
        return getattr(_BaseConnection, name)(self, query, *args, **options)

    return call


def _checking_owner(name: str) -> Any:  # noqa: ANN401 - a method of any signature
    """Return asyncpg's method, made to check the connection first, which asyncpg does not do before a COPY."""
    method = getattr(_BaseConnection, name)

    @functools.wraps(method)
    async def call(self: _PoolsConnection, *args: object, **options: object) -> object:
        self._check_open()  # pyright: ignore[reportPrivateUsage] - a method of the class
        return await method(self, *args, **options)

    return call


for _name in (
    "add_listener",
    "cursor",
    "execute",
    "executemany",
    "fetch",
    "fetchmany",
    "fetchrow",
    "fetchval",
    "prepare",
):
    setattr(_PoolsConnection, _name, _marking_for_reset(_name))
for _name in ("_copy_in", "_copy_out"):
    setattr(_PoolsConnection, _name, _checking_owner(_name))


def check_owner(process: int, loop: asyncio.AbstractEventLoop, what: str, *, may_be_stopped: bool = False) -> None:
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


class Pool(_Base):
    """
    An asyncpg pool that is fair, bounded in time, and costs one round trip a call.

    It does all that asyncpg's does. Besides, tasks get their connections in the order in which they asked; waiting
    and connecting end after the acquire timeout with AcquireTimeoutError; and chatdb's own calls send no query to reset
    the connection, because they keep no session state. A connection lent by `acquire` or `chatdb.transaction` is reset
    when it comes back if other statements ran on it. `fetch` resets nothing.

    The pool belongs to the process and the event loop that open it. In another it raises ConfigurationError before
    anything is sent.

    `retries` is how often a read or a keyed write is sent again after a lost connection. With `row_level_security` each
    of chatdb's own calls runs in a transaction that names its user.
    """

    retries: int
    row_level_security: bool
    _process: int

    def __init__(
        self,
        dsn: AnyDsn | ConnectionInfo,
        *,
        min_size: int = 0,
        max_size: int = 10,
        acquire_timeout: float = 10.0,
        command_timeout: float = 30.0,
        retries: int = 2,
        row_level_security: bool = False,
        # below the five minutes after which a serverless database closes idle connections
        max_inactive_connection_lifetime: float = 240.0,
        **driver_options: Unpack[DriverOptions],
    ) -> None:
        options = checked(
            {
                "min_size": min_size,
                "max_size": max_size,
                "acquire_timeout": acquire_timeout,
                "command_timeout": command_timeout,
                "retries": retries,
                "row_level_security": row_level_security,
                "max_inactive_connection_lifetime": max_inactive_connection_lifetime,
                **driver_options,
            }
        )
        given = {name: options.pop(name) for name in OF_CONNECTION & options.keys()}
        chosen = {name: options.pop(name) for name in _OWN_OPTIONS}
        own: dict[str, Any] = {
            "init_size": max(options["min_size"], 1),
            "max_queries": 50_000,
            "max_inactive_connection_lifetime": 0,  # asyncpg's is a timer set and cancelled a call: see _close_idle
            "loop": _NO_LOOP,  # that which opens the pool is its loop, so a module may make one when it is imported
            "connection_class": _PoolsConnection,
            "record_class": asyncpg.Record,
        }
        super().__init__(**(own | read_dsn(dsn, given).asyncpg() | options))
        self.retries = chosen["retries"]
        self.row_level_security = chosen["row_level_security"]
        self._acquire_timeout: float = chosen["acquire_timeout"]
        self._fifo_lock = asyncio.Lock()
        self._waiting = 0  # tasks that have asked for a connection and have none yet
        self._max_idle: float = chosen["max_inactive_connection_lifetime"]
        self._idle_checks: dict[Private, tuple[object, int]] = {}

    async def _async__init__(self) -> Pool:
        if self._initialized:
            self._check_owner()
            return self
        if self._closed:
            raise PoolClosedError("the pool is closed: make a new one", sent=False)
        if not self._initializing:
            self._process, self._loop = os.getpid(), asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._acquire_timeout):
                await super()._async__init__()
        except Exception as error:  # noqa: BLE001 - raised again, as what it means
            _raise_unreachable(error, self._acquire_timeout, self._target())
        self._schedule_idle_check()
        return self

    async def fetch(
        self,
        query: str,
        *args: Any,  # noqa: ANN401 - any value that a statement takes
        timeout: float | None = None,
        record_class: type[Any] | None = None,
    ) -> list[Any]:
        """
        Run a statement on a connection of the pool and return its rows.

        Where one is idle, that is all: asyncpg's way to and from it, by a context, a proxy, a timer and a task, costs
        more than half of what the statement does. The connection's own `fetch` would check its owner once more.

        With `row_level_security` a statement of chatdb's own, whose first argument is the user, takes three round
        trips: BEGIN with the user, the statement, COMMIT.
        """
        self._check_owner()
        if self.row_level_security and args and query in STATEMENTS:
            try:
                return await self._fetch_as(args[0], query, args, timeout)
            # the transaction is undone, and the statement will be prepared anew
            except (asyncpg.InvalidCachedStatementError, asyncpg.InvalidSQLStatementNameError):
                return await self._fetch_as(args[0], query, args, timeout)
        holder: Private = self._take_idle() or (await self._acquire(None))._holder
        connection: Private = holder._con
        try:
            # connect= may give another class, for which asyncpg's isinstance is true as well
            if query not in STATEMENTS and connection.__class__ is _PoolsConnection:
                connection._needs_reset = True
            rows: list[Any]
            if _BaseConnection.fetch is FETCH:
                try:
                    rows = await connection._execute(query, args, 0, timeout, record_class=record_class)
                except asyncpg.InvalidSQLStatementNameError:
                    if not await may_prepare_anew(connection):
                        raise
                    rows = await connection._execute(query, args, 0, timeout, record_class=record_class)
            else:  # a tool that traces, such as OpenTelemetry's, has wrapped it and would not see the statement
                rows = await connection.fetch(query, *args, timeout=timeout, record_class=record_class)
        except _KNOWN_STATE:
            raise
        except BaseException:  # what the connection is in the middle of is unknown
            with contextlib.suppress(Exception):
                connection.terminate()
            raise
        finally:
            if not self._give_back(holder, connection):
                await _release_with_timeout(holder.release(self._acquire_timeout))
        return rows

    async def _fetch_as(self, user: str, query: str, args: tuple[Any, ...], timeout: float | None) -> list[Any]:
        async with transaction(self, user_id=user) as connection:
            return await fetch_rows(connection, query, args, timeout)

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:  # noqa: ANN401 - asyncpg's proxy
        """Reset a connection and give it back; if a cancelled statement is still running, that goes on by itself."""
        self._check_owner()
        inner = getattr(connection, "_con", None)
        releasing = super().release(connection, timeout=timeout)
        is_cancelling = inner is not None and inner._protocol._is_cancelling()
        await (_release_with_timeout(releasing) if is_cancelling else releasing)

    async def close(self) -> None:
        """
        Close the pool when the connections in use have come back, or after the acquire timeout, and drop those then.

        A warning in the log says how many were dropped.
        """
        if self._closed or not self._initialized:
            return
        self._check_owner()
        try:
            async with asyncio.timeout(self._acquire_timeout):
                await super().close()  # it drops the connections if it is cancelled
        except TimeoutError:
            _log.warning(
                "the pool was closed after %g s with connections still in use: they were dropped", self._acquire_timeout
            )

    def terminate(self) -> None:
        """Drop all connections at once."""
        if not self._closed and self._initialized:
            check_owner(self._process, self._loop, "pool", may_be_stopped=True)
            super().terminate()

    async def expire_connections(self) -> None:
        """Replace each connection when it is next acquired."""
        self._check_owner()
        await super().expire_connections()

    def _target(self) -> str:
        """Return the hosts and ports that the pool connects to."""
        return server_of(self._connect_kwargs)

    def _check_owner(self) -> None:
        if self._initialized or self._initializing:
            # written out, because a call costs: check_owner says what is wrong
            if os.getpid() != self._process or asyncio._get_running_loop() is not self._loop:
                check_owner(self._process, self._loop, "pool")
        else:
            self._check_init()

    def _check_init(self) -> None:
        if self._closed:
            raise PoolClosedError("the pool is closed", sent=False)
        if not self._initialized:
            raise PoolClosedError("the pool is not open: await it, or enter it by async with, first", sent=False)

    def _take_idle(self) -> Private | None:
        """Take a connection that is ready, if there is one and nobody waits for it."""
        if self._waiting or self._closing or self._setup is not None or not self._initialized or self._queue.empty():
            return None
        holder = self._queue.get_nowait()
        if not holder.is_connected() or holder._generation != self._generation:
            self._queue.put_nowait(holder)
            return None
        holder._in_use = self._loop.create_future()
        return holder

    def _give_back(self, holder: Private, connection: Private) -> bool:
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
            pool: weakref.ref[Pool] = weakref.ref(self)  # the timer does not keep it alive
            self._loop.call_later(self._max_idle / IDLE_CHECKS_PER_LIFETIME, _run_idle_check, pool)

    def _close_idle(self) -> None:
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

    async def _acquire(self, timeout: float | None) -> PoolConnectionProxy[asyncpg.Record]:
        """Do as asyncpg's method, but let one task at a time wait at its unfair queue, the others in order before."""
        self._check_owner()
        self._check_init()
        if self._closing:
            raise PoolClosedError("the pool is closed", sent=False)
        timeout = self._acquire_timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + timeout
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline), self._fifo_lock:
                holder = await self._queue.get()
                if self._closing:
                    self._queue.put_nowait(holder)
                    raise PoolClosedError("the pool is closed", sent=False)
        except TimeoutError as error:
            raise AcquireTimeoutError(
                f"no connection became free within {timeout:g} s: all {self.get_max_size()} of the pool are in use",
                sent=False,
            ) from error
        finally:
            self._waiting -= 1
        try:
            async with asyncio.timeout_at(deadline):
                connection: PoolConnectionProxy[asyncpg.Record] = await holder.acquire()
        except BaseException as error:
            self._queue.put_nowait(holder)
            self._schedule_min_size_maintenance()
            if isinstance(error, Exception):
                _raise_unreachable(error, timeout, self._target())
            raise
        holder._timeout = timeout
        return connection


def create_pool(
    dsn: AnyDsn | None = None,
    *,
    min_size: int = 0,
    max_size: int = 10,
    acquire_timeout: float = 10.0,
    command_timeout: float = 30.0,
    retries: int = 2,
    row_level_security: bool = False,
    max_inactive_connection_lifetime: float = 240.0,
    **options: Unpack[DriverOptions],
) -> Pool:
    """
    Make a pool of connections, to be awaited or entered by `async with`.

    `dsn` is that of PostgreSQL's own tools, else the environment's `DATABASE_URL`, as a str or as the object of a
    settings class (pydantic's `PostgresDsn` and `SecretStr`, SQLAlchemy's `URL`). `postgresql+psycopg://` and
    `postgresql+asyncpg://` are taken too, and libpq's variables and files fill in what it does not say. Hosts that are
    not local are reached by verified TLS, unless the DSN says `sslmode=disable`. `acquire_timeout` bounds the wait for
    a connection and `command_timeout` each statement, in seconds. Connections are opened as they are needed, from
    `min_size` to `max_size`, and one at once, to see that the server is there. After a lost connection a read or a
    keyed write is sent again up to `retries` times, 0 for never. Further options are those of `asyncpg.create_pool`;
    `statement_cache_size=0` is what a pooler needs that does not track prepared statements.

    `row_level_security=True` is for a database with `chatdb protect`: each call runs in a transaction that names its
    user, in three round trips instead of one. When the connection is lost during COMMIT, `.sent` is None.

    Raises ConfigurationError at once, which names the option; when awaited, also UnavailableError.
    """
    text = ("" if dsn is None else text_of(dsn)) or os.environ.get("DATABASE_URL")
    if not text:
        raise ConfigurationError("no database is named: pass a dsn, or set DATABASE_URL=postgresql://...")
    return Pool(
        text,
        min_size=min_size,
        max_size=max_size,
        acquire_timeout=acquire_timeout,
        command_timeout=command_timeout,
        retries=retries,
        row_level_security=row_level_security,
        max_inactive_connection_lifetime=max_inactive_connection_lifetime,
        **options,
    )


@contextlib.asynccontextmanager
async def transaction(db: AsyncpgPool | Connection, *, user_id: str | None = None) -> AsyncGenerator[Connection, None]:
    """
    Run a block in a transaction, on a connection of the pool or on the given one, and yield that connection.

    The block's end commits, an exception rolls back. Inside another transaction it is a savepoint. Nothing is retried.

    With `user_id` the rows of this user are the only ones that the block can reach, whatever its statements say, where
    `chatdb protect` has switched row-level security on. It is sent with BEGIN, ends with the transaction, and is
    therefore safe behind a pooler; a savepoint's costs two round trips, and then the user of the transaction around it
    is back.

    Raises ChatDBError when the server answers COMMIT with ROLLBACK, as it does after an error that the block has
    swallowed; asyncpg's own `connection.transaction()` says nothing then, and the writes are gone.
    """
    user = None if user_id is None else check_user_id(user_id)
    check_handle(db, "is_in_transaction" if not isinstance(db, asyncpg.Pool) else "acquire")
    if isinstance(db, asyncpg.Pool):
        with mapped_driver_errors():
            connection = await db.acquire()
        try:
            async with _committed(connection, user):
                yield connection
        finally:
            await db.release(connection)
    else:
        async with _committed(db, user):
            yield db


@contextlib.asynccontextmanager
async def _committed(connection: Connection, user: str | None) -> AsyncGenerator[None, None]:
    is_savepoint = connection.is_in_transaction()
    block = connection.transaction()
    try:
        before = await _begin(connection, block, user, is_savepoint)
        yield
        if is_savepoint and user is not None:  # its end would leave the setting to the transaction around it
            await set_user(connection, before or "")
    except BaseException:
        await _roll_back(connection, block, is_savepoint)
        raise
    with mapped_driver_errors():
        if is_savepoint:
            await block.commit()  # to release that of a failed transaction is an error by itself
            return
        # asyncpg's own commit() does the same and throws the answer away
        _mark_transaction_ended(block)
        try:
            answer = await connection.execute("commit")
        except BaseException:  # cancelled before it came through, it has left the transaction open
            await _roll_back(connection, block, is_savepoint)
            raise
    if answer != "COMMIT":
        raise ChatDBError(
            "the transaction was rolled back, nothing of it is stored: a statement in it had failed, and its error was "
            "swallowed; let the error leave the block, or put the statement into a transaction() of its own inside"
        )


async def set_user(connection: Connection, user: str) -> str | None:
    """Have row-level security show the rows of a user until the transaction ends, and return whose it showed before."""
    with mapped_driver_errors():
        before: str | None = await connection.fetchval(_SET_USER, user)
    return before


_SET_USER: Final = """
    select before.user_id, pg_catalog.set_config('chatdb.user_id', $1, true)
    from (select pg_catalog.current_setting('chatdb.user_id', true) as user_id offset 0) as before
"""
STATEMENTS.add(_SET_USER)


async def _begin(connection: Connection, block: Transaction, user: str | None, is_savepoint: bool) -> str | None:
    """Begin a transaction or a savepoint, and return whose rows were shown before."""
    try:
        with mapped_driver_errors():
            if user is None or is_savepoint:
                await block.start()
                return None if user is None else await set_user(connection, user)
            await connection.execute(_BEGIN_AS.format(_literal(user)))
            # what asyncpg's own start() does after its BEGIN, to which nothing can be added
            block._connection._top_xact = block  # type: ignore[attr-defined]
            block._state = TransactionState.STARTED  # type: ignore[attr-defined]
            return None
    except UnavailableError as error:
        error.sent = False  # nothing of the block was
        raise


async def _roll_back(connection: Connection, block: Transaction, is_savepoint: bool) -> None:
    """Undo the block, and let the error that led here be the one that is seen."""
    with contextlib.suppress(Exception):
        # asyncpg ends the connection of a server that has not stopped a cancelled statement by then
        await connection._protocol._wait_for_cancellation(CANCEL_TIMEOUT)  # type: ignore[union-attr]
        if is_savepoint:
            await block.rollback()
        else:
            _mark_transaction_ended(block)
            await connection.execute("rollback")  # even if BEGIN was cancelled: it may have come through


def _mark_transaction_ended(block: Transaction) -> None:
    """Mark asyncpg's Transaction finished; otherwise the next one becomes a savepoint."""
    block._connection._top_xact = None  # type: ignore[attr-defined]
    block._state = TransactionState.ROLLEDBACK  # type: ignore[attr-defined]


def _run_idle_check(reference: weakref.ref[Pool]) -> None:
    """Have a pool close idle connections, now and later on, unless it is closed or gone."""
    pool = reference()
    if pool is not None and not pool.is_closing():
        pool._close_idle()  # pyright: ignore[reportPrivateUsage] - the pool's own timer
        pool._schedule_idle_check()  # pyright: ignore[reportPrivateUsage]


async def _release_with_timeout(release: Coroutine[Any, Any, None]) -> None:
    """Have a connection given back, and wait for it, but not long: a silent server would draw the error out."""
    releasing = asyncio.ensure_future(release)
    releasing.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if nobody waits any more
    if (await asyncio.wait([releasing], timeout=CANCEL_TIMEOUT))[0]:
        releasing.result()


def _literal(text: str) -> str:
    """Return a text as SQL writes it, whatever the session's settings say of backslashes."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _raise_unreachable(error: Exception, timeout: float, server: str) -> NoReturn:
    """Raise the error of a connection that could not be made: of its statement, nothing was sent."""
    if isinstance(error, TimeoutError):
        raise AcquireTimeoutError(
            f"no connection to {server} could be made within {timeout:g} s: check that the server answers", sent=False
        ) from error
    found = map_driver_error(error, server)
    if found is None:
        raise error
    raise (UnavailableError(str(found), sent=False) if isinstance(found, UnavailableError) else found) from error
