"""Streams under kills, cut connections, and several writers: acknowledged text is never lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
from collections import Counter
from typing import Any

import pytest

import chatdb
from chatdb import ChatDBError, ConflictError, ConversationNotFoundError, MessageNotFoundError, UnavailableError
from tests.support.chaos import figure, query, restart, sized, until
from tests.support.proxy import Proxy, Statement

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900), pytest.mark.usefixtures("repetitions")]

USER = "ada"
HANG = 600
STREAMS = 200
TASKS = 16
TOKENS = 60

WRITER = """
import asyncio, os, random, sys
import chatdb

async def main(dsn, conversation, file, streams, tokens):
    record = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def write(number):
        text = "".join(f"{number}.{token}\U0001f44d " for token in range(tokens))
        try:
            stream = chatdb.stream_message(
                pool, user_id="ada", conversation_id=conversation, key=str(number), flush_every=0.02
            )
            async with stream:
                position = stream.offset
                while position < len(text):
                    size = random.randrange(1, 20)
                    await stream.write(text[position:position + size])
                    position += size
                    if random.random() < 0.1:
                        await stream.flush()  # on a busy machine, or it would outrun what is acknowledged
                    if stream.offset > 0:
                        os.write(record, f"{number} {stream.offset}\\n".encode())
                    await asyncio.sleep(random.uniform(0, 0.05))
        except chatdb.ConflictError:
            pass  # already finished

    async with chatdb.create_pool(dsn, max_size=8) as pool, asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(write(number))

asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
"""
"""A process that streams messages, continues those it finds, and records which lengths were acknowledged."""

STORED = """
    select m.key, m.state, case when m.state = 'streaming' then (
        select coalesce(string_agg(p.content, '' order by p.start), '') from chatdb.message_parts as p
        where p.user_id = m.user_id and p.conversation_id = m.conversation_id and p.seq = m.seq
    ) else m.content end
    from chatdb.messages as m
"""
ORPHANS = """
    select count(*) from chatdb.message_parts as p
    where not exists (
        select from chatdb.messages as m
        where m.user_id = p.user_id and m.conversation_id = p.conversation_id and m.seq = p.seq
          and m.state = 'streaming'
    )
"""
"""Parts without a message that is streamed."""
BROKEN = """
    select count(*)
    from chatdb.messages as m
    left join chatdb.message_parts as s
        on s.user_id = m.user_id and s.conversation_id = m.conversation_id and s.seq = m.seq and s.start = -1
    left join lateral (
        select coalesce(sum(char_length(p.content)), 0) as length, coalesce(sum(octet_length(p.content)), 0) as bytes,
            bool_and(p.start = p.expected) as unbroken
        from (
            select content, start, coalesce(
                sum(char_length(content)) over (order by start rows between unbounded preceding and 1 preceding), 0
            ) as expected
            from chatdb.message_parts as q
            where q.user_id = m.user_id and q.conversation_id = m.conversation_id and q.seq = m.seq and q.start >= 0
        ) as p
    ) as t on true
    where m.state = 'streaming'
      and (s.length, s.bytes, true) is distinct from (t.length, t.bytes, coalesce(t.unbroken, true))
"""
"""Streams whose parts have a gap or an overlap, or another length than the stream's row says."""


def text_of(number: int, tokens: int = TOKENS) -> str:
    """Return the whole text of a stream: no two places look the same."""
    return "".join(f"{number}.{token}👍 " for token in range(tokens))


def compare(dsn: str, acknowledged: dict[int, int], tokens: int = TOKENS) -> tuple[int, int]:
    """Return how many acknowledged characters are lost, and how many characters are stored at another place."""
    stored = {int(key): text for key, _, text in query(dsn, STORED)}
    lost = sum(max(0, length - len(stored.get(number, ""))) for number, length in acknowledged.items())
    wrong = sum(
        sum(a != b for a, b in zip(text, text_of(number, tokens), strict=False))
        + max(0, len(text) - len(text_of(number, tokens)))
        for number, text in stored.items()
    )
    return lost, wrong


def assert_no_rests(dsn: str) -> None:
    """Assert that all parts belong to messages that are streamed, and are whole."""
    assert query(dsn, ORPHANS) == [(0,)]
    assert query(dsn, BROKEN) == [(0,)]


# kills


async def test_a_killed_writer(request, durable, durable_dsn, tmp_path):
    """A writer killed in the middle of 200 streams loses nothing acknowledged; its successor continues each of them."""
    kills = sized(request, 10, 2)
    async with chatdb.create_pool(durable_dsn) as pool:
        conversation = await chatdb.create_conversation(pool, user_id=USER)
    file = tmp_path / "acknowledged"
    chance = random.Random(1)
    interrupted = 0

    def acknowledged() -> dict[int, int]:
        lengths: dict[int, int] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            number, length = map(int, line.split())
            lengths[number] = max(length, lengths.get(number, 0))
        return lengths

    for number in range(kills + 1):
        writer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, durable_dsn, str(conversation.id), str(file), str(STREAMS), str(TOKENS)
        )
        if number == kills:
            assert await asyncio.wait_for(writer.wait(), HANG) == 0
            break
        share = len(text_of(0)) * STREAMS * (number + 1) / (kills + 2)
        await until(lambda share=share: sum(acknowledged().values()) > share, HANG)
        await asyncio.sleep(chance.uniform(0, 0.3))
        writer.kill()
        assert await writer.wait() == -signal.SIGKILL
        interrupted += sum(state == "streaming" and text != "" for _, state, text in query(durable_dsn, STORED))
        assert compare(durable_dsn, acknowledged()) == (0, 0)
        assert_no_rests(durable_dsn)

    figure(
        f"kill -9 of a writer of {STREAMS} streams: 0 of {sum(acknowledged().values()):,} acknowledged characters "
        f"lost, 0 doubled; {interrupted:,} streams interrupted in {kills} kills"
    )
    assert interrupted > STREAMS // 2
    whole = {int(key): (state, text) for key, state, text in query(durable_dsn, STORED)}
    assert whole == {number: (None, text_of(number)) for number in range(STREAMS)}
    assert query(durable_dsn, "select count(*) from chatdb.message_parts") == [(0,)]


async def test_a_killed_server(request, durable, durable_dsn):
    """After kill -9 of all server processes in the middle of 200 streams, no acknowledged character is lost."""
    kills = sized(request, 10, 1)
    tokens = TOKENS * kills
    acknowledged: dict[int, int] = {}
    finished: set[int] = set()
    failed: Counter[str] = Counter()

    async def insist(name: str, **arguments: Any) -> Any:
        while True:
            try:
                return await getattr(chatdb, name)(pool, **at, **arguments)
            except UnavailableError as error:
                failed[type(error).__name__] += 1
                await asyncio.sleep(0.02)

    async def write(number: int) -> None:
        chance = random.Random(number)
        text, key = text_of(number, tokens), str(number)
        assert (await insist("start_message", key=key)).content == ""
        length = 0
        while length < len(text):
            if chance.random() < 0.1:  # as after a restart of the writer: what is stored can be more
                length = (await insist("read_message", key=key)).offset
            size = chance.randrange(1, 40)
            length = await insist("extend_message", key=key, offset=length, text=text[length : length + size])
            acknowledged[number] = length
            await asyncio.sleep(chance.uniform(0, 0.05))
        if number % 2:
            assert (await insist("finish_message", key=key)).content == text
        finished.add(number)

    async def kill() -> None:
        for number in range(1, kills + 1):
            share = len(text_of(0, tokens)) * STREAMS * number / (kills + 1)
            await until(lambda share=share: sum(acknowledged.values()) > share, HANG)
            assert len(finished) < STREAMS
            await asyncio.to_thread(restart, durable)

    async with chatdb.create_pool(durable_dsn, max_size=16, acquire_timeout=10, command_timeout=10, retries=0) as pool:
        conversation = await chatdb.create_conversation(pool, user_id=USER)
        at: dict[str, Any] = {"user_id": USER, "conversation_id": conversation.id}
        async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
            group.create_task(kill())
            for number in range(STREAMS):
                group.create_task(write(number))
    await asyncio.to_thread(restart, durable)

    lost, wrong = compare(durable_dsn, acknowledged, tokens)
    figure(
        f"kill -9 of the server under {STREAMS} streams: {lost} of {sum(acknowledged.values()):,} acknowledged "
        f"characters lost, {wrong} doubled, in {kills + 1} kills; calls that failed: {failed.total():,}"
    )
    assert (lost, wrong) == (0, 0)
    assert failed.total() > 0
    stored = {int(key): (state, len(text)) for key, state, text in query(durable_dsn, STORED)}
    assert stored == {
        number: (None if number % 2 else "streaming", len(text_of(number, tokens))) for number in range(STREAMS)
    }
    assert_no_rests(durable_dsn)


# several writers


async def test_extend_against_a_foreign_finish(request, durable, durable_dsn):
    """A finish from elsewhere leaves out no text whose extension was acknowledged, and adds none that was refused."""
    races = sized(request, 1_000, 150)
    lost = added = characters = 0

    async def race(number: int) -> None:
        nonlocal lost, added, characters
        chance = random.Random(number)
        conversation = await chatdb.create_conversation(writers, user_id=USER)
        at: dict[str, Any] = {"user_id": USER, "conversation_id": conversation.id, "seq": 1}
        await chatdb.start_message(writers, user_id=USER, conversation_id=conversation.id)

        async def extend() -> str:
            text = ""
            for token in range(1_000):
                try:
                    await chatdb.extend_message(writers, **at, offset=len(text), text=f"{token} ")
                except ConflictError:
                    break
                text += f"{token} "
            return text

        async def finish() -> str:
            await asyncio.sleep(chance.uniform(0, 0.05))
            return (await chatdb.finish_message(finishers, **at, aborted=number % 2 == 0)).content

        acknowledged, content = await asyncio.gather(extend(), finish())
        assert (await chatdb.get_message(writers, **at)).content == content
        characters += len(acknowledged)
        lost += not content.startswith(acknowledged)
        added += len(content) > len(acknowledged)

    async def races_in_turn(numbers: Any) -> None:
        for number in numbers:
            await race(number)

    async with (
        chatdb.create_pool(durable_dsn, max_size=8) as writers,
        chatdb.create_pool(durable_dsn, max_size=8) as finishers,
    ):
        numbers = iter(range(races))
        async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(races_in_turn(numbers))
    figure(f"extend against finish: {lost} of {races:,} lost an acknowledged part ({characters:,} characters)")
    assert (lost, added) == (0, 0)
    assert query(durable_dsn, "select count(*) from chatdb.message_parts") == [(0,)]


async def test_two_writers_of_one_stream(request, dsn):
    """Several writers that extend one message at the same time leave neither a gap nor an overlap."""
    streams = sized(request, 100, 10)
    refused = stored = reads = 0
    text = text_of(7, 100)

    async def write(at: dict[str, Any], seed: int) -> None:
        nonlocal refused, stored
        chance = random.Random(seed)
        length = 0
        while length < len(text):
            size = chance.randrange(1, 20)
            try:
                length = await chatdb.extend_message(pool, **at, offset=length, text=text[length : length + size])
                stored += 1
            except ConflictError:
                refused += 1
                length = (await chatdb.read_message(pool, **at, offset=2**62)).offset

    async def read(at: dict[str, Any], writers: list[asyncio.Task[None]]) -> None:
        nonlocal reads
        while not all(writer.done() for writer in writers):
            tail = await chatdb.read_message(pool, **at)
            message = await chatdb.get_message(pool, **at)
            assert tail.text == text[: tail.offset]
            assert message.content == text[: len(message.content)]
            reads += 1

    async with chatdb.create_pool(dsn, max_size=8) as pool:
        conversation = await chatdb.create_conversation(pool, user_id=USER)
        for number in range(streams):
            message = await chatdb.start_message(pool, user_id=USER, conversation_id=conversation.id)
            at: dict[str, Any] = {"user_id": USER, "conversation_id": conversation.id, "seq": message.seq}
            async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
                writers = [group.create_task(write(at, 3 * number + each)) for each in range(3)]
                group.create_task(read(at, writers))
            assert_no_rests(dsn)
            assert (await chatdb.finish_message(pool, **at)).content == text
    figure(f"3 writers of each of {streams} streams: {stored:,} stored, {refused:,} refused, {reads:,} reads, 0 broken")
    assert refused > streams


# calls that are repeated


async def test_repeated_calls(request, dsn, repetitions):
    """Start, extend and finish that are sent again after a cut connection change nothing more."""
    streams = sized(request, 200, 20)
    chance = random.Random(3)
    cuts: Counter[str] = Counter()

    def cut(statement: Statement) -> bool:
        if "chatdb." not in statement.sql or chance.random() < 0.7:
            return False
        name = statement.sql.partition("chatdb.")[2].partition(" ")[0]
        cuts[f"{name} {'after' if statement.answered else 'before'} the server"] += 1
        return True

    async def insist(name: str, **arguments: Any) -> Any:
        while True:
            with contextlib.suppress(UnavailableError):
                return await getattr(chatdb, name)(pool, **at, **arguments)

    async def write(number: int) -> None:
        key = str(number)
        text = text_of(number, 20)
        message = await insist("start_message", key=key)
        assert (message.content, message.state) == ("", "streaming")
        length = 0
        while length < len(text):
            length = await insist("extend_message", key=key, offset=length, text=text[length : length + 25])
            if number % 4 == 0:
                proxy.cut()  # so that the next statement is prepared, and seen by the proxy, again
        finished = await insist("finish_message", key=key, token_count=number)
        assert (finished.content, finished.state, finished.token_count) == (text, None, number)
        assert await insist("start_message", key=key) == finished

    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=4, max_inactive_connection_lifetime=0) as pool:
            conversation = await chatdb.create_conversation(pool, user_id=USER)
            at: dict[str, Any] = {"user_id": USER, "conversation_id": conversation.id}
            proxy.watch = cut
            proxy.cut()
            for first in range(0, streams, 4):
                async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
                    for number in range(first, first + 4):
                        group.create_task(write(number))
            proxy.watch = None
            now = await insist("get_conversation")
    met = ", ".join(f"{count:,} {name}" for name, count in sorted(cuts.items()))
    figure(f"{streams} streams through cut connections ({met}; repeated by chatdb itself: {len(repetitions):,}): exact")
    assert (now.last_seq, now.revision) == (streams, 2 * streams)
    assert {name.split()[0] for name in cuts} >= {"start_message", "extend_message", "finish_message"}
    assert query(dsn, "select count(*) from chatdb.message_parts") == [(0,)]


# lock order


async def test_lock_order(request, dsn):
    """16 tasks that mix every write to a conversation with streams never deadlock, and leave no part behind."""
    calls = sized(request, 10_000, 2_000)
    outcomes: Counter[str] = Counter()
    numbers = iter(range(calls))
    roles = {"role": "user", "content": "x"}

    async def work(seed: int) -> None:
        chance = random.Random(seed)
        for number in numbers:
            at: dict[str, Any] = {"user_id": USER, "conversation_id": chance.choice(conversations)}
            seq = {"seq": max(1, (await chatdb.get_conversation(pool, **at)).last_seq - chance.randrange(6))}
            parent = chance.choice([{}, {}, {"parent_seq": seq["seq"]}])
            stream = {"seq": chance.choice(started[at["conversation_id"]][-6:])}
            text = "x" * chance.randrange(1, 50)
            name, arguments = chance.choice(
                [
                    *[("start_message", parent)] * 4,
                    ("start_message", {"key": f"{number // 20}"}),
                    *[("extend_message", stream)] * 15,
                    ("finish_message", stream),
                    ("finish_message", stream | {"content": "whole", "aborted": True}),
                    ("update_message", stream | {"token_count": 1}),
                    ("update_message", stream | {"content": "replaced"}),
                    *[("delete_message", stream)] * 4,
                    ("switch_branch", seq),
                    ("delete_branch", seq),
                    ("pop_message", {}),
                    ("append_message", roles | parent),
                    ("append_messages", {"messages": [roles, roles]}),
                    ("delete_messages_after", {"after_seq": seq["seq"]}),
                    ("get_history", {}),
                    ("fork_conversation", {}),
                ]
            )
            try:
                if name == "extend_message":
                    tail = await chatdb.read_message(pool, **at, **stream)
                    arguments = arguments | {"offset": tail.offset, "text": text}
                done = await getattr(chatdb, name)(pool, **at, **arguments)
                outcomes[name] += 1
                if name == "start_message":
                    started[done.conversation_id].append(done.seq)
            except (ConflictError, MessageNotFoundError, ConversationNotFoundError) as error:
                outcomes[type(error).__name__] += 1
            except ChatDBError as error:
                outcomes[f"unexpected {type(error).__name__}"] += 1
                raise

    async with chatdb.create_pool(dsn, max_size=TASKS) as pool:
        conversations = [(await chatdb.create_conversation(pool, user_id=USER)).id for _ in range(3)]
        started = {conversation: [1] for conversation in conversations}
        async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
            for seed in range(TASKS):
                group.create_task(work(seed))
    # each session has reported its figures when it ended
    [(deadlocks,)] = query(dsn, "select deadlocks from pg_stat_database where datname = current_database()")
    met = ", ".join(f"{count:,} {name}" for name, count in sorted(outcomes.items()))
    figure(f"{TASKS} tasks, {calls:,} calls on 3 conversations: {deadlocks} deadlocks ({met})")
    assert deadlocks == 0
    assert not any(name.startswith("unexpected") for name in outcomes)
    assert {"start_message", "extend_message", "finish_message", "delete_message"} <= set(outcomes)
    assert_no_rests(dsn)
