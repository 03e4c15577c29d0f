"""`Watcher` and the hints of pools with `notify=True`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

import chatdb
import chatdb.watching
from chatdb import (
    ConfigurationError,
    ConversationNotFoundError,
    InvalidInputError,
    Message,
    PoolClosedError,
    Watcher,
)
from chatdb._core.dsn import connect_arguments
from chatdb._core.hints import CHANNEL, GATHERED_FOR, Hints, _in_transactions, _payloads
from chatdb._core.query import RunAgainError
from chatdb.pool import run_until_settled
from tests.support.calls import MISSING
from tests.support.databases import database_of, execute
from tests.support.pools import HANG, seen_by_the_server, until
from tests.support.proxy import Proxy
from tests.support.talk import Talk

POLL = 0.05
NEVER = 3600.0
"""A poll interval with which only hints wake a watcher."""
USER: dict[str, Any] = {"role": "user", "content": "hello"}


class Reader:
    """A task that iterates over what a watcher yields, and keeps it."""

    def __init__(self, messages: AsyncGenerator[Message, None]) -> None:
        self.got: list[Message] = []
        self.error: Exception | None = None
        self.task = asyncio.create_task(self._read(messages))

    async def _read(self, messages: AsyncGenerator[Message, None]) -> None:
        try:
            async with contextlib.aclosing(messages):
                async for message in messages:
                    self.got.append(message)
        except Exception as error:  # noqa: BLE001 - the tests look at it
            self.error = error

    async def count(self, number: int) -> list[Message]:
        """Wait until this many messages have come."""
        await until(lambda: len(self.got) >= number or self.task.done())
        assert self.error is None
        return self.got

    async def failed(self) -> Exception:
        """Wait for the error that ends the iteration."""
        async with asyncio.timeout(HANG):
            await self.task
        assert self.error is not None
        return self.error

    async def stop(self) -> None:
        """End the iteration, as a closed browser tab does."""
        self.task.cancel()
        await asyncio.wait([self.task])


def watch(watcher: Watcher, talk: Talk, **arguments: Any) -> Reader:
    """Watch a conversation of alice in a task."""
    return Reader(watcher.watch(user_id="alice", conversation_id=talk.conversation.id, **arguments))


def at_of(talk: Talk) -> dict[str, Any]:
    """Return the arguments that name the conversation."""
    return {"user_id": "alice", "conversation_id": talk.conversation.id}


class Heard:
    """What another program hears on chatdb's channel: conversation ids, in order."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __call__(self, _connection: object, _process: int, _channel: str, payload: object) -> None:
        """Note the ids of a notification."""
        self.ids += [int(word) for word in str(payload).split()]


@pytest.fixture
async def notifying(dsn: str, arguments_of: Callable[[str], dict[str, Any]]) -> AsyncIterator[Any]:
    """Yield a pool that sends hints."""
    async with chatdb.create_pool(notify=True, **arguments_of(dsn)) as pool:
        yield pool


@pytest.fixture
async def heard(dsn: str) -> AsyncIterator[Heard]:
    """Yield what is heard on chatdb's channel during the test."""
    connection = await asyncpg.connect(**connect_arguments(dsn))
    found = Heard()
    await connection.add_listener(CHANNEL, found)
    yield found
    await connection.remove_listener(CHANNEL, found)
    await connection.close()


async def hinted(pool: Any, heard: Heard) -> list[int]:
    """Return the ids heard so far, after a hint that this sends as the last one."""
    last = await chatdb.create_conversation(pool, user_id="last")
    await asyncio.sleep(2 * GATHERED_FOR)  # a notification is a set, so that it does not tell the last one
    await chatdb.append_message(pool, user_id="last", conversation_id=last.id, **USER)
    await until(lambda: last.id in heard.ids)
    assert heard.ids[-1] == last.id
    return heard.ids[:-1]


# messages


async def test_stored_messages_come_first_then_new_ones(committed: Talk) -> None:
    """A watcher yields stored messages over several pages, then new ones, each once and in order."""
    await chatdb.append_messages(committed.db, messages=[USER] * 250, **at_of(committed))
    async with Watcher(committed.db, poll=POLL) as watcher:
        reader = watch(watcher, committed)
        await reader.count(250)
        for _ in range(5):
            await chatdb.append_message(committed.db, **USER, **at_of(committed))
        await chatdb.append_messages(committed.db, messages=[USER] * 220, **at_of(committed))
        await reader.count(475)
        await asyncio.sleep(5 * POLL)
        await reader.stop()
    assert [message.seq for message in reader.got] == [*range(1, 476)]
    stored = await chatdb.list_messages(committed.db, limit=1000, **at_of(committed))
    assert reader.got == stored


async def test_a_position_and_a_key(db: Any) -> None:
    """A watcher starts after a position, and takes the conversation's key instead of its id."""
    conversation = await chatdb.create_conversation(db, user_id="alice", key="talk", messages=[USER] * 3)
    async with Watcher(db, poll=POLL) as watcher:
        reader = Reader(watcher.watch(user_id="alice", conversation_key="talk", after_seq=2))
        late = Reader(watcher.watch(user_id="alice", conversation_id=conversation.id, after_seq=4))
        await reader.count(1)
        await chatdb.append_messages(db, user_id="alice", conversation_key="talk", messages=[USER] * 2)
        await reader.count(3)
        await late.count(1)
        await reader.stop()
        await late.stop()
    assert [message.seq for message in reader.got] == [3, 4, 5]
    assert [message.seq for message in late.got] == [5]
    assert {message.conversation_id for message in reader.got} == {conversation.id}


@pytest.mark.parametrize("aborted", [False, True])
async def test_a_streaming_message_comes_twice(committed: Talk, aborted: bool) -> None:
    """A message that is streamed comes with the text so far, and again when it is finished or aborted."""
    at = at_of(committed)
    await chatdb.append_message(committed.db, **USER, **at)
    started = await chatdb.start_message(committed.db, **at)
    await chatdb.extend_message(committed.db, seq=started.seq, offset=0, text="so far", **at)
    async with Watcher(committed.db, poll=POLL) as watcher:
        reader = watch(watcher, committed)
        await reader.count(2)
        await chatdb.extend_message(committed.db, seq=started.seq, offset=6, text=", so good", **at)
        await chatdb.append_message(committed.db, **USER, **at)
        await reader.count(3)
        finished = await chatdb.finish_message(committed.db, seq=started.seq, aborted=aborted, **at)
        await reader.count(4)
        await chatdb.append_message(committed.db, **USER, **at)
        await reader.count(5)
        await asyncio.sleep(5 * POLL)
        await reader.stop()
    expected = [(1, None), (2, "streaming"), (3, None), (2, "aborted" if aborted else None), (4, None)]
    assert [(message.seq, message.state) for message in reader.got] == expected
    assert reader.got[1].content == "so far"
    assert reader.got[3] == finished
    assert finished.content == "so far, so good"


async def test_streams_that_are_finished_before_they_are_read(committed: Talk) -> None:
    """Messages that were finished before the watcher read them come once, and the others twice."""
    at = at_of(committed)
    async with Watcher(committed.db, poll=POLL) as watcher:
        async with chatdb.stream_message(committed.db, **at) as stream:
            await stream.write("done")
        first, second = [await chatdb.start_message(committed.db, **at) for _ in range(2)]
        reader = watch(watcher, committed)
        await reader.count(3)
        async with chatdb.transaction(committed.db) as connection:
            await chatdb.finish_message(connection, seq=second.seq, content="two", **at)
            await chatdb.finish_message(connection, seq=first.seq, content="one", **at)
        await reader.count(5)
        await asyncio.sleep(5 * POLL)
        await reader.stop()
    contents = [(message.seq, message.content) for message in reader.got]
    assert contents[:3] == [(1, "done"), (2, ""), (3, "")]
    assert sorted(contents[3:]) == [(2, "one"), (3, "two")]


async def test_a_streaming_message_is_deleted(committed: Talk) -> None:
    """A message that is deleted while it is streamed does not come again, and the watcher goes on."""
    at = at_of(committed)
    started = await chatdb.start_message(committed.db, **at)
    async with Watcher(committed.db, poll=POLL) as watcher:
        reader = watch(watcher, committed)
        await reader.count(1)
        await chatdb.delete_message(committed.db, seq=started.seq, **at)
        await asyncio.sleep(3 * POLL)
        await chatdb.append_message(committed.db, **USER, **at)
        await reader.count(2)
        await reader.stop()
    assert [(message.seq, message.state) for message in reader.got] == [(1, "streaming"), (2, None)]


async def test_messages_replaced_and_rolled_back(committed: Talk) -> None:
    """Messages that replace others come, and those of a transaction that is rolled back do not."""
    at = at_of(committed)
    async with Watcher(committed.db, poll=POLL) as watcher:
        await chatdb.append_messages(committed.db, messages=[USER] * 3, **at)
        reader = watch(watcher, committed)
        await reader.count(3)
        conversation = await chatdb.get_conversation(committed.db, **at)
        await chatdb.replace_messages_after(
            committed.db, after_seq=1, messages=[USER | {"content": "again"}], expected=conversation, **at
        )
        with contextlib.suppress(ZeroDivisionError):
            async with chatdb.transaction(committed.db) as connection:
                await chatdb.append_message(connection, role="user", content="never", **at)
                await asyncio.sleep(3 * POLL)
                raise ZeroDivisionError
        await chatdb.append_message(committed.db, role="user", content="last", **at)
        await reader.count(5)
        await reader.stop()
    assert [(message.seq, message.content) for message in reader.got[3:]] == [(4, "again"), (5, "last")]


async def test_several_watchers_of_one_conversation(committed: Talk) -> None:
    """Each watcher of a conversation gets every message, also while others come and go."""
    async with Watcher(committed.db, poll=POLL) as watcher:
        readers = [watch(watcher, committed) for _ in range(10)]
        await until(lambda: len(watcher._watches[committed.conversation.id]) == 10)
        for number in range(10):
            await chatdb.append_message(committed.db, **USER, **at_of(committed))
            if number == 5:
                await readers[0].count(1)
                await readers[0].stop()
        for reader in readers[1:]:
            await reader.count(10)
            await reader.stop()
    assert all([message.seq for message in reader.got] == [*range(1, 11)] for reader in readers[1:])


# the end


async def test_the_end_of_a_loop_releases_everything(committed: Talk) -> None:
    """A loop that breaks, raises or is cancelled leaves no entry in the watcher, and no task after its end."""
    tasks = asyncio.all_tasks()
    await chatdb.append_messages(committed.db, messages=[USER] * 300, **at_of(committed))
    async with Watcher(committed.db, poll=POLL) as watcher:
        async for message in watcher.watch(user_id="alice", conversation_id=committed.conversation.id):
            assert message.seq == 1
            break
        with contextlib.suppress(ZeroDivisionError):
            async for _ in watcher.watch(user_id="alice", conversation_id=committed.conversation.id):
                raise ZeroDivisionError
        reader = watch(watcher, committed)
        await reader.count(300)
        await reader.stop()
        gc.collect()
        await until(lambda: not watcher._watches)
    await until(lambda: asyncio.all_tasks() == tasks)


async def test_missing_conversations(db: Any) -> None:
    """The first step raises ConversationNotFoundError for a missing conversation and for another user's."""
    conversation = await chatdb.create_conversation(db, user_id="bob", key="talk", messages=[USER])
    async with Watcher(db, poll=POLL) as watcher:
        for name in ({"conversation_id": conversation.id}, {"conversation_id": MISSING}, {"conversation_key": "talk"}):
            with pytest.raises(ConversationNotFoundError):
                await anext(watcher.watch(user_id="alice", **name))
        assert not watcher._watches


async def test_a_conversation_is_deleted(db: Any) -> None:
    """Each watcher of a conversation raises ConversationNotFoundError after its deletion, and others go on."""
    one, two = [await chatdb.create_conversation(db, user_id="alice", messages=[USER]) for _ in range(2)]
    async with Watcher(db, poll=POLL) as watcher:
        ending = [Reader(watcher.watch(user_id="alice", conversation_id=one.id)) for _ in range(2)]
        other = Reader(watcher.watch(user_id="alice", conversation_id=two.id))
        for reader in (*ending, other):
            await reader.count(1)
        await chatdb.delete_conversation(db, user_id="alice", conversation_id=one.id)
        for reader in ending:
            assert isinstance(await reader.failed(), ConversationNotFoundError)
        await chatdb.append_message(db, user_id="alice", conversation_id=two.id, **USER)
        await other.count(2)
        await other.stop()


async def test_a_watcher_that_is_not_open(committed: Talk) -> None:
    """A watcher that was not opened or is closed raises PoolClosedError, also in the callers that wait."""
    watcher = Watcher(committed.db, poll=POLL)
    with pytest.raises(PoolClosedError, match="async with"):
        await anext(watcher.watch(user_id="alice", conversation_id=committed.conversation.id))
    async with watcher:
        with pytest.raises(ConfigurationError, match="already open"):
            await watcher.__aenter__()
        await chatdb.append_message(committed.db, **USER, **at_of(committed))
        reader = watch(watcher, committed)
        await reader.count(1)
    assert isinstance(await reader.failed(), PoolClosedError)
    with pytest.raises(PoolClosedError):
        await anext(watcher.watch(user_id="alice", conversation_id=committed.conversation.id))


async def test_a_watcher_closes_while_a_caller_reads(committed: Talk) -> None:
    """A caller that is between two messages when the watcher closes gets the page that it holds, then the error."""
    await chatdb.append_messages(committed.db, messages=[USER] * 1000, **at_of(committed))
    async with Watcher(committed.db, poll=POLL) as watcher:
        messages = watcher.watch(user_id="alice", conversation_id=committed.conversation.id)
        await anext(messages)
    rest = Reader(messages)
    assert "watcher is closed" in str(await rest.failed())
    assert len(rest.got) == 99


def test_a_watcher_is_opened_in_one_loop_after_another(dsn: str, one_authority: None) -> None:
    """A closed watcher can be opened again, but a pool of another event loop raises ConfigurationError."""

    async def run() -> None:
        async with pool, watcher:
            created = await chatdb.create_conversation(pool, user_id="alice")
            reader = Reader(watcher.watch(user_id="alice", conversation_id=created.id))
            await until(lambda: bool(watcher._watches))
            await asyncio.sleep(3 * POLL)
            await chatdb.append_message(pool, user_id="alice", conversation_id=created.id, **USER)
            await reader.count(1)
            await reader.stop()

    for _ in range(2):
        pool = chatdb.create_pool(dsn)
        watcher = Watcher(pool, poll=POLL)
        asyncio.run(run())

    async def foreign() -> None:
        async with chatdb.create_pool(dsn) as other:
            await asyncio.to_thread(asyncio.run, elsewhere(other))

    async def elsewhere(other: Any) -> None:
        async with Watcher(other, poll=POLL) as there:
            with pytest.raises(ConfigurationError, match="event loop"):
                await anext(there.watch(user_id="alice", conversation_id=1))

    asyncio.run(foreign())


async def test_the_pool_is_closed(dsn: str, arguments_of: Callable[[str], dict[str, Any]]) -> None:
    """Callers get PoolClosedError when the pool closes, and afterwards at their first step."""
    pool = chatdb.create_pool(**arguments_of(dsn))
    async with Watcher(pool, poll=POLL) as watcher:
        async with pool:
            created = await chatdb.create_conversation(pool, user_id="alice", messages=[USER])
            reader = Reader(watcher.watch(user_id="alice", conversation_id=created.id))
            await reader.count(1)
        assert isinstance(await reader.failed(), PoolClosedError)
        with pytest.raises(PoolClosedError):
            await anext(watcher.watch(user_id="alice", conversation_id=created.id))


async def test_a_plain_pool(dsn: str, arguments_of: Callable[[str], dict[str, Any]]) -> None:
    """A watcher takes asyncpg's own pool, and its callers end when that is closed."""
    arguments = arguments_of(dsn)
    plain = connect_arguments(arguments.pop("dsn"))
    pool: Any = await asyncpg.create_pool(min_size=1, max_size=2, **plain, **arguments)
    async with Watcher(pool, poll=POLL) as watcher:
        created = await chatdb.create_conversation(pool, user_id="alice", messages=[USER])
        reader = Reader(watcher.watch(user_id="alice", conversation_id=created.id))
        await reader.count(1)
        await chatdb.append_message(pool, user_id="alice", conversation_id=created.id, **USER)
        await reader.count(2)
        await pool.close()
        assert isinstance(await reader.failed(), PoolClosedError)


# arguments


@pytest.mark.parametrize("poll", [0, 0.049, -1, 3601, True, "2", None, float("nan"), float("inf"), 10**400])
async def test_bad_intervals(committed: Talk, poll: Any) -> None:
    """The poll interval is a number of seconds from 0.05 to 3,600."""
    with pytest.raises(InvalidInputError, match=r"^poll: must be"):
        Watcher(committed.db, poll=poll)


@pytest.mark.parametrize("pool", [None, "pool", object()])
def test_bad_pools(pool: Any) -> None:
    """The pool must be a pool."""
    with pytest.raises(InvalidInputError, match=r"^pool: must be a pool"):
        Watcher(pool)


async def test_a_connection_is_not_a_pool(tx: Any) -> None:
    """A connection is refused as the pool, because it serves one statement at a time."""
    with pytest.raises(InvalidInputError, match=r"^pool: must be a pool"):
        Watcher(tx)


@pytest.mark.parametrize("dsn_", ["XYZZY", "http://ada:s3cr3t@host/x", "postgresql://ada:s3cr3t@host:XYZZY/db", 5])
async def test_bad_dsns(committed: Talk, dsn_: Any) -> None:
    """A listen_dsn that is not a DSN raises ConfigurationError, which does not quote it."""
    with pytest.raises(ConfigurationError) as caught:
        Watcher(committed.db, listen_dsn=dsn_)
    assert "s3cr3t" not in str(caught.value)
    assert "XYZZY" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("user_id", {"user_id": "", "conversation_id": 1}),
        ("conversation_id", {"user_id": "alice"}),
        ("conversation_id", {"user_id": "alice", "conversation_id": 1, "conversation_key": "talk"}),
        ("conversation_id", {"user_id": "alice", "conversation_id": True}),
        ("after_seq", {"user_id": "alice", "conversation_id": 1, "after_seq": -1}),
        ("after_seq", {"user_id": "alice", "conversation_id": 1, "after_seq": True}),
        ("after_seq", {"user_id": "alice", "conversation_id": 1, "after_seq": 2**63}),
    ],
)
async def test_bad_arguments(committed: Talk, parameter: str, arguments: dict[str, Any]) -> None:
    """The first step raises InvalidInputError, which names the parameter, before anything is sent."""
    async with Watcher(committed.db) as watcher:
        with pytest.raises(InvalidInputError, match=parameter):
            await anext(watcher.watch(**arguments))


async def test_a_server_that_does_not_exist(committed: Talk) -> None:
    """If the server of listen_dsn cannot be reached, the watcher polls."""
    async with Watcher(committed.db, listen_dsn="postgresql://ada@127.0.0.1:1/x?sslmode=disable", poll=POLL) as watcher:
        reader = watch(watcher, committed)
        await asyncio.sleep(4 * POLL)
        await chatdb.append_message(committed.db, **USER, **at_of(committed))
        await reader.count(1)
        await reader.stop()


async def test_a_listen_dsn_that_the_server_refuses(committed: Talk, dsn: str) -> None:
    """Opening raises ConfigurationError if the listening connection is refused, and leaves nothing behind."""
    tasks = asyncio.all_tasks()
    there = database_of(dsn, "no_such_database")
    with pytest.raises(ConfigurationError):
        await Watcher(committed.db, listen_dsn=there).__aenter__()
    assert asyncio.all_tasks() == tasks


# hints

FIRST: dict[str, Any] = {"role": "user", "content": "first", "key": "first"}
HINTS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "append_message": lambda db, at: chatdb.append_message(db, **USER, **at),
    "append_message, key": lambda db, at: chatdb.append_message(db, **USER, key="new", **at),
    "append_message, create": lambda db, at: chatdb.append_message(
        db, **USER, user_id="alice", conversation_key="talk", create=True
    ),
    "append_messages": lambda db, at: chatdb.append_messages(db, messages=[USER] * 2, **at),
    "append_messages, keys": lambda db, at: chatdb.append_messages(db, messages=[USER | {"key": "new"}], **at),
    "append_messages, skip": lambda db, at: chatdb.append_messages(
        db, messages=[FIRST, USER], on_existing="skip", **at
    ),
    "append_messages, parent": lambda db, at: chatdb.append_messages(db, messages=[USER], parent_seq=1, **at),
    "upsert_message": lambda db, at: chatdb.upsert_message(db, **USER, key="new", **at),
    "start_message": lambda db, at: chatdb.start_message(db, **at),
    "start_message, key": lambda db, at: chatdb.start_message(db, key="new", **at),
    "finish_message": lambda db, at: chatdb.finish_message(db, key="streaming", **at),
    "finish_message, aborted": lambda db, at: chatdb.finish_message(db, key="streaming", aborted=True, **at),
}
"""Calls that add or finish a message in the conversation."""
SILENT: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "create_conversation": lambda db, at: chatdb.create_conversation(db, user_id="alice", messages=[USER]),
    "fork_conversation": lambda db, at: chatdb.fork_conversation(db, **at),
    "extend_message": lambda db, at: chatdb.extend_message(db, key="streaming", offset=0, text="x", **at),
    "append_messages, none": lambda db, at: chatdb.append_messages(db, messages=[], **at),
    "list_messages": lambda db, at: chatdb.list_messages(db, **at),
}
"""Calls that add no message to a conversation that is watched."""


async def a_talk(pool: Any) -> dict[str, Any]:
    """Create a conversation with a message and one that is streamed, by a connection that sends no hints."""
    async with pool.acquire() as connection:
        created = await chatdb.create_conversation(connection, user_id="alice", key="talk", messages=[FIRST])
        at: dict[str, Any] = {"user_id": "alice", "conversation_id": created.id}
        await chatdb.start_message(connection, key="streaming", **at)
    return at


@pytest.mark.parametrize("name", HINTS)
async def test_writes_send_hints(notifying: Any, heard: Heard, name: str) -> None:
    """Each function that adds or finishes a message sends one hint, in a transaction too."""
    at = await a_talk(notifying)
    await HINTS[name](notifying, at)
    assert await hinted(notifying, heard) == [at["conversation_id"]]


async def test_replace_messages_after_sends_a_hint(notifying: Any, heard: Heard) -> None:
    """`replace_messages_after` sends a hint, because it adds messages."""
    at = await a_talk(notifying)
    conversation = await chatdb.get_conversation(notifying, **at)
    await chatdb.replace_messages_after(notifying, after_seq=0, messages=[USER], expected=conversation, **at)
    assert await hinted(notifying, heard) == [at["conversation_id"]]


@pytest.mark.parametrize("name", SILENT)
async def test_other_calls_send_none(notifying: Any, heard: Heard, name: str) -> None:
    """A call that adds no message to a stored conversation sends no hint."""
    at = await a_talk(notifying)
    await SILENT[name](notifying, at)
    assert at["conversation_id"] not in await hinted(notifying, heard)


async def test_a_pool_without_notify_sends_none(db: Any, notifying: Any, heard: Heard) -> None:
    """A pool without notify=True sends no hints."""
    at = await a_talk(db)
    await chatdb.append_message(db, **USER, **at)
    async with chatdb.transaction(db) as connection:
        await chatdb.append_message(connection, **USER, **at)
    await asyncio.sleep(2 * GATHERED_FOR)
    assert await hinted(notifying, heard) == []


async def test_hints_follow_the_commit(notifying: Any, heard: Heard) -> None:
    """A transaction sends its hints after COMMIT, nested blocks included."""
    one, two = await a_talk(notifying), await chatdb.create_conversation(notifying, user_id="bob")
    async with chatdb.transaction(notifying) as connection:
        await chatdb.append_message(connection, **USER, **one)
        async with chatdb.transaction(connection, user_id="bob") as inner:
            await chatdb.append_message(inner, user_id="bob", conversation_id=two.id, **USER)
        await asyncio.sleep(2 * GATHERED_FOR)
        assert await hinted(notifying, heard) == []
        heard.ids.clear()
    ids = {one["conversation_id"], two.id}
    await until(lambda: set(heard.ids) == ids)
    assert len(heard.ids) == 2
    assert _in_transactions == {}


async def test_a_transaction_that_is_rolled_back_sends_none(notifying: Any, heard: Heard) -> None:
    """A transaction that raises, or whose COMMIT the server answers with ROLLBACK, sends no hints."""
    at = await a_talk(notifying)
    with contextlib.suppress(ZeroDivisionError):
        async with chatdb.transaction(notifying) as connection:
            await chatdb.append_message(connection, **USER, **at)
            raise ZeroDivisionError

    async def suppress() -> None:
        async with chatdb.transaction(notifying) as connection:
            await chatdb.append_message(connection, **USER, **at)
            with contextlib.suppress(asyncpg.PostgresError):
                await connection.execute("select 1 / 0")

    with pytest.raises(chatdb.ChatDBError, match="rolled back"):
        await suppress()
    assert await hinted(notifying, heard) == []
    assert _in_transactions == {}


async def test_a_call_that_runs_again_sends_a_hint(notifying: Any, heard: Heard) -> None:
    """A call that runs again in a transaction, because others keep writing, sends its hint after COMMIT."""
    at = await a_talk(notifying)
    attempts = 0

    async def append(db: Any, user: str) -> Message:
        nonlocal attempts
        attempts += 1
        if attempts < 4:
            raise RunAgainError("other callers keep writing", sent=True)
        message = await chatdb.append_message(db, **USER, **at)
        await asyncio.sleep(2 * GATHERED_FOR)
        assert heard.ids == []
        return message

    await run_until_settled(append, notifying, "alice")
    assert await hinted(notifying, heard) == [at["conversation_id"]]


async def test_hints_wake_a_watcher(notifying: Any, dsn: str) -> None:
    """A watcher with listen_dsn gets messages without polling, by hints of another pool."""
    at = await a_talk(notifying)
    async with Watcher(notifying, listen_dsn=dsn, poll=NEVER) as watcher:
        reader = Reader(watcher.watch(user_id="alice", conversation_id=at["conversation_id"]))
        await reader.count(2)
        await asyncio.sleep(0.3)  # after the poll that follows the connection
        for number in range(3):
            await chatdb.append_message(notifying, **USER, **at)
            await reader.count(3 + number)
        await chatdb.finish_message(notifying, key="streaming", **at)
        await reader.count(6)
        await reader.stop()
    assert [message.seq for message in reader.got] == [1, 2, 3, 4, 5, 2]


GARBAGE = ["", " ", "x", "--5", "-", "+5", "1e5", "1.0", "²", "٣", "9" * 7000, "9" * 30, "{id}x", "\n", "null", "'; --"]


async def test_garbage_on_the_channel(notifying: Any, dsn: str) -> None:
    """A watcher ignores payloads of another program on the channel, and acts on an id beside garbage."""
    at = await a_talk(notifying)
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    async with Watcher(notifying, listen_dsn=dsn, poll=NEVER) as watcher:
        reader = Reader(watcher.watch(user_id="alice", conversation_id=at["conversation_id"]))
        await reader.count(2)
        for payload in GARBAGE:
            await notifying.execute("select pg_notify('chatdb', $1)", payload)
        await asyncio.sleep(0.3)
        async with notifying.acquire() as connection:
            await chatdb.append_message(connection, **USER, **at)
            await connection.execute("select pg_notify('chatdb', $1)", f"--5 {at['conversation_id']} x")
        await reader.count(3)
        await reader.stop()
    asyncio.get_running_loop().set_exception_handler(None)
    assert errors == []


def test_payloads_are_short_enough() -> None:
    """Payloads stay below PostgreSQL's limit of 8,000 bytes, and hold every id once."""
    ids = {2**63 - 1 - number for number in range(3000)}
    payloads = _payloads(ids)
    assert max(map(len, payloads)) < 7_950
    assert sorted(int(word) for payload in payloads for word in payload.split()) == sorted(ids)


async def test_many_conversations_in_one_statement(notifying: Any, heard: Heard) -> None:
    """Hints for many conversations fit into one statement with several notifications."""
    ids = {10**18 + number for number in range(2000)}
    notifying.hints.add(ids)
    await until(lambda: len(heard.ids) >= 2000)
    assert sorted(heard.ids) == sorted(ids)


# resources


async def test_a_poll_is_one_statement(dsn: str) -> None:
    """A poll of 100 watchers is one round trip, also if a conversation changed that got no message."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(dsn) as writing, chatdb.create_pool(proxy.dsn) as pool:
            created = [
                await chatdb.create_conversation(writing, user_id=f"user {n}", messages=[USER]) for n in range(100)
            ]
            async with Watcher(pool, poll=0.3) as watcher:
                readers = [Reader(watcher.watch(user_id=each.user_id, conversation_id=each.id)) for each in created]
                for reader in readers:
                    await reader.count(1)
                clock = asyncio.get_running_loop().time
                begun = clock()
                proxy.clear()
                await asyncio.sleep(0.7)
                for each in created:
                    at: dict[str, Any] = {"user_id": each.user_id, "conversation_id": each.id}
                    await chatdb.update_conversation(writing, title="renamed", **at)
                await asyncio.sleep(0.7)
                trips, polls = proxy.round_trips, (clock() - begun) / 0.3
                for reader in readers:
                    await reader.stop()
    assert 2 <= trips <= polls + 2  # one may prepare the statement


async def test_a_watcher_that_closes_at_once(committed: Talk, dsn: str) -> None:
    """A watcher that is closed directly after it was opened leaves no session and no task."""
    tasks = asyncio.all_tasks()
    question = """
        select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen%'
    """
    for _ in range(3):
        async with Watcher(committed.db, listen_dsn=dsn):
            pass
    gc.collect()
    async with asyncio.timeout(HANG):
        while await committed.db.fetchval(question):  # noqa: ASYNC110 - it changes in the server
            await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == tasks


async def test_a_watcher_ends_its_listening_session(committed: Talk, dsn: str) -> None:
    """A watcher has one listening session, which ends with it."""
    question = """
        select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen%'
    """
    async with Watcher(committed.db, listen_dsn=dsn, poll=POLL) as watcher:
        readers = [watch(watcher, committed) for _ in range(20)]
        await asyncio.sleep(4 * POLL)
        assert await committed.db.fetchval(question) == 1
        for reader in readers:
            await reader.stop()
    async with asyncio.timeout(HANG):
        while await committed.db.fetchval(question):  # noqa: ASYNC110 - it changes in the server
            await asyncio.sleep(0.01)


async def test_a_pool_closes_with_pending_hints(dsn: str, heard: Heard) -> None:
    """Closing the pool sends the hints that it has gathered."""
    tasks = asyncio.all_tasks()
    async with chatdb.create_pool(dsn, notify=True) as pool:
        at = await a_talk(pool)
        await chatdb.append_message(pool, **USER, **at)
    await until(lambda: heard.ids == [at["conversation_id"]])
    assert asyncio.all_tasks() == tasks


async def test_a_pool_closes_while_hints_are_sent(dsn: str) -> None:
    """Closing the pool waits until a notification under way is answered, and leaves no task."""
    tasks = asyncio.all_tasks()
    with Proxy(dsn, delay=0.05) as proxy:
        async with chatdb.create_pool(proxy.dsn, notify=True) as pool:
            at = await a_talk(pool)
            await chatdb.append_message(pool, **USER, **at)
            await asyncio.sleep(GATHERED_FOR + 0.03)
        assert asyncio.all_tasks() == tasks


async def test_a_pool_closes_although_hints_cannot_be_sent(dsn: str) -> None:
    """A pool whose only connection is in use and whose hints wait for it terminates it after the acquire timeout."""
    pool = await chatdb.create_pool(dsn, notify=True, max_size=1, acquire_timeout=0.5)
    at = await a_talk(pool)
    await chatdb.append_message(pool, **USER, **at)
    await pool.acquire()
    async with asyncio.timeout(5):
        await pool.close()
    await until(lambda: seen_by_the_server(dsn) == [])


async def test_closing_a_pool_is_cancelled(dsn: str) -> None:
    """A pool whose close is cancelled while it waits for its hints leaves no connection open."""
    pool = await chatdb.create_pool(dsn, notify=True, max_size=1)
    at = await a_talk(pool)
    await chatdb.append_message(pool, **USER, **at)
    await pool.acquire()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await pool.close()
    await until(lambda: seen_by_the_server(dsn) == [])


async def test_a_notification_that_fails() -> None:
    """A notification that fails disturbs nobody, and the next one is sent."""
    sent: list[list[str]] = []

    async def send(payloads: list[str]) -> None:
        sent.append(payloads)
        if len(sent) == 1:
            raise asyncpg.InterfaceError("gone")

    hints = Hints(send)
    hints.add({1})
    await hints.close(1.0)
    hints.add({2})
    hints.add({3})
    await hints.close(1.0)
    assert sent == [[" 1"], [" 2 3"]]


async def test_a_pool_that_is_exhausted(dsn: str) -> None:
    """While all connections of the pool are in use, watchers wait; afterwards they miss nothing."""
    async with (
        chatdb.create_pool(dsn) as writing,
        chatdb.create_pool(dsn, max_size=1, acquire_timeout=0.1) as pool,
        Watcher(pool, listen_dsn=dsn, poll=POLL) as watcher,
    ):
        at = await a_talk(writing)
        reader = Reader(watcher.watch(user_id="alice", conversation_id=at["conversation_id"]))
        await reader.count(2)
        async with pool.acquire():
            await chatdb.append_message(writing, **USER, **at)
            await writing.execute("select pg_notify('chatdb', $1)", str(at["conversation_id"]))
            await asyncio.sleep(0.5)
        await reader.count(3)
        await reader.stop()
    assert [message.seq for message in reader.got] == [1, 2, 3]


@pytest.mark.owner
async def test_an_error_that_is_not_chatdbs(dsn: str) -> None:
    """An error of the host's own objects does not end the polls of a watcher."""
    async with chatdb.create_pool(dsn) as pool, Watcher(pool, poll=POLL) as watcher:
        at = await a_talk(pool)
        reader = Reader(watcher.watch(user_id="alice", conversation_id=at["conversation_id"]))
        await reader.count(2)
        await asyncio.sleep(3 * POLL)
        execute(dsn, "alter table chatdb.conversations rename to aside")
        broken = "select user_id, id, last_seq, edits / (edits - edits) as edits from chatdb.aside"
        execute(dsn, f"create view chatdb.conversations as {broken}")
        await asyncio.sleep(6 * POLL)
        execute(dsn, "drop view chatdb.conversations", "alter table chatdb.aside rename to conversations")
        await chatdb.append_message(pool, **USER, **at)
        await reader.count(3)
        await reader.stop()


async def test_a_silent_listening_connection(notifying: Any, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the listening connection goes silent, messages come by the poll, and it is soon replaced."""
    monkeypatch.setattr(chatdb.watching, "_CHECK_EVERY", 0.2)
    at = await a_talk(notifying)
    with Proxy(dsn) as proxy:
        async with Watcher(notifying, listen_dsn=proxy.dsn, poll=0.3) as watcher:
            reader = Reader(watcher.watch(user_id="alice", conversation_id=at["conversation_id"]))
            await reader.count(2)
            proxy.pause()
            await chatdb.append_message(notifying, **USER, **at)
            await reader.count(3)
            await asyncio.sleep(1.0)
            proxy.resume()
            await until(lambda: sum("LISTEN" in text.upper() for text in proxy.statements) >= 2)
            await reader.stop()


async def test_a_silent_server_at_the_start(committed: Talk, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the server of listen_dsn never answers, opening ends in bounded time and the watcher polls."""
    monkeypatch.setattr(chatdb.watching, "_CONNECT_TIMEOUT", 0.3)
    with Proxy(dsn) as proxy:
        proxy.pause()
        async with asyncio.timeout(5):
            async with Watcher(committed.db, listen_dsn=proxy.dsn, poll=POLL) as watcher:
                await chatdb.append_message(committed.db, **USER, **at_of(committed))
                reader = watch(watcher, committed)
                await reader.count(1)
                await reader.stop()
