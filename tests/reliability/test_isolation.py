"""One pool under every load at once: each caller gets its own answers, and refused writes are not stored."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import chatdb
from chatdb import ConfigurationError, UnavailableError
from tests.support.chaos import LOOPS, assert_whole, figure, query, sized

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

FORK = multiprocessing.get_context("fork")
HANG = 20
SIZE = 6
USERS = 24


def refused(make: Callable[[], Awaitable[Any]]) -> str:
    """Use a pool in a new event loop; return "refused" or what happened instead."""

    async def run() -> Any:
        return await make()

    try:
        asyncio.run(asyncio.wait_for(run(), HANG))
    except ConfigurationError:
        return "refused"
    except UnavailableError as error:
        return "refused" if error.sent is False else f"{type(error).__name__}, sent {error.sent}"
    except BaseException as error:  # noqa: BLE001 - shown by the test
        return f"{type(error).__name__}: {error}"
    return "done"


def step(use: Awaitable[Any]) -> None:
    """Run an awaitable until it waits for the server."""
    next(iter(use.__await__()))


class _User:
    """A user, what it has stored, and calls that check their answers against that."""

    def __init__(self, world: _World, name: str) -> None:
        self.world, self.name = world, name
        self.chance = random.Random(f"{world.loop} {name}")
        self.stored: dict[int, list[tuple[int, str, str | None]]] = {}
        self.titles: dict[int, str | None] = {}

    def text(self) -> str:
        """Return a unique text that starts with the user's name."""
        return f"{self.name} {next(self.world.serial)}"

    async def create(self) -> None:
        pool, key = self.world.pool, self.text() if self.chance.random() < 0.5 else None
        made = await chatdb.create_conversation(pool, user_id=self.name, title=self.name, key=key)
        assert (made.user_id, made.title, made.key, made.last_seq) == (self.name, self.name, key, 0)
        assert made.id not in self.stored
        self.stored[made.id], self.titles[made.id] = [], self.name

    def one(self) -> tuple[int, dict[str, Any]]:
        number = self.chance.choice(list(self.stored))
        return number, {"user_id": self.name, "conversation_id": number}

    def took(self, number: int, message: chatdb.Message, text: str, key: str | None) -> None:
        """Check an append's answer and remember it."""
        assert (message.user_id, message.conversation_id, message.content) == (self.name, number, text)
        assert message.key == key
        held = self.stored[number]
        assert message.seq == (held[-1][0] if held else 0) + 1 or self.world.gaps[number]
        held.append((message.seq, text, key))

    async def append(self) -> None:
        number, at = self.one()
        text = self.text()
        self.took(number, await chatdb.append_message(self.world.pool, role="user", content=text, **at), text, None)

    async def keyed(self) -> None:
        number, at = self.one()
        text = self.text()
        new = {"role": "user", "content": text, "key": text}
        first = await chatdb.append_message(self.world.pool, **new, **at)
        self.took(number, first, text, text)
        if self.chance.random() < 0.3:
            assert await chatdb.append_message(self.world.pool, **new, **at) == first
            assert await chatdb.get_message(self.world.pool, key=text, **at) == first

    async def several(self) -> None:
        number, at = self.one()
        texts = [self.text() for _ in range(self.chance.randint(1, 4))]
        made = await chatdb.append_messages(
            self.world.pool, messages=[{"role": "user", "content": text} for text in texts], **at
        )
        for message, text in zip(made, texts, strict=True):
            self.took(number, message, text, None)

    async def history(self) -> None:
        number, at = self.one()
        limit = self.chance.randint(1, 30)
        found = await chatdb.get_history(self.world.pool, limit=limit, **at)
        self.same(number, found, self.stored[number][-limit:])

    async def page(self) -> None:
        number, at = self.one()
        after = self.chance.randint(0, 30)
        found = await chatdb.list_messages(self.world.pool, after_seq=after, limit=20, **at)
        self.same(number, found, [each for each in self.stored[number] if each[0] > after][:20])

    async def iterate(self) -> None:
        number, at = self.one()
        found = [message async for message in chatdb.iter_messages(self.world.pool, batch=17, **at)]
        self.same(number, found, self.stored[number])

    def same(self, number: int, found: list[chatdb.Message], expected: list[tuple[int, str, str | None]]) -> None:
        self.world.rows += len(found)
        self.world.foreign += sum(not message.content.startswith(f"{self.name} ") for message in found)
        assert [(message.seq, message.content, message.key) for message in found] == expected
        assert {(message.user_id, message.conversation_id) for message in found} <= {(self.name, number)}

    async def conversations(self) -> None:
        found = await chatdb.list_conversations(self.world.pool, user_id=self.name, limit=10_000)
        self.world.rows += len(found)
        self.world.foreign += sum(each.user_id != self.name for each in found)
        assert {each.id: each.title for each in found if not each.key or " lost" not in each.key} == self.titles

    async def get(self) -> None:
        number, at = self.one()
        if not self.stored[number]:
            assert (await chatdb.get_conversation(self.world.pool, **at)).title == self.titles[number]
            return
        seq, text, key = self.chance.choice(self.stored[number])
        message = await chatdb.get_message(self.world.pool, seq=seq, **at)
        self.same(number, [message], [(seq, text, key)])

    async def rename(self) -> None:
        number, at = self.one()
        title = self.text()
        assert (await chatdb.update_conversation(self.world.pool, title=title, **at)).title == title
        self.titles[number] = title

    async def edit(self) -> None:
        number, at = self.one()
        if held := self.stored[number]:
            place = self.chance.randrange(len(held))
            seq, _, key = held[place]
            text = self.text()
            message = await chatdb.update_message(self.world.pool, seq=seq, content=text, **at)
            held[place] = (seq, text, key)
            self.same(number, [message], [held[place]])

    async def delete(self) -> None:
        number, at = self.one()
        held = self.stored[number]
        if self.chance.random() < 0.1 and len(self.stored) > 3:
            gone = await chatdb.delete_conversation(self.world.pool, **at)
            assert (gone.conversations, gone.messages) == (1, len(held))
            del self.stored[number], self.titles[number]
        elif held:
            seq = held[self.chance.randrange(len(held))][0]
            self.world.gaps[number] += 1
            assert (await chatdb.delete_message(self.world.pool, seq=seq, **at)).messages == 1
            held[:] = [each for each in held if each[0] != seq]

    async def transaction(self) -> None:
        number, at = self.one()
        texts = [self.text(), self.text()]
        undo = self.chance.random() < 0.3
        with contextlib.suppress(_UndoError):
            async with chatdb.transaction(self.world.pool) as connection:
                made = [await chatdb.append_message(connection, role="user", content=text, **at) for text in texts]
                await asyncio.sleep(self.chance.uniform(0, 0.002))
                if undo:
                    raise _UndoError
        if not undo:
            for message, text in zip(made, texts, strict=True):
                self.took(number, message, text, None)

    async def borrow(self) -> None:
        """Check that a borrowed connection's session is clean, then dirty it."""
        mine = self.text()
        async with self.world.pool.acquire() as connection:
            seen = "select current_setting('chaos.owner', true), current_setting('work_mem')"
            owner, memory = await connection.fetchrow(seen)
            assert not owner
            assert memory != "77MB"
            await connection.execute(f"set chaos.owner = '{mine}'; set work_mem = '77MB'; set search_path = ''")
            await connection.execute("create temp table mine (a int)")
            assert await connection.fetchval("select current_setting('chaos.owner')") == mine

    async def act(self) -> None:
        """Make one random call and record a failure, which another caller must have caused."""
        kind = self.chance.choices([*KINDS], [*KINDS.values()])[0] if self.stored else _User.create
        name = kind.__name__
        try:
            async with asyncio.timeout(HANG):
                await kind(self)
        except Exception as error:  # noqa: BLE001 - counted, and shown by the test
            self.world.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        self.world.calls[name] += 1


class _UndoError(Exception):
    """Ends a transaction without its writes."""


KINDS = {
    _User.create: 2,
    _User.append: 14,
    _User.keyed: 6,
    _User.several: 5,
    _User.history: 20,
    _User.page: 8,
    _User.iterate: 4,
    _User.conversations: 8,
    _User.get: 10,
    _User.rename: 3,
    _User.edit: 4,
    _User.delete: 4,
    _User.transaction: 6,
    _User.borrow: 6,
}
"""How often a user makes each call, in percent."""


class _World:
    """The pool, its users, and the disturbances beside them."""

    def __init__(self, loop: str, dsn: str) -> None:
        self.loop, self.dsn = loop, dsn
        self.chance = random.Random(loop)
        self.serial = itertools.count(1)
        self.calls: Counter[str] = Counter()
        self.beside: Counter[str] = Counter()
        self.gaps: Counter[int] = Counter()
        self.failures: list[str] = []
        self.loop_errors: list[dict[str, Any]] = []
        self.rows = self.foreign = 0
        self.stop = asyncio.Event()
        self.parent = os.getpid()
        self.ended: chatdb.pool.Pool
        self.pool: chatdb.pool.Pool

    def text(self, kind: str) -> str:
        return f"{kind} {next(self.serial)}"

    def ways(self, pool: chatdb.pool.Pool, lent: dict[str, Any] | None = None) -> dict[str, Callable[[], Any]]:
        """Return every use of a pool and of objects borrowed from it; each write is marked as refused."""
        at = self.at
        text = self.text("refused")

        async def in_transaction() -> None:
            async with chatdb.transaction(pool) as inside:
                await chatdb.append_message(inside, role="user", content=text, **at)

        found: dict[str, Callable[[], Any]] = {
            "read": lambda: chatdb.get_history(pool, **at),
            "append": lambda: chatdb.append_message(pool, role="user", content=text, **at),
            "keyed": lambda: chatdb.append_message(pool, role="user", content=text, key=text, **at),
            "create": lambda: chatdb.create_conversation(pool, user_id="outside", title=text),
            "list": lambda: chatdb.list_conversations(pool, user_id="outside"),
            "transaction": in_transaction,
            "fetch": lambda: pool.fetch("select pg_sleep(0.01)"),
            "acquire": pool.acquire,
            "close": pool.close,
            "expire": pool.expire_connections,
            "await": lambda: pool,
        }
        if lent:
            connection = lent["connection"]
            found |= {
                "connection": lambda: chatdb.append_message(connection, role="user", content=text, **at),
                "statement": lambda: lent["statement"].fetchval("astray"),
                "cursor": lambda: lent["cursor"].fetch(2),
                "release": lambda: pool.release(connection),
                "connection.close": connection.close,
                "copy": lambda: connection.copy_from_query("select 1", output=lambda _: None),
            }
        return found

    def expect_refused(self, place: str, answers: dict[str, str]) -> None:
        self.beside[place] += len(answers)
        self.failures += [f"{place}, {way}: {end}" for way, end in answers.items() if end != "refused"]

    def try_some(self, ways: dict[str, Callable[[], Any]], number: int) -> dict[str, str]:
        return {way: refused(ways[way]) for way in random.Random(number).sample(list(ways), 4)}

    # --- disturbances ---------------------------------------------------------------------------------------------

    async def cancel(self) -> None:
        """Start writes and reads and cancel them at any moment; nobody knows which writes are stored."""
        while not self.stop.is_set():
            text = self.text("cancelled")

            async def in_transaction(text: str = text) -> None:
                async with chatdb.transaction(self.pool) as connection:
                    await chatdb.append_message(connection, role="user", content=text, **self.at)

            async def borrowed(text: str = text) -> None:
                async with self.pool.acquire() as connection:
                    await connection.execute(f"set chaos.owner = '{text}'")
                    await connection.execute("select pg_sleep(0.01)")

            make = self.chance.choice(
                [
                    lambda text=text: chatdb.append_message(self.pool, role="user", content=text, **self.at),
                    lambda text=text: chatdb.append_message(self.pool, role="user", content=text, key=text, **self.at),
                    lambda: chatdb.get_history(self.pool, **self.at),
                    lambda: self.pool.fetch("select pg_sleep(0.02)"),
                    lambda: self.pool.fetch("begin"),  # never ended
                    in_transaction,
                    borrowed,
                ]
            )
            task = asyncio.create_task(make())
            await asyncio.sleep(self.chance.choice([0, 0, self.chance.uniform(0, 0.01)]))
            if self.chance.random() < 0.8:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.beside["cancelled"] += 1
            await asyncio.sleep(0.004)

    async def threads(self) -> None:
        """Call from event loops in other threads, and on a pool whose loop has ended."""
        for number in itertools.count():
            if self.stop.is_set():
                return
            async with self.lent() as lent:
                self.expect_refused(
                    "thread", await asyncio.to_thread(self.try_some, self.ways(self.pool, lent), number)
                )
            if number % 3 == 0:
                answers = await asyncio.to_thread(self.try_some, self.ways(self.ended), number)
                answers |= {f"{way} here": await self.here(make) for way, make in self.ways(self.ended).items()}
                self.expect_refused("ended loop", answers)
            await asyncio.sleep(self.pause)

    async def here(self, make: Callable[[], Any]) -> str:
        try:
            await make()
        except ConfigurationError:
            return "refused"
        except BaseException as error:  # noqa: BLE001 - shown by the test
            return f"{type(error).__name__}: {error}"
        return "done"

    @contextlib.asynccontextmanager
    async def lent(self) -> Any:
        """Yield a connection, a statement and a cursor, and check afterwards that they still work."""
        async with self.pool.acquire() as connection, connection.transaction():
            statement = await connection.prepare("select $1::text")
            cursor = await connection.cursor("select generate_series(1, 9)")
            yield {"connection": connection, "statement": statement, "cursor": cursor}
            assert await statement.fetchval("mine") == "mine"
            assert [row[0] for row in await cursor.fetch(2)] == [1, 2]

    async def forks(self) -> None:
        """Fork from a coroutine; the child uses what it inherited and exits in every way."""
        for number in itertools.count():
            if self.stop.is_set():
                return
            if number % 5 == 4:
                await self.fork_pool(number)
                continue
            async with self.lent() as lent:
                ways = self.ways(self.pool, lent)
                reading, writing = os.pipe()
                child = os.fork()
                if not child:
                    self.in_child(ways, number, writing)
                os.close(writing)
                told = await asyncio.to_thread(self.reap, child, reading)
            answers = dict(each.split("=", 1) for each in told.split("\n") if each)
            if len(answers) < 4:
                self.failures.append(f"child {number} told {told!r} only")
            self.expect_refused("forked process", answers)
            self.beside["forks"] += 1
            await asyncio.sleep(self.pause)

    def in_child(self, ways: dict[str, Callable[[], Any]], number: int, pipe: int) -> None:
        self.stop.set()
        answers = self.try_some(ways, number)
        some = random.Random(number).sample(list(ways), 4)
        answers |= {f"{way} in the inherited loop": self.inherited(lambda way=way: step(ways[way]())) for way in some}
        answers["terminate"] = self.inherited(self.pool.terminate)
        os.write(pipe, "\n".join(f"{way}={end}" for way, end in answers.items()).encode())
        os.close(pipe)
        # an exception that ends uvloop in a child aborts the parent
        if number % 3 == 1 and self.loop == "asyncio" and self.pool.get_size() == SIZE:
            # the executor's threads exist only in the parent, which shares its loop's wake-up pipe: leave both alone
            self.event_loop._default_executor = None
            self.event_loop._close_self_pipe = lambda: None
            raise random.Random(number).choice([SystemExit, KeyboardInterrupt])
        if number % 3 == 2:
            for task in self.tasks:
                with contextlib.suppress(Exception):
                    task.get_coro().close()
        os._exit(0)

    def inherited(self, use: Callable[[], None]) -> str:
        """Use the parent's loop in the child; return "refused" or what happened instead."""
        asyncio._set_running_loop(self.event_loop)
        try:
            use()
        except ConfigurationError:
            return "refused"
        except BaseException as error:  # noqa: BLE001 - shown by the test
            return f"{type(error).__name__}: {error}"
        finally:
            asyncio._set_running_loop(None)
        return "done"

    def reap(self, child: int, reading: int) -> str:
        """Read the child's report and wait for its exit."""
        with open(reading, "rb", closefd=True) as pipe:
            told = pipe.read().decode()
        end = time.monotonic() + 3
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                self.beside["children that did not end by themselves"] += 1  # harmless for the parent
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.005)
        return told

    async def fork_pool(self, number: int) -> None:
        global _inherited
        _inherited = self, number
        with FORK.Pool(2) as pool:
            asked = pool.map_async(in_worker, range(4))
            for answers in await asyncio.to_thread(asked.get, HANG):
                self.expect_refused("process pool", answers)
            pool.close()
            await asyncio.to_thread(pool.join)

    # --- the whole run ----------------------------------------------------------------------------------------------

    async def run(self, calls: int) -> None:
        self.pause = 0.02 if calls < 10_000 else 0.1
        self.event_loop: Any = asyncio.get_running_loop()
        self.event_loop.set_exception_handler(lambda _, context: self.loop_errors.append(context))
        async with chatdb.create_pool(self.dsn, min_size=SIZE, max_size=SIZE, acquire_timeout=30) as self.pool:
            made = await chatdb.create_conversation(self.pool, user_id="outside")
            self.at = {"user_id": "outside", "conversation_id": made.id}
            users = [_User(self, f"user{number}") for number in range(USERS)]

            async def live(user: _User) -> None:
                while sum(self.calls.values()) < calls and os.getpid() == self.parent:
                    await user.act()

            beside = [asyncio.create_task(work()) for work in (self.cancel, self.cancel, self.threads, self.forks)]
            self.tasks = [asyncio.create_task(live(user)) for user in users]
            await asyncio.gather(*self.tasks)
            self.stop.set()
            async with asyncio.timeout(HANG):
                await asyncio.gather(*beside)
            others = self.ended.get_size() if self.loop == "asyncio" else 0  # uvloop closes its sockets when it ends
            await assert_whole(self.pool, self.dsn, others)
        self.compare(users)

    def compare(self, users: list[_User]) -> None:
        """Compare the database's contents, read with psycopg, with what the users stored."""
        held: dict[tuple[str, int], list[tuple[int, str, str | None]]] = {}
        for user, number, title in query(self.dsn, "select user_id, id, title from chatdb.conversations"):
            assert user != "outside" or not title, "a refused conversation is stored"
            held[user, number] = []
        rows = "select user_id, conversation_id, seq, content, key from chatdb.messages order by 1, 2, 3"
        for user, number, seq, text, key in query(self.dsn, rows):
            self.foreign += not text.startswith("cancelled " if user == "outside" else f"{user} ")
            held[user, number].append((seq, text, key))
        assert not [text for each in held.values() for _, text, _ in each if text.startswith("refused")]
        of_users = {at: each for at, each in held.items() if at[0] not in ("outside", "ended")}
        assert of_users == {(user.name, number): each for user in users for number, each in user.stored.items()}
        self.beside["rows compared at the end"] = sum(map(len, held.values()))


_inherited: tuple[_World, int]


def in_worker(place: int) -> dict[str, str]:
    """Use the inherited pool in a process of a multiprocessing pool."""
    world, number = _inherited
    return world.try_some(world.ways(world.pool), number * 10 + place)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # ended loops; forks with threads
@pytest.mark.parametrize("loop", LOOPS)
def test_each_gets_what_is_its_own(request, dsn, loop):
    """Coroutines, threads, forks, cancellations and ended loops share a pool: no wrong rows, no innocent failures."""
    parent = os.getpid()
    calls = sized(request, 100_000, 2_000)
    world = _World(loop, dsn)

    async def opened() -> chatdb.pool.Pool:
        pool = await chatdb.create_pool(dsn, max_size=1)
        await chatdb.create_conversation(pool, user_id="ended")
        return pool

    begun = time.monotonic()
    try:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            world.ended = runner.run(opened())
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(asyncio.wait_for(world.run(calls), sized(request, 900, 120)))
    finally:
        if os.getpid() != parent:
            os._exit(0)
        del world.ended
        gc.collect()
    figure(
        f"{world.foreign} foreign of {world.rows:,} rows, {len(world.failures)} innocent failures of "
        f"{sum(world.calls.values()):,} calls, 0 refused writes stored ({loop}, {time.monotonic() - begun:.0f} s)"
    )
    for what, counted in (("calls", world.calls), ("beside", world.beside)):
        figure(f"{what}: " + ", ".join(f"{name} {number:,}" for name, number in counted.most_common()))
    assert world.failures[:20] == []
    assert world.foreign == 0
    left_open = "Resetting connection with an active transaction"  # asyncpg's message about an unended "begin"
    assert [error for error in world.loop_errors if not error["message"].startswith(left_open)] == []
    assert sum(world.calls.values()) >= calls
