"""Conversations and messages that are created, or replaced if they are stored."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

import chatdb
from chatdb import ConversationNotFoundError, InvalidInputError, JsonText
from tests.support.calls import Counting
from tests.support.talk import Talk, said

WRITTEN = "select xmin::text, ctid::text from chatdb.messages"


@pytest.mark.parametrize("content", ["", "so far"])
async def test_the_key_of_a_message_that_streams(tx: asyncpg.Connection, content: str) -> None:
    """No body is the one of a message that streams, not even with its text so far: every write with its key fails."""
    before = await chatdb.create_conversation(tx, user_id="alice")
    at: dict[str, Any] = {"user_id": "alice", "conversation_id": before.id}
    await chatdb.start_message(tx, **at, key="k")
    await chatdb.extend_message(tx, **at, key="k", offset=0, text="so far")
    stored = await chatdb.load_conversation(tx, **at)
    body: dict[str, Any] = {"role": "assistant", "content": content, "key": "k"}

    with pytest.raises(chatdb.ConflictError):
        await chatdb.append_message(tx, **at, **body)
    with pytest.raises(chatdb.ConflictError):
        await chatdb.append_messages(tx, **at, messages=[body])
    with pytest.raises(chatdb.ConflictError):
        await chatdb.append_messages(tx, **at, messages=[body], parent_seq=99)
    with pytest.raises(chatdb.ConflictError):
        await chatdb.upsert_message(tx, **at, **body)
    with pytest.raises(chatdb.StaleError):
        await chatdb.replace_messages_after(tx, **at, after_seq=0, messages=[body], expected=before)

    assert await chatdb.load_conversation(tx, **at) == stored


async def upsert(db: Any, **fields: Any) -> chatdb.Conversation:
    """Upsert alice's conversation with the key "k"."""
    return await chatdb.upsert_conversation(db, **{"user_id": "alice", "key": "k"} | fields)


async def test_upsert_creates_a_conversation(tx: asyncpg.Connection) -> None:
    """A new key makes a conversation, as create_conversation would."""
    created = await upsert(tx, title="Plans", metadata={"a": 1})

    assert (created.key, created.title, created.metadata) == ("k", "Plans", {"a": 1})
    assert (created.last_seq, created.revision, created.archived_at, created.pinned_at) == (0, 0, None, None)
    assert await chatdb.get_conversation(tx, user_id="alice", conversation_key="k") == created
    assert await chatdb.create_conversation(tx, user_id="alice", key="k") == created


@pytest.mark.parametrize(
    ("fields", "raised"),
    [
        ({"title": "New", "metadata": {"b": [2]}}, 1),
        ({"title": "New", "metadata": {"a": 1}}, 1),
        ({"title": "Old", "metadata": {"a": 2}}, 1),
        ({"title": "Old"}, 1),
        ({"metadata": {"a": 1}}, 1),
        ({}, 1),
        ({"title": "Old", "metadata": {"a": 1}}, 0),
        ({"title": "Old", "metadata": {"a": 1.0}}, 0),
    ],
    ids=repr,
)
async def test_upsert_replaces_a_conversation(tx: asyncpg.Connection, fields: dict[str, Any], raised: int) -> None:
    """A stored key gets the title and the metadata of the call, also where they are None, and keeps all else."""
    talk = Talk(tx, await upsert(tx, title="Old", metadata={"a": 1}))
    await talk.append()
    before = await talk.update_conversation(archived=True, pinned=True)

    after = await upsert(tx, **fields)

    values = {"title": fields.get("title"), "metadata": fields.get("metadata"), "revision": before.revision + raised}
    assert after == before.model_copy(update=values) == await talk.now()
    assert await talk.contents() == ["hello"]


@pytest.mark.parametrize(
    ("fields", "raised"),
    [
        ({"title": "Old", "metadata_patch": {"b": 2}}, 1),
        ({"title": "Old", "metadata_patch": {"a": None}}, 1),
        ({"title": "Old", "metadata_patch": {"a": 1, "b": None}}, 0),
        ({"title": "New", "metadata_patch": {}}, 1),
        ({"metadata_patch": {}, "archived": True}, 1),
        ({"title": "Old", "metadata_patch": {}, "archived": True}, 0),
        ({"title": "Old", "metadata_patch": {}, "archived": False}, 1),
        ({"title": "Old", "metadata_patch": {}, "archived": None}, 1),
    ],
    ids=repr,
)
async def test_upsert_patches_a_conversation(tx: asyncpg.Connection, fields: dict[str, Any], raised: int) -> None:
    """A patch keeps the metadata that it does not name, and an archived conversation keeps the time of its archive."""
    before = await upsert(tx, title="Old", metadata={"a": 1}, archived=True)
    assert before.archived_at is not None

    after = await upsert(tx, **fields)

    merged = {"a": 1} | fields["metadata_patch"]
    values = {
        "title": fields.get("title"),
        "metadata": {name: value for name, value in merged.items() if value is not None} or None,
        "revision": before.revision + raised,
        "archived_at": before.archived_at if fields.get("archived", True) else None,
    }
    assert after == before.model_copy(update=values)
    assert await chatdb.get_conversation(tx, user_id="alice", conversation_key="k") == after


async def test_upsert_archives(tx: asyncpg.Connection) -> None:
    """`archived` archives a new conversation or a stored one, and a call without it leaves the archive as it is."""
    created = await upsert(tx, archived=True)
    assert created.archived_at is not None
    assert await upsert(tx) == created
    kept = await upsert(tx, key="other", archived=False)
    assert (kept.archived_at, (await upsert(tx, key="other")).archived_at) == (None, None)
    assert (await upsert(tx, key="other", archived=True)).archived_at is not None


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"archived": 1}, "archived"),
        ({"metadata_patch": None}, "metadata_patch"),
        ({"metadata_patch": {}, "metadata": {}}, "metadata_patch"),
        ({"metadata_patch": {"a": 1}, "metadata": {"a": 1}}, "metadata_patch"),
    ],
    ids=repr,
)
async def test_upsert_refuses(fields: dict[str, Any], parameter: str) -> None:
    """A patch beside metadata and a flag that is no bool are an InvalidInputError, and nothing is sent."""
    db = Counting(None)
    with pytest.raises(InvalidInputError, match=rf"^{parameter}: "):
        await upsert(db, **fields)
    assert db.statements == []


async def test_upserts_of_two_users(tx: asyncpg.Connection) -> None:
    """Another user's conversation with the same key stays."""
    mine = await upsert(tx, title="mine")
    theirs = await upsert(tx, user_id="bob", title="theirs")

    assert theirs.id != mine.id
    assert await chatdb.get_conversation(tx, user_id="alice", conversation_key="k") == mine


async def test_upserts_of_many_callers(db: Any) -> None:
    """Sixteen callers make one conversation, with the values of one of them."""
    made = await asyncio.gather(*(upsert(db, title=f"{n}", metadata={"n": n}) for n in range(16)))

    [stored] = await chatdb.list_conversations(db, user_id="alice")
    assert {conversation.id for conversation in made} == {stored.id}
    assert {"n": int(stored.title or "")} == stored.metadata
    assert sorted(conversation.revision for conversation in made) == list(range(16))


@pytest.mark.parametrize("name", ["upsert_conversation", "upsert_message"])
async def test_upsert_needs_a_key(name: str) -> None:
    """A key of None is an InvalidInputError, and nothing is sent."""
    db = Counting(None)
    arguments = {"conversation_id": 1, **said()} if name == "upsert_message" else {}
    with pytest.raises(InvalidInputError, match=r"^key: "):
        await getattr(chatdb, name)(db, user_id="alice", key=None, **arguments)
    assert db.statements == []


async def test_upsert_appends_a_message(talk: Talk) -> None:
    """A new key appends, as append_message would: the next place, and the conversation becomes active."""
    await talk.append("first")

    message = await talk.upsert_message(
        key="k", role="tool", content="1", payload={"a": 1}, metadata={"b": 2}, token_count=3
    )

    assert (message.seq, message.role, message.content, message.key) == (2, "tool", "1", "k")
    assert (message.payload, message.metadata, message.token_count) == ('{"a": 1}', {"b": 2}, 3)
    assert await talk.get_message(seq=2) == message
    now = await talk.now()
    assert (now.last_seq, now.revision, now.updated_at) == (2, 2, message.created_at)


FULL: dict[str, Any] = {
    "role": "assistant",
    "content": "old",
    "payload": JsonText('{"a" :1}'),
    "metadata": {"b": 2},
    "token_count": 3,
}


@pytest.mark.parametrize(
    "change",
    [
        {"role": "tool"},
        {"content": ""},
        {"payload": JsonText('{"a": 1}')},
        {"payload": JsonText("null")},
        {"payload": None},
        {"metadata": {}},
        {"metadata": None},
        {"token_count": 0},
        {"token_count": None},
        {"role": "user", "content": "new", "payload": None, "metadata": None, "token_count": None},
    ],
    ids=repr,
)
async def test_upsert_replaces_a_message(talk: Talk, change: dict[str, Any]) -> None:
    """A stored message gets all values of the call and keeps its place and time, and the list does not move."""
    first = await talk.upsert_message(key="k", **FULL)
    other = await talk.append("other")
    before = await talk.now()

    message = await talk.upsert_message(key="k", **FULL | change)

    assert message == first.model_copy(update=change)
    assert await talk.messages() == [message, other]
    assert await talk.now() == before.model_copy(update={"revision": before.revision + 1})


@pytest.mark.owner
async def test_upsert_of_what_is_stored_writes_nothing(talk: Talk) -> None:
    """The same values again return the stored message and write no row."""
    first = await talk.upsert_message(key="k", **FULL)
    row, now = await talk.db.fetchrow(WRITTEN), await talk.now()

    assert await talk.upsert_message(key="k", **FULL | {"metadata": {"b": 2.0}}) == first
    assert await talk.db.fetchrow(WRITTEN) == row
    assert await talk.now() == now


async def test_upsert_after_a_deletion(talk: Talk) -> None:
    """A deleted message's key appends again, at a new place."""
    await talk.upsert_message(key="k", **FULL)
    await talk.delete_message(seq=1)

    assert (await talk.upsert_message(key="k", **FULL)).seq == 2


async def test_upsert_and_append_know_each_other(talk: Talk) -> None:
    """A message that was upserted comes back from an append with its body, and the other way round."""
    upserted = await talk.upsert_message(key="k", **FULL)
    assert await talk.append_message(key="k", **FULL) == upserted
    appended = await talk.append("new", key="other")
    assert await talk.upsert_message(key="other", **said("new")) == appended


async def test_upserts_of_a_message_by_many_callers(committed: Talk) -> None:
    """Sixteen callers make one message, whose values are one caller's; the places of other appends have no gap."""

    async def call(number: int) -> chatdb.Message:
        await committed.append("between")
        message: chatdb.Message = await committed.upsert_message(
            key="k", role="user", content=f"{number}", metadata={"number": number}
        )
        return message

    made = await asyncio.gather(*map(call, range(16)))

    assert len({message.seq for message in made}) == len({message.id for message in made}) == 1
    assert await committed.seqs() == list(range(1, 18))
    stored = await committed.get_message(key="k")
    assert stored.metadata == {"number": int(stored.content)}
    assert (await committed.now()).revision == 17 + 15


async def test_upsert_in_a_missing_conversation(tx: asyncpg.Connection) -> None:
    """A conversation that the user does not have is not created."""
    for place in ({"conversation_id": -1}, {"conversation_key": "missing"}):
        with pytest.raises(ConversationNotFoundError):
            await chatdb.upsert_message(tx, user_id="alice", **place, key="k", **FULL)
    assert await chatdb.list_conversations(tx, user_id="alice") == []
