"""Watchers miss no message, get none twice and keep the order, whatever happens to hints, sessions and the server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import chatdb
from chatdb import Message, UnavailableError, Watcher
from chatdb.admin.row_security import protect_tables
from chatdb.testing.databases import Databases
from tests.support.chaos import figure, query, restart, sized, until
from tests.support.databases import as_role, cloned
from tests.support.pgbouncer import OPTIONS, VERSIONS, pgbouncer
from tests.support.pools import kill_sessions
from tests.support.roles import Roles

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.usefixtures("repetitions")]

HANG = 120
KILL_LISTENER = """
    select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
    where datname = current_database() and query ilike 'listen %%'
"""


class LossyPool(chatdb.pool.Pool):
    """A pool that drops a share of its hints, chosen by a seed."""

    share = 0.4
    sent = dropped = 0

    async def _notify(self, payloads: list[str]) -> None:
        chance = random.Random(self.sent)
        words = [word for payload in payloads for word in payload.split()]
        kept = [word for word in words if chance.random() >= self.share]
        self.sent += len(words)
        self.dropped += len(words) - len(kept)
        await super()._notify([" ".join(kept)])


class Audience:
    """Tasks that watch conversations and keep what they get, with the delay of each message."""

    def __init__(self, watcher: Watcher, conversations: list[chatdb.Conversation], each: int) -> None:
        self.written: dict[tuple[int, int, str | None], float] = {}
        self.got: list[list[Message]] = [[] for _ in range(each * len(conversations))]
        self.delays: list[float] = []
        self.expected: Counter[int] = Counter()
        self.conversations = conversations
        self.errors: list[BaseException] = []
        self._watcher = watcher
        self._tasks: list[asyncio.Task[None]] = []
        self._missing = 0

    async def __aenter__(self) -> Audience:
        for number, got in enumerate(self.got):
            conversation = self.conversations[number % len(self.conversations)]
            self._tasks.append(asyncio.create_task(self._watch(conversation, got)))
        await until(lambda: sum(map(len, self._watcher._watches.values())) == len(self.got), HANG)
        await asyncio.sleep(self._watcher._poll + 0.5)  # the first poll reads each conversation again
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, conversation: chatdb.Conversation, got: list[Message]) -> None:
        messages = self._watcher.watch(user_id=conversation.user_id, conversation_id=conversation.id)
        try:
            async with contextlib.aclosing(messages):
                async for message in messages:
                    got.append(message)
                    begun = self.written.get((message.conversation_id, message.seq, message.state))
                    if begun is not None:
                        self.delays.append(time.perf_counter() - begun)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.errors.append(error)

    def note(self, message: Message) -> None:
        """Remember a message that was written and acknowledged just now."""
        self.written[message.conversation_id, message.seq, message.state] = time.perf_counter()
        self.expected[message.conversation_id] += message.state != "streaming"

    def _is_complete(self) -> bool:
        return bool(self.errors) or all(
            sum(message.state != "streaming" for message in got)
            >= self.expected[self.conversations[number % len(self.conversations)].id]
            for number, got in enumerate(self.got)
        )

    async def judge(self, request: pytest.FixtureRequest, pool: Any, what: str, most: float) -> None:
        """
        Wait until all has come, compare it with what is stored, and print the delays.

        Their median must be below `most` seconds, except with --quick, because other work may share the cores then.
        """
        with contextlib.suppress(TimeoutError):
            await until(self._is_complete, HANG)
        await asyncio.sleep(0.5)  # for messages that come twice
        lost = doubled = disordered = total = 0
        for number, conversation in enumerate(self.conversations):
            at = {"user_id": conversation.user_id, "conversation_id": conversation.id}
            stored = [message async for message in chatdb.iter_messages(pool, **at)]
            for got in self.got[number :: len(self.conversations)]:
                found: defaultdict[int, list[Message]] = defaultdict(list)
                for message in got:
                    found[message.seq].append(message)
                total += len(stored)
                lost += sum(message not in found[message.seq] for message in stored if message.seq in found)
                lost += sum(message.seq not in found for message in stored)
                doubled += sum(len(same) - len({message.state for message in same}) for same in found.values())
                disordered += [*found] != sorted(found)
                disordered += sum(message.state == "streaming" for same in found.values() for message in same[1:])
        delays = statistics.quantiles(self.delays, n=100) if len(self.delays) > 1 else [0.0] * 99
        figure(
            f"{what}: {len(self.got):,} watchers, {total:,} messages: {lost} lost, {doubled} doubled, "
            f"{disordered} out of order; delay median {delays[49] * 1000:.0f} ms, 99 % {delays[98] * 1000:.0f} ms"
        )
        assert self.errors == []
        assert (lost, doubled, disordered) == (0, 0, 0)
        assert total > 0
        assert request.config.getoption("--quick") or delays[49] < most


async def write(pool: Any, audience: Audience, messages: int, writer: int, pause: float = 0.01) -> None:
    """Write messages in every way into conversations chosen by a seed, again after each failure."""
    chance = random.Random(writer)
    number = 0
    while number < messages:
        written: list[Message]
        conversation = chance.choice(audience.conversations)
        at: dict[str, Any] = {"user_id": conversation.user_id, "conversation_id": conversation.id}
        new: dict[str, Any] = {"role": "user", "content": f"{writer} {number}"}
        key = f"{writer} {number}"
        await asyncio.sleep(chance.uniform(0, 2 * pause))
        match chance.randrange(10):
            case 0:
                batch = [new | {"key": f"{key} {place}"} for place in range(3)]
                written = await _until_stored(chatdb.append_messages, pool, messages=batch, **at)
            case 1:
                audience.note(await _until_stored(chatdb.start_message, pool, key=key, **at))
                await asyncio.sleep(chance.uniform(0, 0.3))
                written = [await _until_stored(chatdb.finish_message, pool, key=key, content=key, **at)]
            case 2:
                written = await _until_stored(_in_a_transaction, pool, at, new, key)
            case _:
                written = [await _until_stored(chatdb.append_message, pool, key=key, **new, **at)]
        number += len(written)
        for message in written:
            audience.note(message)


async def _in_a_transaction(pool: Any, at: dict[str, Any], new: dict[str, Any], key: str) -> list[Message]:
    async with chatdb.transaction(pool, user_id=at["user_id"]) as connection:
        first = await chatdb.append_message(connection, key=f"{key} a", **new, **at)
        await asyncio.sleep(0.01)
        return [first, await chatdb.append_message(connection, key=f"{key} b", **new, **at)]


async def _until_stored(call: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
    async with asyncio.timeout(HANG):
        while True:
            try:
                return await call(*args, **options)
            except UnavailableError:
                await asyncio.sleep(0.1)


async def conversations(pool: Any, count: int, users: int) -> list[chatdb.Conversation]:
    """Create conversations of several users, each with a message."""
    hello = {"role": "system", "content": "hello"}
    return [
        await chatdb.create_conversation(pool, user_id=f"user {number % users}", messages=[hello])
        for number in range(count)
    ]


def expect_first(audience: Audience) -> None:
    """Count the message that each conversation had from the start."""
    audience.expected.update(conversation.id for conversation in audience.conversations)


@pytest.mark.parametrize("share", [0.0, 0.4])
async def test_hints_that_are_lost(request, dsn, share):
    """2,000 watchers on one listening session, killed three times, and a pool of two lose nothing."""
    count = sized(request, 2_000, 200)
    messages = sized(request, 4_000, 400)
    kills: list[int] = []

    async def kill() -> None:
        for _ in range(3 if share else 0):
            await asyncio.sleep(sized(request, 5, 1))
            kills.append((await asyncio.to_thread(query, dsn, KILL_LISTENER))[0][0])

    async with (
        LossyPool(dsn, notify=True, max_size=4) as writing,
        chatdb.create_pool(dsn, max_size=2) as reading,
        Watcher(reading, listen_dsn=dsn, poll=2.0) as watcher,
    ):
        writing.share = share
        audience = Audience(watcher, await conversations(writing, count, 50), each=1)
        async with audience, asyncio.timeout(300):
            expect_first(audience)
            await asyncio.gather(kill(), *(write(writing, audience, messages // 8, n, 0.05) for n in range(8)))
            await audience.judge(request, writing, f"{writing.dropped:,} of {writing.sent:,} hints dropped", 0.1)
    assert (writing.dropped > 0) == (share > 0)
    assert kills == [1] * (3 if share else 0)


async def test_watchers_that_only_poll(request, dsn):
    """2,000 watchers without hints get every message, half of them within the poll interval."""
    count = sized(request, 2_000, 200)
    async with (
        chatdb.create_pool(dsn, max_size=4) as writing,
        chatdb.create_pool(dsn, max_size=2) as reading,
        Watcher(reading, poll=2.0) as watcher,
    ):
        audience = Audience(watcher, await conversations(writing, count, 50), each=1)
        async with audience, asyncio.timeout(300):
            expect_first(audience)
            share = sized(request, 4_000, 400) // 8
            await asyncio.gather(*(write(writing, audience, share, n, 0.05) for n in range(8)))
            await audience.judge(request, writing, "polls every 2 s", 2.0)


async def test_many_watchers_of_few_conversations(request, dsn):
    """Conversations with many watchers each deliver every message to all of them."""
    async with (
        chatdb.create_pool(dsn, notify=True, max_size=4) as writing,
        chatdb.create_pool(dsn, max_size=2) as reading,
        Watcher(reading, listen_dsn=dsn, poll=2.0) as watcher,
    ):
        audience = Audience(watcher, await conversations(writing, 5, 5), each=sized(request, 100, 20))
        async with audience, asyncio.timeout(300):
            expect_first(audience)
            await asyncio.gather(*(write(writing, audience, sized(request, 100, 25), n, 0.2) for n in range(4)))
            await audience.judge(request, writing, "many watchers of 5 conversations", 1.0)


@pytest.mark.parametrize("version", VERSIONS)
async def test_through_pgbouncer(request, server, dsn, tmp_path: Path, version: str):
    """Behind PgBouncer in transaction mode, watchers poll, and writers may send hints for those who listen."""
    with pgbouncer(server, tmp_path, version, server_round_robin=1) as pooled:
        arguments: dict[str, Any] = {"dsn": f"{pooled.rpartition('/')[0]}/{database(dsn)}", **OPTIONS[version]}
        async with (
            chatdb.create_pool(notify=True, max_size=4, **arguments) as writing,
            chatdb.create_pool(max_size=2, **arguments) as reading,
            Watcher(reading, poll=0.5) as watcher,
            Watcher(reading, listen_dsn=dsn, poll=2.0) as listening,
        ):
            created = await conversations(writing, 100, 20)
            polls, hears = (Audience(each, created, each=1) for each in (watcher, listening))
            hears.expected, hears.written = polls.expected, polls.written
            async with polls, hears, asyncio.timeout(300):
                expect_first(polls)
                await asyncio.gather(
                    *(write(writing, polls, sized(request, 250, 50), writer, 0.05) for writer in range(4))
                )
                await polls.judge(request, writing, f"PgBouncer {version}, polls every 0.5 s", 0.5)
                await hears.judge(request, writing, f"PgBouncer {version}, a direct session listens", 0.4)


def database(dsn: str) -> str:
    """Return the name of a DSN's database."""
    return query(dsn, "select current_database()")[0][0]


@pytest.fixture
def protected(databases: Databases, roles: Roles) -> Iterator[str]:
    """Yield the application's DSN of a database with row-level security."""
    with cloned(databases, roles) as dsn:
        protect_tables(as_role(dsn, roles.owner))
        yield as_role(dsn, roles.app)


@pytest.mark.parametrize("listens", [True, False])
async def test_behind_row_level_security(request, protected, listens):
    """With `chatdb protect`, watchers of many users get every message of theirs, by hints and by polls."""
    async with (
        chatdb.create_pool(protected, notify=True, row_level_security=True, max_size=4) as writing,
        chatdb.create_pool(protected, row_level_security=True, max_size=2) as reading,
        Watcher(reading, listen_dsn=protected if listens else None, poll=1.0) as watcher,
    ):
        [one] = await conversations(writing, 1, 1)
        with pytest.raises(chatdb.ConversationNotFoundError):
            await anext(watcher.watch(user_id="somebody else", conversation_id=one.id))
        audience = Audience(watcher, await conversations(writing, sized(request, 300, 100), 30), each=1)
        async with audience, asyncio.timeout(300):
            expect_first(audience)
            await asyncio.gather(*(write(writing, audience, sized(request, 250, 50), n, 0.05) for n in range(4)))
            await audience.judge(
                request,
                writing,
                f"row-level security, {'hints' if listens else 'polls every 1 s'}",
                0.2 if listens else 1.0,
            )


async def test_killed_sessions(request, dsn):
    """All sessions of the pools and the listening one are killed several times, and nothing is lost."""

    async def kill() -> None:
        for _ in range(sized(request, 10, 3)):
            await asyncio.sleep(0.7)
            await asyncio.to_thread(kill_sessions, dsn)

    async with (
        chatdb.create_pool(dsn, notify=True, max_size=4) as writing,
        chatdb.create_pool(dsn, max_size=2) as reading,
        Watcher(reading, listen_dsn=dsn, poll=0.5) as watcher,
    ):
        audience = Audience(watcher, await conversations(writing, 200, 20), each=1)
        async with audience, asyncio.timeout(300):
            expect_first(audience)
            await asyncio.gather(
                kill(), *(write(writing, audience, sized(request, 500, 150), n, 0.03) for n in range(4))
            )
            await audience.judge(request, writing, "all sessions killed", 1.0)


async def test_a_restarted_server(request, durable, durable_dsn):
    """The server is killed and started again, and the watchers go on without an error."""
    times = sized(request, 3, 1)

    async def kill() -> None:
        for _ in range(times):
            await asyncio.sleep(1.0)
            await asyncio.to_thread(restart, durable)

    async with (
        chatdb.create_pool(durable_dsn, notify=True, max_size=4) as writing,
        chatdb.create_pool(durable_dsn, max_size=2) as reading,
        Watcher(reading, listen_dsn=durable_dsn, poll=0.5) as watcher,
    ):
        audience = Audience(watcher, await conversations(writing, 200, 20), each=1)
        async with audience, asyncio.timeout(300):
            expect_first(audience)
            await asyncio.gather(
                kill(), *(write(writing, audience, sized(request, 300, 100), n, 0.03) for n in range(4))
            )
            await audience.judge(request, writing, f"server restarted {times} times", HANG)


async def test_a_slow_caller(request, dsn):
    """A caller that sleeps while 10,000 messages are appended holds at most a page of them, and then gets all."""
    count = sized(request, 10_000, 2_000)

    def held() -> int:
        gc.collect()
        return sum(isinstance(each, Message) for each in gc.get_objects())

    async with (
        chatdb.create_pool(dsn, notify=True) as pool,
        Watcher(pool, listen_dsn=dsn, poll=0.2) as watcher,
    ):
        [conversation] = await conversations(pool, 1, 1)
        at: dict[str, Any] = {"user_id": conversation.user_id, "conversation_id": conversation.id}
        messages = watcher.watch(**at)
        seqs = [(await anext(messages)).seq]
        before = held()
        for _ in range(count // 100):
            await chatdb.append_messages(pool, messages=[{"role": "user", "content": "x" * 1000}] * 100, **at)
            await asyncio.sleep(0.01)
        most = held() - before
        async with asyncio.timeout(HANG):
            while len(seqs) < count + 1:
                seqs.append((await anext(messages)).seq)
                if len(seqs) % 500 == 50:  # in the middle of a page
                    most = max(most, held() - before)
        await messages.aclose()
        kept = await chatdb.list_messages(pool, limit=300, **at)
        assert held() - before > len(kept) - 10  # the count works
    figure(f"slow caller: {count:,} messages appended meanwhile, at most {most} held")
    assert seqs == [*range(1, count + 2)]
    assert most <= 101
