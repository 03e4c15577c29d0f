"""A pool belongs to the process and event loop that open it; a released connection keeps no session state."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import math
import multiprocessing
import os
import signal
import threading
import time

import asyncpg
import pytest
import uvloop

import chatdb
from chatdb import ConfigurationError
from chatdb._core.dsn import connect_arguments
from chatdb.pool import check_process_and_loop

FORK = multiprocessing.get_context("fork")
HANG = 30


async def opened(dsn, **options):
    """Return a pool, and the ids of a conversation of alice and one of bob."""
    pool = await chatdb.create_pool(dsn, **options)
    ids = {}
    for user in ("alice", "bob"):
        ids[user] = (await chatdb.create_conversation(pool, user_id=user)).id
        await chatdb.append_message(pool, user_id=user, conversation_id=ids[user], role="user", content=f"of {user}")
    return pool, ids


async def contents(pool, ids, user):
    """Return the contents of a user's messages."""
    return [m.content for m in await chatdb.get_history(pool, user_id=user, conversation_id=ids[user])]


def uses(pool, ids, connection=None):
    """Return the ways to use a pool or its connection in the wrong process or loop."""
    at = {"user_id": "bob", "conversation_id": ids["bob"]}

    async def in_transaction():
        async with chatdb.transaction(pool) as inside:
            await chatdb.get_history(inside, **at)

    found = {
        "read": lambda: chatdb.get_history(pool, **at),
        "append": lambda: chatdb.append_message(pool, role="user", content="astray", **at),
        "transaction": in_transaction,
        "fetch": lambda: pool.fetch("select 1"),
        "execute": lambda: pool.execute("select 1"),
        "acquire": pool.acquire,
        "await": lambda: pool,
        "close": pool.close,
        "expire": pool.expire_connections,
    }
    if connection is not None:
        found |= {
            "connection": lambda: chatdb.get_history(connection, **at),
            "release": lambda: pool.release(connection),
            "connection.close": connection.close,
            "copy": lambda: connection.copy_from_query("select 1", output=lambda _: None),
        }
    return found


def refused(make):
    """Return how a use ended in an event loop of its own."""

    async def run():
        return await make()

    try:
        asyncio.run(run())
    except ConfigurationError:
        return "refused"
    except BaseException as error:  # noqa: BLE001 - the test shows any other error
        return f"{type(error).__name__}: {error}"
    return "done"


def report(pipe, ways):
    """Send the outcome of each use from a forked process."""
    pipe.send({name: refused(make) for name, make in ways.items()})
    pipe.close()


@pytest.mark.parametrize("size", [1, 3])
async def test_a_forked_process_is_refused(dsn, size):
    """A forked process sends nothing, and the parent's calls and connections continue."""
    pool, ids = await opened(dsn, max_size=size)
    connection = await pool.acquire() if size > 1 else None
    ways = uses(pool, ids, connection)
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=report, args=(there, ways))
    process.start()
    answers = await asyncio.to_thread(here.recv)
    await asyncio.to_thread(process.join)
    assert answers == dict.fromkeys(ways, "refused")
    for _ in range(5):
        assert await contents(pool, ids, "alice") == ["of alice"]
    if connection is not None:
        assert await connection.fetchval("select 1") == 1
        await pool.release(connection)
    await pool.close()


async def test_terminating_in_a_forked_process_is_refused(dsn):
    """`terminate` needs no loop, but in a forked process it does not drop the parent's connections."""
    pool, ids = await opened(dsn)

    def terminate(pipe):
        try:
            pool.terminate()
        except ConfigurationError:
            pipe.send("refused")

    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=terminate, args=(there,))
    process.start()
    assert await asyncio.to_thread(here.recv) == "refused"
    process.join()
    assert await contents(pool, ids, "alice") == ["of alice"]
    await pool.close()


async def test_another_threads_loop_is_refused(dsn):
    """Calls from another thread store nothing, and calls on the pool's own loop continue."""
    pool, ids = await opened(dsn, max_size=2)
    connection = await pool.acquire()
    answers = []

    def others():
        ways = uses(pool, ids, connection).items()
        answers.extend({name: refused(make) for name, make in ways} for _ in range(5))

    thread = threading.Thread(target=others)
    thread.start()
    calls = 0
    while thread.is_alive() or not calls:
        assert await contents(pool, ids, "alice") == ["of alice"]
        calls += 1
    assert answers == [dict.fromkeys(uses(pool, ids, connection), "refused")] * 5
    assert await contents(pool, ids, "bob") == ["of bob"]
    await pool.release(connection)
    await pool.close()


async def reap(child):
    """Wait for a forked process without a thread, and return whether it ended in time."""
    end = time.monotonic() + HANG / 3
    while os.waitpid(child, os.WNOHANG) == (0, 0):  # noqa: ASYNC222 - WNOHANG does not block
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        await asyncio.sleep(0.01)
    return time.monotonic() <= end


async def test_prepared_statements_and_cursors_are_refused(dsn):
    """Prepared statements and cursors send nothing from a forked process or another thread's loop."""
    pool, _ = await opened(dsn)
    async with pool.acquire() as connection, connection.transaction():
        statement = await connection.prepare("select $1::text")
        cursor = await connection.cursor("select generate_series(1, 9)")
        ways = {
            "statement": lambda: statement.fetchval("astray"),
            "many": lambda: statement.executemany([("astray",)]),
            "cursor": lambda: cursor.fetch(1),
            "new cursor": lambda: statement.cursor("astray"),
        }
        here, there = FORK.Pipe(duplex=False)
        process = FORK.Process(target=report, args=(there, ways))
        process.start()
        assert await asyncio.to_thread(here.recv) == dict.fromkeys(ways, "refused")
        process.join()
        assert [await asyncio.to_thread(refused, make) for make in ways.values()] == ["refused"] * len(ways)
        assert await statement.fetchval("mine") == "mine"
        assert [row[0] for row in await cursor.fetch(2)] == [1, 2]
    await pool.close()


@pytest.mark.parametrize(
    ("loop", "error"),  # on uvloop, an exception that ends the loop in a child aborts the parent
    [
        (asyncio.new_event_loop, SystemExit),
        (asyncio.new_event_loop, KeyboardInterrupt),
        (asyncio.new_event_loop, None),
        (uvloop.new_event_loop, None),
    ],
    ids=["asyncio-exit", "asyncio-interrupt", "asyncio-garbage", "uvloop-garbage"],
)
def test_a_forked_process_ends_anyhow(dsn, loop, error):
    """A child that exits with an exception or collects garbage reads no answer and cancels no statement."""
    parent = os.getpid()
    stop = asyncio.Event()

    async def ask(pool, number):
        asked = 0
        while not stop.is_set() and os.getpid() == parent:
            assert (await pool.fetch(f"select {number}, pg_sleep(0.002)"))[0][0] == number
            asked += 1
        return asked

    async def main():
        async with chatdb.create_pool(dsn, min_size=4, max_size=4, command_timeout=5) as pool:
            asking = [asyncio.create_task(ask(pool, number)) for number in range(4)]
            for _ in range(5):
                await asyncio.sleep(0.05)
                child = os.fork()
                if not child:
                    if error:
                        raise error
                    for task in asking:
                        task.get_coro().close()
                    os._exit(0)
                assert await reap(child)
            stop.set()
            async with asyncio.timeout(HANG):
                assert min(await asyncio.gather(*asking)) > 10

    try:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(main())
    finally:
        if os.getpid() != parent:
            os._exit(0)


def test_a_loop_that_has_ended(dsn):
    """A pool of a finished asyncio.run() reports each time that its event loop is closed."""
    pool, ids = asyncio.run(opened(dsn))

    async def run(make):
        return await make()

    for make in uses(pool, ids).values():
        with pytest.raises(ConfigurationError, match="is closed"):
            asyncio.run(run(make))
    del pool, make
    with pytest.warns(ResourceWarning):  # nothing can close the connections any more
        gc.collect()


def test_a_pool_made_outside_a_loop(dsn):
    """A pool that a module creates at import belongs to the loop that opens it."""
    pool = chatdb.create_pool(dsn)

    async def run():
        async with pool:
            return await chatdb.list_conversations(pool, user_id="alice")

    assert asyncio.run(run()) == []


@pytest.mark.owner
async def test_a_lent_connection_comes_back_clean(dsn):
    """A session's settings, locks and objects are gone for the next borrower."""
    pool, ids = await opened(dsn, max_size=1)
    leave = (
        "select set_config('app.tenant', 'A', false), set_config('statement_timeout', '1ms', false)",
        "select pg_advisory_lock(42)",
        "create temp table mine (a int)",
        "set role pg_monitor",
        "listen news",
        "declare mine cursor with hold for select 1",
    )
    seen = (
        "select current_setting('app.tenant', true), current_setting('statement_timeout'), current_user, "
        "(select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()), "
        "to_regclass('pg_temp.mine'), array(select pg_listening_channels()), pg_backend_pid(), "
        "(select count(*) from pg_cursors where name = 'mine')"
    )
    async with pool.acquire() as connection:
        before = await connection.fetchrow(seen)
    for statement in leave:
        async with pool.acquire() as connection:
            await connection.execute(statement)
        after = tuple((await pool.fetch(seen))[0])
        assert [value or None for value in after] == [value or None for value in before]
    for statement in leave:
        async with chatdb.transaction(pool) as connection:
            await connection.execute(statement)
        after = tuple((await pool.fetch(seen))[0])
        assert [value or None for value in after] == [value or None for value in before]
    async with pool.acquire() as connection:
        await connection.fetch("select nextval(pg_get_serial_sequence('chatdb.conversations', 'id'))")
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError):
        await pool.fetch("select lastval()")
    assert await contents(pool, ids, "alice") == ["of alice"]
    await pool.close()


async def test_the_process_is_told_apart_from_the_loop():
    """A process that keeps using its inherited loop is refused too."""
    with pytest.raises(ConfigurationError, match="another process"):
        check_process_and_loop(os.getpid() + 1, asyncio.get_running_loop(), "pool")
    check_process_and_loop(os.getpid(), asyncio.get_running_loop(), "pool")


async def test_a_busy_connection_is_not_handed_on(dsn):
    """A connection released while a statement runs on it is dropped."""
    pool, ids = await opened(dsn, max_size=1)
    connection = await pool.acquire()
    inner = connection._con
    running = asyncio.create_task(inner.fetch("select pg_sleep(0.3)"))
    await asyncio.sleep(0.05)
    with pytest.raises(asyncpg.InterfaceError, match="in progress"):
        await pool.release(connection)
    assert await contents(pool, ids, "alice") == ["of alice"]
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError)):
        await running
    await pool.close()


async def test_closing_is_bounded(dsn, caplog):
    """The pool drops a connection that is never released, logs that, and closes."""
    pool, _ = await opened(dsn, acquire_timeout=0.3)
    released = asyncio.Event()

    async def hold():
        async with pool.acquire():
            await released.wait()

    holding = asyncio.create_task(hold())
    await asyncio.sleep(0.05)
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, "chatdb"):
        async with asyncio.timeout(HANG):
            await pool.close()
    assert time.monotonic() - begun < HANG / 2
    assert "still in use" in caplog.text
    released.set()
    await holding
    with pytest.raises(chatdb.PoolClosedError) as raised:
        await chatdb.list_conversations(pool, user_id="alice")
    assert raised.value.sent is False


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1, 1e-6, 1e300, "10", True, None])
@pytest.mark.parametrize("name", ["acquire_timeout", "command_timeout", "max_inactive_connection_lifetime"])
def test_a_limit_that_is_none(name, wrong):
    """NaN, infinity, non-numbers, and a lifetime that would keep a CPU busy are refused by name."""
    if wrong == 1e-6 and name != "max_inactive_connection_lifetime":
        return
    with pytest.raises(ConfigurationError, match=name):
        chatdb.create_pool("postgresql://ada@127.0.0.1/none", **{name: wrong})


def test_another_class_of_connections():
    """A connection class that does not check its process and loop is refused."""
    with pytest.raises(ConfigurationError, match="connection_class"):
        chatdb.create_pool("postgresql://ada@127.0.0.1/none", connection_class=asyncpg.Connection)


@pytest.mark.owner
async def test_a_reset_gives_back_the_role_of_the_session(dsn):
    """A role set in `server_settings` survives a reset, so a connection gains no privileges."""
    name = f"chatdb_test_restricted_{time.time_ns()}"
    admin = await asyncpg.connect(**connect_arguments(dsn))
    user = await admin.fetchval("select session_user")
    await admin.execute(f"create role {name}")
    try:
        async with chatdb.create_pool(dsn, max_size=1, server_settings={"role": name}) as pool:
            for leave in ("reset role", "set role none", f"set role {user}", "set statement_timeout = '9s'"):
                async with pool.acquire() as connection:
                    assert await connection.fetchval("select current_user") == name
                    await connection.execute(leave)
            assert (await pool.fetch("select current_user"))[0][0] == name
    finally:
        await admin.execute(f"drop role {name}")
        await admin.close()


async def test_a_copy_leaves_no_session_state(dsn):
    """What a copied query sets for the session does not reach the next user of the connection."""
    query = "select pg_catalog.pg_advisory_lock(42), pg_catalog.set_config('search_path', 'other', false)"
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        before = await pool.fetchval("show search_path")
        async with pool.acquire() as connection:
            await connection.copy_from_query(query, output=io.BytesIO())
        async with pool.acquire() as connection:
            locks = "select pg_catalog.count(*) from pg_catalog.pg_locks where locktype = 'advisory' and objid = 42"
            assert (await connection.fetchval("show search_path"), await connection.fetchval(locks)) == (before, 0)


async def test_closed_while_it_opens(dsn):
    """A pool that is closed or terminated while it opens does not open, and has no connection."""

    async def end(pool: chatdb.Pool, name: str) -> None:
        await pool.close() if name == "close" else pool.terminate()

    for name in ("close", "terminate"):
        pool = chatdb.create_pool(dsn)
        opening = asyncio.ensure_future(pool._open())
        await asyncio.sleep(0)
        await end(pool, name)
        with pytest.raises(chatdb.PoolClosedError, match="closed while it opened"):
            await opening
        assert pool.get_size() == 0
        with pytest.raises(chatdb.PoolClosedError):
            await pool.fetch("select 1")
