"""`expected`: a write that is refused if another caller has written to the conversation first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

import chatdb
from chatdb import (
    NEW,
    ConflictError,
    Conversation,
    ConversationNotFoundError,
    Deleted,
    InvalidInputError,
    Message,
    MessageNotFoundError,
    StaleError,
)
from tests.support.calls import MISSING, SIGNATURES, Counting
from tests.support.talk import Talk, said

WRITES: dict[str, tuple[dict[str, Any], int]] = {
    "append_message": (said("new"), 1),
    "append_messages": ({"messages": [said("new"), said("newer")]}, 2),
    "upsert_message": (said("new", key="first"), 1),
    "replace_messages_after": ({"after_seq": 1, "messages": [said("new"), said("newer")]}, 3),
    "update_conversation": ({"title": "new"}, 1),
    "update_message": ({"seq": 1, "content": "changed"}, 1),
    "delete_message": ({"seq": 1}, 1),
    "delete_messages_after": ({"after_seq": 1}, 1),
    "pop_message": ({}, 1),
    "switch_branch": ({"seq": 1}, 0),
    "delete_branch": ({"seq": 2}, 1),
    "delete_conversation": ({}, 0),
}
"""A call of every function that takes `expected` on a conversation, and by how much it raises the revision."""

KINDS: dict[str, Callable[[Conversation], Conversation | str]] = {
    "Conversation": lambda conversation: conversation,
    "etag": lambda conversation: conversation.etag,
    "copy": lambda conversation: Conversation.model_validate_json(conversation.model_dump_json()),
}

EVERYTHING = """
    select coalesce((select array_agg(c::text order by id) from chatdb.conversations as c), '{}')
        || coalesce((select array_agg(m::text order by id) from chatdb.messages as m), '{}')
"""


@pytest.fixture
async def chat(tx: asyncpg.Connection) -> Talk:
    """Give a conversation with the key "chat" and three messages, the first with the key "first"."""
    messages = [said("1", key="first"), said("2"), said("3", key="last")]
    return Talk(tx, await chatdb.create_conversation(tx, user_id="alice", key="chat", messages=messages))


async def write(talk: Talk, name: str, expected: Any, **address: Any) -> Any:
    """Call a function of `WRITES`."""
    address = address or {"conversation_id": talk.conversation.id}
    arguments = {"user_id": "alice", **address, **WRITES[name][0], "expected": expected}
    return await getattr(chatdb, name)(talk.db, **arguments)


def test_every_function_is_tried() -> None:
    """The tests below leave out no function that takes `expected`, but for create_conversation, which takes NEW."""
    assert WRITES.keys() | {"create_conversation"} == {
        name for name, parameters in SIGNATURES.items() if "expected" in parameters
    }


@pytest.mark.parametrize("by_key", [False, True], ids=["by id", "by key"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITES)
async def test_the_conversation_as_it_is(chat: Talk, name: str, kind: str, by_key: bool) -> None:
    """A write succeeds with the conversation as it is stored, and the caller knows the next revision."""
    for _ in range(2):
        await chat.append()  # the conversation has been written to, but not since it was read
    read = await chat.now()

    await write(chat, name, KINDS[kind](read), **({"conversation_key": "chat"} if by_key else {}))

    if name == "delete_conversation":
        assert await chatdb.list_conversations(chat.db, user_id="alice") == []
    else:
        assert (await chat.now()).revision == read.revision + WRITES[name][1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITES)
async def test_a_stale_one(chat: Talk, name: str, kind: str) -> None:
    """After any other write, a write with the earlier conversation is a StaleError, and writes nothing."""
    for other in WRITES:
        if other in {"delete_conversation", "switch_branch"}:  # the latter changes nothing without branches
            continue
        if name == other == "upsert_message":  # a retry
            continue
        read = await chat.now()
        block = chat.db.transaction()
        await block.start()
        await write(chat, other, read)
        before = await chat.db.fetchval(EVERYTHING)
        with pytest.raises(StaleError):
            await write(chat, name, KINDS[kind](read))
        assert await chat.db.fetchval(EVERYTHING) == before
        await block.rollback()


@pytest.mark.parametrize("name", WRITES)
async def test_one_that_is_not_the_conversations(chat: Talk, name: str) -> None:
    """Another conversation's etag, or one of a later revision, is a StaleError too."""
    other = await chatdb.create_conversation(chat.db, user_id="alice", messages=[said()] * 3)
    of_bob = await chatdb.create_conversation(chat.db, user_id="bob", messages=[said()] * 3)
    assert other.revision == of_bob.revision == (await chat.now()).revision
    before = await chat.db.fetchval(EVERYTHING)

    for expected in (other, other.etag, of_bob, (await chat.now()).model_copy(update={"revision": 2**63 - 1})):
        with pytest.raises(StaleError):
            await write(chat, name, expected)
    assert await chat.db.fetchval(EVERYTHING) == before


@pytest.mark.parametrize("name", WRITES)
async def test_one_of_a_deleted_conversation(chat: Talk, name: str) -> None:
    """A conversation that was created again under the same key is another one, also at the same revision."""
    read = await chat.now()
    await chat.delete_conversation()
    messages = [said("1", key="first", metadata={}), said("2"), said("3", key="last")]
    again = await chatdb.create_conversation(chat.db, user_id="alice", key="chat", messages=messages)
    assert (again.key, again.revision) == (read.key, read.revision)
    assert again.etag != read.etag
    before = await chat.db.fetchval(EVERYTHING)

    with pytest.raises(StaleError):
        await write(chat, name, read.etag, conversation_key="chat")
    assert await chat.db.fetchval(EVERYTHING) == before


@pytest.mark.parametrize("name", WRITES)
async def test_a_missing_conversation_comes_first(chat: Talk, name: str) -> None:
    """A conversation that the user does not have is a ConversationNotFoundError, whatever `expected` says."""
    for expected in (chat.conversation, chat.conversation.etag):
        with pytest.raises(ConversationNotFoundError):
            await write(chat, name, expected, conversation_id=MISSING)
        with pytest.raises(ConversationNotFoundError):
            await write(chat, name, expected, conversation_key="missing")


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("expected", [NEW, "", "e1", "e1AAAA", "e2AAAAAAAAAAAAAAAAAAAAAA", 1, b"e1", {}, object()])
async def test_what_is_not_expected(name: str, expected: Any) -> None:
    """Anything else is an InvalidInputError that names `expected`, and nothing is sent."""
    db = Counting(None)
    with pytest.raises(InvalidInputError, match=r"^expected: "):
        await getattr(chatdb, name)(db, user_id="alice", conversation_id=1, **WRITES[name][0] | {"expected": expected})
    assert db.statements == []


async def test_replace_needs_expected(chat: Talk) -> None:
    """`replace_messages_after` refuses None, because the tail that goes must be the one that the caller read."""
    with pytest.raises(InvalidInputError, match=r"^expected: "):
        await chat.replace_messages_after(after_seq=0, messages=[], expected=None)


# The key is looked at first.


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("append_message", said("1", key="first"), "first"),
        ("append_messages", {"messages": [said("3", key="last"), said("1", key="first")]}, "first"),
        ("upsert_message", said("1", key="first"), "first"),
    ],
)
async def test_a_stored_message_comes_back(chat: Talk, name: str, arguments: dict[str, Any], key: str) -> None:
    """A message that is stored with the same body comes back whatever `expected` says, and nothing is written."""
    stale = chat.conversation
    await chat.append()
    before = await chat.db.fetchval(EVERYTHING)

    answer = await getattr(chat, name)(**arguments, expected=stale)

    assert await chat.get_message(key=key) in (answer if isinstance(answer, list) else [answer])
    assert await chat.db.fetchval(EVERYTHING) == before


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("append_message", said("other", key="first"), ConflictError),
        ("append_message", said("new", key="new"), StaleError),
        ("append_messages", {"messages": [said("other", key="first")]}, ConflictError),
        ("append_messages", {"messages": [said("1", key="first"), said("new", key="new")]}, ConflictError),
        ("append_messages", {"messages": [said("1", key="first"), said("no key")]}, ConflictError),
        ("append_messages", {"messages": [said("new", key="new"), said("newer", key="newer")]}, StaleError),
        ("append_messages", {"messages": [said("no key")]}, StaleError),
        ("append_messages", {"messages": []}, StaleError),
        ("upsert_message", said("other", key="first"), StaleError),
        ("upsert_message", said("new", key="new"), StaleError),
        ("replace_messages_after", {"after_seq": 0, "messages": []}, StaleError),
        ("replace_messages_after", {"after_seq": 1, "messages": [said("1", key="first")]}, StaleError),
        ("update_message", {"seq": 99, "content": "new"}, StaleError),
        ("delete_message", {"key": "missing"}, StaleError),
        ("delete_messages_after", {"after_key": "missing"}, StaleError),
    ],
)
async def test_the_order_of_errors(chat: Talk, name: str, arguments: dict[str, Any], error: type[Exception]) -> None:
    """A key in conflict comes before a stale `expected`, and that before a missing message."""
    stale = chat.conversation
    await chat.append()
    before = await chat.db.fetchval(EVERYTHING)

    with pytest.raises(ConflictError) as raised:
        await getattr(chat, name)(**arguments, expected=stale)

    assert type(raised.value) is error
    assert await chat.db.fetchval(EVERYTHING) == before


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("update_message", {"key": "missing", "content": "new"}),
        ("update_message", {"seq": 99}),
        ("delete_message", {"seq": 99}),
        ("delete_messages_after", {"after_key": "missing"}),
    ],
)
async def test_a_missing_message(chat: Talk, name: str, arguments: dict[str, Any]) -> None:
    """With the conversation as it is, a missing message is a MessageNotFoundError."""
    with pytest.raises(MessageNotFoundError):
        await getattr(chat, name)(**arguments, expected=chat.conversation)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("append_message", said("new", key="new")),
        ("append_message", said("new", key="new", conversation_metadata_patch={"a": 1})),
        ("append_messages", {"messages": [said("new", key="new"), said("newer", key="newer")]}),
        ("upsert_message", said("new", key="new")),
        ("upsert_message", said("new", key="first")),
        ("replace_messages_after", {"after_seq": 0, "messages": [said("new", key="first"), said("newer", key="b")]}),
        ("replace_messages_after", {"after_seq": 2, "messages": [said("3", key="last")]}),
    ],
)
async def test_a_retry_after_a_lost_answer(chat: Talk, name: str, arguments: dict[str, Any]) -> None:
    """A keyed write that is repeated with the same `expected` gives the same answer and writes nothing more."""
    read = await chat.now()
    first = await getattr(chat, name)(**arguments, expected=read)
    before = await chat.db.fetchval(EVERYTHING)

    for expected in (read, read.etag):
        assert await getattr(chat, name)(**arguments, expected=expected) == first
    assert await chat.db.fetchval(EVERYTHING) == before


# NEW


@pytest.mark.parametrize("key", [None, "k"], ids=["unkeyed", "keyed"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
async def test_new(tx: asyncpg.Connection, batch: bool, key: str | None) -> None:
    """NEW with `create=True` appends the first message of a conversation, and never a second one."""
    place: dict[str, Any] = {"user_id": "alice", "conversation_key": "new", "create": True, "expected": NEW}

    async def append(content: str, key: str | None) -> list[Message]:
        if batch:
            return await chatdb.append_messages(tx, messages=[said(content, key=key)], **place)
        return [await chatdb.append_message(tx, **said(content, key=key), **place)]

    first = await append("1", key)

    assert [message.seq for message in first] == [1]
    with pytest.raises(StaleError):
        await append("2", key and "other")
    if key:
        assert await append("1", key) == first
        with pytest.raises(ConflictError) as raised:
            await append("2", key)
        assert type(raised.value) is ConflictError
    assert await chatdb.get_history(tx, user_id="alice", conversation_key="new") == first


async def test_new_with_a_stored_conversation_of_another_user(chat: Talk) -> None:
    """Another user's conversation of that key does not count."""
    message = await chatdb.append_message(
        chat.db, user_id="bob", conversation_key="chat", create=True, expected=NEW, **said()
    )

    assert (message.seq, message.user_id) == (1, "bob")


async def test_new_in_create_conversation(chat: Talk) -> None:
    """With NEW, a stored key is a StaleError, with messages or without; without a key there is nothing to meet."""
    before = await chat.db.fetchval(EVERYTHING)
    for arguments in ({}, {"messages": [said("new")]}):
        with pytest.raises(StaleError):
            await chatdb.create_conversation(chat.db, user_id="alice", key="chat", expected=NEW, **arguments)
    assert await chat.db.fetchval(EVERYTHING) == before

    for arguments in ({}, {"messages": [said("new")]}):
        created = [
            await chatdb.create_conversation(chat.db, user_id="alice", expected=NEW, **arguments),
            await chatdb.create_conversation(chat.db, user_id="bob", key=f"{arguments}", expected=NEW, **arguments),
        ]
        assert [conversation.last_seq for conversation in created] == [len(arguments)] * 2


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
async def test_an_etag_never_creates(chat: Talk, batch: bool) -> None:
    """An etag with `create=True` appends to the stored conversation, and creates none where it is missing."""
    place: dict[str, Any] = {"user_id": "alice", "conversation_key": "chat", "create": True}
    call = chatdb.append_messages if batch else chatdb.append_message
    body: dict[str, Any] = {"messages": [said("4")]} if batch else said("4")
    await call(chat.db, **place, **body, expected=chat.conversation)
    read = await chat.now()
    await chat.delete_conversation()

    for expected in (read, read.etag):
        with pytest.raises(ConversationNotFoundError):
            await call(chat.db, **place, **body, expected=expected)
    assert await chatdb.list_conversations(chat.db, user_id="alice") == []


# Races


@pytest.mark.parametrize("name", [name for name in WRITES if name != "delete_conversation"])
async def test_one_of_many_wins(db: Any, name: str) -> None:
    """Of eight callers with the same conversation exactly one writes, and the others get a StaleError."""
    messages = [said("1", key="first"), said("2"), said("3")]
    talk = Talk(db, await chatdb.create_conversation(db, user_id="alice", messages=messages))
    for _ in range(5):
        await talk.append()
        await talk.upsert_message(**said("1", key="first"))
        if name == "switch_branch":  # which changes the head only if another version is selected
            await talk.append(parent_seq=1)
        read = await talk.now()
        newest = {"seq": read.last_seq}

        async def call(caller: int, read: Conversation = read, newest: dict[str, int] = newest) -> Any:
            text = f"caller {caller} of {read.revision}"  # for the same value again would be no write
            changes: dict[str, dict[str, Any]] = {
                "update_conversation": {"title": text},
                "update_message": newest | {"content": text},
                "upsert_message": {"content": text},
                "delete_message": newest,
                "delete_branch": newest,
                "switch_branch": {"seq": 2},
            }
            try:
                return await getattr(talk, name)(**WRITES[name][0] | changes.get(name, {}), expected=read)
            except StaleError as error:
                return error

        answers = await asyncio.gather(*map(call, range(8)))
        assert sum(not isinstance(answer, StaleError) for answer in answers) == 1
        assert (await talk.now()).revision == read.revision + (WRITES[name][1] or 1)


async def test_one_of_many_deletes(db: Any) -> None:
    """Of eight deletions one counts the conversation, and to the others it is missing."""
    conversation = await chatdb.create_conversation(db, user_id="alice", messages=[said(), said()])

    async def delete(_: int) -> Any:
        place: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
        try:
            return await chatdb.delete_conversation(db, **place, expected=conversation)
        except ConversationNotFoundError as error:
            return type(error)

    answers = await asyncio.gather(*map(delete, range(8)))
    assert answers.count(Deleted(conversations=1, messages=2)) == 1
    assert answers.count(ConversationNotFoundError) == 7


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
async def test_one_of_many_creates(db: Any, batch: bool) -> None:
    """Of eight callers with NEW one appends the first message; without `expected` all append to one conversation."""
    for number in range(10):
        place: dict[str, Any] = {"user_id": "alice", "conversation_key": f"{number}", "create": True}

        async def call(caller: int, expected: Any, place: dict[str, Any] = place) -> Any:
            try:
                if batch:
                    return await chatdb.append_messages(db, messages=[said(f"{caller}")], expected=expected, **place)
                return await chatdb.append_message(db, **said(f"{caller}"), expected=expected, **place)
            except StaleError as error:
                return error

        answers = await asyncio.gather(*(call(caller, NEW) for caller in range(8)))
        assert sum(not isinstance(answer, StaleError) for answer in answers) == 1
        await chatdb.delete_conversation(db, user_id="alice", conversation_key=f"{number}")

        await asyncio.gather(*(call(caller, None) for caller in range(8)))
        messages = await chatdb.list_messages(db, user_id="alice", conversation_key=f"{number}")
        assert [message.seq for message in messages] == list(range(1, 9))
        assert {message.content for message in messages} == set("01234567")


# The revision


@pytest.mark.parametrize(
    ("name", "arguments", "raised"),
    [
        ("append_message", said(), 1),
        ("append_message", said(key="new"), 1),
        ("append_message", said("1", key="first"), 0),
        ("append_message", said(conversation_metadata_patch={"a": 1}), 1),
        ("append_message", said("1", key="first", conversation_metadata_patch={"a": 1}), 0),
        ("append_messages", {"messages": []}, 0),
        ("append_messages", {"messages": [said()] * 5}, 5),
        ("append_messages", {"messages": [said(key="a"), said(key="b")]}, 2),
        ("append_messages", {"messages": [said(key="a"), said()], "conversation_metadata_patch": {"a": 1}}, 2),
        ("append_messages", {"messages": [said("1", key="first"), said("3", key="last")]}, 0),
        ("append_messages", {"messages": [said("1", key="first"), said()], "on_existing": "skip"}, 1),
        ("append_messages", {"messages": [], "conversation_metadata_patch": {"a": 1}}, 1),
        ("append_messages", {"messages": [], "conversation_metadata_patch": {}}, 0),
        ("append_messages", {"messages": [], "conversation_metadata_patch": {"b": 1, "c": None}}, 0),
        ("upsert_message", said(key="new"), 1),
        ("upsert_message", said("other", key="first"), 1),
        ("upsert_message", said("1", key="first", token_count=1), 1),
        ("upsert_message", said("1", key="first"), 0),
        ("replace_messages_after", {"after_seq": 1, "messages": [said()] * 3}, 4),
        ("replace_messages_after", {"after_seq": 1, "messages": []}, 1),
        ("replace_messages_after", {"after_seq": 3, "messages": [said()]}, 2),
        ("update_conversation", {"title": "new"}, 1),
        ("update_conversation", {"title": None}, 0),
        ("update_conversation", {"title": "new", "metadata": {}, "archived": True, "pinned": True}, 1),
        ("update_conversation", {"metadata": {"b": 1}}, 0),
        ("update_conversation", {"metadata_patch": {"b": 1, "c": None}}, 0),
        ("update_conversation", {"metadata_patch": {"b": 2}}, 1),
        ("update_conversation", {"archived": True}, 1),
        ("update_conversation", {"archived": False, "pinned": False}, 0),
        ("update_conversation", {}, 0),
        ("update_message", {"seq": 1, "content": "new"}, 1),
        ("update_message", {"seq": 1, "content": "1", "payload": None, "metadata": None, "token_count": None}, 0),
        ("update_message", {"seq": 1, "metadata_patch": {"a": None}}, 0),
        ("update_message", {"seq": 1, "metadata_patch": {"a": 1}}, 1),
        ("update_message", {"seq": 1}, 0),
        ("delete_message", {"seq": 3}, 1),
        ("delete_messages_after", {"after_seq": 0}, 1),
        ("delete_messages_after", {"after_seq": 3}, 0),
        ("pop_message", {}, 1),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("is_expected", [False, True], ids=["", "expected"])
async def test_the_revision(chat: Talk, name: str, arguments: dict[str, Any], raised: int, is_expected: bool) -> None:
    """An append raises the revision by its messages, another write by 1 if it changes something, and a read by 0."""
    await chat.update_conversation(metadata={"b": 1})
    read = await chat.now()
    given = {"expected": read} if is_expected or name == "replace_messages_after" else {}

    answer = await getattr(chat, name)(**arguments, **given)

    now = await chat.now()
    assert now.revision == read.revision + raised
    assert (now.etag == read.etag) == (raised == 0)
    if isinstance(answer, Conversation):
        assert answer == now


async def test_the_revision_of_a_new_conversation(tx: asyncpg.Connection) -> None:
    """A new conversation has the revision of its messages, whichever function creates it."""
    create: dict[str, Any] = {"user_id": "alice", "create": True}
    await chatdb.append_message(tx, **said(), conversation_key="1", **create, conversation_metadata_patch={"a": 1})
    await chatdb.append_messages(tx, messages=[said(), said()], conversation_key="2", **create)
    await chatdb.append_messages(tx, messages=[], conversation_key="0", **create)
    await chatdb.create_conversation(tx, user_id="alice", key="3", messages=[said()] * 3)
    for key in "0123":
        conversation = await chatdb.get_conversation(tx, user_id="alice", conversation_key=key)
        assert (conversation.revision, conversation.last_seq) == (int(key), int(key))


async def test_pop_of_nothing_raises_nothing(talk: Talk) -> None:
    """To pop from a conversation without messages is no write."""
    assert await talk.pop_message() is None
    assert await talk.pop_message(expected=talk.conversation) is None
    assert await talk.now() == talk.conversation
