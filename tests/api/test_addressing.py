"""Conversations and messages that are named by an id or place, or by the caller's own key."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from pydantic import BaseModel

import chatdb
from chatdb import Conversation, ConversationNotFoundError, InvalidInputError, MessageNotFoundError
from tests.support.calls import (
    CALLS,
    CONVERSATION_CALLS,
    MISSING,
    SIGNATURES,
    Counting,
    call,
    conversation_with_a_message,
)
from tests.support.talk import Talk, said

BY_ID = [
    (name, arguments)
    for name, arguments in CALLS
    if "conversation_id" in SIGNATURES[name]
    and "conversation_key" not in arguments
    # of all conversations
    and arguments.get("conversation_id", ...) is not None
]
"""Every call on a conversation that `call` names by its id."""

ON_A_MESSAGE = [name for name, parameters in SIGNATURES.items() if parameters.keys() >= {"conversation_id", "seq"}]
ON_A_MESSAGE.remove("fork_conversation")  # which needs none


def values_of(answer: Any) -> Any:
    """Return the values of records, without ids and times, which differ between two writes."""
    if isinstance(answer, BaseModel):
        return type(answer), answer.model_dump(exclude={"id", "created_at", "updated_at", "archived_at", "pinned_at"})
    return [values_of(each) for each in answer] if isinstance(answer, list | tuple) else answer


async def undone(tx: asyncpg.Connection, name: str, arguments: dict[str, Any], conversation: Conversation) -> Any:
    """Return what a call comes to, its values or its error, and roll it back."""
    block = tx.transaction()
    await block.start()
    try:
        return values_of(await call(tx, name, arguments, conversation))
    except chatdb.ChatDBError as error:
        return type(error), str(error)
    finally:
        await block.rollback()


async def result(answer: Any) -> Any:
    """Await a coroutine, or the first step of an asynchronous iterator."""
    return await (anext(answer) if hasattr(answer, "__anext__") else answer)


def test_the_functions_on_a_message() -> None:
    """The tests below leave out no function on one message."""
    others = ["update_message", "delete_message", "switch_branch", "delete_branch"]
    assert ["get_message", *others, "extend_message", "read_message", "finish_message"] == ON_A_MESSAGE
    assert {name for name, _ in BY_ID} == CONVERSATION_CALLS.keys() - {"search_messages"}


@pytest.mark.parametrize(("name", "arguments"), BY_ID)
async def test_a_key_names_the_same_conversation(tx: asyncpg.Connection, name: str, arguments: dict[str, Any]) -> None:
    """A call with the key has the results and errors of one with the id."""
    await chatdb.create_conversation(tx, user_id="alice", key="other", messages=[said("other", key="first")])
    conversation = await conversation_with_a_message(tx)

    by_id = await undone(tx, name, arguments, conversation)
    by_key = await undone(tx, name, arguments | {"conversation_key": "thread"}, conversation)

    assert by_key == by_id


@pytest.mark.parametrize(
    ("name", "others"),
    [
        *((name, {"offset": 0, "text": "x"} if name == "extend_message" else {}) for name in ON_A_MESSAGE),
        ("update_message", {"content": "new"}),
        ("update_message", {"metadata_patch": {"a": 1}}),
    ],
)
@pytest.mark.parametrize("conversation_key", [None, "thread"])
async def test_a_key_names_the_same_message(
    tx: asyncpg.Connection, name: str, conversation_key: str | None, others: dict[str, Any]
) -> None:
    """A call with the message's key has the result of one with its place."""
    conversation = await conversation_with_a_message(tx)
    await Talk(tx, conversation).append("second", key="second")
    others = others | {"conversation_key": conversation_key}

    by_seq = await undone(tx, name, others | {"seq": 3}, conversation)
    by_key = await undone(tx, name, others | {"key": "second"}, conversation)

    assert by_key == by_seq


@pytest.mark.parametrize("name", CONVERSATION_CALLS)
async def test_both_or_neither(name: str) -> None:
    """Both id and key, or neither, is an InvalidInputError that names one of them, and nothing is sent."""
    arguments = {"user_id": "alice", **CONVERSATION_CALLS[name]}
    neither: list[tuple[dict[str, Any], str]] = [
        ({}, "conversation_id"),
        ({"conversation_id": None, "conversation_key": None}, "conversation_id"),
    ]
    both = {"conversation_id": 1, "conversation_key": "thread"}
    # without a conversation, a search is in all of the user's
    for place, parameter in [*(neither if name != "search_messages" else ()), (both, "conversation_key")]:
        db = Counting(None)
        with pytest.raises(InvalidInputError, match=rf"^{parameter}: ") as raised:
            await result(getattr(chatdb, name)(db, **place, **arguments))
        assert raised.value.parameter == parameter
        assert db.statements == []


@pytest.mark.parametrize("name", ON_A_MESSAGE)
async def test_both_or_neither_of_a_message(name: str) -> None:
    """So are both place and key of a message, or neither; a place of 0 is given."""
    for place, parameter in [({}, "seq"), ({"seq": 1, "key": "k"}, "key"), ({"seq": 0, "key": "k"}, "key")]:
        db = Counting(None)
        others = {"offset": 0, "text": "x"} if name == "extend_message" else {}
        with pytest.raises(InvalidInputError, match=rf"^{parameter}: "):
            await getattr(chatdb, name)(db, user_id="alice", conversation_id=1, **place, **others)
        assert db.statements == []


@pytest.mark.parametrize(
    ("name", "arguments", "parameter"),
    [
        ("fork_conversation", {"seq": 5, "key": "k"}, "key"),
        ("fork_conversation", {"seq": 0, "key": "k"}, "key"),
        ("get_history", {"before_seq": 5, "before_key": "k"}, "before_key"),
        ("get_history", {"before_seq": 0, "before_key": "k"}, "before_key"),
        ("list_messages", {"after_seq": 1, "after_key": "k"}, "after_key"),
        ("list_messages", {"after_seq": False, "after_key": "k"}, "after_key"),
        ("delete_messages_after", {"after_seq": 1, "after_key": "k"}, "after_key"),
        ("delete_messages_after", {}, "after_seq"),
        ("update_conversation", {"metadata": {}, "metadata_patch": {}}, "metadata_patch"),
        ("update_conversation", {"metadata": None, "metadata_patch": {"a": 1}}, "metadata_patch"),
        ("update_message", {"seq": 1, "metadata": {}, "metadata_patch": {}}, "metadata_patch"),
        ("update_message", {"seq": 1, "metadata": None, "metadata_patch": {"a": 1}}, "metadata_patch"),
    ],
)
async def test_two_that_exclude_each_other(name: str, arguments: dict[str, Any], parameter: str) -> None:
    """Two values for the same thing are an InvalidInputError that names one of them, and nothing is sent."""
    db = Counting(None)
    with pytest.raises(InvalidInputError, match=rf"^{parameter}: ") as raised:
        await getattr(chatdb, name)(db, user_id="alice", conversation_id=1, **arguments)
    assert raised.value.parameter == parameter
    assert db.statements == []


@pytest.mark.parametrize(("name", "arguments"), BY_ID)
async def test_foreign_is_missing_by_key(tx: asyncpg.Connection, name: str, arguments: dict[str, Any]) -> None:
    """Another user's key, a missing one and a missing id raise the same ConversationNotFoundError."""
    conversation = await conversation_with_a_message(tx)
    of_bob = conversation.model_copy(update={"user_id": "bob"})
    everything = "select array_agg(c::text) || array_agg(m::text) from chatdb.conversations c, chatdb.messages m"
    before = await tx.fetchval(everything)
    said = set()
    for caller, place in [
        (of_bob, {"conversation_key": "thread"}),
        (conversation, {"conversation_key": "missing"}),
        (conversation, {"conversation_id": MISSING}),
        (of_bob, {}),
    ]:
        with pytest.raises(ConversationNotFoundError) as raised:
            await call(tx, name, arguments | place, caller)
        said.add(str(raised.value))

    assert len(said) == 1
    assert await tx.fetchval(everything) == before


async def test_two_users_of_one_key(tx: asyncpg.Connection) -> None:
    """The same key names each user's own conversation."""
    for user in ("alice", "bob"):
        await chatdb.create_conversation(tx, user_id=user, key="k", messages=[said(f"{user}'s", key="k")])
    for user in ("alice", "bob"):
        place: dict[str, Any] = {"user_id": user, "conversation_key": "k"}
        [message] = await chatdb.get_history(tx, **place)
        assert (message.content, message.user_id) == (f"{user}'s", user)
        assert await chatdb.get_message(tx, **place, key="k") == message


@pytest.mark.parametrize("by_key", [False, True], ids=["by id", "by key"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 10_000])
async def test_a_page_at_a_key(tx: asyncpg.Connection, by_key: bool, limit: int) -> None:
    """A page before or after a key is that before or after its message's place."""
    conversation = await chatdb.create_conversation(tx, user_id="alice", key="c")
    talk = Talk(tx, conversation)
    await talk.append_messages(messages=[said(f"{n}", key=f"{n}") for n in range(1, 6)])
    await talk.delete_message(seq=3)
    place: dict[str, Any] = {"user_id": "alice", "limit": limit}
    place |= {"conversation_key": "c"} if by_key else {"conversation_id": conversation.id}

    for seq in (1, 2, 4, 5):
        before = await talk.get_history(before_seq=seq, limit=limit)
        after = await talk.list_messages(after_seq=seq, limit=limit)
        assert await chatdb.get_history(tx, **place, before_key=f"{seq}") == before
        assert await chatdb.list_messages(tx, **place, after_key=f"{seq}") == after
        assert await chatdb.list_messages(tx, **place, after_key=f"{seq}", after_seq=0) == after
    assert await chatdb.get_history(tx, **place) == await talk.get_history(limit=limit)
    assert await chatdb.list_messages(tx, **place) == await talk.list_messages(limit=limit)


@pytest.mark.parametrize("by_key", [False, True], ids=["by id", "by key"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("get_history", {"before_key": "k"}),
        ("get_history", {"before_key": "k", "limit": 1}),
        ("list_messages", {"after_key": "k"}),
        ("list_messages", {"after_key": "k", "limit": 1}),
        ("delete_messages_after", {"after_key": "k"}),
        ("get_message", {"key": "k"}),
        ("update_message", {"key": "k", "content": "new"}),
        ("update_message", {"key": "k"}),
        ("delete_message", {"key": "k"}),
    ],
)
async def test_a_missing_key_of_a_message(
    tx: asyncpg.Connection, name: str, arguments: dict[str, Any], by_key: bool
) -> None:
    """A key that no message of the conversation has, or no longer, is a MessageNotFoundError."""
    conversation = await chatdb.create_conversation(tx, user_id="alice", key="c")
    await chatdb.create_conversation(tx, user_id="alice", key="other", messages=[said(key="k")])
    place = {"conversation_key": "c"} if by_key else {"conversation_id": conversation.id}
    talk = Talk(tx, conversation)

    for fill in (False, True):
        if fill:
            await talk.append("deleted", key="k")
            await talk.append("kept")
            await talk.delete_message(seq=1)
        before = await talk.now()
        with pytest.raises(MessageNotFoundError):
            await getattr(chatdb, name)(tx, user_id="alice", **place, **arguments)
        assert await talk.now() == before
    assert await talk.contents() == ["kept"]
    [other] = await chatdb.get_history(tx, user_id="alice", conversation_key="other")
    assert other.content == "hello"


async def test_delete_messages_after_a_key(talk: Talk) -> None:
    """The message with the key stays, and all after it go."""
    await talk.append_messages(messages=[said(f"{n}", key=f"{n}") for n in range(1, 5)])

    assert await talk.delete_messages_after(after_key="2") == chatdb.Deleted(conversations=0, messages=2)
    assert await talk.delete_messages_after(after_key="2") == chatdb.Deleted(conversations=0, messages=0)
    assert await talk.contents() == ["1", "2"]


async def test_iterate_by_key(tx: asyncpg.Connection) -> None:
    """The iterator reads all pages of the conversation with the key."""
    await chatdb.create_conversation(tx, user_id="alice", key="c", messages=[said(f"{n}") for n in range(5)])
    place: dict[str, Any] = {"user_id": "alice", "conversation_key": "c"}

    read = [message.content async for message in chatdb.iter_messages(tx, **place, batch=2)]
    rest = [message.content async for message in chatdb.iter_messages(tx, **place, batch=2, after_seq=3)]

    assert (read, rest) == (["0", "1", "2", "3", "4"], ["3", "4"])
