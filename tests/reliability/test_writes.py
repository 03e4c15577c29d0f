"""All writes at once on few conversations: no deadlock, one winner per revision, and order as if one after another."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import chatdb
from chatdb import NEW, ConflictError, NotFoundError, StaleError
from tests.support.chaos import LOOPS, figure, query, sized
from tests.support.proxy import Proxy, Statement

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

USER = {"user_id": "ann"}
TASKS = 16
CONVERSATIONS = 6
EXPECTED_ERRORS = (ConflictError, NotFoundError, StaleError)

DANGLING = """
    select m.conversation_id, m.seq, m.parent_seq from chatdb.messages as m
    where m.parent_seq > 0 and not exists (
        select from chatdb.messages as p
        where p.user_id = m.user_id and p.conversation_id = m.conversation_id and p.seq = m.parent_seq
    )
"""
"""The messages whose parent is not stored."""
WRONG_HEADS = """
    select c.id, c.last_seq, h.seq, newest.seq
    from (
        select *, case when head_last_seq = last_seq then head_seq else last_seq end as effective
        from chatdb.conversations
    ) as c
    left join chatdb.messages as h on h.user_id = c.user_id and h.conversation_id = c.id and h.seq = c.effective
    left join lateral (
        select max(m.seq) as seq from chatdb.messages as m where m.user_id = c.user_id and m.conversation_id = c.id
    ) as newest on true
    where (c.effective > 0 and h.seq is null)
       or (c.head_last_seq = c.last_seq and c.head_is_newest and newest.seq > c.effective)
"""
"""The conversations whose head is not stored, or is not the newest message although it says so."""

WRONG_STREAMS = """
    with text as (
        select user_id, conversation_id, seq, min(start) as first, max(length) as length, max(bytes) as bytes,
            max(last_start) as last_start, max(start) as top, string_agg(content, '' order by start) as content
        from chatdb.message_parts
        group by user_id, conversation_id, seq
    )
    select m.conversation_id, m.seq, m.state, t.*
    from chatdb.messages as m
    full join text as t on t.user_id = m.user_id and t.conversation_id = m.conversation_id and t.seq = m.seq
    where (m.state is not distinct from 'streaming') <> (t.first is not distinct from -1)
       or t.length <> char_length(t.content) or t.bytes <> octet_length(t.content) or t.top > t.last_start
"""
"""The messages with parts that do not stream or that stream without parts, and streams of another length."""


def message(chance: random.Random) -> dict[str, Any]:
    """Return a message that has one of a few keys, or none."""
    return {"role": "user", "content": chance.choice("ab"), "key": chance.choice([None, *"123456"])}


def writes(
    db: chatdb.Pool, chance: random.Random, known: dict[str, chatdb.Conversation]
) -> list[Callable[[], Awaitable[Any]]]:
    """Return each write as a call on a conversation chosen at random."""
    name = str(chance.randrange(CONVERSATIONS))
    at = USER | {"conversation_key": name}
    stored = known.get(name)
    expected = chance.choice([None, stored])
    patch = {chance.choice("xyz"): chance.choice([None, 1])}
    place = {"seq": chance.randrange(1, 20)} if chance.random() < 0.5 else {"key": chance.choice("123456")}
    batch = [{"role": "user", "content": key, "key": key} for key in chance.sample("123456789", chance.randrange(1, 6))]
    parent = chance.randrange(20)
    return [
        lambda: chatdb.create_conversation(db, **USER, key=name, messages=[message(chance)]),
        lambda: chatdb.create_conversation(db, **USER, key=name, expected=NEW),
        lambda: chatdb.upsert_conversation(db, **USER, key=name, title=chance.choice("ab")),
        lambda: chatdb.upsert_conversation(db, **USER, key=name, metadata_patch=patch, archived=chance.random() < 0.5),
        lambda: chatdb.update_conversation(db, **at, metadata_patch=patch, expected=expected),
        lambda: chatdb.update_conversation(db, **at, archived=chance.random() < 0.5, pinned=chance.random() < 0.5),
        lambda: chatdb.delete_conversation(db, **at, expected=expected),
        lambda: chatdb.append_message(db, **at, **message(chance)),
        lambda: chatdb.append_message(db, **at, **message(chance), create=True, conversation_metadata_patch=patch),
        lambda: chatdb.append_message(db, **at, **message(chance), expected=expected),
        lambda: chatdb.append_messages(db, **at, messages=[message(chance) | {"key": None} for _ in range(3)]),
        lambda: chatdb.append_messages(db, **at, messages=batch, create=True),
        lambda: chatdb.append_messages(db, **at, messages=batch, on_existing="skip", expected=expected),
        lambda: chatdb.upsert_message(db, **at, key=chance.choice("123456"), role="user", content=chance.choice("ab")),
        lambda: chatdb.update_message(db, **at, **place, metadata_patch=patch),
        lambda: chatdb.delete_message(db, **at, **place),
        lambda: chatdb.delete_messages_after(db, **at, after_seq=chance.randrange(20)),
        lambda: chatdb.pop_message(db, **at),
        lambda: chatdb.append_message(db, **at, **message(chance), parent_seq=parent),
        lambda: chatdb.append_message(db, **at, **message(chance), parent_seq=parent, expected=expected),
        lambda: chatdb.append_messages(db, **at, messages=batch, parent_seq=parent),
        lambda: chatdb.append_messages(db, **at, messages=batch, parent_seq=parent, on_existing="skip", create=True),
        lambda: chatdb.switch_branch(db, **at, **place, expected=expected),
        lambda: chatdb.delete_branch(db, **at, **place, expected=expected),
        lambda: chatdb.start_message(db, **at, key=chance.choice([None, *"123456"])),
        lambda: chatdb.start_message(db, **at, key=chance.choice([None, *"123456"]), parent_seq=parent),
        lambda: chatdb.extend_message(db, **at, **place, offset=0, text=chance.choice(["", "a", "é👋"])),
        lambda: chatdb.extend_message(db, **at, **place, offset=chance.randrange(4), text=chance.choice(["b", "ü"])),
        lambda: chatdb.finish_message(db, **at, **place, aborted=chance.random() < 0.5),
        lambda: chatdb.fork_conversation(db, **at, new_key=str(chance.randrange(CONVERSATIONS))),
        lambda: (
            chatdb.replace_messages_after(db, **at, after_seq=chance.randrange(20), messages=batch, expected=stored)
            if stored
            else chatdb.pop_message(db, **at)
        ),
    ]


@pytest.mark.parametrize("loop", LOOPS)
def test_no_deadlock(dsn: str, loop: str, request: pytest.FixtureRequest) -> None:
    """Random writes of 16 tasks to six conversations never deadlock, and leave every seq and revision right."""
    calls = sized(request, 20_000, 2_000)
    outcomes: Counter[str] = Counter()

    async def work(db: chatdb.Pool, number: int) -> None:
        chance = random.Random(f"{loop} {number}")
        known: dict[str, chatdb.Conversation] = {}
        for _ in range(calls // TASKS):
            for conversation in await chatdb.list_conversations(db, **USER, archived=None):
                known[str(conversation.key)] = conversation
            call = chance.choice(writes(db, chance, known))
            try:
                await call()
            except EXPECTED_ERRORS as error:
                outcomes[type(error).__name__] += 1
            else:
                outcomes["done"] += 1

    async def run() -> None:
        # retries=0: the pool would send a statement again after a deadlock
        async with chatdb.create_pool(dsn, max_size=TASKS, retries=0) as db:
            await asyncio.gather(*(work(db, number) for number in range(TASKS)))

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())
    deadlocks = query(dsn, "select deadlocks from pg_stat_database where datname = current_database()")
    assert deadlocks == [(0,)]
    assert sum(outcomes.values()) == calls // TASKS * TASKS
    assert (
        query(
            dsn,
            """
        select c.id from chatdb.conversations as c
        left join chatdb.messages as m on m.user_id = c.user_id and m.conversation_id = c.id
        group by c.id, c.last_seq having coalesce(max(m.seq), 0) > c.last_seq
        """,
        )
        == []
    )
    assert query(dsn, DANGLING) == []
    assert query(dsn, WRONG_HEADS) == []
    assert query(dsn, WRONG_STREAMS) == []
    figure(f"{sum(outcomes.values())} random writes of {TASKS} tasks on {loop}: 0 deadlocks; {dict(outcomes)}")


def attempts(
    db: chatdb.Pool, conversation: chatdb.Conversation, writer: int, chance: random.Random
) -> list[Callable[[], Awaitable[Any]]]:
    """Return each write that takes `expected`, as a call that changes the conversation if it is the first."""
    at = USER | {"conversation_id": conversation.id, "expected": chance.choice([conversation, conversation.etag])}
    text = f"{conversation.revision} {writer}"
    new = {"role": "user", "content": text}
    last = conversation.last_seq
    return [
        lambda: chatdb.append_message(db, **at, **new),
        lambda: chatdb.append_message(db, **at, **new, key=text),
        lambda: chatdb.append_messages(db, **at, messages=[new | {"key": f"{text} 1"}, new | {"key": text}]),
        lambda: chatdb.append_messages(db, **at, messages=[new | {"key": text}], on_existing="skip"),
        lambda: chatdb.upsert_message(db, **at, key=text, role="user", content=text),
        lambda: chatdb.replace_messages_after(db, **at, after_seq=last, messages=[new]),
        lambda: chatdb.update_conversation(db, **at, title=text),
        lambda: chatdb.update_conversation(db, **at, metadata_patch={"writer": text}),
        lambda: chatdb.update_message(db, **at, seq=1, content=text),
    ]


@pytest.mark.parametrize("loop", LOOPS)
def test_one_winner(dsn: str, loop: str, request: pytest.FixtureRequest) -> None:
    """Of eight writers that expect the same revision, exactly one writes, and the others raise StaleError."""
    races, writers = sized(request, 1_000, 100), 8
    chance = random.Random(loop)

    async def run() -> None:
        async with chatdb.create_pool(dsn, max_size=writers, retries=0) as db:
            await asyncio.gather(*(db.fetch("select pg_sleep(0.1)") for _ in range(writers)))
            await chatdb.append_message(db, **USER, conversation_key="k", role="user", content="1", create=True)
            for _ in range(races):
                before = await chatdb.get_conversation(db, **USER, conversation_key="k")
                calls = [chance.choice(attempts(db, before, writer, chance)) for writer in range(writers)]
                results = await asyncio.gather(*(call() for call in calls), return_exceptions=True)
                lost = [each for each in results if isinstance(each, StaleError)]
                assert len(lost) == writers - 1, results
                after = await chatdb.get_conversation(db, **USER, conversation_key="k")
                assert after.revision > before.revision
                # the winner repeats its call, as after a lost answer: with a key it succeeds, and writes nothing
                (winner,) = (call for call, each in zip(calls, results, strict=True) if each not in lost)
                again = (await asyncio.gather(winner(), return_exceptions=True))[0]
                (first,) = (each for each in results if each not in lost)
                assert isinstance(again, StaleError) or again in ([], first), again
                assert await chatdb.get_conversation(db, **USER, conversation_key="k") == after

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())
    figure(f"{races} races of {writers} writers with expected on {loop}: exactly one winner each")


@pytest.mark.parametrize("loop", LOOPS)
def test_one_creator(dsn: str, loop: str, request: pytest.FixtureRequest) -> None:
    """Of eight writers that expect no conversation, exactly one creates it, in each way of creating."""
    races, writers = sized(request, 300, 40), 8

    async def run() -> None:
        async with chatdb.create_pool(dsn, max_size=writers, retries=0) as db:
            for race in range(races):
                key, new = f"k{race}", {"role": "user", "content": "hello"}
                at = USER | {"conversation_key": key, "create": True, "expected": NEW}
                ways: list[Callable[[], Awaitable[Any]]] = [
                    lambda at=at: chatdb.create_conversation(db, **USER, key=at["conversation_key"], expected=NEW),
                    lambda at=at, new=new: chatdb.create_conversation(
                        db, **USER, key=at["conversation_key"], expected=NEW, messages=[new]
                    ),
                    lambda at=at, new=new: chatdb.append_message(db, **at, **new),
                    lambda at=at, new=new: chatdb.append_messages(db, **at, messages=[new, new]),
                ]
                chosen = [race + writer if race % 2 else race // 2 for writer in range(writers)]
                results = await asyncio.gather(*(ways[way % 4]() for way in chosen), return_exceptions=True)
                assert sum(isinstance(each, StaleError) for each in results) == writers - 1, results
                conversation = await chatdb.get_conversation(db, **USER, conversation_key=key)
                history = await chatdb.get_history(db, **USER, conversation_key=key)
                assert conversation.last_seq == conversation.revision == len(history)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())
    figure(f"{races} races of {writers} writers with NEW on {loop}: exactly one winner each")


KEYED: dict[str, Callable[..., Awaitable[Any]]] = {
    "append_message": lambda db, at, expected: chatdb.append_message(
        db, **at, expected=expected, role="user", content="new", key="n"
    ),
    "append_messages": lambda db, at, expected: chatdb.append_messages(
        db, **at, expected=expected, messages=[{"role": "user", "content": key, "key": key} for key in "xyz"]
    ),
    "replace_messages_after": lambda db, at, expected: chatdb.replace_messages_after(
        db, **at, expected=expected, after_seq=1, messages=[{"role": "user", "content": "new", "key": "n"}]
    ),
    "upsert_message": lambda db, at, expected: chatdb.upsert_message(
        db, **at, expected=expected, key="2", role="assistant", content="other"
    ),
}
"""The writes that take `expected` and find what an earlier try stored."""


@pytest.mark.parametrize("name", KEYED)
async def test_a_retry_after_a_lost_answer(dsn: str, name: str) -> None:
    """If the answer to a keyed write with `expected` is lost, the same call succeeds and writes nothing more."""
    lost: list[str] = []

    def watch(statement: Statement) -> bool:
        if f"chatdb.{name}" in statement.sql and statement.answered and not lost:
            lost.append(name)
            return True
        return False

    async with chatdb.create_pool(dsn) as direct:
        turns = [{"role": "user", "content": key, "key": key} for key in "123"]
        before = await chatdb.create_conversation(direct, **USER, key="k", messages=turns)
        at = USER | {"conversation_id": before.id}
        with Proxy(dsn, watch=watch) as proxy:
            async with chatdb.create_pool(proxy.dsn, retries=0) as db:
                with pytest.raises(chatdb.UnavailableError):
                    await KEYED[name](db, at, before)
                written = await chatdb.load_conversation(direct, **at)
                assert written[0].revision > before.revision
                again = await KEYED[name](db, at, before)
        assert await chatdb.load_conversation(direct, **at) == written
        assert (again if isinstance(again, list) else [again])[-1] in written[1]
    assert lost == [name]
