"""Guests that become users while they write: nothing is lost, nothing stays behind, and no deadlock occurs."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

import chatdb
from chatdb import NotFoundError, StaleError
from tests.support.chaos import LOOPS, figure, query, sized

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

TASKS = 16

STORED = """
    select c.user_id, m.content, m.state, p.parts
    from chatdb.conversations as c
    inner join chatdb.messages as m on m.user_id = c.user_id and m.conversation_id = c.id
    left join lateral (
        select string_agg(p.content, '' order by p.start) as parts from chatdb.message_parts as p
        where p.user_id = m.user_id and p.conversation_id = m.conversation_id and p.seq = m.seq
    ) as p on true
"""
ORPHANS = """
    select
        (select count(*) from chatdb.messages as m where not exists (
            select from chatdb.conversations as c where (c.user_id, c.id) = (m.user_id, m.conversation_id)
        )),
        (select count(*) from chatdb.message_parts as p where not exists (
            select from chatdb.messages as m
            where (m.user_id, m.conversation_id, m.seq) = (p.user_id, p.conversation_id, p.seq)
              and m.state = 'streaming'
        )),
        (select count(*) from chatdb.messages as m where m.state = 'streaming' and not exists (
            select from chatdb.message_parts as p
            where (m.user_id, m.conversation_id, m.seq) = (p.user_id, p.conversation_id, p.seq) and p.start = -1
        ))
"""
"""Messages without a conversation, parts without a stream, and streams without parts."""
KEYS = "select count(*) from chatdb.conversations where user_id = 'ann' and key = 'chat'"
DEADLOCKS = "select deadlocks from pg_stat_database where datname = current_database()"


@pytest.mark.parametrize("loop", LOOPS)
def test_a_guest_who_writes_is_moved_again_and_again(dsn: str, loop: str, request: pytest.FixtureRequest) -> None:
    """16 tasks append, stream, create and delete as a guest, while the guest is moved to a user without pause."""
    rounds = sized(request, 150, 25)
    acknowledged: set[str] = set()
    extended: dict[str, int] = {}
    deleted: set[str] = set()
    answers: Counter[str] = Counter()

    async def guest(db: chatdb.Pool, task: int) -> None:
        chance = random.Random(task)
        for number in range(rounds):
            name = f"{task}.{number}"
            at: dict[str, Any] = {"user_id": "guest", "conversation_key": "chat" if task % 2 else f"chat {task}"}
            try:
                match chance.randrange(8):
                    case 0 | 1 | 2:
                        await chatdb.append_message(db, **at, role="user", content=name, key=name, create=True)
                        acknowledged.add(name)
                    case 3 | 4 | 5:
                        await chatdb.append_message(db, **at, role="user", content="?", key=f"{name}?", create=True)
                        await chatdb.start_message(db, **at, key=name)
                        length = 0
                        for _ in range(chance.randrange(1, 6)):
                            length = await chatdb.extend_message(db, **at, key=name, offset=length, text=name + " ")
                            extended[name] = length
                        if chance.random() < 0.6:
                            await chatdb.finish_message(db, **at, key=name)
                    case 6:
                        await chatdb.create_conversation(
                            db, user_id="guest", messages=[{"role": "user", "content": name}]
                        )
                        acknowledged.add(name)
                    case _:
                        only: dict[str, Any] = {"user_id": "guest", "conversation_key": name}
                        await chatdb.append_message(db, **only, role="user", content=name, create=True)
                        await chatdb.delete_conversation(db, **only)
                        deleted.add(name)
                answers["written"] += 1
            except NotFoundError:
                answers["moved meanwhile"] += 1
            except chatdb.UnavailableError:  # moved during each of its attempts; nothing is written
                answers["given up"] += 1
            await asyncio.sleep(0)

    async def mover(db: chatdb.Pool, done: asyncio.Event) -> None:
        while not done.is_set():
            try:
                moved = await chatdb.move_user(db, user_id="guest", to_user_id="ann")
                answers["moves"] += bool(moved.conversations)
                answers["messages moved"] += moved.messages
            except chatdb.UnavailableError:
                answers["moves given up"] += 1
            await asyncio.sleep(random.uniform(0, 0.02))

    async def target(db: chatdb.Pool, done: asyncio.Event) -> None:
        at: dict[str, Any] = {"user_id": "ann", "conversation_key": "chat"}
        while not done.is_set():
            try:
                created = await chatdb.create_conversation(db, user_id="ann", key="chat", expected=chatdb.NEW)
                await chatdb.delete_conversation(db, **at, expected=created)
            except (NotFoundError, StaleError):  # moved here with this key
                await db.execute("update chatdb.conversations set key = null where user_id = 'ann' and key = 'chat'")

    async def main() -> None:
        async with chatdb.create_pool(dsn, max_size=TASKS + 4, retries=0) as db:
            done = asyncio.Event()
            others = [asyncio.ensure_future(each) for each in (mover(db, done), mover(db, done), target(db, done))]
            await asyncio.gather(*(guest(db, task) for task in range(TASKS)))
            done.set()
            await asyncio.gather(*others)
            await chatdb.move_user(db, user_id="guest", to_user_id="ann")

    ((before,),) = query(dsn, DEADLOCKS)
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
    ((after,),) = query(dsn, DEADLOCKS)
    stored = query(dsn, STORED)
    texts = Counter(content if state != "streaming" else parts for _, content, state, parts in stored)
    found = {name: len(text) for text in texts for name in [text.split(" ")[0]] if text.strip()}
    figure(f"{dict(answers)}, {len(acknowledged):,} messages, {len(extended):,} streams, {after - before} deadlocks")
    assert {user for user, *_ in stored} == {"ann"}
    assert acknowledged <= texts.keys()
    assert not deleted & texts.keys()
    assert {name: length for name, length in extended.items() if found.get(name, 0) < length} == {}
    assert query(dsn, ORPHANS) == [(0, 0, 0)]
    assert query(dsn, KEYS)[0][0] <= 1
    assert after == before
    assert answers["moves"] > rounds / 10
    assert answers["moves given up"] == 0
    assert answers["given up"] < answers["written"] / 20
