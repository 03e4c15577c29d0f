"""Conversations that are created with their first messages, or by an append; and read with their newest ones."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

import chatdb
from chatdb import ConversationNotFoundError, InvalidInputError, JsonText, NewMessage
from tests.support.calls import Counting
from tests.support.proxy import Proxy
from tests.support.talk import Talk, said

FIRST: list[Any] = [
    NewMessage(role="system", content="Be brief."),
    said("hello", key="k", payload=JsonText('{"a" :1}'), metadata={"b": 2}, token_count=3),
]


@pytest.mark.parametrize("key", [None, "new"], ids=["unkeyed", "keyed"])
async def test_create_with_messages(tx: asyncpg.Connection, key: str | None) -> None:
    """A conversation and its first messages are stored by one statement, with one time."""
    db = Counting(tx)

    created = await chatdb.create_conversation(
        db, user_id="alice", key=key, title="Plans", metadata={"m": 1}, messages=iter(FIRST)
    )

    assert len(db.statements) == 1
    assert (created.key, created.title, created.metadata) == (key, "Plans", {"m": 1})
    assert (created.last_seq, created.revision) == (2, 2)
    talk = Talk(tx, created)
    assert await talk.now() == created
    messages = await talk.messages()
    assert [(m.seq, m.role, m.content, m.key) for m in messages] == [
        (1, "system", "Be brief.", None),
        (2, "user", "hello", "k"),
    ]
    assert (messages[1].payload, messages[1].metadata, messages[1].token_count) == ('{"a" :1}', {"b": 2}, 3)
    assert {m.created_at for m in messages} == {created.created_at, created.updated_at}
    assert (await talk.append()).seq == 3


async def test_one_round_trip(dsn: str) -> None:
    """It is one round trip, and so are an append that creates, and the conversation with its newest messages."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn) as db:
            counts = []
            for number in range(3):
                place: dict[str, Any] = {"user_id": "alice", "conversation_key": f"other {number}"}
                calls = [
                    chatdb.create_conversation(db, user_id="alice", key=f"{number}", messages=FIRST),
                    chatdb.create_conversation(db, user_id="alice", key=f"{number}", messages=FIRST),
                    chatdb.append_message(db, **place, **said(), create=True),
                    chatdb.append_message(db, **place, **said(), create=True),
                    chatdb.append_messages(db, **place, messages=FIRST, create=True),
                    chatdb.load_conversation(db, **place),
                ]
                for call in calls:
                    proxy.clear()
                    await call
                    counts.append((proxy.round_trips, proxy.ready))
    assert counts[-len(calls) :] == [(1, 1)] * len(calls)


async def test_a_stored_key_with_messages(tx: asyncpg.Connection) -> None:
    """A stored key returns the stored conversation, and the messages of the call are not appended."""
    first = await chatdb.create_conversation(tx, user_id="alice", key="k", messages=FIRST)
    other = await chatdb.create_conversation(tx, user_id="alice", key="empty")

    for stored in (first, other):
        again = await chatdb.create_conversation(
            tx, user_id="alice", key=stored.key, title="new", messages=[said("new"), *FIRST]
        )
        assert again == stored == await Talk(tx, stored).now()
        assert len(await Talk(tx, stored).messages()) == stored.last_seq


@pytest.mark.parametrize("messages", [(), [], iter(()), {}.values()], ids=["tuple", "list", "iterator", "view"])
@pytest.mark.parametrize("key", [None, "k"], ids=["unkeyed", "keyed"])
async def test_create_with_no_messages(tx: asyncpg.Connection, messages: Any, key: str | None) -> None:
    """An empty batch makes an empty conversation, by the statement of a call without messages."""
    db = Counting(tx)

    created = await chatdb.create_conversation(db, user_id="alice", key=key, messages=messages)

    assert (created.last_seq, created.revision) == (0, 0)
    assert [statement.partition("\n")[0] for statement in db.statements] == [
        f"--chatdb.create_conversation{'_keyed' if key else ''}"
    ]


@pytest.mark.parametrize(
    ("messages", "parameter"),
    [
        ("hello", "messages"),
        (said(), "messages"),
        (3, "messages"),
        (None, "messages"),
        ([said(), 3], "messages[1]"),
        ([said(role="nobody")], "messages[0].role"),
        ([said(key="k"), said(key="k")], "messages"),
        ([said()] * 10_001, "messages"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_wrong_first_messages(messages: Any, parameter: str) -> None:
    """A wrong message is an InvalidInputError that names it, and nothing is sent."""
    db = Counting(None)
    with pytest.raises(InvalidInputError) as raised:
        await chatdb.create_conversation(db, user_id="alice", key="k", messages=messages)
    assert raised.value.parameter == parameter
    assert db.statements == []


async def test_creations_of_many_callers(db: Any) -> None:
    """Sixteen callers with the same key get one conversation, which has one caller's messages."""
    for number in range(10):

        async def create(caller: int, key: str = f"{number}") -> chatdb.Conversation:
            messages = [said(f"{caller}"), said(f"{caller}", key="k")]
            return await chatdb.create_conversation(db, user_id="alice", key=key, messages=messages)

        made = await asyncio.gather(*map(create, range(16)))
        assert all(conversation == made[0] for conversation in made)
        assert len({message.content for message in await Talk(db, made[0]).messages()}) == 1
        assert await Talk(db, made[0]).seqs() == [1, 2]


# append with create


@pytest.mark.parametrize("key", [None, "k"], ids=["unkeyed", "keyed"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
async def test_append_that_creates(tx: asyncpg.Connection, batch: bool, key: str | None) -> None:
    """The first call makes the conversation, and all append to it."""
    place: dict[str, Any] = {"user_id": "alice", "conversation_key": "new", "create": True}
    for number in (1, 2, 3):
        one = said(f"{number}", key=key and f"{key} {number}", payload=[number], metadata={"n": number})
        if batch:
            [message] = await chatdb.append_messages(tx, messages=[one], **place)
        else:
            message = await chatdb.append_message(tx, **one, **place)
        found = await chatdb.get_conversation(tx, user_id="alice", conversation_key="new")
        assert (message.seq, message.conversation_id, message.user_id) == (number, found.id, "alice")
        assert await Talk(tx, found).get_message(seq=number) == message
        assert (found.last_seq, found.revision, found.updated_at) == (number, number, message.created_at)
        assert (found.key, found.title, found.metadata) == ("new", None, None)
    assert len(await chatdb.list_conversations(tx, user_id="alice")) == 1


async def test_an_empty_batch_that_creates(tx: asyncpg.Connection) -> None:
    """An empty batch makes the conversation, and returns an empty list each time."""
    place: dict[str, Any] = {"user_id": "alice", "conversation_key": "new", "messages": []}
    with pytest.raises(ConversationNotFoundError):
        await chatdb.append_messages(tx, **place)

    assert await chatdb.append_messages(tx, **place, create=True) == []
    [created] = await chatdb.list_conversations(tx, user_id="alice")
    assert await chatdb.append_messages(tx, **place, create=True) == []

    assert await chatdb.list_conversations(tx, user_id="alice") == [created]
    assert (created.key, created.last_seq, created.revision) == ("new", 0, 0)


@pytest.mark.parametrize("name", ["append_message", "append_messages"])
async def test_create_needs_a_key(name: str) -> None:
    """`create=True` with a conversation's id is an InvalidInputError that names `create`, and nothing is sent."""
    db = Counting(None)
    arguments = {"messages": [said()]} if name == "append_messages" else said()
    with pytest.raises(InvalidInputError, match=r"^create: can be True only with a conversation_key$"):
        await getattr(chatdb, name)(db, user_id="alice", conversation_id=1, create=True, **arguments)
    assert db.statements == []


@pytest.mark.parametrize("name", ["append_message", "append_messages"])
async def test_without_create_a_missing_conversation_is_missing(tx: asyncpg.Connection, name: str) -> None:
    """Without it, no option makes a conversation."""
    options: list[dict[str, Any]] = [{}, {"conversation_metadata_patch": {"a": 1}}]
    for given in options:
        for key in (None, "k"):
            one = said(key=key)
            arguments = {"messages": [one]} if name == "append_messages" else one
            with pytest.raises(ConversationNotFoundError):
                await getattr(chatdb, name)(tx, user_id="alice", conversation_key="new", **arguments, **given)
    assert await chatdb.list_conversations(tx, user_id="alice") == []


# load_conversation


@pytest.mark.parametrize("there", [0, 1, 3, 5])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 10_000])
async def test_load(tx: asyncpg.Connection, there: int, limit: int) -> None:
    """A conversation and its newest messages are those of get_conversation and get_history."""
    messages = [said(f"{n}", key=f"{n}", payload=n, metadata={"n": n}, token_count=n) for n in range(there)]
    talk = Talk(
        tx,
        await chatdb.create_conversation(tx, user_id="alice", key="c", title="T", metadata={"a": 1}, messages=messages),
    )
    await chatdb.create_conversation(tx, user_id="alice", key="other", messages=[said("other")])
    if there > 2:
        await talk.delete_message(seq=2)
    await talk.update_conversation(archived=True, pinned=True)

    by_id = await talk.load_conversation(limit=limit)
    by_key = await chatdb.load_conversation(tx, user_id="alice", conversation_key="c", limit=limit)

    assert by_id == by_key == (await talk.now(), await talk.get_history(limit=limit))


async def test_load_a_hundred(talk: Talk) -> None:
    """Where no limit is given, the newest hundred messages come."""
    messages = await talk.fill(101)

    assert await talk.load_conversation() == (await talk.now(), messages[1:])


@pytest.mark.parametrize("place", [{"conversation_id": -1}, {"conversation_key": "missing"}], ids=str)
@pytest.mark.parametrize("user", ["alice", "bob"])
async def test_load_a_missing_conversation(talk: Talk, user: str, place: dict[str, Any]) -> None:
    """A conversation that the user does not have is a ConversationNotFoundError."""
    for where in (place, {"conversation_id": talk.conversation.id} if user == "bob" else place):
        with pytest.raises(ConversationNotFoundError):
            await chatdb.load_conversation(talk.db, user_id=user, **where)
