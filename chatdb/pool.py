"""The handles: chatdb's own pool, and transactions that tell when they were not committed."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final, Unpack

import asyncpg

from chatdb._core import asyncpg_private
from chatdb._core.asyncpg_private import (
    STATEMENTS,
    PoolBase,
    begin_for_user,
    check_process_and_loop,
    commit,
    fetch_rows,
    roll_back,
)
from chatdb._core.driver_errors import mapped_driver_errors
from chatdb._core.dsn import AnyDsn, ConnectionInfo, dsn_to_str, read_dsn
from chatdb._core.options import CONNECTION_OPTIONS, DriverOptions, check_options
from chatdb._core.validate import check_handle, check_user_id
from chatdb.errors import ChatDBError, ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from asyncpg.transaction import Transaction

    from chatdb._core.asyncpg_private import AsyncpgPool
    from chatdb._core.asyncpg_private import Connection as Connection

_log = logging.getLogger("chatdb")


class Pool(PoolBase):
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

    def __init__(self, dsn: AnyDsn | ConnectionInfo, **given_options: Any) -> None:  # noqa: ANN401 - create_pool's
        options = check_options(_DEFAULTS | given_options)
        given = {name: options.pop(name) for name in CONNECTION_OPTIONS & options.keys()}
        self.retries = options.pop("retries")
        self.row_level_security = options.pop("row_level_security")
        defaults: dict[str, Any] = {
            "init_size": max(options["min_size"], 1),
            "max_queries": 50_000,
            "record_class": asyncpg.Record,
        }
        super().__init__(**(defaults | read_dsn(dsn, given).asyncpg() | options))

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
        self._check_process_and_loop()
        if self.row_level_security and args and query in STATEMENTS:
            try:
                return await self._fetch_for_user(args[0], query, args, timeout)
            # the transaction is undone, and the statement will be prepared anew
            except (asyncpg.InvalidCachedStatementError, asyncpg.InvalidSQLStatementNameError):
                return await self._fetch_for_user(args[0], query, args, timeout)
        return await self._run(query, args, timeout, record_class)

    async def _fetch_for_user(self, user: str, query: str, args: tuple[Any, ...], timeout: float | None) -> list[Any]:
        async with transaction(self, user_id=user) as connection:
            return await fetch_rows(connection, query, args, timeout)

    async def close(self) -> None:
        """
        Close the pool when the connections in use have come back, or after the acquire timeout, and drop those then.

        A warning in the log says how many were dropped.
        """
        if self._state != "open":
            return
        self._check_process_and_loop()
        try:
            async with asyncio.timeout(self._acquire_timeout):
                await super().close()  # it drops the connections if it is cancelled
        except TimeoutError:
            _log.warning(
                "the pool was closed after %g s with connections still in use: they were dropped", self._acquire_timeout
            )
        finally:
            self._state = "closed"

    def terminate(self) -> None:
        """Drop all connections at once."""
        if self._state == "open":
            check_process_and_loop(self._process, self._loop, "pool", may_be_stopped=True)
            super().terminate()
            self._state = "closed"

    async def expire_connections(self) -> None:
        """Replace each connection when it is next acquired."""
        self._check_process_and_loop()
        await super().expire_connections()


def create_pool(
    dsn: AnyDsn | None = None,
    *,
    min_size: int = 0,
    max_size: int = 10,
    acquire_timeout: float = 10.0,
    command_timeout: float = 30.0,
    retries: int = 2,
    row_level_security: bool = False,
    # below the five minutes after which a serverless database closes idle connections
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
    text = ("" if dsn is None else dsn_to_str(dsn)) or os.environ.get("DATABASE_URL")
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


_DEFAULTS: Final = {
    parameter.name: parameter.default
    for parameter in inspect.signature(create_pool).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
}
"""Those of a pool that is made without `create_pool`, as the embedded server's is."""


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
    if isinstance(db, asyncpg.Pool):
        with mapped_driver_errors():
            connection = await db.acquire()
        try:
            async with _transaction_block(connection, user):
                yield connection
        finally:
            await db.release(connection)
    else:
        check_handle(db, "is_in_transaction")
        async with _transaction_block(db, user):
            yield db


@contextlib.asynccontextmanager
async def _transaction_block(connection: Connection, user: str | None) -> AsyncGenerator[None, None]:
    is_savepoint = connection.is_in_transaction()
    block = connection.transaction()
    try:
        before = await _begin(connection, block, user, is_savepoint)
        yield
        if is_savepoint and user is not None:  # its end would leave the setting to the transaction around it
            await set_rls_user(connection, before or "")
    except BaseException:
        await roll_back(connection, block, is_savepoint=is_savepoint)
        raise
    with mapped_driver_errors():
        if is_savepoint:
            await block.commit()  # to release that of a failed transaction is an error by itself
            return
        try:
            is_committed = await commit(connection, block)
        except BaseException:  # cancelled before it came through, it has left the transaction open
            await roll_back(connection, block, is_savepoint=is_savepoint)
            raise
    if not is_committed:
        raise ChatDBError(
            "the transaction was rolled back, nothing of it is stored: a statement in it had failed, and its error was "
            "swallowed; let the error leave the block, or put the statement into a transaction() of its own inside"
        )


async def set_rls_user(connection: Connection, user: str) -> str | None:
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
            if user is None or is_savepoint or not asyncpg_private.FAST:
                await block.start()
                return None if user is None else await set_rls_user(connection, user)
            await begin_for_user(connection, block, user)
            return None
    except UnavailableError as error:
        error.sent = False  # nothing of the block was
        raise
