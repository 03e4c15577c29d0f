"""chatdb's pool and transactions on a real server: order, time limits, cancellation, round trips, lost connections."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import random
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest

import chatdb
from chatdb import AcquireTimeoutError, ChatDBError, ConfigurationError, Conversation, UnavailableError
from chatdb._core.dsn import connect_arguments
from tests.support.pools import (
    CALLS,
    HANG,
    Session,
    answered,
    assert_whole,
    batch,
    kill_sessions,
    loop_errors,
    seen_by_the_server,
    until,
)
from tests.support.proxy import Proxy

USER = "ada"
# --- tools ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    """Yield a proxy to the test's database."""
    with Proxy(dsn) as found:
        yield found


@pytest.fixture
def watcher(dsn: str) -> Iterator[Session]:
    """Yield a session that sees the test database's committed data."""
    with psycopg.connect(dsn, autocommit=True) as session:
        yield session


async def outcome(call: Coroutine[Any, Any, Any], *expected: type[BaseException]) -> Any:
    """Return a call's result, or its error if that is expected."""
    try:
        return await call
    except expected as error:
        return error


async def append(db: Any, conversation: Conversation, content: str = "x", key: str | None = None) -> chatdb.Message:
    """Append a user's message."""
    return await chatdb.append_message(
        db, user_id=USER, conversation_id=conversation.id, role="user", content=content, key=key
    )


def contents(where: str | Session) -> list[str]:
    """Return the contents of all messages as another session sees them."""
    return [content for (content,) in answered(where, "select content from chatdb.messages order by seq")]


@pytest.fixture
async def conversation(db: chatdb.pool.Pool) -> Conversation:
    """Return an empty conversation."""
    return await chatdb.create_conversation(db, user_id=USER, key="key")


# --- creating a pool -----------------------------------------------------------------------------------------------


async def test_a_pool_is_awaited_or_entered(dsn):
    """Both await and `async with` return a connected asyncpg pool."""
    awaited = await chatdb.create_pool(dsn)
    async with chatdb.create_pool(dsn) as entered:
        for pool in (awaited, entered):
            assert isinstance(pool, asyncpg.Pool)
            assert pool.get_size() == 1
            assert await pool.fetchval("select 1") == 1
    await awaited.close()
    assert awaited.is_closing()
    assert entered.is_closing()


async def test_the_environment_names_the_database(dsn, monkeypatch):
    """The default DSN is DATABASE_URL; without either, ConfigurationError is raised immediately."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    async with chatdb.create_pool() as pool:
        assert await chatdb.list_conversations(pool, user_id=USER) == []
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        chatdb.create_pool()


async def test_a_server_that_is_not_there(unused_tcp_port):
    """If the server refuses connections, opening a pool raises UnavailableError with `sent` False."""
    with pytest.raises(UnavailableError) as caught:
        await chatdb.create_pool(f"postgresql://u@127.0.0.1:{unused_tcp_port}/d?sslmode=disable")
    assert caught.value.sent is False


async def test_a_server_that_does_not_answer(proxy):
    """If the server accepts the connection but does not answer, opening a pool ends after `acquire_timeout`."""
    proxy.pause()
    async with asyncio.timeout(HANG):
        with pytest.raises(AcquireTimeoutError) as caught:
            await chatdb.create_pool(proxy.dsn, acquire_timeout=0.1)
    assert caught.value.sent is False


# --- first come, first served ----------------------------------------------------------------------------------------


async def served(pool: asyncpg.Pool, tasks: int, rounds: int) -> list[int]:
    """Let tasks acquire connections repeatedly, and return their tickets in the order of service."""
    tickets = itertools.count()
    order: list[int] = []

    async def ask() -> None:
        for _ in range(rounds):
            ticket = next(tickets)
            async with pool.acquire() as connection:
                order.append(ticket)
                await connection.fetchval("select 1")

    async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(ask())
    return order


@pytest.mark.parametrize(("size", "tasks"), [(1, 50), (2, 50), (4, 200)])
async def test_connections_go_out_in_the_order_of_asking(dsn, size, tasks):
    """Connections are lent in the order of requests, both on a new pool and after releases."""
    async with chatdb.create_pool(dsn, min_size=size, max_size=size) as pool:
        order = await served(pool, tasks, rounds=5)
    assert order == list(range(tasks * 5))


@pytest.mark.parametrize(
    ("kind", "order"),
    [(chatdb.create_pool, ["waiter", "latecomer"]), (asyncpg.create_pool, ["latecomer", "waiter"])],
    ids=["chatdb", "asyncpg"],
)
async def test_a_latecomer_does_not_overtake(dsn, kind, order):
    """A request made during a release waits behind earlier ones; in asyncpg's own pool it overtakes them."""
    arguments = {"dsn": dsn} if kind is chatdb.create_pool else connect_arguments(dsn)
    served: list[str] = []
    async with kind(**arguments, min_size=1, max_size=1) as pool:

        async def use(name: str) -> None:
            async with pool.acquire():
                served.append(name)

        async def come_late() -> None:
            while not pool.get_idle_size():  # noqa: ASYNC110 - the test needs this exact moment
                await asyncio.sleep(0)
            await use("latecomer")

        async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
            held = await pool.acquire()
            group.create_task(use("waiter"))
            group.create_task(come_late())
            await asyncio.sleep(0.01)
            await pool.release(held)
    assert served == order


async def test_calls_wait_in_the_same_order(dsn, conversation):
    """Appends by many tasks on one connection are stored in the order of their calls."""
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        await asyncio.gather(*(append(pool, conversation, f"{number}") for number in range(50)))
    assert contents(dsn) == [f"{number}" for number in range(50)]


# --- time limits -----------------------------------------------------------------------------------------------------


async def test_waiting_for_a_connection_ends(dsn, conversation):
    """Callers of an exhausted pool get AcquireTimeoutError with `sent` False, and the pool stays usable."""
    async with chatdb.create_pool(dsn, max_size=2, acquire_timeout=0.1) as pool:
        async with pool.acquire(), pool.acquire():
            calls = (outcome(append(pool, conversation), AcquireTimeoutError) for _ in range(10))
            answers = await asyncio.gather(*calls)
            assert [getattr(answer, "sent", None) for answer in answers] == [False] * 10
            with pytest.raises(AcquireTimeoutError):
                await pool.acquire(timeout=0.01)
            with pytest.raises(AcquireTimeoutError):
                async with chatdb.transaction(pool):
                    pass
        await assert_whole(pool)
    assert contents(dsn) == []


async def test_limits_that_pass_as_connections_come_free_lose_none(dsn):
    """Whatever the timing of a timeout and a release, no connection is lost."""
    chance = random.Random(1)
    async with chatdb.create_pool(dsn, max_size=2) as pool:

        async def use(wait: float, hold: float) -> None:
            async with pool.acquire(timeout=wait):
                await asyncio.sleep(hold)

        uses = (use(chance.uniform(0, 0.2), chance.uniform(0, 0.005)) for _ in range(200))
        answers = await asyncio.gather(*(outcome(call, AcquireTimeoutError) for call in uses))
        await assert_whole(pool)
    assert {type(answer) for answer in answers} == {AcquireTimeoutError, type(None)}


async def test_connecting_ends(proxy):
    """If a connection cannot be opened in time, AcquireTimeoutError is raised and its slot is free again."""
    async with chatdb.create_pool(proxy.dsn, max_size=2, acquire_timeout=0.2) as pool:
        async with pool.acquire():
            proxy.pause()
            answers = await asyncio.gather(*(outcome(pool.fetchval("select 1"), AcquireTimeoutError) for _ in range(3)))
            assert [getattr(answer, "sent", None) for answer in answers] == [False] * 3
            proxy.resume()
        await assert_whole(pool)


async def test_a_statement_that_takes_too_long(dsn, conversation):
    """A slow statement raises CommandTimeoutError with `sent` True; its connection and the next call are unaffected."""
    async with chatdb.create_pool(dsn, max_size=1, command_timeout=0.2) as pool, chatdb.create_pool(dsn) as other:
        async with chatdb.transaction(other) as connection:
            await append(connection, conversation, "held")
            with pytest.raises(chatdb.CommandTimeoutError) as caught:
                await append(pool, conversation, "too late")
            assert caught.value.sent is True
        await append(pool, conversation, "next")
        await assert_whole(pool)
    assert contents(dsn) == ["held", "next"]


async def _in_savepoint(pool: chatdb.pool.Pool, conversation: Conversation) -> None:
    async with chatdb.transaction(pool) as outer, chatdb.transaction(outer) as inner:
        await append(inner, conversation)


@pytest.mark.parametrize("call", [append, _in_savepoint], ids=["call", "transaction"])
async def test_a_silent_server_does_not_draw_an_error_out(proxy, conversation, call):
    """The error is raised soon after the limit, even if the server does not confirm the cancellation."""
    clock = asyncio.get_running_loop().time
    async with chatdb.create_pool(proxy.dsn, max_size=1, acquire_timeout=HANG, command_timeout=1.5) as pool:
        proxy.pause()
        begun = clock()
        with pytest.raises(chatdb.CommandTimeoutError):
            await call(pool, conversation)
        assert clock() - begun < 1.5 + 1
        proxy.resume()
        await assert_whole(pool)


async def test_closing_a_pool_on_a_silent_server(proxy):
    """The pool drops connections that the server does not close in time."""
    async with asyncio.timeout(HANG), chatdb.create_pool(proxy.dsn, command_timeout=0.1) as pool:
        proxy.pause()
    assert pool.get_size() == 0


# --- cancellation ----------------------------------------------------------------------------------------------------


async def test_cancelled_waiters_leave_the_queue(dsn):
    """Cancelling any tasks in the queue loses no connection and blocks nobody."""
    chance = random.Random(1)
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        for _ in range(50):
            order: list[int] = []

            async def use(number: int, order: list[int]) -> None:
                async with pool.acquire():
                    order.append(number)
                    await asyncio.sleep(0)

            tasks = [asyncio.create_task(use(number, order)) for number in range(8)]
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            for number in chance.sample(range(8), 3):
                tasks[number].cancel()
            async with asyncio.timeout(HANG):
                answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert order == sorted(order)
            assert {number for number, answer in enumerate(answers) if answer is None} <= set(order)
        await assert_whole(pool)


async def test_a_cancelled_connect_gives_its_place_back(proxy):
    """Tasks cancelled while they open a connection leave all slots usable."""
    async with chatdb.create_pool(proxy.dsn, max_size=3) as pool:
        async with pool.acquire():
            proxy.pause()
            tasks = [asyncio.create_task(pool.fetchval("select 1")) for _ in range(3)]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            proxy.resume()
        assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 3
        await assert_whole(pool)


async def test_cancelled_calls_hurt_nobody_else(dsn, conversation):
    """After each of 500 rounds of calls cancelled anywhere, another task's call returns the right answer."""
    chance = random.Random(1)
    bystander = await _bystander(dsn)
    returned: list[str] = []

    async def in_transaction(pool: chatdb.pool.Pool, content: str) -> None:
        async with chatdb.transaction(pool) as connection:
            await append(connection, conversation, content)
            await append(connection, conversation, content)

    async with chatdb.create_pool(dsn, min_size=2, max_size=2) as pool:
        kinds: tuple[Callable[[str], Coroutine[Any, Any, Any]], ...] = (
            lambda content: append(pool, conversation, content),
            lambda content: append(pool, conversation, content, key=content),
            lambda _: chatdb.get_history(pool, user_id=USER, conversation_id=conversation.id),
            lambda content: in_transaction(pool, content),
        )
        with loop_errors() as errors:
            for number in range(500):
                victims = [asyncio.create_task(chance.choice(kinds)(f"{number}")) for _ in range(chance.randint(1, 4))]
                if number % 2:
                    for _ in range(chance.randrange(15)):
                        await asyncio.sleep(0)
                else:
                    await asyncio.sleep(chance.uniform(0, 0.002))
                for victim in victims:
                    victim.cancel()
                async with asyncio.timeout(HANG):
                    found = await chatdb.get_history(pool, user_id="bystander", conversation_id=bystander.id)
                    assert [message.content for message in found] == ["mine"]
                    answers = await asyncio.gather(*victims, return_exceptions=True)
                assert {type(answer) for answer in answers} <= {
                    asyncio.CancelledError,
                    chatdb.Message,
                    list,
                    type(None),
                }
                returned += [answer.content for answer in answers if isinstance(answer, chatdb.Message)]
        await assert_whole(pool)
        await until(lambda: len(seen_by_the_server(dsn)) <= 3)  # the pool's two, and one of the fixture
        assert not any(in_transaction for _, _, in_transaction in seen_by_the_server(dsn))
        messages = await chatdb.get_history(pool, user_id=USER, conversation_id=conversation.id, limit=10_000)
    assert [message.seq for message in messages] == list(range(1, len(messages) + 1))
    assert set(returned) <= {message.content for message in messages}
    assert errors == []


async def _bystander(dsn: str) -> Conversation:
    async with chatdb.create_pool(dsn) as pool:
        found = await chatdb.create_conversation(pool, user_id="bystander")
        await chatdb.append_message(pool, user_id="bystander", conversation_id=found.id, role="user", content="mine")
        return found


# --- round trips -----------------------------------------------------------------------------------------------------


def test_every_function_is_counted():
    """The table of calls lists every public function that works on a database."""
    functions = {name for name in chatdb.__all__ if "db" in _parameters(getattr(chatdb, name))} - {
        "transaction",
        "stream_message",
    }
    assert {name.partition(",")[0] for name in CALLS} == functions


def _parameters(member: object) -> list[str]:
    return list(inspect.signature(member).parameters) if inspect.isfunction(member) else []


async def _fill(db: Any, user: str) -> dict[str, Any]:
    """Create a conversation with the messages that the calls need."""
    conversation = await chatdb.create_conversation(db, user_id=user, key="key")
    here = {"user_id": user, "conversation_id": conversation.id}
    await chatdb.append_message(db, role="user", content="x", key="key", **here)
    await chatdb.append_messages(db, messages=batch(0, keyed=True), **here)
    await chatdb.start_message(db, key="stream", **here)
    return here


async def test_a_call_is_one_round_trip(proxy):
    """With its statement prepared, a call sends Bind, Execute and Sync, and waits once."""
    counted = {}
    async with chatdb.create_pool(proxy.dsn, max_size=1) as pool:
        for name, call in CALLS.items():
            for number in range(2):
                here = await _fill(pool, f"{name} {number}")
                proxy.clear()
                await call(pool, here, number)
                counted[name] = (list(proxy.sent), proxy.round_trips, proxy.ready)
    # a page of conversations and one of their messages
    pages = {"export_user": (["B", "E", "S"] * 2, 2, 2)}
    assert counted == dict.fromkeys(CALLS, (["B", "E", "S"], 1, 1)) | pages


async def test_a_later_page_of_the_list_is_one_round_trip(proxy, conversation):
    """A later page costs the same as the first."""
    async with chatdb.create_pool(proxy.dsn, max_size=1) as pool:
        for _ in range(2):
            proxy.clear()
            await chatdb.list_conversations(pool, user_id=USER, after=conversation)
        assert (proxy.sent, proxy.round_trips, proxy.ready) == (["B", "E", "S"], 1, 1)


async def test_asyncpgs_own_pool_takes_two(proxy, conversation):
    """The same count shows asyncpg's reset query, so the check can fail."""
    async with asyncpg.create_pool(**connect_arguments(proxy.dsn), min_size=1, max_size=1) as pool:
        for _ in range(2):
            proxy.clear()
            await chatdb.get_conversation(pool, user_id=USER, conversation_id=conversation.id)
        assert (proxy.sent, proxy.round_trips, proxy.ready) == (["B", "E", "S", "Q"], 2, 2)


async def test_a_transaction_adds_begin_and_commit(proxy, conversation):
    """A transaction of two appends takes four round trips."""
    async with chatdb.create_pool(proxy.dsn, max_size=1) as pool:
        for _ in range(2):
            proxy.clear()
            async with chatdb.transaction(pool) as connection:
                await append(connection, conversation)
                await append(connection, conversation)
        assert (proxy.sent, proxy.round_trips) == (["Q", "B", "E", "S", "B", "E", "S", "Q"], 4)


# --- release ---------------------------------------------------------------------------------------------------------


async def test_nothing_is_sent_when_a_connection_comes_back(dsn):
    """The last statement that the server saw on an idle connection is chatdb's own, not a reset."""
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        await chatdb.list_conversations(pool, user_id=USER)
        ((state, query, in_transaction),) = seen_by_the_server(dsn)
    assert (state, query.splitlines()[0], in_transaction) == ("idle", "--chatdb.list_conversations", False)


async def test_a_transaction_left_open_is_rolled_back(dsn, conversation):
    """A connection released inside a transaction is rolled back, and nothing is stored."""
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        with loop_errors() as errors:
            connection = await pool.acquire()
            await connection.execute("begin")
            await append(connection, conversation)
            await pool.release(connection)
        assert ["active transaction" in error["message"] for error in errors] == [True]
        assert not any(in_transaction for _, _, in_transaction in seen_by_the_server(dsn))
        await assert_whole(pool)
    assert contents(dsn) == []


# --- lost connections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_read_survives_lost_connections(dsn, conversation, noticed):
    """After the server ends all sessions, reads succeed, whether or not the pool has noticed."""
    async with chatdb.create_pool(dsn, max_size=4) as pool:
        await assert_whole(pool)
        assert kill_sessions(dsn) >= 4
        if noticed:
            await until(lambda: pool.get_size() == 0)
        answers = await asyncio.gather(
            *(chatdb.get_conversation(pool, user_id=USER, conversation_id=conversation.id) for _ in range(8))
        )
        assert answers == [conversation] * 8
        await assert_whole(pool)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in CALLS
        if name.startswith(("get_", "load_", "list_", "iter_", "check_", "upsert_", "read_", "extend_", "finish_"))
        or name.endswith((" key", " keys", "none", "nothing"))
    ],
)
async def test_every_read_and_keyed_write_survives_a_lost_connection(dsn, name):
    """Calls that have no further effect the second time are retried."""
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        here = await _fill(pool, USER)
        kill_sessions(dsn)
        await CALLS[name](pool, here, 1)


async def test_a_read_on_asyncpgs_own_pool_is_not_repeated(dsn, conversation):
    """On asyncpg's own pool, the same read raises UnavailableError: only chatdb's pool retries."""
    async with asyncpg.create_pool(**connect_arguments(dsn), min_size=1, max_size=1) as pool:
        kill_sessions(dsn)
        with pytest.raises(UnavailableError) as caught:
            await chatdb.get_conversation(pool, user_id=USER, conversation_id=conversation.id)
        assert caught.value.sent is None


async def test_a_keyed_append_survives_a_lost_connection(dsn, conversation):
    """A keyed append is retried like a read, and stored once."""
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        kill_sessions(dsn)
        message = await append(pool, conversation, key="key")
    assert (message.seq, contents(dsn)) == (1, ["x"])


@pytest.mark.parametrize("noticed", [True, False])
async def test_an_append_without_a_key_is_done_once_or_fails(dsn, conversation, noticed):
    """An append without a key is never retried, and its answer matches what is stored."""
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        kill_sessions(dsn)
        if noticed:
            await until(lambda: pool.get_size() == 0)
        answer = await outcome(append(pool, conversation), UnavailableError)
        if noticed:
            assert isinstance(answer, chatdb.Message)
        assert contents(dsn) == (["x"] if isinstance(answer, chatdb.Message) else [])
        await append(pool, conversation, "next")
        await assert_whole(pool)


async def test_a_running_append_that_is_killed_is_not_repeated(dsn, conversation):
    """An append without a key whose session is killed raises UnavailableError with `sent` None and is not retried."""
    async with chatdb.create_pool(dsn, max_size=1) as pool, chatdb.create_pool(dsn, max_size=1) as other:
        async with chatdb.transaction(other) as connection:
            await append(connection, conversation, "first")
            call = asyncio.create_task(append(pool, conversation, "killed"))
            await until(lambda: _waiting(dsn) == 1)
            assert _kill_waiting(dsn) == 1
            async with asyncio.timeout(HANG):
                with pytest.raises(UnavailableError) as caught:
                    await call
            assert caught.value.sent is None
        await append(pool, conversation, "next")
        await assert_whole(pool)
    assert contents(dsn) == ["first", "next"]


async def test_a_running_read_that_is_killed_is_repeated(dsn, conversation):
    """A read whose session is killed while it waits for a lock continues in another session."""
    async with chatdb.create_pool(dsn, max_size=1) as pool, chatdb.create_pool(dsn, max_size=1) as other:
        async with chatdb.transaction(other) as connection:
            await connection.execute("lock table chatdb.conversations in access exclusive mode")
            call = asyncio.create_task(chatdb.get_conversation(pool, user_id=USER, conversation_id=conversation.id))
            await until(lambda: _waiting(dsn) == 1)
            assert _kill_waiting(dsn) == 1
            await until(lambda: _waiting(dsn) == 1)
        async with asyncio.timeout(HANG):
            assert await call == conversation


def _waiting(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(f"select count(*) {_WAITING}").fetchone()[0]


def _kill_waiting(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(f"select count(pg_terminate_backend(pid, 10000)) {_WAITING}").fetchone()[0]


_WAITING = "from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"


@pytest.mark.chaos
async def test_a_pool_under_load_survives_lost_connections(dsn, conversation):
    """While sessions are killed repeatedly, confirmed messages are stored, and the pool stays usable."""
    stop = asyncio.Event()
    answered: list[str] = []

    async def write(pool: chatdb.pool.Pool, writer: int) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            content = f"{writer} {number}"
            answer = await outcome(
                append(pool, conversation, content, key=content if writer % 2 else None), UnavailableError
            )
            if isinstance(answer, chatdb.Message):
                answered.append(content)

    async with chatdb.create_pool(dsn, max_size=4) as pool:
        async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
            for writer in range(8):
                group.create_task(write(pool, writer))
            for _ in range(6):
                await asyncio.sleep(0.05)
                await asyncio.to_thread(kill_sessions, dsn)
            stop.set()
        await assert_whole(pool)
    stored = contents(dsn)
    assert len(answered) > 10
    assert len(set(stored)) == len(stored)
    assert set(answered) <= set(stored)


async def test_a_floor_of_connections_comes_back(dsn):
    """A pool with a min_size reconnects by itself after it loses all connections."""
    async with chatdb.create_pool(dsn, min_size=2, max_size=3) as pool:
        assert kill_sessions(dsn) == 2
        await until(lambda: len(seen_by_the_server(dsn)) == 2)
        await assert_whole(pool)


# --- retries ---------------------------------------------------------------------------------------------------------


def repetitions(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages that the chatdb logger received at level WARNING."""
    return [
        record.getMessage() for record in caplog.records if (record.name, record.levelname) == ("chatdb", "WARNING")
    ]


async def test_a_repetition_is_logged_without_anything_of_the_caller(dsn, conversation, caplog):
    """Each retry logs the statement's name and the error classes, but no text, key or DSN."""
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        await append(pool, conversation, "nothing is logged", key="calm")
        kill_sessions(dsn)
        await append(pool, conversation, "SECRET", key="SECRET KEY")
    (line,) = repetitions(caplog)
    assert re.fullmatch(r"retrying append_message_conditional in \d+ ms: UnavailableError \(\w+\)", line)


async def test_repetitions_are_switched_off(dsn, conversation, caplog):
    """With retries=0, the lost connection is raised as UnavailableError."""
    async with chatdb.create_pool(dsn, max_size=1, retries=0) as pool:
        kill_sessions(dsn)
        with pytest.raises(UnavailableError) as caught:
            await chatdb.get_conversation(pool, user_id=USER, conversation_id=conversation.id)
    assert caught.value.sent is None
    assert repetitions(caplog) == []


def test_a_negative_number_of_repetitions(dsn):
    """A negative number of retries raises ConfigurationError."""
    with pytest.raises(ConfigurationError, match="retries"):
        chatdb.create_pool(dsn, retries=-1)


@pytest.mark.parametrize(("retries", "least", "most"), [(0, 0, 0), (1, 1, 1), (2, 2, 2), (1000, 10, 101)])
async def test_repetitions_end(proxy, conversation, caplog, retries, least, most):
    """The pool retries at most `retries` times, with waits between, and stops a second after the loss."""
    clock = asyncio.get_running_loop().time
    async with chatdb.create_pool(proxy.dsn, max_size=1, retries=retries) as pool:
        proxy.close()
        await until(lambda: pool.get_size() == 0)
        begun = clock()
        with pytest.raises(UnavailableError) as caught:
            await chatdb.get_conversation(pool, user_id=USER, conversation_id=conversation.id)
        assert min(retries, 100) * 0.01 <= clock() - begun < 2
    assert caught.value.sent is False  # only connection attempts failed, so nothing was sent
    assert least <= len(repetitions(caplog)) <= most


async def test_what_is_known_of_all_attempts_is_told(proxy, dsn, conversation, caplog):
    """After an attempt that may have been executed, a refused retry does not set `sent` to False."""
    async with chatdb.create_pool(proxy.dsn, max_size=1) as pool, chatdb.create_pool(dsn, max_size=1) as other:
        async with chatdb.transaction(other) as connection:
            await append(connection, conversation, "first")
            call = asyncio.create_task(append(pool, conversation, "carried out", key="key"))
            await until(lambda: _waiting(dsn) == 1)
            proxy.close()
        with pytest.raises(UnavailableError) as caught:
            await call
        assert caught.value.sent is None
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert len(repetitions(caplog)) == 2
    await until(lambda: contents(dsn) == ["first", "carried out"])


@pytest.mark.parametrize("keys", [("a", "b"), ("a", None)])
async def test_a_batch_is_repeated_if_all_have_keys(dsn, conversation, keys):
    """A batch is retried only if every message has a key."""
    batch = [{"role": "user", "content": "x", "key": key} for key in keys]
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        kill_sessions(dsn)
        call = chatdb.append_messages(pool, user_id=USER, conversation_id=conversation.id, messages=batch)
        answer = await outcome(call, UnavailableError)
    assert len(contents(dsn)) == (2 if all(keys) else 0)
    assert isinstance(answer, list if all(keys) else UnavailableError)


async def test_no_change_or_deletion_is_repeated(dsn, conversation, caplog):
    """Updates, deletes, appends without a key and creations that expect no conversation are not retried."""
    at = {"user_id": USER, "conversation_id": conversation.id}
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        for call in (
            lambda: append(pool, conversation),
            lambda: chatdb.create_conversation(pool, user_id=USER, key="new", expected=chatdb.NEW),
            lambda: chatdb.update_conversation(pool, title="x", **at),
            lambda: chatdb.delete_message(pool, seq=1, **at),
            lambda: chatdb.delete_conversation(pool, **at),
            lambda: chatdb.delete_user(pool, user_id=USER),
        ):
            await pool.fetchval("select 1")
            kill_sessions(dsn)
            with pytest.raises(UnavailableError):
                await call()
    assert repetitions(caplog) == []


# --- transactions ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pool", "connection of a pool", "connection", "asyncpg pool"])
async def handle(
    request: pytest.FixtureRequest,
    dsn: str,
    arguments_of: Callable[[str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Any]:
    """Yield each kind of handle."""
    # on a busy machine, cancelling a statement may exceed the default, and the connection would be dropped
    monkeypatch.setattr(chatdb._core.asyncpg_private, "CANCEL_TIMEOUT", HANG)
    arguments = arguments_of(dsn)
    driver = arguments | connect_arguments(arguments["dsn"]) | {"dsn": None}
    async with contextlib.AsyncExitStack() as stack:
        match request.param:
            case "pool":
                yield await stack.enter_async_context(chatdb.create_pool(**arguments, max_size=1))
            case "connection of a pool":
                pool = await stack.enter_async_context(chatdb.create_pool(**arguments, max_size=1))
                yield await stack.enter_async_context(pool.acquire())
            case "connection":
                connection = await asyncpg.connect(**driver)
                stack.push_async_callback(connection.close)
                yield connection
            case "asyncpg pool":
                yield await stack.enter_async_context(asyncpg.create_pool(**driver, min_size=1, max_size=1))


async def assert_clean(handle: Any, conversation: Conversation, watcher: Session) -> None:
    """Check that the handle's connection is outside a transaction, and that its next one commits."""
    assert await handle.fetchval("select 1") == 1  # waits for the end of a cancelled statement
    assert not any(in_transaction for _, _, in_transaction in seen_by_the_server(watcher))
    before = contents(watcher)
    if isinstance(handle, asyncpg.Pool):
        await assert_whole(handle)
    else:
        assert not handle.is_in_transaction()
        async with handle.transaction():
            await append(handle, conversation, "asyncpg's")
        before.append("asyncpg's")
    async with chatdb.transaction(handle) as connection:
        await append(connection, conversation, "chatdb's")
    assert contents(watcher) == [*before, "chatdb's"]


async def test_a_block_that_ends_commits(handle, conversation, watcher):
    """Other sessions see what the block wrote only after it ends."""
    async with chatdb.transaction(handle) as connection:
        await append(connection, conversation, "a")
        await append(connection, conversation, "b")
        assert contents(watcher) == []
    assert contents(watcher) == ["a", "b"]
    await assert_clean(handle, conversation, watcher)


@pytest.mark.parametrize("error", [ZeroDivisionError("of the block"), KeyboardInterrupt()], ids=repr)
async def test_an_exception_rolls_back(handle, conversation, watcher, error):
    """An exception propagates unchanged, and nothing of the block is stored."""

    async def run() -> None:
        async with chatdb.transaction(handle) as connection:
            await append(connection, conversation)
            raise error

    with pytest.raises(type(error)) as caught:
        await run()
    assert caught.value is error
    assert contents(watcher) == []
    await assert_clean(handle, conversation, watcher)


async def test_an_error_of_the_server_rolls_back(handle, conversation, watcher):
    """A server error propagates unchanged, and the connection stays usable."""

    async def run() -> None:
        async with chatdb.transaction(handle) as connection:
            await append(connection, conversation)
            await connection.execute("select 1 / 0")

    with pytest.raises(asyncpg.DivisionByZeroError):
        await run()
    assert contents(watcher) == []
    await assert_clean(handle, conversation, watcher)


async def test_a_swallowed_error_is_told(handle, conversation, watcher):
    """If the block swallows a server error, ChatDBError says that it was rolled back."""

    async def run() -> None:
        async with chatdb.transaction(handle) as connection:
            await append(connection, conversation)
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                await connection.execute("select 1 / 0")

    with pytest.raises(ChatDBError, match="rolled back") as caught:
        await run()
    assert type(caught.value) is ChatDBError
    assert contents(watcher) == []
    await assert_clean(handle, conversation, watcher)


async def test_asyncpgs_own_transaction_says_nothing(conversation, dsn):
    """In asyncpg's own transaction, the same block loses its writes without an error."""
    connection = await asyncpg.connect(**connect_arguments(dsn))
    async with connection.transaction():
        await append(connection, conversation)
        with contextlib.suppress(asyncpg.DivisionByZeroError):
            await connection.execute("select 1 / 0")
    await connection.close()
    assert contents(dsn) == []


@pytest.mark.owner
async def test_an_error_at_the_commit_is_told(handle, conversation, dsn, watcher):
    """A deferred constraint that fails at COMMIT raises ChatDBError, and nothing is stored."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("create table late (a int unique deferrable initially deferred)")

    async def run() -> None:
        async with chatdb.transaction(handle) as connection:
            await append(connection, conversation)
            await connection.execute("insert into late values (1), (1)")

    with pytest.raises(ChatDBError):
        await run()
    assert contents(watcher) == []
    await assert_clean(handle, conversation, watcher)


async def test_a_transaction_in_a_transaction_is_a_savepoint(handle, conversation, watcher):
    """A failed inner block loses only its own writes; a successful one commits with the outer block."""

    async def run_inside(outer: Any) -> None:
        async with chatdb.transaction(outer) as inner:
            await append(inner, conversation, "lost")
            await inner.execute("select 1 / 0")

    async with chatdb.transaction(handle) as outer:
        await append(outer, conversation, "a")
        with pytest.raises(asyncpg.DivisionByZeroError):
            await run_inside(outer)
        async with chatdb.transaction(outer) as inner:
            await append(inner, conversation, "b")
        assert contents(watcher) == []
    assert contents(watcher) == ["a", "b"]
    await assert_clean(handle, conversation, watcher)


async def test_an_error_swallowed_in_a_savepoint_does_not_stay_hidden(handle, conversation, watcher):
    """The end of the inner block raises the server's error, and nothing of the outer block is stored."""

    async def run() -> None:
        async with chatdb.transaction(handle) as outer:
            await append(outer, conversation)
            async with chatdb.transaction(outer) as inner:
                with contextlib.suppress(asyncpg.DivisionByZeroError):
                    await inner.execute("select 1 / 0")

    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await run()
    assert contents(watcher) == []
    await assert_clean(handle, conversation, watcher)


async def test_asyncpgs_transaction_inside_and_outside(handle, conversation, watcher):
    """Transactions of asyncpg and chatdb can be nested in each other."""
    async with chatdb.transaction(handle) as connection:
        async with connection.transaction():
            await append(connection, conversation, "a")
            async with chatdb.transaction(connection):
                await append(connection, conversation, "b")
        with contextlib.suppress(ZeroDivisionError):
            async with connection.transaction():
                await append(connection, conversation, "lost")
                raise ZeroDivisionError
    assert contents(watcher) == ["a", "b"]
    await assert_clean(handle, conversation, watcher)


async def test_a_block_cancelled_inside_rolls_back(handle, conversation, watcher):
    """A task cancelled in the block raises CancelledError, and nothing of the block is stored."""
    inside = asyncio.Event()

    async def run() -> None:
        async with chatdb.transaction(handle) as connection:
            await append(connection, conversation)
            inside.set()
            await asyncio.sleep(HANG)

    task = asyncio.create_task(run())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert contents(watcher) == []
    await assert_clean(handle, conversation, watcher)


async def test_a_block_cancelled_anywhere_is_all_or_nothing(handle, conversation, watcher):
    """Wherever a transaction is cancelled, including BEGIN and COMMIT, both messages are stored or neither is."""

    async def run(content: str) -> None:
        async with chatdb.transaction(handle) as connection:
            await append(connection, conversation, content)
            await append(connection, conversation, content)

    chance = random.Random(1)
    for number in range(40):
        task = asyncio.create_task(run(f"{number}"))
        if number % 2:
            for _ in range(number // 2):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(chance.uniform(0, 0.003))
        task.cancel()
        async with asyncio.timeout(HANG):
            await asyncio.gather(task, return_exceptions=True)
            await assert_clean(handle, conversation, watcher)
        assert contents(watcher).count(f"{number}") in {0, 2}


@pytest.mark.parametrize("statement", ["begin", "commit"])
async def test_a_cancelled_begin_or_commit_leaves_the_handle_clean(handle, conversation, watcher, statement):
    """The next transaction on the handle is a new one, not a savepoint."""

    async def run() -> None:
        async with chatdb.transaction(handle) as connection:
            if statement == "commit":
                await append(connection, conversation)
                asyncio.get_running_loop().call_soon(task.cancel)

    with loop_errors() as errors:
        task = asyncio.create_task(run())
        if statement == "begin":
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        await assert_clean(handle, conversation, watcher)
    assert errors == []
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("kind", [chatdb.create_pool, asyncpg.create_pool], ids=["chatdb", "asyncpg"])
async def test_a_transaction_on_a_lost_connection(dsn, conversation, kind):
    """A BEGIN on an ended session raises UnavailableError, as any call does."""

    async def run(pool: asyncpg.Pool) -> None:
        async with chatdb.transaction(pool) as connection:
            await append(connection, conversation)

    arguments = {"dsn": dsn} if kind is chatdb.create_pool else connect_arguments(dsn)
    async with kind(**arguments, min_size=1, max_size=1) as pool:
        kill_sessions(dsn)
        with pytest.raises(UnavailableError) as caught:
            await run(pool)
        assert caught.value.__cause__ is not caught.value
        await run(pool)
    assert contents(dsn) == ["x"]


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_connection_lost_inside_a_transaction(handle, dsn, conversation, noticed):
    """The next call raises UnavailableError, which propagates unchanged, and nothing is stored."""

    async def run() -> None:
        async with chatdb.transaction(handle) as connection:
            await append(connection, conversation)
            kill_sessions(dsn)
            if noticed:
                await asyncio.sleep(0.1)
            await append(connection, conversation, key="never repeated on a connection")

    with pytest.raises(UnavailableError):
        await run()
    assert contents(dsn) == []
    if isinstance(handle, asyncpg.Pool):
        await assert_whole(handle)


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_connection_lost_inside_a_savepoint(handle, dsn, conversation, noticed):
    """An inner block also propagates the error."""

    async def run() -> None:
        async with chatdb.transaction(handle) as outer, chatdb.transaction(outer) as connection:
            await append(connection, conversation)
            kill_sessions(dsn)
            if noticed:
                await asyncio.sleep(0.1)
            await append(connection, conversation)

    with pytest.raises(UnavailableError):
        await run()
    assert contents(dsn) == []
    if isinstance(handle, asyncpg.Pool):
        await assert_whole(handle)


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_connection_lost_before_the_commit(handle, dsn, conversation, noticed):
    """COMMIT raises UnavailableError, and nothing is stored."""

    async def run() -> None:
        async with chatdb.transaction(handle) as connection:
            await append(connection, conversation)
            kill_sessions(dsn)
            if noticed:
                await asyncio.sleep(0.1)

    with pytest.raises(UnavailableError) as caught:
        await run()
    assert caught.value.sent is not True
    assert contents(dsn) == []
    if isinstance(handle, asyncpg.Pool):
        await assert_whole(handle)


# --- closing a pool --------------------------------------------------------------------------------------------------


async def test_closing_waits_for_those_who_work(dsn, conversation):
    """close() waits for the lent connection; then the server has no session of the pool."""
    pool = await chatdb.create_pool(dsn, max_size=2)
    sessions = len(seen_by_the_server(dsn))
    async with pool.acquire() as connection:
        closing = asyncio.create_task(pool.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        await append(connection, conversation)
        with pytest.raises(chatdb.PoolClosedError):
            await append(pool, conversation)
    async with asyncio.timeout(HANG):
        await closing
    await until(lambda: len(seen_by_the_server(dsn)) == sessions - 1)
    with pytest.raises(chatdb.PoolClosedError):
        await append(pool, conversation)
    assert contents(dsn) == ["x"]


@pytest.mark.parametrize("end", ["close", "terminate"])
async def test_nobody_waits_for_ever_on_a_pool_that_ends(dsn, end):
    """When a pool is closed or terminated, queued tasks are served or get an error."""
    pool = await chatdb.create_pool(dsn, max_size=1)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(pool.acquire())
        waiting = [asyncio.create_task(chatdb.list_conversations(pool, user_id=USER)) for _ in range(5)]
        await asyncio.sleep(0)
        if end == "terminate":
            pool.terminate()
        else:
            closing = asyncio.create_task(pool.close())
            await asyncio.sleep(0)
    async with asyncio.timeout(HANG):
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        if end == "close":
            await closing
    assert all(answer == [] or isinstance(answer, UnavailableError) for answer in answers)
    assert pool.get_size() == 0
    await until(lambda: seen_by_the_server(dsn) == [])


async def test_terminating_ends_running_calls(dsn, conversation):
    """A call that is running when its pool is terminated raises UnavailableError."""
    pool = await chatdb.create_pool(dsn, max_size=1)
    async with chatdb.create_pool(dsn) as other, chatdb.transaction(other) as connection:
        await append(connection, conversation, "first")
        call = asyncio.create_task(append(pool, conversation))
        await until(lambda: _waiting(dsn) == 1)
        pool.terminate()
        async with asyncio.timeout(HANG):
            with pytest.raises(UnavailableError) as caught:
                await call
    assert caught.value.sent is None


async def test_a_release_that_fails_hides_nothing(dsn, proxy, conversation, caplog):
    """An error of the reset after a block, or of a cancellation that waits for the server, is not the caller's."""
    async with chatdb.create_pool(dsn, max_size=1) as pool:
        async with pool.acquire() as connection:
            await connection.execute("set statement_timeout = '9s'")
            kill_sessions(dsn)
        assert "a connection was terminated because it could not be reset" in caplog.text
        await assert_whole(pool)
    async with chatdb.create_pool(proxy.dsn, max_size=1, acquire_timeout=0.5) as pool:
        await append(pool, conversation, "one")
        proxy.pause()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await append(pool, conversation, "two")
        task = asyncio.create_task(chatdb.get_history(pool, user_id=USER, conversation_id=conversation.id))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        proxy.resume()
