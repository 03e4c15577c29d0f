"""The handles: chatdb's own pool, and transactions that tell when they were not committed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Any, Final, NoReturn

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from asyncpg.transaction import Transaction, TransactionState

from chatdb import _input
from chatdb.dsn import connect_arguments
from chatdb.errors import (
    AcquireTimeoutError,
    ChatDBError,
    ConfigurationError,
    UnavailableError,
    translated,
    translating,
)

if TYPE_CHECKING:
    AsyncpgPool = asyncpg.Pool[asyncpg.Record]

    class _Base(AsyncpgPool):
        """asyncpg's pool, with those of its private parts that chatdb's uses."""

        _closing: bool
        _generation: int
        _holders: list[Any]
        _initialized: bool
        _loop: asyncio.AbstractEventLoop
        _queue: asyncio.Queue[Any]
        _reset: object
        _setup: object

        async def _async__init__(self) -> Any: ...  # noqa: ANN401
        def _check_init(self) -> None: ...
        def _schedule_min_size_maintenance(self) -> None: ...

    class _BaseConnection(asyncpg.Connection[asyncpg.Record]):
        """asyncpg's connection, with those of its private parts that chatdb's uses."""

        _pool_holder: Any

        def _drop_local_statement_cache(self) -> None: ...
        def _drop_local_type_cache(self) -> None: ...

    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Private = Any  # asyncpg's PoolConnectionHolder or what is in it, of whose private parts the stubs say nothing
else:
    _Base = asyncpg.Pool
    _BaseConnection = asyncpg.Connection

_GRACE: Final = 0.75
"""Seconds that a caller waits until the server has stopped a statement that was cancelled or ran into its limit."""

_LOOKS: Final = 8
"""How often the pool looks at its idle connections in the time that they may be idle."""


class _PoolsConnection(_BaseConnection):
    """
    A connection that has its whole pool forget what one statement found outdated, as a changed table makes it.

    asyncpg's finds its pool by the proxy that it is used through, and `Pool.fetch` uses none.
    """

    __slots__ = ()

    def _drop_global_statement_cache(self) -> None:
        holder = self._pool_holder and self._pool_holder()
        (holder._pool._drop_statement_cache if holder else self._drop_local_statement_cache)()

    def _drop_global_type_cache(self) -> None:
        holder = self._pool_holder and self._pool_holder()
        (holder._pool._drop_type_cache if holder else self._drop_local_type_cache)()


class Pool(_Base):
    """
    An asyncpg pool that is fair, bounded in time, and costs one round trip a call.

    It does all that asyncpg's does. Besides, tasks get their connections in the order in which they asked; waiting
    and connecting end after the acquire timeout with AcquireTimeoutError; and no query is sent to reset a connection
    that comes back, because chatdb keeps no session state (an open transaction is still rolled back).

    `retries` is how often a read or a keyed write is sent again after a lost connection.
    """

    retries: int

    def __init__(
        self,
        dsn: str,
        *,
        min_size: int = 0,
        max_size: int = 10,
        acquire_timeout: float = 10.0,
        command_timeout: float = 30.0,
        retries: int = 2,
        # below the five minutes after which a serverless database closes idle connections
        max_inactive_connection_lifetime: float = 240.0,
        **options: Any,  # noqa: ANN401 - asyncpg's own
    ) -> None:
        if max_inactive_connection_lifetime < 0:
            raise ConfigurationError("max_inactive_connection_lifetime must be 0, for no limit, or a number of seconds")
        if retries < 0:
            raise ConfigurationError("retries must be 0, for none, or how often a statement may be sent again")
        own: dict[str, Any] = {
            "init_size": max(min_size, 1),
            "max_queries": 50_000,
            "max_inactive_connection_lifetime": 0,  # asyncpg's is a timer set and cancelled a call: see _close_idle
            "loop": None,
            "connection_class": _PoolsConnection,
            "record_class": asyncpg.Record,
            "reset": _keep,
        }
        super().__init__(
            min_size=min_size,
            max_size=max_size,
            command_timeout=command_timeout,
            **(own | connect_arguments(dsn) | options),
        )
        self.retries = retries
        self._acquire_timeout = acquire_timeout
        self._turn = asyncio.Lock()
        self._waiting = 0  # tasks that have asked for a connection and have none yet
        self._max_idle = max_inactive_connection_lifetime
        self._seen: dict[Private, tuple[object, int]] = {}

    async def _async__init__(self) -> Pool:
        is_new = not self._initialized
        try:
            async with asyncio.timeout(self._acquire_timeout):
                await super()._async__init__()
        except Exception as error:  # noqa: BLE001 - raised again, as what it means
            _raise_unreachable(error, self._acquire_timeout)
        if is_new:
            self._watch_idle()
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
        more than half of what the statement does.
        """
        holder = self._take_idle()
        if holder is None:
            return await super().fetch(query, *args, timeout=timeout, record_class=record_class)
        connection = holder._con
        try:
            rows: list[Any] = await connection.fetch(query, *args, timeout=timeout, record_class=record_class)
        finally:
            if not self._give_back(holder, connection):
                await _briefly(holder.release(self._acquire_timeout))
        return rows

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:  # noqa: ANN401 - asyncpg's proxy
        """Give a connection back, or leave it to do so by itself when the server has stopped what was cancelled."""
        giving = super().release(connection, timeout=timeout)
        inner = getattr(connection, "_con", None)
        await (_briefly(giving) if inner is not None and inner._protocol._is_cancelling() else giving)

    async def close(self) -> None:
        """Close all connections when they are given back; those that a silent server does not close are dropped."""
        with contextlib.suppress(TimeoutError):  # asyncpg has dropped them by then
            await super().close()

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
            or self._reset is not _keep
        ):
            return False
        holder._release()
        return True

    def _watch_idle(self) -> None:
        if self._max_idle:
            pool: weakref.ref[Pool] = weakref.ref(self)  # the timer does not keep it alive
            self._loop.call_later(self._max_idle / _LOOKS, _look_at, pool)

    def _close_idle(self) -> None:
        """Close the connections that no look has found used for so long, down to the floor: one timer for them all."""
        for holder in self._holders:
            # in use it has a proxy or, from `fetch`, a future only; and a proxy only while `setup` runs
            if not holder.is_connected() or not holder.is_idle() or holder._proxy is not None:
                self._seen.pop(holder, None)
                continue
            state = holder._con, holder._con._protocol.queries_count
            before, looks = self._seen.get(holder, (None, 0))
            looks = looks + 1 if state == before else 0
            self._seen[holder] = state, looks
            if looks >= _LOOKS and self.get_size() > self.get_min_size():
                holder.terminate()

    async def _acquire(self, timeout: float | None) -> PoolConnectionProxy[asyncpg.Record]:
        """Do as asyncpg's method, but let one task at a time wait at its unfair queue, the others in order before."""
        if self._closing:
            raise asyncpg.InterfaceError("pool is closing")
        self._check_init()
        timeout = self._acquire_timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + timeout
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline), self._turn:
                holder = await self._queue.get()
                if self._closing:
                    self._queue.put_nowait(holder)
                    raise asyncpg.InterfaceError("pool is closing")
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
                _raise_unreachable(error, timeout)
            raise
        holder._timeout = timeout
        return connection


def create_pool(
    dsn: str | None = None,
    *,
    min_size: int = 0,
    max_size: int = 10,
    acquire_timeout: float = 10.0,
    command_timeout: float = 30.0,
    retries: int = 2,
    **options: Any,  # noqa: ANN401 - asyncpg's own
) -> Pool:
    """
    Make a pool of connections, to be awaited or entered by `async with`.

    `dsn` is that of PostgreSQL's own tools, else the environment's `DATABASE_URL`; `postgresql+psycopg://` is taken
    too. Hosts that are not local are reached by verified TLS, unless the DSN says `sslmode=disable`. `acquire_timeout`
    bounds the wait for a connection and `command_timeout` each statement, in seconds. Connections are opened as they
    are needed, from `min_size` to `max_size`, and one at once, to see that the server is there. After a lost connection
    a read or a keyed write is sent again up to `retries` times, 0 for never. Further options are those of
    `asyncpg.create_pool`; `statement_cache_size=0` is what a pooler needs that does not track prepared statements.

    Raises ConfigurationError at once; when awaited, also UnavailableError.
    """
    dsn = dsn or os.environ.get("DATABASE_URL")
    if not dsn or not isinstance(dsn, str):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without types
        raise ConfigurationError("no database is named: pass a dsn, or set DATABASE_URL=postgresql://...")
    return Pool(
        dsn,
        min_size=min_size,
        max_size=max_size,
        acquire_timeout=acquire_timeout,
        command_timeout=command_timeout,
        retries=retries,
        **options,
    )


@contextlib.asynccontextmanager
async def transaction(db: AsyncpgPool | Connection, *, user_id: str | None = None) -> AsyncGenerator[Connection, None]:
    """
    Run a block in a transaction, on a connection of the pool or on the given one, and yield that connection.

    The block's end commits, an exception rolls back. Inside another transaction it is a savepoint. Nothing is retried.

    With `user_id` the rows of this user are the only ones that the block can reach, whatever its statements say, where
    `chatdb protect` has switched row-level security on. It costs a round trip, ends with the transaction, and is
    therefore safe behind a pooler; after a savepoint, the user of the transaction around it is back.

    Raises ChatDBError when the server answers COMMIT with ROLLBACK, as it does after an error that the block has
    swallowed; asyncpg's own `connection.transaction()` says nothing then, and the writes are gone.
    """
    user = None if user_id is None else _input.user(user_id)
    if isinstance(db, asyncpg.Pool):
        with translating():
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
        await _begin(block)
        before = None if user is None else await set_user(connection, user)
        yield
        if is_savepoint and user is not None:  # its end would leave the setting to the transaction around it
            await set_user(connection, before or "")
    except BaseException:
        await _roll_back(connection, block, is_savepoint)
        raise
    with translating():
        if is_savepoint:
            await block.commit()  # to release that of a failed transaction is an error by itself
            return
        # asyncpg's own commit() does the same and throws the answer away
        _forget(block)
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
    with translating():
        before: str | None = await connection.fetchval(_SET_USER, user)
    return before


_SET_USER: Final = """
    select before.user_id, set_config('chatdb.user_id', $1, true)
    from (select current_setting('chatdb.user_id', true) as user_id offset 0) as before
"""


async def _begin(block: Transaction) -> None:
    try:
        with translating():
            await block.start()
    except UnavailableError as error:
        error.sent = False  # nothing of the block was
        raise


async def _roll_back(connection: Connection, block: Transaction, is_savepoint: bool) -> None:
    """Undo the block, and let the error that led here be the one that is seen."""
    with contextlib.suppress(Exception):
        # asyncpg ends the connection of a server that has not stopped a cancelled statement by then
        await connection._protocol._wait_for_cancellation(_GRACE)  # type: ignore[union-attr]
        if is_savepoint:
            await block.rollback()
        else:
            _forget(block)
            await connection.execute("rollback")  # even if BEGIN was cancelled: it may have come through


def _forget(block: Transaction) -> None:
    """Let asyncpg take its transaction for ended, or it would begin the next one inside it."""
    block._connection._top_xact = None  # type: ignore[attr-defined]
    block._state = TransactionState.ROLLEDBACK  # type: ignore[attr-defined]


def _look_at(reference: weakref.ref[Pool]) -> None:
    """Have a pool close idle connections, now and later on, unless it is closed or gone."""
    pool = reference()
    if pool is not None and not pool.is_closing():
        pool._close_idle()  # pyright: ignore[reportPrivateUsage] - the pool's own timer
        pool._watch_idle()  # pyright: ignore[reportPrivateUsage]


async def _briefly(release: Coroutine[Any, Any, None]) -> None:
    """Have a connection given back, and wait for it, but not long: a silent server would draw the error out."""
    releasing = asyncio.ensure_future(release)
    releasing.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if nobody waits any more
    if (await asyncio.wait([releasing], timeout=_GRACE))[0]:
        releasing.result()


async def _keep(connection: object) -> None:
    """Reset nothing: asyncpg's default sends a query, one more round trip a call."""


def _raise_unreachable(error: Exception, timeout: float) -> NoReturn:
    """Raise the error of a connection that could not be made: of its statement, nothing was sent."""
    if isinstance(error, TimeoutError):
        raise AcquireTimeoutError(
            f"no connection could be made within {timeout:g} s: check that the server answers", sent=False
        ) from error
    found = translated(error)
    if found is None:
        raise error
    raise (UnavailableError(str(found), sent=False) if isinstance(found, UnavailableError) else found) from error
