"""The functions on messages, each case of each."""

from __future__ import annotations

import contextlib
import json
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


@pytest.fixture
async def talk(tx):
    """Give an empty conversation of alice that was created an hour ago, to be used inside a transaction."""
    created = await chatdb.create_conversation(tx, user_id="alice", title="Talk")
    hour_ago = created.created_at - timedelta(hours=1)
    await tx.execute("update chatdb.conversations set created_at = $1, updated_at = $1", hour_ago)
    return Talk(tx, await chatdb.get_conversation(tx, user_id="alice", conversation_id=created.id))


@pytest.fixture
async def committed(db):
    """Give an empty conversation of alice, to be used through the pool."""
    return Talk(db, await chatdb.create_conversation(db, user_id="alice", title="Talk"))


class Talk:
    """A conversation and the database that it is in, which every call names."""

    def __init__(self, db, conversation):
        self.db = db
        self.conversation = conversation

    def __getattr__(self, name):
        """Return a function of chatdb that is on this conversation."""
        place = {"user_id": self.conversation.user_id, "conversation_id": self.conversation.id}
        return lambda **arguments: getattr(chatdb, name)(self.db, **place, **arguments)

    def through(self, db):
        """Return the same conversation through another handle."""
        return Talk(db, self.conversation)

    async def append(self, content="hello", **fields):
        """Append a user's message."""
        return await self.append_message(**({"role": "user", "content": content} | fields))

    async def fill(self, count):
        """Append so many messages, whose contents are their places."""
        return await self.append_messages(messages=[said(str(seq)) for seq in range(1, count + 1)])

    async def seqs(self):
        """Return the places of the messages that are there."""
        return [message.seq for message in await self.list_messages(limit=10_000)]


def said(content="hello", **fields):
    """Return a user's message to be appended."""
    return {"role": "user", "content": content} | fields


# append_message


async def test_append(talk):
    """A message comes back with the values that were given, its place, and the time of the append."""
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
        role="assistant",
        content="Grüße 👋",
        payload=JsonText('{"type": "text", "n": 1}'),
        metadata={"model": "small", "cost": 0.25},
        token_count=7,
        key="turn-1",
        created_at=message.created_at,
    )
    assert await talk.get_message(seq=1) == message
    assert start <= message.created_at <= await talk.db.fetchval("select clock_timestamp()")


@pytest.mark.parametrize("key", [None, "turn-1"], ids=["unkeyed", "keyed"])
async def test_append_with_role_and_content_only(talk, key):
    """All but role and content is optional, what is not given is None, and the content may be empty."""
    message = await talk.append(content="", key=key)

    assert (message.content, message.payload, message.metadata, message.token_count) == ("", None, None, None)


@pytest.mark.parametrize("key", [None, "turn"], ids=["unkeyed", "keyed"])
async def test_append_counts_from_one(talk, key):
    """The places are 1, 2, 3 in the order of the calls, in each conversation from the start."""
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))

    assert [(await talk.append(key=key and f"{key}-{turn}")).seq for turn in range(3)] == [1, 2, 3]
    assert (await other.append(key=key)).seq == 1
    assert (await talk.get_conversation()).last_seq == 3


@pytest.mark.parametrize("role", ["user", "assistant", "system", "developer", "tool"])
async def test_append_takes_every_role(talk, role):
    """Each of the five roles is stored and comes back."""
    assert (await talk.append(role=role)).role == role


@pytest.mark.parametrize("key", [None, "turn-1"], ids=["unkeyed", "keyed"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
async def test_append_makes_the_conversation_active(talk, key, batch):
    """The append's time is the message's and becomes the conversation's, of which only the count moves besides."""
    message = (await talk.append_messages(messages=[said(key=key)]))[0] if batch else await talk.append(key=key)

    assert message.created_at > talk.conversation.created_at
    assert await talk.get_conversation() == talk.conversation.model_copy(
        update={"last_seq": 1, "updated_at": message.created_at}
    )


@pytest.mark.parametrize("key", [None, "late"], ids=["unkeyed", "keyed"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
async def test_time_never_runs_backwards(committed, key, batch):
    """A transaction that began before another's append gives its messages the time of their own append, a later one."""
    async with chatdb.transaction(committed.db) as early:
        began = await early.fetchval("select now()")
        first = await committed.append()
        mine = committed.through(early)
        late = (await mine.append_messages(messages=[said(key=key)]))[0] if batch else await mine.append(key=key)

    assert began < first.created_at
    assert late.created_at > first.created_at
    assert (await committed.get_conversation()).updated_at == late.created_at


async def test_time_of_a_conversation_from_the_future(talk):
    """Where another clock was ahead, times stand still until it is reached."""
    ahead = datetime.now(UTC) + timedelta(hours=1)
    await talk.db.execute("update chatdb.conversations set updated_at = $1", ahead)

    assert {(await talk.append(key=key)).created_at for key in (None, "a", None)} == {ahead}


async def test_append_inside_a_rolled_back_transaction(talk):
    """A place that was rolled back is assigned again: there is no gap."""
    with contextlib.suppress(ZeroDivisionError):
        async with chatdb.transaction(talk.db):
            assert (await talk.append("lost")).seq == 1
            raise ZeroDivisionError

    assert (await talk.append("kept")).seq == 1


# append_message with a key


BODY = {"role": "user", "content": "hello", "payload": JsonText('{"n":1}'), "metadata": {"a": 1, "b": [2]}}


async def test_same_key_and_body(talk):
    """The same key with the same body returns the stored message and moves nothing."""
    first = await talk.append(**BODY, key="turn-1")
    await talk.append("another")
    before = await talk.get_conversation()

    again = await talk.append(**BODY, key="turn-1")

    assert again == first
    assert await talk.get_conversation() == before
    assert await talk.seqs() == [1, 2]
    assert (await talk.append("next")).seq == 3


async def test_same_body_in_another_order_of_metadata(talk):
    """Metadata is compared by its value, whatever the order of its keys."""
    first = await talk.append(**BODY, key="turn-1")

    assert await talk.append(**BODY | {"metadata": {"b": [2], "a": 1.0}}, key="turn-1") == first


async def test_token_count_is_not_of_the_body(talk):
    """Another token count is not another body, and what is stored stays."""
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
    """Another body is a conflict: nothing is written, what is stored stays, and the transaction goes on."""
    first = await talk.append(**BODY, key="turn-1")
    before = await talk.get_conversation()

    with pytest.raises(ConflictError):
        await talk.append(**BODY | other, key="turn-1")

    assert await talk.get_conversation() == before
    assert await talk.list_messages() == [first]


async def test_key_without_payload_and_metadata(talk):
    """That payload and metadata are missing is a part of the body too."""
    first = await talk.append(key="turn-1")

    assert await talk.append(key="turn-1") == first
    with pytest.raises(ConflictError):
        await talk.append(key="turn-1", metadata={})


async def test_key_is_unique_in_its_conversation_only(talk):
    """Another conversation of the same user may use the same key for something else."""
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))
    await talk.append("here", key="turn-1")

    assert (await other.append("there", key="turn-1")).content == "there"
    assert (await talk.get_message_by_key(key="turn-1")).content == "here"


async def test_key_of_a_deleted_message_is_free(talk):
    """A deleted message's key makes a new message, at a new place and of any body."""
    await talk.append("first", key="turn-1")
    await talk.delete_message(seq=1)

    message = await talk.append("second", key="turn-1")

    assert (message.seq, message.content) == (2, "second")


async def test_key_after_an_update(talk):
    """The body that counts is the one that is stored now."""
    await talk.append("first", key="turn-1")
    updated = await talk.update_message(seq=1, content="second")

    assert await talk.append("second", key="turn-1") == updated
    with pytest.raises(ConflictError):
        await talk.append("first", key="turn-1")


# append_messages


async def test_append_messages(talk):
    """A batch is stored in its order at the next places, with the values of each message and one time for all."""
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
    """A batch with keys is stored in the same way, and may have messages without."""
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
    """Any iterable will do."""
    messages = await talk.append_messages(messages=(said(letter) for letter in "abc"))

    assert [message.content for message in messages] == ["a", "b", "c"]


async def test_append_no_messages(talk):
    """An empty batch appends nothing and moves nothing."""
    before = await talk.get_conversation()

    assert await talk.append_messages(messages=[]) == []
    assert await talk.append_messages(messages=iter(())) == []
    assert await talk.get_conversation() == before


@pytest.mark.parametrize("key", [None, "k"], ids=["unkeyed", "keyed"])
async def test_append_messages_is_all_or_nothing(talk, key):
    """A batch of which one message is refused leaves nothing behind."""
    with pytest.raises(chatdb.InvalidInputError):
        await talk.append_messages(messages=[said(key=key), {"role": "nobody", "content": "hello"}])

    assert await talk.seqs() == []
    assert (await talk.get_conversation()).last_seq == 0


@pytest.mark.owner
@pytest.mark.parametrize("key", [None, "k"], ids=["unkeyed", "keyed"])
async def test_append_messages_that_the_database_refuses(talk, key):
    """A batch of which the database refuses one message leaves nothing behind."""
    await talk.db.execute("alter table chatdb.messages add constraint a_hosts_own check (content <> 'bad')")

    with pytest.raises(chatdb.ConfigurationError, match="a_hosts_own"):
        async with talk.db.transaction():
            await talk.append_messages(messages=[said("good", key=key), said("bad")])

    assert await talk.seqs() == []
    assert (await talk.append()).seq == 1


async def test_batch_that_is_stored(talk):
    """A batch of stored keys with equal bodies returns the stored messages in the batch's order and moves nothing."""
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
    """What was appended alone comes back in a batch, and the other way round."""
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
    """A mixture of stored and new, or another body, is a conflict: nothing is written and the transaction goes on."""
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
    """Where no limit is said, the history is the newest hundred."""
    messages = await talk.fill(101)

    assert await talk.get_history() == messages[1:]


async def test_history_before_a_place(talk):
    """With a place, the history is what came before it."""
    messages = await talk.fill(5)

    assert await talk.get_history(before_seq=4) == messages[:3]
    assert await talk.get_history(before_seq=4, limit=2) == messages[1:3]
    assert await talk.get_history(before_seq=100, limit=2) == messages[3:]
    assert await talk.get_history(before_seq=1) == []
    assert await talk.get_history(before_seq=0) == []


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
async def test_history_in_pages(talk, limit):
    """The first place of a page is the cursor of the page before it, over holes too."""
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
    """A history has no other conversation's messages."""
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))
    mine, theirs = await talk.append(), await other.append()

    assert await talk.get_history() == await talk.list_messages() == [mine]
    assert await other.get_history() == await other.list_messages() == [theirs]


# list_messages and iter_messages


async def test_list(talk):
    """The list goes forward from a place, oldest first."""
    messages = await talk.fill(5)

    assert await talk.list_messages() == messages
    assert await talk.list_messages(limit=2) == messages[:2]
    assert await talk.list_messages(after_seq=2, limit=2) == messages[2:4]
    assert await talk.list_messages(after_seq=4) == messages[4:]
    assert await talk.list_messages(after_seq=5) == []
    assert await talk.list_messages(after_seq=2**63 - 1) == []


async def test_list_has_a_hundred_messages(talk):
    """Where no limit is said, a page has the oldest hundred."""
    messages = await talk.fill(101)

    assert await talk.list_messages() == messages[:100]


async def test_list_without_messages(talk):
    """A conversation without messages has an empty list."""
    assert await talk.list_messages() == []


@pytest.mark.parametrize("there", range(6))
async def test_pages_full_and_not(talk, there):
    """A page has as many messages as there are up to its limit, and an existence row behind them if it is not full."""
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
            rows = await talk.db.fetch(query.sql, *at, place, limit)
            assert [row["id"] is None for row in rows] == [False] * found + [True] * (there < limit)
            assert not any(rows[-1].values()) or there >= limit


@pytest.mark.parametrize("limit", [1, 2, 10_000])
async def test_pages_of_no_conversation(talk, limit):
    """Whatever its limit, a page of a conversation that the user does not have is an error, not an empty page."""
    await talk.fill(2)
    for place in (
        {"user_id": "bob", "conversation_id": talk.conversation.id},
        {"user_id": "alice", "conversation_id": -1},
    ):
        for call in (chatdb.list_messages, chatdb.get_history):
            with pytest.raises(ConversationNotFoundError):
                await call(talk.db, **place, limit=limit)


@pytest.mark.parametrize(
    ("name", "args", "read"),
    [
        ("list_messages", (0, 3), 0),
        ("list_messages", (0, 4), 1),
        ("list_messages", (3, 1), 1),
        ("get_history", (4, 3), 0),
        ("get_history", (4, 4), 1),
        ("get_message", (3,), 0),
        ("get_message", (4,), 1),
        ("get_message_by_key", ("key-3",), 0),
        ("get_message_by_key", ("key-4",), 1),
    ],
)
async def test_the_conversation_is_looked_for_if_need_be(talk, name, args, read):
    """Where the page is full or the message found, the server does not read the conversation."""
    await talk.append_messages(messages=[said(key=f"key-{number}") for number in (1, 2, 3)])
    sql = getattr(chatdb.messages, f"_{name}").sql
    at = (talk.conversation.user_id, talk.conversation.id)
    plan = json.loads(await talk.db.fetchval(f"explain (analyze, format json) {sql}", *at, *args))
    reads = {}
    nodes = [plan[0]["Plan"]]
    for node in nodes:
        nodes += node.get("Plans", [])
        if "Relation Name" in node:
            reads[node["Relation Name"]] = node["Actual Loops"]
    assert reads == {"messages": 1, "conversations": read}


async def test_list_follows_what_is_appended(talk):
    """A reader that goes on from the last place finds what came since, after a deletion of the newest too."""
    await talk.fill(3)
    await talk.delete_messages_after(seq=1)
    await talk.append("since")

    assert [(m.seq, m.content) for m in await talk.list_messages(after_seq=3)] == [(4, "since")]


@pytest.mark.parametrize(
    ("batch", "statements"), [(1, 8), (2, 4), (3, 3), (6, 2), (7, 2), (8, 1), (10_000, 1)], ids=lambda value: str(value)
)
async def test_iter(talk, batch, statements):
    """The iterator gives every message once, oldest first, and sends one statement a page."""
    messages = await talk.fill(7)
    counting = talk.through(Counting(talk.db))

    assert [message async for message in counting.iter_messages(batch=batch)] == messages
    assert len(counting.db.statements) == statements


async def test_iter_takes_one_page_at_a_time(talk):
    """A page is read when its first message is asked for, and no sooner."""
    await talk.fill(5)
    counting = talk.through(Counting(talk.db))

    reached = [(message.seq, len(counting.db.statements)) async for message in counting.iter_messages(batch=2)]

    assert reached == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)]


async def test_iter_pages_of_500(talk):
    """Where nothing is said, a page has 500 messages."""
    messages = await talk.fill(501)
    counting = talk.through(Counting(talk.db))

    assert [message async for message in counting.iter_messages()] == messages
    assert len(counting.db.statements) == 2


async def test_iter_after_a_place(talk):
    """The iterator begins after the given place."""
    messages = await talk.fill(5)

    assert [message async for message in talk.iter_messages(after_seq=3, batch=1)] == messages[3:]
    assert [message async for message in talk.iter_messages(after_seq=5)] == []


async def test_iter_over_holes(talk):
    """Deleted messages make no page shorter or doubled."""
    await talk.fill(7)
    for hole in (1, 4, 5):
        await talk.delete_message(seq=hole)

    assert [message.seq async for message in talk.iter_messages(batch=2)] == [2, 3, 6, 7]


async def test_iter_while_messages_come_and_go(talk):
    """What is appended or deleted after the iterator's place is seen as it is when its page is read."""
    await talk.fill(5)
    seen = []
    async for message in talk.iter_messages(batch=2):
        seen.append(message.seq)
        if message.seq == 1:
            await talk.delete_message(seq=3)
            await talk.append()

    assert seen == [1, 2, 4, 5, 6]


async def test_iter_over_nothing(talk):
    """A conversation without messages has nothing to iterate over."""
    assert [message async for message in talk.iter_messages()] == []


async def test_iter_over_a_missing_conversation(tx):
    """A missing conversation is an error at the first step, not at the call."""
    messages = chatdb.iter_messages(tx, user_id="alice", conversation_id=-1)

    with pytest.raises(ConversationNotFoundError):
        await anext(messages)


async def test_iter_over_a_conversation_that_goes(talk):
    """A conversation that is deleted meanwhile is an error at the next page."""
    await talk.fill(3)
    messages = talk.iter_messages(batch=2)
    assert [(await anext(messages)).seq for _ in range(2)] == [1, 2]
    await talk.delete_conversation()

    with pytest.raises(ConversationNotFoundError):
        await anext(messages)


# get_message and get_message_by_key


async def test_get(talk):
    """A message is found by its place and by its key, as it was stored."""
    await talk.append()
    message = await talk.append(**BODY, key="turn-2", token_count=3)

    assert await talk.get_message(seq=2) == message
    assert await talk.get_message_by_key(key="turn-2") == message


@pytest.mark.parametrize("seq", [0, 1, 3, 2**63 - 1])
async def test_get_a_missing_message(talk, seq):
    """A place where no message is, or no longer, raises MessageNotFoundError."""
    await talk.fill(2)
    await talk.delete_message(seq=1)

    with pytest.raises(MessageNotFoundError):
        await talk.get_message(seq=seq)


async def test_get_by_a_missing_key(talk):
    """A key that the conversation does not have, be it another's, raises MessageNotFoundError."""
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))
    await other.append(key="turn-1")
    await talk.append()

    with pytest.raises(MessageNotFoundError):
        await talk.get_message_by_key(key="turn-1")


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
    """A given value replaces the stored one, None clears it, what is not given stays, and so does all else."""
    before = await talk.append(**BODY, key="turn-1", token_count=3)
    other = await talk.append(**BODY, key="turn-2", token_count=3)
    given = {name: value for name, value in change.items() if value is not chatdb.UNSET}

    updated = await talk.update_message(seq=1, **change)

    assert updated == before.model_copy(update=OLD | given)
    assert await talk.list_messages() == [updated, other]


async def test_update_keeps_the_time_and_the_list(talk):
    """An update moves neither the message's time nor the conversation in the list."""
    message = await talk.append()
    before = await talk.get_conversation()

    updated = await talk.update_message(seq=1, content="corrected")

    assert (updated.created_at, updated.seq, updated.role, updated.id) == (message.created_at, 1, "user", message.id)
    assert await talk.get_conversation() == before


async def test_update_encodes_as_append_does(talk):
    """A payload that is no JsonText is encoded like that of an append."""
    value = {"b": [1.0, None, "ü"], "a": {}}
    appended = await talk.append(payload=value)

    assert (await talk.update_message(seq=1, payload=value)).payload == appended.payload


@pytest.mark.parametrize("change", [{"content": "new"}, {}], ids=["write", "nothing given"])
async def test_update_a_missing_message(talk, change):
    """A place without a message raises MessageNotFoundError."""
    await talk.append()

    with pytest.raises(MessageNotFoundError):
        await talk.update_message(seq=2, **change)


# delete_message and delete_messages_after


async def test_delete_message(talk):
    """A deleted message leaves a hole: no other moves, and the next append goes on behind the last place."""
    await talk.fill(3)
    before = await talk.get_conversation()

    assert await talk.delete_message(seq=2) == Deleted(conversations=0, messages=1)
    assert await talk.seqs() == [1, 3]
    assert await talk.get_conversation() == before
    assert (await talk.append()).seq == 4


async def test_delete_the_newest_message(talk):
    """The place of the newest message is not used again either."""
    await talk.fill(2)
    await talk.delete_message(seq=2)

    assert (await talk.get_conversation()).last_seq == 2
    assert (await talk.append()).seq == 3
    assert (await talk.append(key="k")).seq == 4


@pytest.mark.parametrize("seq", [0, 2, 3, 2**63 - 1])
async def test_delete_a_missing_message(talk, seq):
    """A place without a message raises MessageNotFoundError, also when it was deleted before."""
    await talk.fill(2)
    await talk.delete_message(seq=2)

    with pytest.raises(MessageNotFoundError):
        await talk.delete_message(seq=seq)
    assert await talk.seqs() == [1]


@pytest.mark.parametrize(("seq", "left"), [(0, 0), (2, 2), (4, 4), (5, 5), (2**63 - 1, 5)])
async def test_delete_messages_after(talk, seq, left):
    """The messages with a greater place go and are counted, and the next append goes on behind the last place."""
    await talk.append_messages(messages=[said(str(n), key=str(n)) for n in range(1, 6)])
    before = await talk.get_conversation()

    assert await talk.delete_messages_after(seq=seq) == Deleted(conversations=0, messages=5 - left)
    assert await talk.seqs() == list(range(1, left + 1))
    assert await talk.get_conversation() == before
    assert (await talk.append("again", key="5-again")).seq == 6


async def test_delete_messages_after_frees_their_keys(talk):
    """The keys of messages that were deleted together are free again."""
    await talk.append_messages(messages=[said("1", key="a"), said("2", key="b")])
    await talk.delete_messages_after(seq=0)

    messages = await talk.append_messages(messages=[said("one", key="a"), said("two", key="b")])

    assert [message.seq for message in messages] == [3, 4]


# what comes back

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
    """A JsonText comes back as it is, whichever way it was written and read, and stands for its value."""
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
    """Any JSON value can be a payload and comes back as the text that stands for it, in the order of its keys."""
    payload = (await talk.append(payload=value)).payload

    assert type(payload) is JsonText
    parsed = payload.parsed()
    assert parsed == (list(value) if isinstance(value, tuple) else value)
    assert not isinstance(value, dict) or list(parsed) == list(value)
    assert await talk.db.fetchval("select payload::text from chatdb.messages") == payload


async def test_no_payload_is_not_null(talk):
    """None is no payload; JSON's null is one, and a text is not taken for JSON."""
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
    """Metadata comes back as an equal dict, of a message and of a conversation."""
    message = await talk.append(metadata=metadata)
    conversation = await talk.update_conversation(metadata=metadata)

    assert message.metadata == metadata
    assert conversation.metadata == metadata
    assert {name: type(value) for name, value in message.metadata.items()} == {
        name: type(value) for name, value in metadata.items()
    }


async def test_metadata_can_be_asked_for(talk):
    """Metadata is stored as jsonb, whose operators the host's own queries can use."""
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


@pytest.mark.parametrize("handle", HANDLES)
async def test_every_handle_gives_the_same(dsn, arguments_of, handle):
    """Pools and connections, in a transaction or with codecs of the host's own, give the same results and errors."""
    metadata = {"a": [1, None], "b": "text"}
    async with HANDLES[handle](**arguments_of(dsn)) as db:
        conversation = await chatdb.create_conversation(db, user_id="alice", key="c", metadata=metadata)
        assert conversation.metadata == metadata
        assert await chatdb.create_conversation(db, user_id="alice", key="c") == conversation
        assert await chatdb.get_conversation_by_key(db, user_id="alice", key="c") == conversation
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
        assert await talk.get_message(seq=1) == await talk.get_message_by_key(key="1") == first
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
