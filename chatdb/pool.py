"""chatdb's pool, and transactions that raise if they were not committed."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack, cast, overload

import asyncpg

from chatdb._core import asyncpg_private
from chatdb._core.asyncpg_private import (
    STATEMENTS,
    PoolBase,
    begin_for_user,
    check_process_and_loop,
    commit,
    fetch_rows,
    listeners_of,
    roll_back,
)
from chatdb._core.calls import CallListener, CallListeners, running_call
from chatdb._core.driver_errors import mapped_driver_errors
from chatdb._core.dsn import AnyDsn, ConnectionInfo, dsn_to_str, read_dsn
from chatdb._core.handles import AsyncpgPool, Connection, Record
from chatdb._core.hints import CHANNEL, Hints, gathered
from chatdb._core.options import CONNECTION_OPTIONS, DriverOptions, PoolOptions, check_options
from chatdb._core.query import Database, Query, RunAgainError
from chatdb._core.validate import check_handle, check_user_id
from chatdb.errors import ChatDBError, ConfigurationError, UnavailableError
from chatdb.replicas import ANSWER_TIMEOUT, Reader, Replicas, ReplicaState

if TYPE_CHECKING:
    from chatdb._core.handles import Transaction

__all__ = ["Connection", "Pool", "create_pool", "run_until_settled", "set_rls_user", "transaction"]

ResultT = TypeVar("ResultT")
_RowT = TypeVar("_RowT", bound=asyncpg.Record)

_log = logging.getLogger("chatdb")


class Pool(PoolBase):
    """
    An asyncpg pool with first-come, first-served waiting, time limits, and one round trip per call.

    It has all methods of asyncpg's pool. Tasks get connections in the order of their requests, and `acquire` raises
    AcquireTimeoutError after the acquire timeout. The functions of chatdb leave no session state, so they need no
    reset query. A connection from `acquire` or `chatdb.transaction` is reset on release if other statements ran on it.
    `fetch` does not reset the connection.

    A pool works only in the process and event loop that opened it; elsewhere it raises ConfigurationError before
    anything is sent.

    `retries` is the maximum number of times that a read or a keyed write is sent again after a lost connection. With
    `row_level_security`, each function of chatdb runs in a transaction that names its user. With `notify`, the pool
    tells each `Watcher` that listens which conversations got messages. With `replicas`, `reader()` reads on them.
    `hosts` are the servers of the DSN, each with its port, and `database` is the database.
    """

    retries: int
    row_level_security: bool
    hints: Hints | None
    hosts: tuple[tuple[str, int], ...]
    database: str

    def __init__(self, dsn: AnyDsn | ConnectionInfo, **given_options: Unpack[PoolOptions]) -> None:
        options = check_options({**_DEFAULTS, **given_options})
        given = {name: options.pop(name) for name in CONNECTION_OPTIONS & options.keys()}
        replicas = options.pop("replicas")
        self.retries = options.pop("retries")
        self.row_level_security = options.pop("row_level_security")
        self.hints = Hints(self._notify) if options.pop("notify") else None
        self._replicas = _replicas(self, replicas, given, options) if replicas else None
        defaults: dict[str, Any] = {
            "init_size": max(options["min_size"], 1),
            "max_queries": 50_000,
            "record_class": asyncpg.Record,
        }
        info = read_dsn(dsn, given)
        self.hosts, self.database = tuple(zip(info.hosts, info.ports, strict=True)), info.database
        super().__init__(**(defaults | info.asyncpg("chatdb") | options))

    @overload  # type: ignore[override] # see handles.pyi
    async def fetch(
        self, query: str, *args: object, timeout: float | None = None, record_class: None = None
    ) -> list[Record]: ...
    @overload
    async def fetch(
        self, query: str, *args: object, timeout: float | None = None, record_class: type[_RowT]
    ) -> list[_RowT]: ...
    async def fetch(
        self, query: str, *args: Any, timeout: float | None = None, record_class: type[asyncpg.Record] | None = None
    ) -> list[Any]:
        """
        Run a statement on a connection of the pool and return its rows.

        `timeout`, in seconds, replaces the command timeout. If a connection is idle, it is used directly: asyncpg's
        acquire and release would add more than half the cost of the statement.

        With `row_level_security`, a statement of chatdb takes three round trips: BEGIN with the user (the first
        argument), the statement, and COMMIT.
        """
        self._check_process_and_loop()
        if self.row_level_security and args and query in STATEMENTS:
            try:
                return await self._fetch_for_user(args[0], query, args, timeout)
            # The transaction was rolled back; the retry prepares the statement again.
            except (asyncpg.InvalidCachedStatementError, asyncpg.InvalidSQLStatementNameError):
                return await self._fetch_for_user(args[0], query, args, timeout)
        return await self._run(query, args, timeout, record_class)

    async def _fetch_for_user(self, user: str, query: str, args: tuple[Any, ...], timeout: float | None) -> list[Any]:
        async with transaction(self, user_id=user) as connection:
            return await fetch_rows(connection, query, args, timeout)

    def reader(self) -> Reader:
        """
        Return a handle whose reads may be answered by a replica, and may then be old.

        `at_least` asks for an answer that is new enough. Without replicas, the primary answers.
        """
        return Reader(self, self._replicas, self.retries)

    def replica_states(self) -> list[ReplicaState]:
        """Return what the last checks found out about the replicas, in the order in which they were given."""
        return [] if self._replicas is None else self._replicas.states()

    async def _open(self) -> Self:
        is_first = self._state == "new"
        await super()._open()
        if is_first and self._replicas is not None:
            try:
                await self._replicas.start()
            except BaseException:  # cancelled: the caller has no pool to close
                self.terminate()
                raise
        return self

    async def _notify(self, payloads: list[str]) -> None:
        await self._run(_NOTIFY, (CHANNEL, payloads), None, None)

    async def close(self) -> None:
        """
        Close the pool and wait until all connections are released.

        Connections still in use after the acquire timeout are terminated, with a warning in the log.
        """
        if self._state == "opening":
            self._state = "closed"
        if self._state != "open":
            return
        self._check_process_and_loop()
        try:
            async with asyncio.timeout(self._acquire_timeout):
                if self.hints is not None:
                    await self.hints.close(min(1.0, self._acquire_timeout / 2))
                if self._replicas is not None:
                    await self._replicas.close()
                await super().close()
        except TimeoutError:
            _log.warning(
                "the pool closed with connections still in use after %g s: they were terminated", self._acquire_timeout
            )
        except BaseException:
            super().terminate()
            raise
        finally:
            if self._replicas is not None:
                self._replicas.terminate()
            self._state = "closed"

    def terminate(self) -> None:
        """Terminate all connections immediately."""
        if self._state == "opening":
            self._state = "closed"
        if self._state == "open":
            check_process_and_loop(self._process, self._loop, "pool", may_be_stopped=True)
            if self._replicas is not None:
                self._replicas.terminate()
            super().terminate()
            self._state = "closed"

    def get_waiting_count(self) -> int:
        """Return the number of tasks that wait until a connection is free."""
        return self._waiting

    def add_call_listener(self, listener: CallListener) -> None:
        """
        Call a function with a `Call` after each call of chatdb on this pool or on a connection that it has lent.

        The function runs in the event loop, in the context of the call, so it must not block: hand slow work to a queue
        or a thread. What it raises is logged once per class and never reaches the caller.

        Raises InvalidInputError if `listener` is not a plain function.
        """
        listeners = self.call_listeners or CallListeners()
        listeners.add(listener)
        self.call_listeners = listeners

    async def expire_connections(self) -> None:
        """Replace each connection the next time it is acquired."""
        self._check_process_and_loop()
        await super().expire_connections()


def create_pool(
    dsn: AnyDsn | None = None,
    *,
    replicas: Sequence[AnyDsn] = (),
    min_size: int = 0,
    max_size: int = 10,
    acquire_timeout: float = 10.0,
    command_timeout: float = 30.0,
    retries: int = 2,
    row_level_security: bool = False,
    notify: bool = False,
    # Serverless databases close idle connections after five minutes.
    max_inactive_connection_lifetime: float = 240.0,
    **options: Unpack[DriverOptions],
) -> Pool:
    """
    Create a connection pool. Await it, or use it in `async with`, to open it.

    - `dsn` is a PostgreSQL DSN: a str, or an object of a settings class (pydantic's `PostgresDsn` or `SecretStr`,
      SQLAlchemy's `URL`). It defaults to the environment variable `DATABASE_URL`. The schemes
      `postgresql+psycopg://` and `postgresql+asyncpg://` work too. libpq's variables and files supply what is not in
      the DSN. Connections to remote hosts use verified TLS unless the DSN says `sslmode=disable`.
    - `replicas` are the DSNs of physical replicas of this database, for `pool.reader()`. Each has a pool with the same
      options, and one more connection that checks it every second. The pool opens even if none can be reached.
    - The pool keeps `min_size` to `max_size` connections. It opens one at the start, to check that the server answers,
      and more on demand. It closes connections that are idle for `max_inactive_connection_lifetime` seconds (0: never).
    - `acquire_timeout` limits the wait for a connection and `command_timeout` limits each statement, in seconds.
    - `retries` is the maximum number of times that a read or a keyed write is sent again after a lost connection.
    - `row_level_security=True` is for a database with `chatdb protect`: each call runs in a transaction that names its
      user, with three round trips instead of one. If the connection is lost during COMMIT, `.sent` is None.
    - `notify=True` lets each `Watcher` with a `listen_dsn` know about new messages at once. After commits, the pool
      gathers the ids of their conversations and sends them about 20 times a second in a statement of its own.
    - All other options are those of `asyncpg.create_pool`. Set `statement_cache_size=0` for a pooler that does not
      track prepared statements.

    Raises ConfigurationError, which names the option. Opening the pool also raises UnavailableError.
    """
    text = ("" if dsn is None else dsn_to_str(dsn)) or os.environ.get("DATABASE_URL")
    if not text:
        raise ConfigurationError("no database is configured: pass dsn, or set DATABASE_URL=postgresql://...")
    return Pool(
        text,
        replicas=replicas,
        min_size=min_size,
        max_size=max_size,
        acquire_timeout=acquire_timeout,
        command_timeout=command_timeout,
        retries=retries,
        row_level_security=row_level_security,
        notify=notify,
        max_inactive_connection_lifetime=max_inactive_connection_lifetime,
        **options,
    )


_DEFAULTS: Final = {
    parameter.name: parameter.default
    for parameter in inspect.signature(create_pool).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
}
"""Defaults of a `Pool` that is created without `create_pool`, as on the embedded server."""


def _replicas(pool: Pool, dsns: Sequence[AnyDsn], given: dict[str, Any], options: dict[str, Any]) -> Replicas:
    """Return the replicas of a pool, whose connections and pools have the same options."""
    credentials = {name: value for name, value in given.items() if name not in _OF_ONE_SERVER}
    infos = [read_dsn(dsn, credentials) for dsn in dsns]
    init = options.get("init")

    def new_pool(info: ConnectionInfo, check: Callable[[Connection], Awaitable[None]]) -> Pool:
        async def check_and_init(connection: Connection) -> None:
            await check(connection)
            if init is not None:
                await init(connection)

        of_replica: dict[str, Any] = {
            "acquire_timeout": min(options["acquire_timeout"], ANSWER_TIMEOUT),
            "retries": 0,  # the primary is next
            "row_level_security": pool.row_level_security,
            "init": check_and_init,
        }
        return Pool(info, **options | of_replica)

    return Replicas(pool, infos, new_pool)


_OF_ONE_SERVER: Final = frozenset({"host", "port", "service", "servicefile", "target_session_attrs"})
"""Options that say where the primary is, and not how to connect to a replica."""


@contextlib.asynccontextmanager
async def transaction(db: Database, *, user_id: str | None = None) -> AsyncGenerator[Connection, None]:
    """
    Run a block in a transaction and yield its connection.

    `db` is a pool, from which a connection is acquired, or an asyncpg connection. The end of the block commits; an
    exception rolls back. Inside another transaction, the block is a savepoint. Nothing is retried.

    With `user_id`, the block can access only the rows of this user, whatever its statements say, provided that
    `chatdb protect` has enabled row-level security. The setting is sent with BEGIN and ends with the transaction, so it
    is safe behind a pooler. In a savepoint it costs two round trips.

    Raises ConfigurationError inside a transaction of another user. Raises ChatDBError if the server answers COMMIT with
    ROLLBACK, as it does if a statement failed and the block suppressed the error. asyncpg's `connection.transaction()`
    loses the writes silently in this case.
    """
    user = None if user_id is None else check_user_id(user_id)
    if isinstance(db, AsyncpgPool):
        with mapped_driver_errors():
            connection = await db.acquire()
        try:
            with gathered(connection, getattr(db, "hints", None)):
                async with _transaction_block(connection, user):
                    yield connection
        finally:
            with contextlib.suppress(OSError, asyncpg.PostgresError):  # the pool has terminated the connection
                await db.release(connection)
    else:
        check_handle(db, "is_in_transaction")
        connection = cast("Connection", db)
        async with _transaction_block(connection, user):
            yield connection


@contextlib.asynccontextmanager
async def _transaction_block(connection: Connection, user: str | None) -> AsyncGenerator[None, None]:
    is_savepoint = connection.is_in_transaction()
    block = connection.transaction()
    try:
        before = await _begin(connection, block, user, is_savepoint)
        yield
        if is_savepoint and user is not None and before != user:  # RELEASE SAVEPOINT would keep the setting
            await set_rls_user(connection, "")
    except BaseException:
        await roll_back(connection, block, is_savepoint=is_savepoint)
        raise
    with mapped_driver_errors():
        if is_savepoint:
            await block.commit()  # in a failed transaction, RELEASE SAVEPOINT itself raises
            return
        try:
            is_committed = await commit(connection, block)
        except BaseException:  # cancelled before COMMIT was sent: the transaction is still open
            await roll_back(connection, block, is_savepoint=is_savepoint)
            raise
    if not is_committed:
        raise ChatDBError(
            "the transaction was rolled back and nothing was stored, because a statement failed and its error was "
            "suppressed: let the error propagate, or run the statement in a nested transaction()"
        )


async def set_rls_user(connection: Connection, user: str) -> str | None:
    """Set the user for row-level security until the transaction ends, and return the previous one."""
    with mapped_driver_errors():
        before: str | None = await connection.fetchval(_SET_USER, user)
    return before


async def run_until_settled(
    call: Callable[..., Awaitable[ResultT]],
    db: Database,
    user: str,
    *args: object,
    **options: Any,  # noqa: ANN401 - the call's own
) -> ResultT:
    """
    Run a statement that writes only if no other write to the conversation committed while it waited for the lock.

    After two attempts, a transaction keeps the lock between the next ones, so that the second of them succeeds, unless
    the conversation was deleted or created again in between: it cannot keep the lock of a row that is gone.

    Decision: docs/decisions/0013-run-again-after-a-concurrent-write.md
    """
    listeners = listeners_of(db)
    if listeners is not None and running_call() is None:
        query: Query[Any] = cast("Any", call).__self__
        running = run_until_settled(call, db, user, *args, **options)
        return await listeners.tell(query.operation, query.name, running)
    for _ in range(2):
        with contextlib.suppress(RunAgainError):
            return await call(db, user, *args, **options)
    async with transaction(cast("AsyncpgPool | Connection", db), user_id=user) as connection:
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(RunAgainError):
                return await call(connection, user, *args, **options)
        return await call(connection, user, *args, **options)


_ATTEMPTS: Final = 25
"""Attempts in a transaction. Beside tasks that only delete and create the conversation, half of them fail."""


_NOTIFY: Final = "select pg_catalog.pg_notify($1, payload) from pg_catalog.unnest($2::text[]) as payload"

_SET_USER: Final = """
    select before.user_id, pg_catalog.set_config('chatdb.user_id', $1, true)
    from (select pg_catalog.current_setting('chatdb.user_id', true) as user_id offset 0) as before
"""
STATEMENTS.update((_NOTIFY, _SET_USER))

_OF_ANOTHER_USER: Final = (
    "the transaction around this one names another user: end it first, or begin it without user_id and name each user "
    "in a nested transaction"
)


async def _begin(connection: Connection, block: Transaction, user: str | None, is_savepoint: bool) -> str | None:
    """Begin a transaction or a savepoint, and return the previous user for row-level security."""
    try:
        with mapped_driver_errors():
            if user is None or is_savepoint or not asyncpg_private.FAST:
                await block.start()
                before = None if user is None else await set_rls_user(connection, user)
                if is_savepoint and before and before != user:
                    raise ConfigurationError(_OF_ANOTHER_USER)
                return before
            await begin_for_user(connection, block, user)
            return None
    except UnavailableError as error:
        error.sent = False  # no statement of the block was sent
        raise
