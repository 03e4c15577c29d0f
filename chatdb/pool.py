"""The handles: chatdb's own pool, and transactions that tell when they were not committed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, NoReturn

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from asyncpg.transaction import Transaction, TransactionState

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
        _queue: asyncio.Queue[Any]

        async def _async__init__(self) -> Any: ...  # noqa: ANN401
        def _check_init(self) -> None: ...
        def _schedule_min_size_maintenance(self) -> None: ...

    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
else:
    _Base = asyncpg.Pool


class Pool(_Base):
    """
    An asyncpg pool that is fair, bounded in time, and costs one round trip a call.

    It does all that asyncpg's does. Besides, tasks get their connections in the order in which they asked; waiting
    and connecting end after the acquire timeout with AcquireTimeoutError; and no query is sent to reset a connection
    that comes back, because chatdb keeps no session state (an open transaction is still rolled back).
    """

    retries_lost_connections = True

    def __init__(
        self,
        dsn: str,
        *,
        min_size: int = 0,
        max_size: int = 10,
        acquire_timeout: float = 10.0,
        command_timeout: float = 30.0,
        **options: Any,  # noqa: ANN401 - asyncpg's own
    ) -> None:
        own: dict[str, Any] = {
            "init_size": max(min_size, 1),
            "max_queries": 50_000,
            # below the five minutes after which a serverless database closes idle connections
            "max_inactive_connection_lifetime": 240.0,
            "loop": None,
            "connection_class": asyncpg.Connection,
            "record_class": asyncpg.Record,
            "reset": _keep,
        }
        super().__init__(
            min_size=min_size,
            max_size=max_size,
            command_timeout=command_timeout,
            **(own | connect_arguments(dsn) | options),
        )
        self._acquire_timeout = acquire_timeout
        self._turn = asyncio.Lock()

    async def _async__init__(self) -> Pool:
        try:
            async with asyncio.timeout(self._acquire_timeout):
                await super()._async__init__()
        except Exception as error:  # noqa: BLE001 - raised again, as what it means
            _raise_unreachable(error, self._acquire_timeout)
        return self

    async def _acquire(self, timeout: float | None) -> PoolConnectionProxy[asyncpg.Record]:
        """Do as asyncpg's method, but let one task at a time wait at its unfair queue, the others in order before."""
        if self._closing:
            raise asyncpg.InterfaceError("pool is closing")
        self._check_init()
        timeout = self._acquire_timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + timeout
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
    **options: Any,  # noqa: ANN401 - asyncpg's own
) -> Pool:
    """
    Make a pool of connections, to be awaited or entered by `async with`.

    `dsn` is that of PostgreSQL's own tools, else the environment's `DATABASE_URL`; `postgresql+psycopg://` is taken
    too. Hosts that are not local are reached by verified TLS, unless the DSN says `sslmode=disable`. `acquire_timeout`
    bounds the wait for a connection and `command_timeout` each statement, in seconds. Connections are opened as they
    are needed, from `min_size` to `max_size`, and one at once, to see that the server is there. Further options are
    those of `asyncpg.create_pool`; `statement_cache_size=0` is what a PgBouncer before 1.21 needs.

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
        **options,
    )


@contextlib.asynccontextmanager
async def transaction(db: AsyncpgPool | Connection) -> AsyncGenerator[Connection, None]:
    """
    Run a block in a transaction, on a connection of the pool or on the given one, and yield that connection.

    The block's end commits, an exception rolls back. Inside another transaction it is a savepoint. Nothing is retried.

    Raises ChatDBError when the server answers COMMIT with ROLLBACK, as it does after an error that the block has
    swallowed; asyncpg's own `connection.transaction()` says nothing then, and the writes are gone.
    """
    if isinstance(db, asyncpg.Pool):
        with translating():
            connection = await db.acquire()
        try:
            async with _committed(connection):
                yield connection
        finally:
            await db.release(connection)
    else:
        async with _committed(db):
            yield db


@contextlib.asynccontextmanager
async def _committed(connection: Connection) -> AsyncGenerator[None, None]:
    is_savepoint = connection.is_in_transaction()
    block = connection.transaction()
    try:
        await _begin(block)
        yield
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
        if is_savepoint:
            await block.rollback()
        else:
            _forget(block)
            await connection.execute("rollback")  # even if BEGIN was cancelled: it may have come through


def _forget(block: Transaction) -> None:
    """Let asyncpg take its transaction for ended, or it would begin the next one inside it."""
    block._connection._top_xact = None  # type: ignore[attr-defined]
    block._state = TransactionState.ROLLEDBACK  # type: ignore[attr-defined]


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
