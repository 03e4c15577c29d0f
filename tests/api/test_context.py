"""The newest messages that fit a model's window: `get_context` beside a straightforward reference."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import NamedTuple

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import chatdb
from chatdb import ConversationNotFoundError, Message
from tests.support.talk import Talk, said

LEADING = ("system", "developer")
TURNS = [
    ["user"],
    ["user", "assistant"],
    ["user", "assistant", "tool", "assistant"],
    ["user", "assistant", "assistant", "tool", "tool", "assistant"],  # two calls at once, stored as single items
    ["assistant", "user", "tool", "assistant"],  # the user writes before the result is there
    ["assistant"],
    ["tool"],
    ["system"],
    ["developer"],
]


class Said(NamedTuple):
    """A message to be stored: `back` is how far before the newest one its parent is, or None if it follows the head."""

    role: str
    tokens: int | None
    content: str
    back: int | None


def with_sizes(role: str) -> st.SearchStrategy[Said]:
    """Return a strategy for messages of a role."""
    tokens = st.none() | st.integers(0, 40)
    # two and four bytes a character: the estimate counts bytes
    content = st.text("aé👋", max_size=40)
    back = st.none() | st.none() | st.none() | st.integers(0, 6)
    return st.builds(Said, st.just(role), tokens, content, back)


turns = st.lists(st.sampled_from(TURNS), max_size=8).flatmap(
    lambda chosen: st.tuples(*(with_sizes(role) for turn in chosen for role in turn))
)


def tokens_of(message: Message) -> int:
    """Return the tokens of a message as the documentation counts them."""
    if message.token_count is not None:
        return message.token_count
    return len(message.content.encode()) // 4 + 1


def reference(line: list[Message], max_tokens: int, limit: int) -> list[Message]:
    """Return the longest allowed window that ends with the line."""
    leading = line[:1] if line and line[0].role in LEADING else []
    rest = line[len(leading) :]
    if sum(map(tokens_of, leading)) > max_tokens:
        return []
    for start in range(len(rest)):
        window = rest[start:]
        calls = [message.role for message in window if message.role in ("assistant", "tool")]
        if (
            sum(map(tokens_of, leading + window)) <= max_tokens
            and len(window) <= limit
            and (window[0].role == "user" or start == 0)
            and calls[:1] != ["tool"]
        ):
            return leading + window
    return leading


def check_rules(window: list[Message], line: list[Message], max_tokens: int, limit: int) -> None:
    """Raise unless a window keeps the promises that the documentation makes."""
    leading = line[:1] if line and line[0].role in LEADING else []
    assert sum(map(tokens_of, window)) <= max_tokens
    assert [message.seq for message in window] == sorted({message.seq for message in window})
    if leading and tokens_of(leading[0]) <= max_tokens:
        assert window[:1] == leading
    messages = [message for message in window if message not in leading]
    assert len(messages) <= limit
    assert messages == line[len(line) - len(messages) :]
    if messages:
        assert messages[-1] == line[-1]
        assert messages[0].role == "user" or messages == line[len(leading) :]
    has_call = False
    for message in messages:
        has_call = has_call or message.role == "assistant"
        assert message.role != "tool" or has_call


async def stored_line(talk: Talk, conversation: tuple[Said, ...]) -> list[Message]:
    """Append the messages, and return the line of the head."""
    newest = 0
    for each in conversation:
        parent = {} if each.back is None else {"parent_seq": max(0, newest - each.back)}
        stored = await talk.append(each.content, role=each.role, token_count=each.tokens, **parent)
        newest = stored.seq
    line: list[Message] = await talk.get_branch(limit=10_000)
    return line


@given(conversation=turns, budget=st.integers(-3, 120), limit=st.integers(1, 40), is_share=st.booleans())
@example(conversation=(Said("system", 9, "", None), Said("user", 1, "", None)), budget=5, limit=5, is_share=False)
@example(conversation=(Said("tool", 1, "", None), Said("user", 1, "", None)), budget=9, limit=5, is_share=False)
@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_conversation(
    tx: asyncpg.Connection, conversation: tuple[Said, ...], budget: int, limit: int, is_share: bool
) -> None:
    """Of any line, branched or not, the window is the longest one that keeps the promises."""
    talk = Talk(tx, await chatdb.create_conversation(tx, user_id="alice"))
    line = await stored_line(talk, conversation)
    # exactly what the newest messages need, or a little more or less
    sums = [0, *accumulate(tokens_of(message) for message in reversed(line))]
    around = sums[len(line) * max(budget, 0) // 120] + budget % 3 - 1
    max_tokens = max(1, around if is_share else budget)

    window = await talk.get_context(max_tokens=max_tokens, limit=limit)

    check_rules(window, line, max_tokens, limit)
    assert window == reference(line, max_tokens, limit)


async def test_the_example_of_parallel_calls(talk: Talk) -> None:
    """A window never begins between the calls and their results, even where each is a message of its own."""
    roles = ["system", "user", "assistant", "user", "assistant", "assistant", "tool", "tool", "assistant", "user"]
    await talk.append_messages(messages=[said(role, role=role, token_count=10) for role in roles])

    windows = {
        tokens: [m.seq for m in await talk.get_context(max_tokens=tokens)] for tokens in (9, 10, 20, 70, 80, 100)
    }
    assert windows == {
        9: [],
        10: [1],
        20: [1, 10],
        70: [1, 10],
        80: [1, *range(4, 11)],
        100: [*range(1, 11)],
    }


async def test_a_message_of_the_user_between_a_call_and_its_result(talk: Talk) -> None:
    """A window does not begin with a message of the user that comes between a call and its result."""
    roles = ["user", "assistant", "user", "tool", "assistant", "user"]
    await talk.append_messages(messages=[said(role, role=role, token_count=10) for role in roles])

    assert [message.seq for message in await talk.get_context(max_tokens=59)] == [6]
    assert [message.seq for message in await talk.get_context(max_tokens=60)] == [1, 2, 3, 4, 5, 6]


async def test_the_last_turn_is_too_large(talk: Talk) -> None:
    """If the last turn does not fit, only the leading message is returned, or nothing."""
    await talk.append("system", role="system", token_count=5)
    await talk.append("question", token_count=100)
    await talk.append("answer", role="assistant", token_count=10)

    assert [message.seq for message in await talk.get_context(max_tokens=20)] == [1]
    assert [message.seq for message in await talk.get_context(max_tokens=114)] == [1]
    assert [message.seq for message in await talk.get_context(max_tokens=115)] == [1, 2, 3]
    assert await talk.get_context(max_tokens=4) == []
    assert [message.seq for message in await talk.get_context(max_tokens=2**63 - 1, limit=1)] == [1]


async def test_all_values_come_back(talk: Talk) -> None:
    """The messages of the window have all their values, also the leading one."""
    await talk.append("lead", role="developer", payload={"a": 1}, metadata={"b": 2}, token_count=0, key="l")
    await talk.append("hello", payload=[1], metadata={"c": 3}, token_count=2**31 - 1, key="h")

    assert await talk.get_context(max_tokens=2**31 - 1) == await talk.messages()
    assert await talk.get_context(max_tokens=2**31 - 2) == (await talk.messages())[:1]


async def test_nothing_to_return(talk: Talk) -> None:
    """An empty conversation gives an empty list, and a missing one an error."""
    assert await talk.get_context(max_tokens=100) == []
    with pytest.raises(ConversationNotFoundError):
        await chatdb.get_context(talk.db, user_id="bob", conversation_id=talk.conversation.id, max_tokens=100)


async def test_a_deleted_leading_message(talk: Talk) -> None:
    """What follows a deleted leading message leads the line itself."""
    await talk.append_messages(messages=[said(role=role, token_count=10) for role in ("system", "assistant", "user")])
    await talk.delete_message(seq=1)

    assert [message.seq for message in await talk.get_context(max_tokens=20)] == [2, 3]
    assert [message.seq for message in await talk.get_context(max_tokens=19)] == [3]


async def test_the_leading_message_of_another_line(talk: Talk) -> None:
    """The leading message is that of the line of the head, not the first one of the conversation."""
    await talk.append_messages(messages=[said(role=role, token_count=10) for role in ("system", "user")])
    turns = [said(role=role, token_count=10) for role in ("developer", "user", "assistant", "user")]
    await talk.append_messages(messages=turns, parent_seq=0)

    assert [message.seq for message in await talk.get_context(max_tokens=20)] == [3, 6]
    assert [message.seq for message in await talk.get_context(max_tokens=40)] == [3, 4, 5, 6]
    await talk.switch_branch(seq=1)
    assert [message.seq for message in await talk.get_context(max_tokens=40)] == [1, 2]


# cost

LONG = """
    insert into chatdb.messages (user_id, conversation_id, seq, role, content, token_count, created_at)
    select
        'alice', $1, n,
        case when n = 1 then 'system' when n % 4 = 1 then 'user' when n % 4 = 3 then 'tool' else 'assistant' end,
        repeat('four', 300), case when n % 17 <> 0 then 300 end, now()
    from generate_series(1, 10000) as n
"""


async def blocks(talk: Talk, max_tokens: int, limit: int) -> int:
    """Return how many blocks get_context reads, once its plan is cached."""
    async with chatdb.transaction(talk.db) as connection:
        await connection.execute("set local plan_cache_mode = force_generic_plan")
        await connection.execute(f"prepare measured as {chatdb.branches._get_context.sql}")
        call = f"execute measured ('alice', {talk.conversation.id}, null, {max_tokens}, {limit})"
        await connection.fetch(call)
        explained = await connection.fetchval(f"explain (analyze, buffers, format json) {call}")
        await connection.execute("deallocate measured")
    plan = json.loads(explained)[0]["Plan"]
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


async def test_what_streams_is_left_out(talk: Talk) -> None:
    """A message is left out until it is finished, the leading one too; an aborted one is there."""
    await talk.start_message(role="system", key="lead")
    await talk.extend_message(key="lead", offset=0, text="Be brief.")
    question = await talk.append("question")
    await talk.start_message(key="answer")
    await talk.extend_message(key="answer", offset=0, text="An answer")

    assert await talk.get_context(max_tokens=1000) == [question]

    answer = await talk.finish_message(key="answer", aborted=True)
    assert await talk.get_context(max_tokens=1000) == [question, answer]
    lead = await talk.finish_message(key="lead")
    assert await talk.get_context(max_tokens=1000) == [lead, question, answer]


@pytest.mark.owner
@pytest.mark.parametrize(
    ("forks", "turns_between", "most", "most_before_15"),
    [(0, 0, 20, 40), (8, 3, 50, 80), (8, 0, 60, 80)],
    ids=["unbranched", "8 forks in 96 messages", "8 forks in 24 messages"],
)
async def test_blocks_of_a_long_conversation(
    committed: Talk, forks: int, turns_between: int, most: int, most_before_15: int
) -> None:
    """For 8,000 tokens of 10,000 messages, few blocks are read; PostgreSQL 14 reads as many messages as `limit`."""
    db, talk = committed.db, committed
    await db.execute(LONG, talk.conversation.id)
    await db.execute("update chatdb.conversations set last_seq = 10000")
    turn = [said("four" * 300, role=role, token_count=300) for role in ("user", "assistant", "assistant")]
    for _ in range(forks):
        await talk.append_messages(messages=turn)
        await talk.append_messages(messages=turn, parent_seq=(await talk.now()).last_seq - len(turn))
        await talk.append_messages(messages=turn * turns_between)
    await db.execute("vacuum analyze chatdb.messages")
    window = await talk.get_context(max_tokens=8000)
    assert len(window) in range(23, 28)
    assert sum(message.parent_seq is not None for message in await talk.get_branch(limit=100)) == forks

    version = int(await db.fetchval("show server_version_num")) // 10_000
    read = await blocks(talk, 8000, 1000 if version > 14 else 100)

    print(f"figure: {read} blocks for {len(window)} messages with {forks} forks on PostgreSQL {version}")
    assert read <= (most if version > 14 else most_before_15)
