"""What a pool tells the listeners of its calls."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from typing import Any

import asyncpg
import pytest

import chatdb
from chatdb import Call, branches, conversations, messages, schema, search, streaming, users, watching
from chatdb._core.query import Query, RunAgainError, statement_files
from chatdb.transfer.exporter import export_conversations
from tests.support.calls import CALLS, SIGNATURES, call, conversation_with_a_message
from tests.support.pools import kill_sessions
from tests.support.proxy import Proxy

ALICE: dict[str, Any] = {"user_id": "alice", "conversation_key": "thread"}
HELLO: dict[str, Any] = {"role": "user", "content": "hello"}


class Heard(list[Call]):
    """The calls that a listener heard of."""

    def taken(self) -> list[Call]:
        """Return the calls, and forget them."""
        calls = self[:]
        self.clear()
        return calls


def listening(pool: chatdb.Pool) -> Heard:
    """Add a listener to a pool."""
    heard = Heard()
    pool.add_call_listener(heard.append)
    return heard


@pytest.mark.parametrize("lent", ["pool", "acquire", "transaction", "row_level_security"])
async def test_each_call_is_told(dsn: str, lent: str) -> None:
    """A listener hears of each call once, on the pool, on a connection that it lent, and with row-level security."""
    async with chatdb.create_pool(dsn, row_level_security=lent == "row_level_security") as db:
        heard = listening(db)
        for name, arguments in CALLS:
            await chatdb.delete_user(db, user_id="alice")
            conversation = await conversation_with_a_message(db)
            heard.clear()
            if lent in {"pool", "row_level_security"}:
                await call(db, name, arguments, conversation)
            else:
                async with db.acquire() if lent == "acquire" else chatdb.transaction(db) as connection:
                    await call(connection, name, arguments, conversation)
            told = heard.taken()
            called = "list_messages" if name == "iter_messages" else name
            if name.startswith("update") and arguments.keys() <= {"seq"}:
                called = name.replace("update", "get")
            elif arguments.get("messages") == [] and "create" not in arguments:
                called = "get_conversation"
            assert [each.operation for each in told] == [called] * (2 if name == "export_user" else 1)
            for each in told:
                assert each.statement.startswith(called)
                assert (each.error, each.sqlstate, each.retries) == (None, None, 0)
                assert each.wait == 0 < each.duration < 10  # a connection was idle
                assert not {"alice", "thread", "hello", "first"} & set(map(str, dataclasses.astuple(each)))


def test_the_operation_is_a_function() -> None:
    """The statements of the public functions belong to a public function, but for the poll of a watcher."""
    modules = (branches, conversations, messages, schema, search, streaming, users, watching)
    queries = {each.name: each for module in modules for each in vars(module).values() if isinstance(each, Query)}
    own = {path.stem for path in statement_files() if path.parent.name == "sql"}
    assert queries.keys() == own
    assert {each.operation for each in queries.values()} - set(chatdb.__all__) == {"poll_conversations"}
    assert set(SIGNATURES) - {each.operation for each in queries.values()} == {"iter_messages", "stream_message"}


async def test_the_fields(db: chatdb.Pool) -> None:
    """The rows are those with data; a missing conversation or message is no error, a refusal is one."""
    heard = listening(db)
    conversation = await conversation_with_a_message(db)
    heard.clear()

    await chatdb.get_history(db, **ALICE)
    await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id, before_seq=1)
    for missing in ({"user_id": "bob", "conversation_id": conversation.id}, ALICE):
        with pytest.raises(chatdb.NotFoundError):
            await chatdb.update_message(db, seq=9, content="x", **missing)
        with pytest.raises(chatdb.NotFoundError):
            await chatdb.get_message(db, seq=9, **missing)
    with pytest.raises(chatdb.ConflictError):
        await chatdb.append_message(db, **ALICE, role="user", content="other", key="first")
    with pytest.raises(chatdb.InvalidInputError):  # before anything is sent
        await chatdb.get_message(db, **ALICE)

    told = [(each.statement, each.rows, each.error) for each in heard]
    assert told == [
        ("get_history_by_key", 2, None),
        ("get_history", 0, None),
        *[("update_message", 0, None), ("get_message", 0, None)] * 2,
        ("append_message_conditional", 0, "ConflictError"),
    ]


async def test_an_error_has_the_servers_code(db: chatdb.Pool) -> None:
    """An error of the server has its SQLSTATE, of chatdb the name of the public class."""
    heard = listening(db)
    async with chatdb.transaction(db) as connection:
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute("select 1/0")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await chatdb.list_pinned(connection, user_id="alice")
        await connection.execute("rollback")
        await connection.execute("begin")
        await connection.execute("set local statement_timeout = 1")
        async with chatdb.transaction(db) as other:
            await chatdb.create_conversation(other, user_id="alice", key="thread")
            with pytest.raises(chatdb.CommandTimeoutError):
                await chatdb.create_conversation(connection, user_id="alice", key="thread")
        await connection.execute("rollback")
        await connection.execute("begin")
    told = [(each.operation, each.error, each.sqlstate) for each in heard]
    assert told == [
        ("list_pinned", "InFailedSQLTransactionError", "25P02"),
        ("create_conversation", None, None),
        ("create_conversation", "CommandTimeoutError", "57014"),
    ]


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (RunAgainError("try again", sent=True), "UnavailableError"),  # a class of chatdb's own
        (chatdb.StaleError(), "StaleError"),
        (asyncio.CancelledError(), "CancelledError"),
        (chatdb.MessageNotFoundError(), None),
    ],
)
async def test_the_name_of_an_error(db: chatdb.Pool, error: BaseException, name: str | None) -> None:
    """An error is told by the class that a caller can name; what is not found is none."""
    heard = listening(db)

    async def fail() -> None:
        raise error

    assert db.call_listeners is not None
    with pytest.raises(type(error)):
        await db.call_listeners.tell("get_message", "get_message", fail())
    assert [call.error for call in heard] == [name]


async def test_a_repetition_is_one_call(dsn: str) -> None:
    """A statement that is sent again after a lost connection is one call with its number of retries."""
    async with chatdb.create_pool(dsn, max_size=1) as db:
        heard = listening(db)
        await chatdb.create_conversation(db, user_id="alice")
        kill_sessions(dsn)
        assert len(await chatdb.list_conversations(db, user_id="alice")) == 1
        first, again = heard
        assert (again.operation, again.rows, again.retries, again.error) == ("list_conversations", 1, 1, None)
        assert again.wait > 0  # until a new connection was open
        assert first.retries == 0


async def test_a_statement_that_runs_again_is_one_call(db: chatdb.Pool) -> None:
    """A write that found that another one committed first is one call, which ran twice."""
    await conversation_with_a_message(db)
    heard = listening(db)
    async with chatdb.transaction(db) as connection:
        await chatdb.append_message(connection, **ALICE, **HELLO)
        deleting = asyncio.create_task(chatdb.delete_message(db, **ALICE, seq=1))
        while not await connection.fetchval("select exists (select from pg_locks where not granted)"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await deleting).messages == 1
    appended, deleted = heard
    assert (appended.operation, appended.retries) == ("append_message", 0)
    assert (deleted.operation, deleted.retries, deleted.rows, deleted.error) == ("delete_message", 1, 1, None)


async def test_the_wait_for_the_pool(dsn: str) -> None:
    """A call tells how long it waited for a connection, also if none became free; the pool counts who waits."""
    async with chatdb.create_pool(dsn, max_size=1, acquire_timeout=0.2) as db:
        heard = listening(db)
        assert db.get_waiting_count() == 0
        async with db.acquire():
            waiting = asyncio.create_task(chatdb.list_pinned(db, user_id="alice"))
            await asyncio.sleep(0.1)
            assert db.get_waiting_count() == 1
        await waiting
        async with db.acquire():
            with pytest.raises(chatdb.AcquireTimeoutError):
                await chatdb.list_pinned(db, user_id="alice")
        await chatdb.list_pinned(db, user_id="alice")
        assert db.get_waiting_count() == 0
        waited, timed_out, idle = heard
        assert 0.05 < waited.wait < waited.duration
        assert (timed_out.error, timed_out.sqlstate) == ("AcquireTimeoutError", None)
        assert 0.15 < timed_out.wait <= timed_out.duration
        assert idle.wait == 0


async def test_a_cancelled_call(dsn: str) -> None:
    """A call that its caller cancels is told as such."""
    proxy = Proxy(dsn)
    try:
        async with chatdb.create_pool(proxy.dsn) as db:
            heard = listening(db)
            await chatdb.list_pinned(db, user_id="alice")
            proxy.passing.clear()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await chatdb.list_pinned(db, user_id="alice")
            proxy.passing.set()
            assert [each.error for each in heard] == [None, "CancelledError"]
    finally:
        proxy.close()


async def test_what_calls_others(db: chatdb.Pool) -> None:
    """A stream, the pages of an iterator, an export and a watcher are told as the calls that they make."""
    heard = listening(db)
    conversation = await chatdb.create_conversation(db, user_id="alice", key="thread")
    at: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
    async with chatdb.stream_message(db, **at) as stream:
        await stream.write("hello")
    assert [each.operation for each in heard.taken()] == [
        "create_conversation",
        "start_message",
        "extend_message",
        "finish_message",
    ]
    await chatdb.append_message(db, **at, **HELLO)
    assert len([message async for message in chatdb.iter_messages(db, **at, batch=1)]) == 2
    assert [each.operation for each in heard.taken()] == ["append_message", *["list_messages"] * 3]
    async with chatdb.Watcher(db, poll=0.05) as watcher, asyncio.timeout(10):
        async for message in watcher.watch(**at):
            if message.seq == 2:
                await asyncio.sleep(0.2)
                break
    assert {each.operation for each in heard.taken()} == {"list_messages", "poll_conversations"}
    async for _ in export_conversations(db, user_id="alice"):
        pass
    assert {"export_user"} <= {each.operation for each in heard.taken()}


async def test_tasks_that_outlive_a_call(dsn: str) -> None:
    """A task that a hook of the pool starts during a call is no part of it: its own calls are told."""
    tasks: list[asyncio.Task[object]] = []

    async def later(db: chatdb.Pool) -> None:
        await asyncio.sleep(0.1)
        await chatdb.list_pinned(db, user_id="alice")

    async def setup(connection: chatdb.Connection) -> None:
        if not tasks:
            tasks.append(asyncio.create_task(later(db)))

    async with chatdb.create_pool(dsn, setup=setup) as db:
        heard = listening(db)
        await chatdb.list_conversations(db, user_id="alice")
        await asyncio.gather(*tasks)
        assert [each.operation for each in heard] == ["list_conversations", "list_pinned"]


class SecretError(Exception):
    """What a listener raises."""


@pytest.mark.parametrize("error", [SecretError("hello"), asyncio.CancelledError("hello")])
async def test_a_listener_that_raises(db: chatdb.Pool, caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    """What a listener raises reaches no caller; its class is logged once, and other listeners hear of the call."""

    def broken(call: Call) -> None:
        raise error

    db.add_call_listener(broken)
    heard = listening(db)
    with caplog.at_level(logging.WARNING, "chatdb"):
        conversation = await chatdb.create_conversation(db, user_id="alice", key="thread")
        assert await chatdb.get_conversation(db, **ALICE) == conversation
        with pytest.raises(chatdb.ConversationNotFoundError):
            await chatdb.get_conversation(db, user_id="bob", conversation_key="thread")
    assert len(heard) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"a listener of calls raised {type(error).__name__}; this is logged once"
    ]


async def test_a_slow_listener(db: chatdb.Pool, caplog: pytest.LogCaptureFixture) -> None:
    """A listener that blocks the event loop is reported once, and the calls succeed."""
    db.add_call_listener(lambda call: time.sleep(0.02))
    with caplog.at_level(logging.WARNING, "chatdb"):
        for _ in range(3):
            assert await chatdb.list_pinned(db, user_id="alice") == []
    [record] = caplog.records
    assert "runs in the event loop" in record.getMessage()


async def test_what_is_no_listener(db: chatdb.Pool) -> None:
    """A coroutine function, and what cannot be called, is refused with a sentence."""

    async def listener(call: Call) -> None: ...

    class Listener:
        async def __call__(self, call: Call) -> None: ...

    for wrong in (listener, functools.partial(listener), Listener(), "print", None):
        with pytest.raises(chatdb.InvalidInputError, match="listener: must be a"):
            db.add_call_listener(wrong)  # type: ignore[arg-type]
    assert db.call_listeners is None


async def test_a_listener_can_call(db: chatdb.Pool) -> None:
    """A listener may start a task that calls chatdb, which is told as well."""
    tasks: list[asyncio.Task[object]] = []

    def listener(call: Call) -> None:
        if call.operation == "list_pinned":
            tasks.append(asyncio.create_task(chatdb.list_conversations(db, user_id="alice")))

    db.add_call_listener(listener)
    heard = listening(db)
    await chatdb.list_pinned(db, user_id="alice")
    await asyncio.gather(*tasks)
    assert [each.operation for each in heard] == ["list_pinned", "list_conversations"]


def test_a_call_cannot_be_changed() -> None:
    """A record of a call is frozen."""
    ended = Call(operation="a", statement="a", duration=0.1, wait=0.0, rows=0, retries=0, error=None, sqlstate=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ended.rows = 1  # type: ignore[misc]
