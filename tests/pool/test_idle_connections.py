"""Idle connections of chatdb's pool: `fetch` uses one directly, and the pool closes unused ones."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
import weakref
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import psycopg
import pytest

import chatdb
from chatdb import AcquireTimeoutError, ConfigurationError
from chatdb._core.dsn import connect_arguments
from chatdb.pool import Pool
from tests.support.pools import HANG, assert_whole, kill_sessions, loop_errors, seen_by_the_server, until
from tests.support.proxy import Proxy

PID = "select pg_backend_pid() as pid"
SLEEP = "select pg_sleep(30)"
LOST = (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError)


async def pid_of(pool: Pool) -> int:
    """Return the server process of the connection that runs the pool's next statement."""
    return (await pool.fetch(PID))[0]["pid"]


@pytest.fixture
async def quiet_dsn(shared_dsn: str) -> AsyncIterator[str]:
    """Yield the DSN of a database without data, and end its sessions afterwards."""
    yield shared_dsn
    kill_sessions(shared_dsn)


@pytest.fixture
async def pool(quiet_dsn: str) -> AsyncIterator[Pool]:
    """Yield a pool of one idle connection."""
    async with chatdb.create_pool(quiet_dsn, max_size=1) as found:
        yield found


async def acquired(pool: Pool) -> Any:
    """Return a connection of the pool, which the caller must release."""
    return await pool.acquire()


def is_running(dsn: str, query: str) -> bool:
    """Return whether a session of the database is running the statement."""
    return ("active", query) in [(state, sent) for state, sent, _ in seen_by_the_server(dsn)]


def sessions(dsn: str) -> set[int]:
    """Return the processes of the database's other sessions, except those of this function."""
    with psycopg.connect(dsn, autocommit=True, application_name="chatdb test") as connection:
        return {
            pid
            for (pid,) in connection.execute("""
                select pid from pg_stat_activity
                where datname = current_database() and backend_type = 'client backend'
                  and application_name <> 'chatdb test'
            """)
        }


# --- fetch: acquire and release --------------------------------------------------------------------------------------


async def test_an_idle_connection_is_taken_as_it_is(pool, monkeypatch):
    """If a connection is idle and nobody waits, fetch bypasses asyncpg's acquire; otherwise it waits in the queue."""

    async def fetch_straight() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Pool, "_acquire", None)
            assert [dict(row) for row in await pool.fetch("select $1::int as a, 'b' as b", 1)] == [{"a": 1, "b": "b"}]

    await fetch_straight()
    async with pool.acquire():
        waiting, cancelled = (asyncio.create_task(pool.fetch(PID)) for _ in range(2))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        cancelled.cancel()
        with pytest.raises(AcquireTimeoutError):
            await pool.acquire(timeout=0.01)
    assert await waiting
    await fetch_straight()


async def test_rows_are_of_the_class_that_is_asked_for(pool):
    """The record_class argument works as in asyncpg's fetch."""

    class Row(asyncpg.Record):
        pass

    assert [type(row) for row in await pool.fetch("select 1", record_class=Row)] == [Row]


@pytest.mark.parametrize(
    ("statement", "arguments", "error"),
    [
        ("select 1", {}, None),
        ("select 1 / 0", {}, asyncpg.DivisionByZeroError),
        ("select nothing", {}, asyncpg.UndefinedColumnError),
        (SLEEP, {"timeout": 0.05}, TimeoutError),
    ],
)
async def test_the_connection_comes_back(pool, quiet_dsn, statement, arguments, error):
    """After a result, a server error or a timeout, the same connection is idle and runs nothing."""
    before = await pid_of(pool)
    with pytest.raises(error) if error else contextlib.nullcontext():
        await pool.fetch(statement, **arguments)
    assert pool.get_idle_size() == 1
    assert not is_running(quiet_dsn, SLEEP)
    async with asyncio.timeout(HANG):
        assert await pid_of(pool) == before
    await assert_whole(pool)


async def test_the_connection_comes_back_after_a_wrong_argument(pool):
    """An argument that the driver cannot send leaves the connection idle."""
    before = await pid_of(pool)
    with pytest.raises(asyncpg.DataError):
        await pool.fetch("select $1::int", "x")
    assert (pool.get_idle_size(), await pid_of(pool)) == (1, before)


@pytest.mark.parametrize("times", [1, 2])
async def test_the_connection_comes_back_after_a_cancellation(pool, quiet_dsn, times):
    """A cancelled fetch, even if cancelled again during the release, leaves nothing running on its connection."""
    before = await pid_of(pool)
    call = asyncio.create_task(pool.fetch(SLEEP))
    await until(lambda: is_running(quiet_dsn, SLEEP))
    for _ in range(times):
        call.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert times == 2 or not is_running(quiet_dsn, SLEEP)
    async with asyncio.timeout(HANG):
        assert await pid_of(pool) == before
    assert not is_running(quiet_dsn, SLEEP)
    await assert_whole(pool)


async def test_a_call_that_is_cancelled_before_its_turn_takes_no_connection(pool):
    """A task cancelled before it starts or at its first step leaves all connections usable."""
    for steps in range(3):
        call = asyncio.create_task(pool.fetch(PID))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await assert_whole(pool)


@pytest.mark.parametrize("when", ["by itself", "unnoticed", "noticed"])
async def test_a_lost_connection_is_replaced(pool, quiet_dsn, when):
    """A session that ends before or during a fetch causes at most one error, and the pool opens another."""
    before = await pid_of(pool)
    if when == "by itself":
        with pytest.raises(LOST):
            await pool.fetch("select pg_terminate_backend(pg_backend_pid(), 10000)")
    else:
        kill_sessions(quiet_dsn)
        if when == "noticed":
            await until(lambda: pool.get_size() == 0)
        else:
            with pytest.raises(LOST):
                await pool.fetch(PID)
    async with asyncio.timeout(HANG):
        assert await pid_of(pool) != before
    await assert_whole(pool)


async def test_a_connection_that_the_driver_gave_up_is_replaced(quiet_dsn):
    """A connection that asyncpg closes after an internal error is replaced if the pool has a min_size."""
    async with chatdb.create_pool(quiet_dsn, min_size=1, max_size=1) as pool:
        async with pool.acquire() as proxy:
            connection = proxy._con
        call = asyncio.create_task(pool.fetch(SLEEP))
        await until(lambda: is_running(quiet_dsn, SLEEP))
        connection._protocol.abort()
        with pytest.raises(asyncpg.PostgresConnectionError):
            await call
        await until(lambda: pool.get_size() == 1)
        await assert_whole(pool)


async def test_a_place_that_is_in_use_again_is_not_given_back(quiet_dsn):
    """A fetch that loses its connection does not release the one that another task now has in its slot."""
    with Proxy(quiet_dsn) as proxy:
        spare = [await asyncpg.connect(**connect_arguments(address)) for address in (quiet_dsn, proxy.dsn)]

        async def connect(*_: object, **__: object) -> asyncpg.Connection:
            return spare.pop()

        async with chatdb.create_pool(quiet_dsn, max_size=1, connect=connect) as pool:
            call = asyncio.create_task(pool.fetch(SLEEP))
            await until(lambda: is_running(quiet_dsn, SLEEP))
            waiting = asyncio.create_task(acquired(pool))
            await asyncio.sleep(0)
            proxy.close()
            with pytest.raises(asyncpg.PostgresConnectionError):
                await call
            connection = await waiting
            assert pool.get_idle_size() == 0
            with pytest.raises(AcquireTimeoutError):
                await pool.acquire(timeout=0.01)
            assert await connection.fetchval("select 1") == 1
            await pool.release(connection)
            await assert_whole(pool)


async def test_a_transaction_that_is_begun_is_rolled_back(dsn):
    """If a statement leaves a transaction open, the release rolls it back and reports it."""
    async with chatdb.create_pool(dsn, max_size=1) as pool, chatdb.create_pool(dsn, max_size=1) as other:
        with loop_errors() as errors:
            await pool.fetch("begin")
        assert ["active transaction" in error["message"] for error in errors] == [True]
        assert not any(in_transaction for _, _, in_transaction in seen_by_the_server(dsn))
        await chatdb.create_conversation(pool, user_id="ada")
        assert len(await chatdb.list_conversations(other, user_id="ada")) == 1


async def test_a_connection_is_replaced_after_its_queries(quiet_dsn):
    """max_queries also applies to fetch."""
    async with chatdb.create_pool(quiet_dsn, max_size=1, max_queries=3) as pool:
        for _ in range(2):  # on its first connection the pool has sent a statement of its own
            await pid_of(pool)
        pids = [await pid_of(pool) for _ in range(9)]
    assert pids == [pids[0]] * 3 + [pids[3]] * 3 + [pids[6]] * 3
    assert len(set(pids)) == 3


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_an_expired_connection_is_replaced(pool, quiet_dsn, when):
    """After expire_connections(), the next fetch uses a new session, whether the old one was idle or in use."""
    before = await pid_of(pool)
    if when == "meanwhile":
        call = asyncio.create_task(pool.fetch("select pg_sleep(0.1)"))
        await asyncio.sleep(0.01)
        await pool.expire_connections()
        await call
        assert pool.get_size() == 0
    else:
        await pool.expire_connections()
    after = await pid_of(pool)
    assert after != before
    assert await pid_of(pool) == after
    await until(lambda: len(seen_by_the_server(quiet_dsn)) == 1)


async def test_closing_waits_for_a_fetch(quiet_dsn):
    """close() waits for a running fetch and refuses new ones."""
    pool = await chatdb.create_pool(quiet_dsn, max_size=2)
    await assert_whole(pool)
    call = asyncio.create_task(pool.fetch("select pg_sleep(0.2), 1 as a"))
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    with pytest.raises(chatdb.PoolClosedError):
        await pool.fetch("select 1")
    assert not closing.done()
    async with asyncio.timeout(HANG):
        assert (await call)[0]["a"] == 1
        await closing
    with pytest.raises(chatdb.PoolClosedError):
        await pool.fetch("select 1")
    await until(lambda: seen_by_the_server(quiet_dsn) == [])


async def test_a_pool_that_is_not_there_yet_or_any_more(quiet_dsn):
    """A pool that is not open yet, still opens or is terminated raises PoolClosedError."""
    pool = chatdb.create_pool(quiet_dsn)
    with pytest.raises(chatdb.PoolClosedError, match="not open"):
        await pool.fetch("select 1")
    opening = asyncio.ensure_future(pool._open())
    await asyncio.sleep(0)
    with pytest.raises(chatdb.PoolClosedError, match="not open"):
        await pool.fetch("select 1")
    await opening
    assert await pool.fetch("select 1")
    pool.terminate()
    with pytest.raises(chatdb.PoolClosedError):
        await pool.fetch("select 1")


async def test_what_is_outdated_is_forgotten_by_the_whole_pool(quiet_dsn):
    """After a table change, one fetch suffices to clear the cached plans of all connections."""
    async with chatdb.create_pool(quiet_dsn, min_size=2, max_size=2) as pool:
        await pool.fetch("create table changing (a int)")
        try:
            await run_on_all(pool, "select * from changing")
            await pool.fetch("alter table changing add b int")
            assert await pool.fetch("select * from changing") == []
            await run_on_all(pool, "select * from changing")
        finally:
            await pool.fetch("drop table changing")


async def test_a_function_prepares_its_statement_anew(quiet_dsn):
    """After a change of a column's type, a function whose statement was prepared before returns its rows."""
    async with chatdb.create_pool(quiet_dsn, max_size=1) as pool, chatdb.create_pool(quiet_dsn) as other:
        created = await chatdb.create_conversation(pool, user_id="outdated", title="kept")
        at = {"user_id": "outdated", "conversation_id": created.id}
        assert await chatdb.get_conversation(pool, **at) == created
        try:
            await other.fetch("alter table chatdb.conversations alter title type varchar(2000)")
            assert await chatdb.get_conversation(pool, **at) == created
            assert await chatdb.get_conversation(pool, **at) == created
        finally:
            await other.fetch("alter table chatdb.conversations alter title type text")
        assert await chatdb.get_conversation(pool, **at) == created
        await chatdb.delete_user(pool, user_id="outdated")


async def test_a_type_that_is_outdated_is_forgotten_by_the_whole_pool(quiet_dsn):
    """After a type change, one error suffices to clear the cached types of all connections."""
    async with chatdb.create_pool(quiet_dsn, min_size=2, max_size=2) as pool:
        await pool.fetch("create type changing as (a int)")
        await pool.fetch("create table holding (a changing)")
        try:
            await pool.fetch("insert into holding values (row(1))")
            await run_on_all(pool, "select a from holding")
            await pool.fetch("alter type changing add attribute b int")
            with pytest.raises(asyncpg.OutdatedSchemaCacheError):
                await pool.fetch("select a from holding")
            await run_on_all(pool, "select a from holding")
        finally:
            await pool.fetch("drop table holding")
            await pool.fetch("drop type changing")


async def run_on_all(pool: Pool, statement: str) -> None:
    """Run a statement in a transaction on every connection of the pool at once."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(pool.get_max_size()):
            connection = await stack.enter_async_context(pool.acquire())
            async with connection.transaction():
                await connection.fetch(statement)


# --- fetch: order ----------------------------------------------------------------------------------------------------


async def test_a_late_fetch_does_not_overtake(quiet_dsn):
    """Whatever the timing of a fetch and two releases, earlier requests are served first."""
    async with chatdb.create_pool(quiet_dsn, min_size=2, max_size=2) as pool:
        for steps in range(12):
            order: list[str] = []
            both = asyncio.Barrier(2)

            async def use(name: str, order: list[str] = order, both: asyncio.Barrier = both) -> None:
                async with pool.acquire():
                    order.append(name)
                    await both.wait()

            async def come_late(order: list[str] = order) -> None:
                await pool.fetch("select 1")
                order.append("late")

            async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
                held = [await pool.acquire(), await pool.acquire()]
                for name in ("first", "second"):
                    group.create_task(use(name))
                await asyncio.sleep(0.01)
                releases = [asyncio.create_task(pool.release(connection)) for connection in held]
                for _ in range(steps):
                    await asyncio.sleep(0)
                group.create_task(come_late())
                await asyncio.gather(*releases)
            assert (steps, order) == (steps, ["first", "second", "late"])


async def test_fetches_are_served_in_their_order(quiet_dsn):
    """Repeated fetches by many tasks on one connection run in the order of their calls."""
    async with chatdb.create_pool(quiet_dsn, max_size=1) as pool:
        await pool.fetch("create temporary sequence place")
        tickets, order = iter(range(1000)), []

        async def ask() -> None:
            for _ in range(5):
                ticket = next(tickets)
                order.append(((await pool.fetch("select nextval('place') as place"))[0]["place"], ticket))

        await asyncio.gather(*(ask() for _ in range(20)))
    assert [ticket for _, ticket in sorted(order)] == list(range(100))


# --- fetch: caller's options -----------------------------------------------------------------------------------------


async def test_what_the_caller_has_set_is_done(quiet_dsn):
    """init= runs once per connection; setup= runs before and reset= after each fetch on its connection."""
    done: list[tuple[str, int]] = []

    def noting(name: str) -> Any:
        async def note(connection: asyncpg.Connection) -> None:
            done.append((name, connection.get_server_pid()))

        return note

    for names in (["init"], ["setup"], ["reset"], ["init", "setup", "reset"]):
        done.clear()
        async with chatdb.create_pool(quiet_dsn, max_size=1, **{name: noting(name) for name in names}) as pool:
            pids = {await pid_of(pool) for _ in range(3)}
        [pid] = pids
        each = [(name, pid) for name in names if name != "init"]
        assert done == [("init", pid)] * ("init" in names) + each * 3


async def test_a_setup_that_fails_is_told(quiet_dsn):
    """An error of setup= propagates from fetch, and that connection is not used."""
    fails = [False, True, False]

    async def setup(connection: asyncpg.Connection) -> None:
        if fails.pop(0):
            raise ZeroDivisionError

    async with chatdb.create_pool(quiet_dsn, max_size=1, setup=setup) as pool:
        before = await pid_of(pool)
        with pytest.raises(ZeroDivisionError):
            await pool.fetch(PID)
        assert await pid_of(pool) != before


# --- unused connections ----------------------------------------------------------------------------------------------


async def open_all(pool: Pool) -> None:
    """Open all connections of the pool."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(pool.get_max_size()):
            await stack.enter_async_context(pool.acquire())
        # check here: on a busy machine the pool may close the first connection before the last is released
        assert pool.get_size() == pool.get_max_size()


@pytest.mark.parametrize(("floor", "lifetime"), [(0, 0.2), (1, 0.2), (2, 0.2), (0, 0), (0, 30)])
async def test_idle_connections_are_closed(quiet_dsn, floor, lifetime):
    """The pool closes idle connections after their lifetime, down to min_size; a lifetime of 0 keeps them."""
    left = floor if lifetime == 0.2 else 3
    async with chatdb.create_pool(
        quiet_dsn, min_size=floor, max_size=3, max_inactive_connection_lifetime=lifetime
    ) as pool:
        await open_all(pool)
        await until(lambda: pool.get_size() == left)
        await until(lambda: len(sessions(quiet_dsn)) == left)
        before = sessions(quiet_dsn)
        await asyncio.sleep(0.5)
        assert sessions(quiet_dsn) == before
        await assert_whole(pool)


async def test_idle_connections_have_their_time(quiet_dsn):
    """A connection is closed after its lifetime, never before."""
    async with chatdb.create_pool(quiet_dsn, max_size=1, max_inactive_connection_lifetime=0.8) as pool:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            before = loop.time()
            await pool.fetch("select 1")
            await until(lambda: pool.get_size() == 0)
            assert loop.time() - before >= 0.8


@pytest.mark.parametrize("way", ["fetch", "acquire"])
async def test_a_connection_that_is_used_now_and_then_stays(quiet_dsn, way):
    """A use between two checks restarts the lifetime; eight checks without one close a connection."""
    # the test calls the check itself, because on a busy machine a timer may run too late
    async with chatdb.create_pool(quiet_dsn, max_size=1, max_inactive_connection_lifetime=300) as pool:
        pids = set()
        for _ in range(5):
            if way == "fetch":
                pids.add(await pid_of(pool))
            else:
                async with pool.acquire() as connection:
                    pids.add(await connection.fetchval(PID))
            for _ in range(8):
                pool._close_idle()
        assert len(pids) == 1
        assert pool.get_size() == 1
        pool._close_idle()
        assert pool.get_size() == 0


@pytest.mark.parametrize("way", ["fetch", "acquire", "setup"])
async def test_a_connection_in_use_stays(quiet_dsn, way):
    """A use longer than the idle lifetime is not interrupted, nor is a slow setup=."""

    async def setup(connection: asyncpg.Connection) -> None:
        await asyncio.sleep(0.3 if way == "setup" else 0)

    options = {"setup": setup} if way == "setup" else {}
    async with chatdb.create_pool(quiet_dsn, max_size=1, max_inactive_connection_lifetime=0.08, **options) as pool:
        if way == "fetch":
            assert await pool.fetch("select pg_sleep(0.3)")
        else:
            async with pool.acquire() as connection:
                before = connection.get_server_pid()
                await asyncio.sleep(0.3)
                assert await connection.fetchval(PID) == before
        await until(lambda: pool.get_size() == 0)
        await assert_whole(pool)


async def test_idle_connections_are_looked_at_by_one_timer(quiet_dsn, monkeypatch):
    """A pool that is both awaited and entered has one timer; a closed pool has none."""
    looks: list[Pool] = []
    monkeypatch.setattr(Pool, "_close_idle", lambda self: looks.append(self))
    pool = await chatdb.create_pool(quiet_dsn, max_inactive_connection_lifetime=0.8)
    async with pool:
        await asyncio.sleep(0.65)
        assert 0 < len(looks) <= 7
    looks.clear()
    await asyncio.sleep(0.3)
    assert looks == []


def test_a_negative_lifetime_is_refused():
    """A negative lifetime raises ConfigurationError, which names the valid values."""
    with pytest.raises(ConfigurationError, match="max_inactive_connection_lifetime must be 0"):
        chatdb.create_pool("postgresql://localhost/chat", max_inactive_connection_lifetime=-1)


async def test_a_pool_that_nobody_has_is_collected(quiet_dsn):
    """The timer does not keep an abandoned pool alive, and the pool's sessions end."""
    pool = await chatdb.create_pool(quiet_dsn, max_size=2, max_inactive_connection_lifetime=0.4)
    await open_all(pool)
    await pool.fetch("select 1")
    await asyncio.sleep(0.15)  # at least one check has run
    reference = weakref.ref(pool)
    del pool
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # about the unclosed connections
        gc.collect()
    assert reference() is None
    await until(lambda: seen_by_the_server(quiet_dsn) == [])
    await asyncio.sleep(0.1)  # the timer finds nothing
