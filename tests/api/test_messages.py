"""The functions on messages, case by case."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

import chatdb
from chatdb import (
    ConflictError,
    ConversationNotFoundError,
    Deleted,
    JsonText,
    Message,
    MessageNotFoundError,
    NewMessage,
)
from chatdb._core.dsn import connect_arguments
from tests.support.calls import Counting
from tests.support.talk import Talk, said

# append_message


async def test_append(talk):
    """A message is returned with the given values, its seq, and the time of the append."""
    start = await talk.db.fetchval("select clock_timestamp()")

    message = await talk.append_message(
        role="assistant",
        content="Grüße 👋",
        payload={"type": "text", "n": 1},
        metadata={"model": "small", "cost": 0.25},
        token_count=7,
        key="turn-1",
    )

    assert message == Message(
        id=message.id,
        conversation_id=talk.conversation.id,
        user_id="alice",
        seq=1,
        parent_seq=None,
        role="assistant",
        content="Grüße 👋",
        payload=JsonText('{"type": "text", "n": 1}'),
        metadata={"model": "small", "cost": 0.25},
        token_count=7,
        key="turn-1",
        state=None,
        created_at=message.created_at,
    )
    assert await talk.get_message(seq=1) == message
    assert start <= message.created_at <= await talk.db.fetchval("select clock_timestamp()")


@pytest.mark.parametrize("key", [None, "turn-1"], ids=["unkeyed", "keyed"])
async def test_append_with_role_and_content_only(talk, key):
    """Only role and content are required, omitted values are None, and content can be empty."""
    message = await talk.append(content="", key=key)

    assert (message.content, message.payload, message.metadata, message.token_count) == ("", None, None, None)


@pytest.mark.parametrize("key", [None, "turn"], ids=["unkeyed", "keyed"])
async def test_append_counts_from_one(talk, key):
    """Each conversation counts 1, 2, 3 in the order of the calls."""
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))

    assert [(await talk.append(key=key and f"{key}-{turn}")).seq for turn in range(3)] == [1, 2, 3]
    assert (await other.append(key=key)).seq == 1
    assert (await talk.get_conversation()).last_seq == 3


@pytest.mark.parametrize("role", ["user", "assistant", "system", "developer", "tool"])
async def test_append_takes_every_role(talk, role):
    """Each of the five roles is stored and returned."""
    assert (await talk.append(role=role)).role == role


@pytest.mark.parametrize("key", [None, "turn-1"], ids=["unkeyed", "keyed"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
async def test_append_makes_the_conversation_active(talk, key, batch):
    """The time of the append becomes the conversation's activity; otherwise only its counter changes."""
    message = (await talk.append_messages(messages=[said(key=key)]))[0] if batch else await talk.append(key=key)

    assert message.created_at > talk.conversation.created_at
    assert await talk.get_conversation() == talk.conversation.model_copy(
        update={"last_seq": 1, "head_seq": 1, "revision": 1, "updated_at": message.created_at}
    )


@pytest.mark.parametrize("key", [None, "late"], ids=["unkeyed", "keyed"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
async def test_time_never_runs_backwards(committed, key, batch):
    """A message's time is that of its append, even if its transaction began before another append."""
    async with chatdb.transaction(committed.db) as early:
        began = await early.fetchval("select now()")
        first = await committed.append()
        mine = committed.through(early)
        late = (await mine.append_messages(messages=[said(key=key)]))[0] if batch else await mine.append(key=key)

    assert began < first.created_at
    assert late.created_at > first.created_at
    assert (await committed.get_conversation()).updated_at == late.created_at


async def test_time_of_a_conversation_from_the_future(talk):
    """If another clock was ahead, times stay equal until the clock catches up."""
    ahead = datetime.now(UTC) + timedelta(hours=1)
    await talk.db.execute("update chatdb.conversations set updated_at = $1", ahead)

    assert {(await talk.append(key=key)).created_at for key in (None, "a", None)} == {ahead}


async def test_append_inside_a_rolled_back_transaction(talk):
    """A rolled-back seq is assigned again, so no gap remains."""
    with contextlib.suppress(ZeroDivisionError):
        async with chatdb.transaction(talk.db):
            assert (await talk.append("lost")).seq == 1
            raise ZeroDivisionError

    assert (await talk.append("kept")).seq == 1


# append_message with a key


BODY = {"role": "user", "content": "hello", "payload": JsonText('{"n":1}'), "metadata": {"a": 1, "b": [2]}}


async def test_same_key_and_body(talk):
    """The same key and body return the stored message and change nothing."""
    first = await talk.append(**BODY, key="turn-1")
    await talk.append("another")
    before = await talk.get_conversation()

    again = await talk.append(**BODY, key="turn-1")

    assert again == first
    assert await talk.get_conversation() == before
    assert await talk.seqs() == [1, 2]
    assert (await talk.append("next")).seq == 3


async def test_same_body_in_another_order_of_metadata(talk):
    """Metadata is compared by value, in any key order."""
    first = await talk.append(**BODY, key="turn-1")

    assert await talk.append(**BODY | {"metadata": {"b": [2], "a": 1.0}}, key="turn-1") == first


async def test_token_count_is_not_of_the_body(talk):
    """A different token count is not a different body, and the stored one stays."""
    first = await talk.append(**BODY, key="turn-1", token_count=3)

    assert await talk.append(**BODY, key="turn-1", token_count=4) == first


@pytest.mark.parametrize(
    "other",
    [
        {"role": "assistant"},
        {"content": "hello "},
        {"content": ""},
        {"payload": JsonText('{"n": 1}')},
        {"payload": JsonText("null")},
        {"payload": None},
        {"metadata": {"a": 1, "b": [2, 3]}},
        {"metadata": {}},
        {"metadata": None},
    ],
    ids=repr,
)
async def test_same_key_with_another_body(talk, other):
    """A different body is a conflict: nothing is written, and the transaction can continue."""
    first = await talk.append(**BODY, key="turn-1")
    before = await talk.get_conversation()

    with pytest.raises(ConflictError):
        await talk.append(**BODY | other, key="turn-1")

    assert await talk.get_conversation() == before
    assert await talk.list_messages() == [first]


async def test_key_without_payload_and_metadata(talk):
    """Missing payload and metadata are part of the body too."""
    first = await talk.append(key="turn-1")

    assert await talk.append(key="turn-1") == first
    with pytest.raises(ConflictError):
        await talk.append(key="turn-1", metadata={})


async def test_key_is_unique_in_its_conversation_only(talk):
    """Another conversation of the same user can use the same key for another message."""
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))
    await talk.append("here", key="turn-1")

    assert (await other.append("there", key="turn-1")).content == "there"
    assert (await talk.get_message(key="turn-1")).content == "here"


async def test_key_of_a_deleted_message_is_free(talk):
    """A deleted message's key can be used again, with any body and a new seq."""
    await talk.append("first", key="turn-1")
    await talk.delete_message(seq=1)

    message = await talk.append("second", key="turn-1")

    assert (message.seq, message.content) == (2, "second")


async def test_key_after_an_update(talk):
    """The currently stored body is the one that counts."""
    await talk.append("first", key="turn-1")
    updated = await talk.update_message(seq=1, content="second")

    assert await talk.append("second", key="turn-1") == updated
    with pytest.raises(ConflictError):
        await talk.append("first", key="turn-1")


# append_messages


async def test_append_messages(talk):
    """A batch is stored in order at the next seqs, with each message's values and one time for all."""
    await talk.append()

    messages = await talk.append_messages(
        messages=[
            NewMessage(role="user", content="question", token_count=3, metadata={"a": 1}),
            {"role": "assistant", "content": "", "payload": {"call": "f"}},
            NewMessage(role="tool", content="42", payload=JsonText("[1,  2]")),
        ]
    )

    assert [(m.seq, m.role, m.content, m.payload, m.metadata, m.token_count, m.key) for m in messages] == [
        (2, "user", "question", None, {"a": 1}, 3, None),
        (3, "assistant", "", '{"call": "f"}', None, None, None),
        (4, "tool", "42", "[1,  2]", None, None, None),
    ]
    conversation = await talk.get_conversation()
    assert conversation.last_seq == 4
    assert {message.created_at for message in messages} == {conversation.updated_at}
    assert await talk.list_messages(after_seq=1) == messages


async def test_append_messages_with_keys(talk):
    """A batch with keys is stored the same way, and can mix messages with and without keys."""
    await talk.append()

    messages = await talk.append_messages(
        messages=[said("1", key="z"), said("2"), said("3", key="a"), said("4", payload=0, metadata={}, token_count=1)]
    )

    assert [(m.seq, m.content) for m in messages] == [(2, "1"), (3, "2"), (4, "3"), (5, "4")]
    assert [m.key for m in messages] == ["z", None, "a", None]
    assert (messages[3].payload, messages[3].metadata, messages[3].token_count) == ("0", {}, 1)
    conversation = await talk.get_conversation()
    assert conversation.last_seq == 5
    assert {message.created_at for message in messages} == {conversation.updated_at}
    assert await talk.list_messages(after_seq=1) == messages


@pytest.mark.parametrize("keyed", [False, True], ids=["unkeyed", "keyed"])
async def test_append_many_messages(talk, keyed):
    """A batch of a thousand keeps its order."""
    batch = [said(str(n), key=f"key-{-n}" if keyed else None) for n in range(1000)]

    messages = await talk.append_messages(messages=batch)

    assert [message.seq for message in messages] == list(range(1, 1001))
    assert [message.content for message in messages] == [str(n) for n in range(1000)]


async def test_append_messages_from_a_generator(talk):
    """Any iterable is accepted."""
    messages = await talk.append_messages(messages=(said(letter) for letter in "abc"))

    assert [message.content for message in messages] == ["a", "b", "c"]


async def test_append_no_messages(talk):
    """An empty batch appends nothing and changes nothing."""
    before = await talk.get_conversation()

    assert await talk.append_messages(messages=[]) == []
    assert await talk.append_messages(messages=iter(())) == []
    assert await talk.get_conversation() == before


@pytest.mark.parametrize("key", [None, "k"], ids=["unkeyed", "keyed"])
async def test_append_messages_is_all_or_nothing(talk, key):
    """If one message is invalid, the batch stores nothing."""
    with pytest.raises(chatdb.InvalidInputError):
        await talk.append_messages(messages=[said(key=key), {"role": "nobody", "content": "hello"}])

    assert await talk.seqs() == []
    assert (await talk.get_conversation()).last_seq == 0


@pytest.mark.owner
@pytest.mark.parametrize("key", [None, "k"], ids=["unkeyed", "keyed"])
async def test_append_messages_that_the_database_refuses(talk, key):
    """If the database refuses one message, the batch stores nothing."""
    await talk.db.execute("alter table chatdb.messages add constraint a_hosts_own check (content <> 'bad')")

    with pytest.raises(chatdb.ConfigurationError, match="a_hosts_own"):
        async with talk.db.transaction():
            await talk.append_messages(messages=[said("good", key=key), said("bad")])

    assert await talk.seqs() == []
    assert (await talk.append()).seq == 1


async def test_batch_that_is_stored(talk):
    """Repeating a stored batch returns the stored messages in the batch's order and changes nothing."""
    batch = [NewMessage(**BODY, key="a"), NewMessage(role="tool", content="", key="b"), NewMessage(**BODY, key="c")]
    stored = await talk.append_messages(messages=batch)
    await talk.append("another")
    before = await talk.get_conversation()

    assert await talk.append_messages(messages=batch) == stored
    assert await talk.append_messages(messages=[batch[2], batch[0], batch[1]]) == [stored[2], stored[0], stored[1]]
    assert await talk.append_messages(messages=batch[1:2]) == [stored[1]]
    assert await talk.get_conversation() == before
    assert await talk.seqs() == [1, 2, 3, 4]


async def test_batch_and_single_appends_are_one(talk):
    """A batch returns messages that were appended singly, and vice versa."""
    one, two = await talk.append("1", key="a"), await talk.append("2", key="b")

    assert await talk.append_messages(messages=[said("2", key="b"), said("1", key="a")]) == [two, one]
    three = await talk.append_messages(messages=[said("3", key="c")])
    assert [await talk.append("3", key="c")] == three


@pytest.mark.parametrize(
    "batch",
    [
        [said("1", key="a"), said("new", key="new")],
        [said("new", key="new"), said("1", key="a")],
        [said("new", key="new"), said("newer", key="newer"), said("2", key="b")],
        [said("1", key="a"), said("2", key="b"), said("without a key")],
        [said("without a key"), said("1", key="a")],
        [said("other", key="a")],
        [said("1", key="a"), said("other", key="b")],
        [said("2", key="a"), said("1", key="b")],
        [said("1", key="a", role="tool"), said("2", key="b")],
        [said("1", key="a"), said("2", key="b", payload=2)],
        [said("1", key="a", metadata={}), said("2", key="b")],
        [said("other", key="a"), said("new", key="new")],
    ],
    ids=[
        "one new",
        "one stored",
        "most new",
        "one unkeyed",
        "unkeyed first",
        "another content",
        "another content in one",
        "contents exchanged",
        "another role",
        "another payload",
        "another metadata",
        "another and a new one",
    ],
)
async def test_batch_in_conflict(talk, batch):
    """A partly stored or changed batch is a conflict: nothing is written, and the transaction can continue."""
    stored = await talk.append_messages(messages=[said("1", key="a"), said("2", key="b")])
    before = await talk.get_conversation()

    with pytest.raises(ConflictError):
        await talk.append_messages(messages=batch)

    assert await talk.list_messages() == stored
    assert await talk.get_conversation() == before
    assert (await talk.append()).seq == 3


# get_history


async def test_history(talk):
    """The history is the newest messages, oldest first."""
    messages = await talk.fill(5)

    assert await talk.get_history() == messages
    assert await talk.get_history(limit=3) == messages[2:]
    assert await talk.get_history(limit=1) == messages[4:]


async def test_history_has_a_hundred_messages(talk):
    """By default, the history is the newest hundred messages."""
    messages = await talk.fill(101)

    assert await talk.get_history() == messages[1:]


async def test_history_before_a_place(talk):
    """With `before_seq`, the history is the messages before it."""
    messages = await talk.fill(5)

    assert await talk.get_history(before_seq=4) == messages[:3]
    assert await talk.get_history(before_seq=4, limit=2) == messages[1:3]
    assert await talk.get_history(before_seq=100, limit=2) == messages[3:]
    assert await talk.get_history(before_seq=1) == []
    assert await talk.get_history(before_seq=0) == []


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
async def test_history_in_pages(talk, limit):
    """The first seq of a page is the cursor for the previous page, across gaps too."""
    await talk.fill(9)
    for hole in (4, 5):
        await talk.delete_message(seq=hole)

    found = page = await talk.get_history(limit=limit)
    while page and len(found) < 20:
        page = await talk.get_history(limit=limit, before_seq=page[0].seq)
        found = page + found

    assert [message.seq for message in found] == [1, 2, 3, 6, 7, 8, 9]


async def test_history_without_messages(talk):
    """A conversation without messages, new or emptied, has an empty history."""
    assert await talk.get_history() == []
    await talk.append()
    await talk.delete_message(seq=1)
    assert await talk.get_history() == []


async def test_history_is_of_one_conversation(talk):
    """A history contains only its conversation's messages."""
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))
    mine, theirs = await talk.append(), await other.append()

    assert await talk.get_history() == await talk.list_messages() == [mine]
    assert await other.get_history() == await other.list_messages() == [theirs]


# list_messages and iter_messages


async def test_list(talk):
    """The list runs forward from a seq, oldest first."""
    messages = await talk.fill(5)

    assert await talk.list_messages() == messages
    assert await talk.list_messages(limit=2) == messages[:2]
    assert await talk.list_messages(after_seq=2, limit=2) == messages[2:4]
    assert await talk.list_messages(after_seq=4) == messages[4:]
    assert await talk.list_messages(after_seq=5) == []
    assert await talk.list_messages(after_seq=2**63 - 1) == []


async def test_list_has_a_hundred_messages(talk):
    """By default, a page has the oldest hundred messages."""
    messages = await talk.fill(101)

    assert await talk.list_messages() == messages[:100]


async def test_list_without_messages(talk):
    """A conversation without messages has an empty list."""
    assert await talk.list_messages() == []


@pytest.mark.parametrize("there", range(6))
async def test_pages_full_and_not(talk, there):
    """A page has up to `limit` messages, and an existence row after them if it is not full."""
    messages = await talk.fill(there)
    at = (talk.conversation.user_id, talk.conversation.id)
    for limit in range(1, 7):
        found = min(there, limit)
        assert await talk.list_messages(limit=limit) == messages[:limit]
        assert await talk.get_history(limit=limit) == messages[there - found :]
        assert await talk.get_history(limit=limit, before_seq=there + 1) == messages[there - found :]
        assert await talk.list_messages(limit=limit, after_seq=there) == []
        assert await talk.get_history(limit=limit, before_seq=1) == []
        assert [message async for message in talk.iter_messages(batch=limit)] == messages
        for query, place in ((chatdb.messages._list_messages, 0), (chatdb.messages._get_history, there + 1)):
            rows = await talk.db.fetch(
                query.sql, *at, *([None] if query is chatdb.messages._list_messages else []), place, limit
            )
            assert [row["id"] is None for row in rows] == [False] * found + [True] * (there < limit)
            others = {name: value for name, value in rows[-1].items() if name != "seq"}
            assert there >= limit or (rows[-1]["seq"] in {None, talk.conversation.id} and not any(others.values()))


@pytest.mark.parametrize("limit", [1, 2, 10_000])
async def test_pages_of_no_conversation(talk, limit):
    """For a conversation that the user does not have, a page of any limit is an error, not empty."""
    await talk.fill(2)
    for place in (
        {"user_id": "bob", "conversation_id": talk.conversation.id},
        {"user_id": "alice", "conversation_id": -1},
    ):
        for call in (chatdb.list_messages, chatdb.get_history):
            with pytest.raises(ConversationNotFoundError):
                await call(talk.db, **place, limit=limit)


@pytest.mark.not_on_citus("the coordinator's plan does not show the node's scans")
@pytest.mark.parametrize(
    ("name", "args", "read"),
    [
        ("list_messages", (0, 3), (1, 0)),
        ("list_messages", (0, 4), (1, 1)),
        ("list_messages", (3, 1), (1, 1)),
        ("list_messages_after_key", ("key-2", 1), (2, 0)),
        ("get_history", (4, 3), (1, 0)),
        ("get_history", (4, 4), (1, 1)),
        ("get_history_before_key", ("key-3", 2), (2, 0)),
        ("get_message", (3, None), (1, 0)),
        ("get_message", (4, None), (1, 1)),
        ("get_message", (None, "key-3"), (2, 0)),
        ("get_message", (None, "key-4"), (2, 1)),
    ],
)
async def test_the_conversation_is_looked_for_if_need_be(talk, name, args, read):
    """If the page is full or the message is found, the server does not read the conversation."""
    await talk.append_messages(messages=[said(key=f"key-{number}") for number in (1, 2, 3)])
    sql = getattr(chatdb.messages, f"_{name}").sql
    at = (talk.conversation.user_id, talk.conversation.id)
    key = [] if name == "get_history" else [None]
    plan = json.loads(await talk.db.fetchval(f"explain (analyze, format json) {sql}", *at, *key, *args))
    reads = Counter()
    nodes = [plan[0]["Plan"]]
    for node in nodes:
        nodes += node.get("Plans", [])
        if "Relation Name" in node:
            reads[node["Relation Name"]] += node["Actual Loops"]
    assert (reads["messages"], reads["conversations"]) == read


async def test_list_follows_what_is_appended(talk):
    """A reader that continues from its last seq finds newer messages, even after the newest were deleted."""
    await talk.fill(3)
    await talk.delete_messages_after(after_seq=1)
    await talk.append("since")

    assert [(m.seq, m.content) for m in await talk.list_messages(after_seq=3)] == [(4, "since")]


@pytest.mark.parametrize(
    ("batch", "statements"), [(1, 8), (2, 4), (3, 3), (6, 2), (7, 2), (8, 1), (10_000, 1)], ids=lambda value: str(value)
)
async def test_iter(talk, batch, statements):
    """The iterator yields every message once, oldest first, with one statement per page."""
    messages = await talk.fill(7)
    counting = talk.through(Counting(talk.db))

    assert [message async for message in counting.iter_messages(batch=batch)] == messages
    assert len(counting.db.statements) == statements


async def test_iter_takes_one_page_at_a_time(talk):
    """A page is read only when its first message is requested."""
    await talk.fill(5)
    counting = talk.through(Counting(talk.db))

    reached = [(message.seq, len(counting.db.statements)) async for message in counting.iter_messages(batch=2)]

    assert reached == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)]


async def test_iter_pages_of_500(talk):
    """By default, a page has 500 messages."""
    messages = await talk.fill(501)
    counting = talk.through(Counting(talk.db))

    assert [message async for message in counting.iter_messages()] == messages
    assert len(counting.db.statements) == 2


async def test_iter_after_a_place(talk):
    """The iterator starts after the given seq."""
    messages = await talk.fill(5)

    assert [message async for message in talk.iter_messages(after_seq=3, batch=1)] == messages[3:]
    assert [message async for message in talk.iter_messages(after_seq=5)] == []


async def test_iter_over_holes(talk):
    """Deleted messages neither shorten a page nor repeat messages."""
    await talk.fill(7)
    for hole in (1, 4, 5):
        await talk.delete_message(seq=hole)

    assert [message.seq async for message in talk.iter_messages(batch=2)] == [2, 3, 6, 7]


async def test_iter_while_messages_come_and_go(talk):
    """Appends and deletions beyond the current page are seen when their page is read."""
    await talk.fill(5)
    seen = []
    async for message in talk.iter_messages(batch=2):
        seen.append(message.seq)
        if message.seq == 1:
            await talk.delete_message(seq=3)
            await talk.append()

    assert seen == [1, 2, 4, 5, 6]


async def test_iter_over_nothing(talk):
    """A conversation without messages yields nothing."""
    assert [message async for message in talk.iter_messages()] == []


async def test_iter_over_a_missing_conversation(tx):
    """A missing conversation raises at the first step, not at the call."""
    messages = chatdb.iter_messages(tx, user_id="alice", conversation_id=-1)

    with pytest.raises(ConversationNotFoundError):
        await anext(messages)


async def test_iter_over_a_conversation_that_goes(talk):
    """Deleting the conversation during iteration raises at the next page."""
    await talk.fill(3)
    messages = talk.iter_messages(batch=2)
    assert [(await anext(messages)).seq for _ in range(2)] == [1, 2]
    await talk.delete_conversation()

    with pytest.raises(ConversationNotFoundError):
        await anext(messages)


# get_message


async def test_get(talk):
    """A message is returned by its seq and by its key as stored."""
    await talk.append()
    message = await talk.append(**BODY, key="turn-2", token_count=3)

    assert await talk.get_message(seq=2) == message
    assert await talk.get_message(key="turn-2") == message


@pytest.mark.parametrize("seq", [0, 1, 3, 2**63 - 1])
async def test_get_a_missing_message(talk, seq):
    """A seq without a message, or whose message was deleted, raises MessageNotFoundError."""
    await talk.fill(2)
    await talk.delete_message(seq=1)

    with pytest.raises(MessageNotFoundError):
        await talk.get_message(seq=seq)


async def test_get_by_a_missing_key(talk):
    """A key that only another conversation has raises MessageNotFoundError."""
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))
    await other.append(key="turn-1")
    await talk.append()

    with pytest.raises(MessageNotFoundError):
        await talk.get_message(key="turn-1")


# update_message

OLD = {"content": "hello", "payload": '{"n":1}', "metadata": {"a": 1, "b": [2]}, "token_count": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"content": "new"},
        {"content": ""},
        {"payload": JsonText("[ 1e5 ]")},
        {"payload": JsonText("null")},
        {"payload": None},
        {"metadata": {"c": "d"}},
        {"metadata": {}},
        {"metadata": None},
        {"token_count": 0},
        {"token_count": None},
        {"content": "new", "payload": JsonText("1"), "metadata": None, "token_count": 4},
        dict.fromkeys(("content", "payload", "metadata", "token_count"), chatdb.UNSET),
        {},
    ],
    ids=repr,
)
async def test_update(talk, change):
    """A given value replaces the stored one, None clears it, and everything else stays."""
    before = await talk.append(**BODY, key="turn-1", token_count=3)
    other = await talk.append(**BODY, key="turn-2", token_count=3)
    given = {name: value for name, value in change.items() if value is not chatdb.UNSET}

    updated = await talk.update_message(seq=1, **change)

    assert updated == before.model_copy(update=OLD | given)
    assert await talk.list_messages() == [updated, other]


async def test_update_keeps_the_time_and_the_list(talk):
    """An update changes neither the message's time nor the conversation's position in the list."""
    message = await talk.append()
    before = await talk.get_conversation()

    updated = await talk.update_message(seq=1, content="corrected")

    assert (updated.created_at, updated.seq, updated.role, updated.id) == (message.created_at, 1, "user", message.id)
    assert await talk.get_conversation() == before.model_copy(update={"revision": 2})


async def test_update_encodes_as_append_does(talk):
    """A payload that is not JsonText is encoded as for an append."""
    value = {"b": [1.0, None, "ü"], "a": {}}
    appended = await talk.append(payload=value)

    assert (await talk.update_message(seq=1, payload=value)).payload == appended.payload


@pytest.mark.parametrize("change", [{"content": "new"}, {}], ids=["write", "nothing given"])
async def test_update_a_missing_message(talk, change):
    """A seq without a message raises MessageNotFoundError."""
    await talk.append()

    with pytest.raises(MessageNotFoundError):
        await talk.update_message(seq=2, **change)


# delete_message and delete_messages_after


async def test_delete_message(talk):
    """A deleted message leaves a gap: no other changes, and the next append uses the next new seq."""
    await talk.fill(3)
    before = await talk.get_conversation()

    assert await talk.delete_message(seq=2) == Deleted(conversations=0, messages=1)
    assert await talk.seqs() == [1, 3]
    assert await talk.get_conversation() == before.model_copy(update={"revision": 4})
    assert (await talk.append()).seq == 4


async def test_delete_the_newest_message(talk):
    """The seq of the newest message is not used again either."""
    await talk.fill(2)
    await talk.delete_message(seq=2)

    assert (await talk.get_conversation()).last_seq == 2
    assert (await talk.append()).seq == 3
    assert (await talk.append(key="k")).seq == 4


@pytest.mark.parametrize("seq", [0, 2, 3, 2**63 - 1])
async def test_delete_a_missing_message(talk, seq):
    """A seq without a message, or whose message was deleted, raises MessageNotFoundError."""
    await talk.fill(2)
    await talk.delete_message(seq=2)

    with pytest.raises(MessageNotFoundError):
        await talk.delete_message(seq=seq)
    assert await talk.seqs() == [1]


@pytest.mark.parametrize(("seq", "left"), [(0, 0), (2, 2), (4, 4), (5, 5), (2**63 - 1, 5)])
async def test_delete_messages_after(talk, seq, left):
    """Messages with a greater seq are deleted and counted, and the next append uses the next new seq."""
    await talk.append_messages(messages=[said(str(n), key=str(n)) for n in range(1, 6)])
    before = await talk.get_conversation()

    assert await talk.delete_messages_after(after_seq=seq) == Deleted(conversations=0, messages=5 - left)
    assert await talk.seqs() == list(range(1, left + 1))
    assert await talk.get_conversation() == before.model_copy(update={"head_seq": left, "revision": 5 + (left < 5)})
    assert (await talk.append("again", key="5-again")).seq == 6


async def test_delete_messages_after_frees_their_keys(talk):
    """The keys of messages deleted together can be used again."""
    await talk.append_messages(messages=[said("1", key="a"), said("2", key="b")])
    await talk.delete_messages_after(after_seq=0)

    messages = await talk.append_messages(messages=[said("one", key="a"), said("two", key="b")])

    assert [message.seq for message in messages] == [3, 4]


# returned values

EXACT = [
    '{"b":1,"a":2}',
    '{"a":1,"a":2}',
    ' {\n\t"spaced" :  [ ] }\r\n',
    "[1e5,1E+5,1.0,1.10,-0,-0.0,0.1e-7]",
    "[123456789012345678901234567890,1e308,3.14159265358979323846264338327950288]",
    r'"\u0041\/\\\"\n\u00e4 ä 👋 \ud83d\udc4b"',
    r'{"\u0000":"a\u0000b"}',
    r'["\ud800","\udc00\ud800",{"\udfff":1}]',
    '"\x7f\u2028\u2029\ufeff"',
    "null",
    "true",
    "0",
    '""',
    "{}",
    "[]",
]


@pytest.mark.parametrize("way", ["append", "keyed", "batch", "keyed batch", "update"])
async def test_json_text_is_kept_byte_for_byte(talk, way):
    """JsonText is returned unchanged, however it is written and read, and parses to its value."""
    await talk.append()
    for number, text in enumerate(EXACT):
        payload = JsonText(text)
        key = f"key-{number}" if "keyed" in way else None
        if way == "update":
            written = await talk.update_message(seq=1, payload=payload)
        elif "batch" in way:
            [written] = await talk.append_messages(messages=[said(payload=payload, key=key)])
        else:
            written = await talk.append(payload=payload, key=key)

        place = {"before_seq": written.seq + 1}, {"after_seq": written.seq - 1}
        [old], [new] = await talk.get_history(**place[0], limit=1), await talk.list_messages(**place[1], limit=1)
        for message in (written, old, new, await talk.get_message(seq=written.seq)):
            assert message.payload == text
            assert type(message.payload) is JsonText
            assert message.payload.parsed() == json.loads(text)


@pytest.mark.parametrize(
    "value",
    [
        {"b": 1, "a": [True, None, {}]},
        "text",
        "",
        [],
        [1, "two", 3.5],
        ("a", "tuple"),
        0,
        -1.5,
        10**30,
        False,
        "a\0b",
        {"\ud800": "\udfff"},
        {"emoji": "👋", "line": "\u2028"},
    ],
    ids=ascii,
)
async def test_payload_of_any_value(talk, value):
    """A payload can be any JSON value and is returned as JSON text, with its keys in order."""
    payload = (await talk.append(payload=value)).payload

    assert type(payload) is JsonText
    parsed = payload.parsed()
    assert parsed == (list(value) if isinstance(value, tuple) else value)
    assert not isinstance(value, dict) or list(parsed) == list(value)
    assert await talk.db.fetchval("select payload::text from chatdb.messages") == payload


async def test_no_payload_is_not_null(talk):
    """None means no payload, JSON null is a payload, and a plain str is not parsed as JSON."""
    for payload in (None, JsonText("null"), "null", [None]):
        await talk.append(payload=payload)

    assert [message.payload for message in await talk.list_messages()] == [None, "null", '"null"', "[null]"]
    assert await talk.db.fetchval("select count(*) from chatdb.messages where payload is null") == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"text": "ü 👋", "empty": "", "quote": '"\\\n'},
        {"int": 1, "big": 10**40, "negative": -5, "float": 0.1, "whole": 2.0},
        {"yes": True, "no": False, "none": None},
        {"list": [1, [2, {"three": []}]], "dict": {"": {}}},
        {"looks like null": "null", "looks like json": '{"a": 1}'},
    ],
    ids=repr,
)
async def test_metadata(talk, metadata):
    """Metadata of messages and conversations is returned as an equal dict."""
    message = await talk.append(metadata=metadata)
    conversation = await talk.update_conversation(metadata=metadata)

    assert message.metadata == metadata
    assert conversation.metadata == metadata
    assert {name: type(value) for name, value in message.metadata.items()} == {
        name: type(value) for name, value in metadata.items()
    }


async def test_metadata_can_be_asked_for(talk):
    """Metadata is stored as jsonb, so the host's queries can use its operators."""
    for model in ("small", "large"):
        await talk.append(metadata={"model": model})

    assert await talk.db.fetchval("select seq from chatdb.messages where metadata ->> 'model' = 'large'") == 2


# every handle


@contextlib.asynccontextmanager
async def _asyncpg_pool(dsn, **options):
    async with asyncpg.create_pool(**connect_arguments(dsn), **options, max_size=2, min_size=0) as pool:
        yield pool


@contextlib.asynccontextmanager
async def _connection(dsn, **options):
    connection = await asyncpg.connect(**connect_arguments(dsn), **options)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def _in_transaction(dsn, **options):
    async with _connection(dsn, **options) as connection, connection.transaction():
        yield connection


@contextlib.asynccontextmanager
async def _with_codecs(dsn, **options):
    async with _connection(dsn, **options) as connection:
        for name in ("json", "jsonb"):
            await connection.set_type_codec(name, schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        yield connection


@contextlib.asynccontextmanager
async def _acquired(dsn, **options):
    async with chatdb.create_pool(dsn, **options) as pool, pool.acquire() as connection:
        yield connection


HANDLES = {
    "chatdb's pool": chatdb.create_pool,
    "asyncpg's pool": _asyncpg_pool,
    "a pool's connection": _acquired,
    "a connection": _connection,
    "a transaction": _in_transaction,
    "a connection with codecs": _with_codecs,
}


BARE = pytest.mark.not_on_citus("only chatdb's pool calls the functions")


@pytest.mark.parametrize(
    "handle",
    [
        *("chatdb's pool", "a pool's connection"),
        pytest.param("asyncpg's pool", marks=BARE),
        pytest.param("a connection", marks=BARE),
        pytest.param("a transaction", marks=BARE),
        pytest.param("a connection with codecs", marks=BARE),
    ],
)
async def test_every_handle_gives_the_same(dsn, arguments_of, handle):
    """Pools, connections, transactions and connections with codecs give the same results and errors."""
    metadata = {"a": [1, None], "b": "text"}
    async with HANDLES[handle](**arguments_of(dsn)) as db:
        conversation = await chatdb.create_conversation(db, user_id="alice", key="c", metadata=metadata)
        assert conversation.metadata == metadata
        assert await chatdb.create_conversation(db, user_id="alice", key="c") == conversation
        assert await chatdb.get_conversation(db, user_id="alice", conversation_key="c") == conversation
        talk = Talk(db, conversation)

        first = await talk.append(payload=JsonText('{"b" :1e5}'), metadata=metadata, key="1")
        assert (first.payload, first.metadata) == ('{"b" :1e5}', metadata)
        assert await talk.append(payload=JsonText('{"b" :1e5}'), metadata=metadata, key="1") == first
        second, third = await talk.append_messages(messages=[said(payload={"c": 2}), said(metadata={})])
        assert (second.payload, second.metadata, third.payload, third.metadata) == ('{"c": 2}', None, None, {})
        again = NewMessage(**first.model_dump(include=NewMessage.model_fields.keys()))
        assert await talk.append_messages(messages=[again]) == [first]
        assert await talk.get_history() == await talk.list_messages() == [first, second, third]
        assert [message async for message in talk.iter_messages(batch=1)] == [first, second, third]
        assert await talk.get_message(seq=1) == await talk.get_message(key="1") == first
        third = await talk.update_message(seq=3, payload=[None], metadata=metadata)
        assert (third.payload, third.metadata) == ("[null]", metadata)
        assert (await talk.update_conversation(metadata={})).metadata == {}

        for expected, answer in {
            ConflictError: talk.append("other", key="1"),
            MessageNotFoundError: talk.get_message(seq=4),
            ConversationNotFoundError: chatdb.get_conversation(db, user_id="bob", conversation_id=conversation.id),
        }.items():
            with pytest.raises(expected):
                await answer
        assert await chatdb.list_conversations(db, user_id="alice") == [await talk.get_conversation()]
        assert await talk.delete_message(seq=2) == Deleted(conversations=0, messages=1)
        assert await talk.delete_conversation() == Deleted(conversations=1, messages=2)
        assert await chatdb.delete_user(db, user_id="alice") == Deleted(conversations=0, messages=0)
        await chatdb.check_schema(db)
