"""
Reads on replicas, whose answers may be old but never make stored data look missing.

A `Reader` sends a read to a replica, and again to the primary if the answer is empty, too old or an error. Each
statement for a replica returns no rows once that server has been promoted. Every second, the pool checks which replicas
are usable.

Decision: docs/decisions/0022-a-reader-doubts-empty-answers.md
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol
from zlib import crc32

import asyncpg

from chatdb._core.asyncpg_private import STATEMENTS, PoolConnection
from chatdb._core.driver_errors import as_chatdb_error
from chatdb._core.dsn import ConnectionInfo, server_of
from chatdb._core.query import Database, operation_of
from chatdb._core.validate import check_seq
from chatdb.errors import CommandTimeoutError, ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from chatdb._core.handles import Connection

__all__ = [
    "ANSWER_TIMEOUT", "MAX_LAG", "SERVER_STATE", "Reader", "ReplicaState", "Replicas", "ServerState", "primary_of",
    "reader_at_least", "refuse_reader",
]  # fmt: skip

CHECK_EVERY: Final = 1.0
"""Seconds between two checks of a replica."""

ANSWER_TIMEOUT: Final = 2.0
"""Seconds within which a replica must answer a check, or connect for a call. Otherwise, the primary answers."""

CONNECT_TIMEOUT: Final = 5.0
"""Seconds within which a replica must accept a connection for the checks."""

MAX_LAG: Final = 10.0
"""Seconds by which a replica may be behind and still be used."""

_SAMPLES: Final = 60
"""Positions of the primary's log that are kept to measure lag, one for each check."""

_NAME: Final = re.compile(r"--chatdb\.(\w+)\n")

_ON_REPLICA: Final = re.compile(
    "(?:get_conversation|load_conversation|get_history|list_messages|get_message|list_conversations|list_previews"
    "|list_pinned|search_messages|export_user)"
    "(?:_by_key|_before_key|_after_key|_after|_archived|_all|_created|_ascending|_conversation|_words|_messages)*"
)
"""The statements that a replica may answer."""

_ON_PRIMARY: Final = re.compile(
    "get_branch(?:_top)?|get_context|list_versions|read_message|list_streaming|check_schema|poll_conversations"
)
"""The other reads. All other statements write."""

SERVER_STATE: Final = """--chatdb.server_state
    select /* chatdb.server_state */
        system.system_identifier::text as cluster,
        pg_catalog.current_database()::text as database,
        server.is_replica,
        (case when server.is_replica then pg_catalog.pg_last_wal_replay_lsn() else pg_catalog.pg_current_wal_lsn() end
            - '0/0'::pg_catalog.pg_lsn)::int8 as position,
        case
            -- the timeline in the control file follows only with the next restart point
            when server.is_replica then greatest(
                checkpoint.timeline_id, recovery.min_recovery_end_timeline,
                (select pg_catalog.max(received_tli) from pg_catalog.pg_stat_wal_receiver)
            )
            else ('x' || pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8))::bit(32)::int4
        end as timeline
    from (select pg_catalog.pg_is_in_recovery() as is_replica offset 0) as server,
        pg_catalog.pg_control_system() as system,
        pg_catalog.pg_control_checkpoint() as checkpoint,
        pg_catalog.pg_control_recovery() as recovery
"""
"""Which database this is, whether the server is a replica, and how far in its log it is, in bytes."""
STATEMENTS.add(SERVER_STATE)

_log = logging.getLogger("chatdb")


class ServerState(NamedTuple):
    """A row of `SERVER_STATE`."""

    cluster: str
    database: str
    is_replica: bool
    position: int
    timeline: int

    def problem(self, primary: ServerState) -> str | None:
        """Return why this server is no usable replica of the primary, or None."""
        if (self.cluster, self.database) != (primary.cluster, primary.database):
            return "is not a copy of the primary's database"
        if not self.is_replica:
            return "is not in recovery: it was promoted, or is the primary itself"
        if self.timeline != primary.timeline:
            return f"follows timeline {self.timeline}, but the primary is on {primary.timeline}"
        return None


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """
    What the last check found out about a replica, and how often it answered.

    `server` is its host and port. `role` is None if it cannot be reached. `lag` is how many seconds it is behind,
    rounded up to the next check of the primary, or None if unknown; it stays the last known one while the primary
    cannot be reached. While `in_use` is False, the primary answers instead, and `problem` says why. `answered` counts
    the calls that the replica answered, `passed_on` those that went on to the primary.
    """

    server: str
    role: Literal["replica", "primary"] | None
    lag: float | None
    in_use: bool
    problem: str | None
    answered: int
    passed_on: int


class ReplicaPool(Database, Protocol):
    """The part of `chatdb.Pool` that reads on replicas need."""

    def __await__(self) -> Any: ...  # noqa: ANN401 - a generator
    async def close(self) -> None: ...
    def terminate(self) -> None: ...


Init = Callable[[Any], Awaitable[None]]


class _Primary:
    """The primary's state, and where its log was at the last checks."""

    def __init__(self, pool: Database) -> None:
        self._pool = pool
        self._positions: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)
        self.state: ServerState | None = None

    async def check(self) -> None:
        """Read the state; leave it as it is if the primary does not answer."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                [row] = await self._pool.fetch(SERVER_STATE)
        except Exception as error:  # noqa: BLE001 - the replicas answer meanwhile
            _log.debug("could not read the primary's state: %s", type(error).__name__)
            return
        found = ServerState(*row)
        if found.is_replica:  # it was demoted, and the pool will connect to the next one
            return
        if self.state is not None and found.timeline != self.state.timeline:
            self._positions.clear()
        self.state = found
        self._positions.append((time.monotonic(), found.position))

    def lag_of(self, position: int) -> float:
        """Return how many seconds before the last check the primary's log was past this position."""
        missed = next((at for at, reached in self._positions if reached > position), None)
        return 0.0 if missed is None else max(self._positions[-1][0] - missed, 0.001)


class _Replica:
    """A replica: the pool for its reads, the connection for its checks, and what they found."""

    def __init__(
        self, info: ConnectionInfo, new_pool: Callable[[ConnectionInfo, Init], ReplicaPool], primary: _Primary
    ) -> None:
        self._info = info
        self._new_pool = new_pool
        self._primary = primary
        self._connection: PoolConnection | None = None
        self.pool: ReplicaPool | None = None
        self.server = server_of(info.asyncpg())
        self.role: Literal["replica", "primary"] | None = None
        self.lag: float | None = None
        self.in_use = False
        self.problem: str | None = "was not checked yet"
        self.answered = self.passed_on = 0

    async def check(self) -> None:
        """Find out whether the replica is usable, and open or drop its pool."""
        try:
            found = await self._read_state()
        except Exception as error:  # noqa: BLE001 - the primary answers instead
            self.drop()
            self.role = self.lag = None
            self._set_problem(f"cannot be reached ({type(error).__name__})")
            return
        self.role = "replica" if found.is_replica else "primary"
        if self._primary.state is None:
            self._set_problem("cannot be compared with the primary, which has not answered yet")
            return
        problem = found.problem(self._primary.state)
        if problem is not None:
            self.lag = None
            self._drop_pool()
            self._set_problem(problem)
            return
        self.lag = self._primary.lag_of(found.position)
        if self.lag > MAX_LAG:
            self._set_problem(f"is {self.lag:.0f} s behind")
            return
        try:
            if self.pool is None:
                pool = self._new_pool(self._info, self._refuse_other)
                await pool
                self.pool = pool
        except Exception as error:  # noqa: BLE001 - as above
            self._set_problem(f"cannot be reached ({type(error).__name__})")
            return
        self._set_problem(None)

    async def _read_state(self) -> ServerState:
        connection = self._connection
        if connection is None or connection.is_closed():
            async with asyncio.timeout(CONNECT_TIMEOUT):
                connection = await asyncpg.connect(connection_class=PoolConnection, **self._info.asyncpg("chatdb"))
            self._connection = connection
        async with asyncio.timeout(ANSWER_TIMEOUT):
            [row] = await connection.fetch(SERVER_STATE)
        return ServerState(*row)

    async def _refuse_other(self, connection: Connection) -> None:
        """Refuse a new connection of the pool if it leads to another server, as behind a changed address."""
        [row] = await connection.fetch(SERVER_STATE)
        primary = self._primary.state
        problem = ServerState(*row).problem(primary) if primary is not None else "cannot be compared"
        if problem is not None:
            raise ConfigurationError(f"the replica at {self.server} {problem}")

    def set_aside(self) -> None:
        """Do not use the replica until the next check."""
        self._set_problem("did not answer")

    def _set_problem(self, problem: str | None) -> None:
        if problem is not None and self.in_use:
            _log.warning("the replica at %s is not used: it %s", self.server, problem)
        elif problem is None and not self.in_use:
            _log.info("the replica at %s is used", self.server)
        self.problem = problem
        self.in_use = problem is None

    def _drop_pool(self) -> None:
        if self.pool is not None:
            self.pool.terminate()
            self.pool = None

    def drop(self) -> None:
        """End all connections, which fails the calls that wait for an answer."""
        self._drop_pool()
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


class Replicas:
    """The replicas of a pool, and the tasks that check them."""

    def __init__(
        self,
        pool: Database,
        infos: Sequence[ConnectionInfo],
        new_pool: Callable[[ConnectionInfo, Init], ReplicaPool],
    ) -> None:
        self._primary = _Primary(pool)
        self._replicas = [_Replica(info, new_pool, self._primary) for info in infos]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to check all replicas every second, and wait until each was checked, or did not answer."""
        await self._primary.check()
        self._tasks.append(asyncio.create_task(_repeat(self._primary.check)))
        first = [asyncio.Event() for _ in self._replicas]
        for replica, checked in zip(self._replicas, first, strict=True):
            self._tasks.append(asyncio.create_task(_repeat(replica.check, checked)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_TIMEOUT):
                for checked in first:
                    await checked.wait()

    async def close(self) -> None:
        """End the checks, and close the replicas' pools once their connections are released."""
        self._end_checks()
        await asyncio.gather(*(each.pool.close() for each in self._replicas if each.pool is not None))
        self.terminate()

    def terminate(self) -> None:
        """End the checks and all connections to replicas."""
        self._end_checks()
        for replica in self._replicas:
            replica.drop()

    def _end_checks(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        for replica in self._replicas:
            replica.in_use = False

    def states(self) -> list[ReplicaState]:
        """Return the state of each replica, in the order in which they were given."""
        return [
            ReplicaState(each.server, each.role, each.lag, each.in_use, each.problem, each.answered, each.passed_on)
            for each in self._replicas
        ]

    def choose(self, user: str) -> _Replica | None:
        """Return a replica in use: the same one for a user as long as it is, so that reads do not go back in time."""
        if len(self._replicas) == 1:
            [replica] = self._replicas
            return replica if replica.in_use else None
        usable = [each for each in self._replicas if each.in_use]
        return usable[crc32(user.encode()) % len(usable)] if usable else None


async def _repeat(check: Callable[[], Awaitable[None]], checked: asyncio.Event | None = None) -> None:
    """Check every second until the task is cancelled."""
    while True:
        await check()
        if checked is not None:
            checked.set()
        await asyncio.sleep(CHECK_EVERY)


class Reader:
    """
    A handle for chatdb's functions, from `pool.reader()`, whose reads may be answered by a replica and be old.

    `get_conversation`, `load_conversation`, `get_history`, `list_messages`, `get_message`, `list_conversations`,
    `list_previews`, `list_pinned`, `search_messages` and `export_user` are sent to a replica, and again to the primary
    if the answer is empty, is not as new as `at_least` asks, or is an error. All other reads are sent to the primary.
    Functions that write raise ConfigurationError.

    `primary` is the pool.
    """

    __slots__ = ("_replicas", "primary", "retries")

    def __init__(self, primary: Database, replicas: Replicas | None, retries: int) -> None:
        self.primary = primary
        self.retries = retries
        self._replicas = replicas

    @property
    def call_listeners(self) -> object:
        """The pool's listeners, which hear of the reader's calls too."""
        return getattr(self.primary, "call_listeners", None)

    async def fetch(
        self,
        query: str,
        /,
        *args: Any,  # noqa: ANN401
        timeout: float | None = None,
        is_new: Callable[[list[Any]], bool] | None = None,
    ) -> list[Any]:
        """
        Run one of chatdb's statements on a replica or on the primary, and return its rows.

        With `is_new`, an answer of the replica counts only if it says so.
        """
        statement = _on_replica.get(query)
        if statement is None:
            statement = _on_replica[query] = _statement_on_replica(query)
        replica = self._replicas.choose(args[0]) if statement and self._replicas else None
        if replica is None or (pool := replica.pool) is None:
            return await self.primary.fetch(query, *args, timeout=timeout)
        try:
            rows = await pool.fetch(statement, *args, timeout=timeout)
        except Exception as error:  # noqa: BLE001 - the primary decides
            ours = as_chatdb_error(error)
            if isinstance(ours, UnavailableError) and (ours.sent is not True or isinstance(ours, CommandTimeoutError)):
                replica.set_aside()
        else:
            # the first column is null in a row that says only that the conversation exists
            if rows and rows[0][0] is not None and (is_new is None or is_new(rows)):
                replica.answered += 1
                return rows
        replica.passed_on += 1
        return await self.primary.fetch(query, *args, timeout=timeout)


class _NewReader:
    """A reader whose answers are at least as new as one call asks."""

    __slots__ = ("_is_new", "_reader", "call_listeners", "retries")

    def __init__(self, reader: Reader, is_new: Callable[[list[Any]], bool]) -> None:
        self._reader = reader
        self._is_new = is_new
        self.retries = reader.retries
        self.call_listeners = reader.call_listeners

    async def fetch(self, query: str, /, *args: Any, timeout: float | None = None) -> list[Any]:  # noqa: ANN401
        return await self._reader.fetch(query, *args, timeout=timeout, is_new=self._is_new)


_on_replica: Final[dict[str, str]] = {}
"""Statements for replicas, by statement; empty for those that only the primary answers."""


def _statement_on_replica(query: str) -> str:
    """
    Return the statement for a replica, or "" for one that only the primary answers.

    It returns no row from a server that is not in recovery any more. As long as the server is, its snapshot, which is
    taken before, holds only what the primary has committed.

    Raises ConfigurationError for a statement that writes.
    """
    found = _NAME.match(query)
    if found is None:
        raise ConfigurationError("a reader runs only the functions of chatdb: use the pool for other statements")
    name = found[1]
    if _ON_PRIMARY.fullmatch(name):
        return ""
    if not _ON_REPLICA.fullmatch(name):
        raise _cannot_write(operation_of(name))
    subquery = f"(\n{query[found.end() :]}\n)"
    statement = (
        f"--chatdb.{name}\nselect /* chatdb.{name} on a replica */ answer.* from {subquery} as answer\n"
        # unlike a condition, a limit copies no row: 0.2 instead of 3.7 percent of a history
        "limit case when pg_catalog.pg_is_in_recovery() then null::int8 else 0 end"
    )
    STATEMENTS.add(statement)
    return statement


def _cannot_write(function: str) -> ConfigurationError:
    return ConfigurationError(f"{function} writes, which a reader cannot do: pass the pool instead of pool.reader()")


def refuse_reader(db: Database, function: str) -> None:
    """Raise ConfigurationError if a function that writes was given a reader."""
    if isinstance(db, Reader):
        raise _cannot_write(function)


def primary_of(db: Database) -> Database:
    """Return the pool of a reader, and any other handle as it is."""
    return db.primary if isinstance(db, Reader) else db


def reader_at_least(db: Database, at_least: int, is_new: Callable[[list[Any], int], bool]) -> Database:
    """
    Return a handle for one call whose answer has all messages up to the `seq` `at_least`.

    `is_new` compares the rows of a replica with it. Every handle but a reader is up to date, and is returned as it is.
    """
    seq = check_seq("at_least", at_least)
    return _NewReader(db, lambda rows: is_new(rows, seq)) if isinstance(db, Reader) else db
