"""Patches of metadata: what they merge, what they remove, and what they refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

import chatdb
from chatdb import InvalidInputError
from tests.support.calls import Counting
from tests.support.talk import Talk, said

KIB = 1024


async def _by_update(talk: Talk, patch: Any) -> Any:
    return (await talk.update_conversation(metadata_patch=patch)).metadata


async def _by_upsert(talk: Talk, patch: Any) -> Any:
    return (await chatdb.upsert_conversation(talk.db, user_id="alice", key="thread", metadata_patch=patch)).metadata


async def _by_append(talk: Talk, patch: Any) -> Any:
    await talk.append(conversation_metadata_patch=patch)
    return (await talk.now()).metadata


async def _by_batch(talk: Talk, patch: Any) -> Any:
    await talk.append_messages(messages=[said(), said(key="k")], conversation_metadata_patch=patch)
    return (await talk.now()).metadata


async def _by_empty_batch(talk: Talk, patch: Any) -> Any:
    assert await talk.append_messages(messages=[], conversation_metadata_patch=patch) == []
    return (await talk.now()).metadata


async def _of_message(talk: Talk, patch: Any) -> Any:
    updated = await talk.update_message(key="patched", metadata_patch=patch)
    assert await talk.get_message(key="patched") == updated
    return updated.metadata


WAYS: dict[str, Callable[[Talk, Any], Awaitable[Any]]] = {
    "update_conversation": _by_update,
    "upsert_conversation": _by_upsert,
    "append_message": _by_append,
    "append_messages": _by_batch,
    "append no messages": _by_empty_batch,
    "update_message": _of_message,
}


async def patched(db: Any, way: str, metadata: Any, patch: Any) -> Any:
    """Store metadata, patch it in one of the ways, and return what is stored then."""
    talk = Talk(db, await chatdb.create_conversation(db, user_id="alice", key="thread", metadata=metadata))
    await talk.append(key="patched", metadata=metadata)
    return await WAYS[way](talk, patch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("metadata", "patch", "result"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}}, {"a": {"x": 3}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"a": 1}, {"a": None}, None),
        ({"a": 1}, {"b": None}, {"a": 1}),
        ({"a": 1}, {}, {"a": 1}),
        (None, {"a": 1}, {"a": 1}),
        (None, {"a": None}, None),
        (None, {}, None),
        ({}, {}, None),
        ({}, {"a": None}, None),
        ({"a": 1}, {"a": None, "b": {"c": None, "d": [None]}}, {"b": {"c": None, "d": [None]}}),
        ({"a": None, "b": 1}, {"b": 2}, {"a": None, "b": 2}),
        ({"a": None}, {"a": None}, None),
        ({"a": 1}, {"a": 0, "b": False, "c": "", "d": [], "e": {}}, {"a": 0, "b": False, "c": "", "d": [], "e": {}}),
        ({"": 1, "a": 2}, {"": None}, {"a": 2}),
        ({"0": 1, "-1": 2, "a": 3}, {"0": None, "-1": None}, {"a": 3}),
        ({'"': 1, "\\": 2, "{}": 3, "a,b": 4, "ü👋": 5, "null": 6}, {'"': None, "{}": None}, None),
        ({"NULL": 1, "a": 2}, {"NULL": None}, {"a": 2}),
        ({"a": 1}, {"n": 1e22, "m": -0.0, "big": 10**40}, {"a": 1, "n": 1e22, "m": -0.0, "big": 10**40}),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_patch(tx: asyncpg.Connection, way: str, metadata: Any, patch: Any, result: Any) -> None:
    """A patch replaces keys of the top level, None removes one, and an empty result is None."""
    if metadata is not None and '"' in metadata:
        result = {"\\": 2, "a,b": 4, "ü👋": 5, "null": 6}

    assert await patched(tx, way, metadata, patch) == result


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("patch", [[], [("a", 1)], '{"a": 1}', 1, True, {"a": {1}}, {1: 2}, {"a": "\0"}, {"\0": None}])
async def test_what_is_no_patch(way: str, patch: Any) -> None:
    """What is no dict of JSON values with str keys is an InvalidInputError that names the parameter."""
    parameter = "metadata_patch" if way.startswith(("update", "upsert")) else "conversation_metadata_patch"
    db = Counting(None)
    with pytest.raises(InvalidInputError, match=rf"^{parameter}: ") as raised:
        await WAYS[way](Talk(db, chatdb.Conversation.model_construct(id=1, user_id="alice")), patch)
    assert raised.value.parameter == parameter
    assert db.statements == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_result_that_is_too_large(tx: asyncpg.Connection, way: str) -> None:
    """A patch within the limit whose result is beyond it is an InvalidInputError, and nothing is written."""
    limit = 64 * KIB if way == "update_message" else 1024 * KIB
    half = "x" * (limit // 2)
    talk = Talk(tx, await chatdb.create_conversation(tx, user_id="alice", key="thread", metadata={"a": half}))
    await talk.append(key="patched", metadata={"a": half[: 32 * KIB]})
    before = await talk.now(), await talk.messages()

    with pytest.raises(InvalidInputError, match=r"metadata.*(64 KiB|1 MiB)") as raised:
        async with chatdb.transaction(tx):
            await WAYS[way](talk, {"b": half})
    assert "metadata" in raised.value.parameter
    assert "xxx" not in str(raised.value)

    assert (await talk.now(), await talk.messages()) == before
    assert await WAYS[way](talk, {"a": None, "b": half}) == {"b": half}


async def test_a_patch_that_removes_is_not_stored(talk: Talk) -> None:
    """The names of removed keys need no room: a patch may remove more than fits beside what is stored."""
    await talk.update_conversation(metadata={"a": "x" * (1024 * KIB - 20)})

    updated = await talk.update_conversation(metadata_patch={f"key-{n}": None for n in range(10_000)})

    assert updated.metadata is not None
    assert updated.metadata.keys() == {"a"}


async def test_a_patch_of_a_new_conversation(tx: asyncpg.Connection) -> None:
    """A conversation that an append or an upsert creates gets what the patch sets, and None where it sets nothing."""
    create: dict[str, Any] = {"user_id": "alice", "create": True}
    for number, (patch, metadata) in enumerate([({"a": 1, "b": None}, {"a": 1}), ({"b": None}, None), ({}, None)]):
        options = create | {"conversation_metadata_patch": patch}
        await chatdb.append_message(tx, **said(), conversation_key=f"one {number}", **options)
        await chatdb.append_messages(tx, messages=[said()], conversation_key=f"batch {number}", **options)
        await chatdb.append_messages(tx, messages=[], conversation_key=f"none {number}", **options)
        await chatdb.upsert_conversation(tx, user_id="alice", key=f"upsert {number}", metadata_patch=patch)
        for key in ("one", "batch", "none", "upsert"):
            found = await chatdb.get_conversation(tx, user_id="alice", conversation_key=f"{key} {number}")
            assert found.metadata == metadata


async def test_a_repeated_append_patches_nothing(talk: Talk) -> None:
    """An append whose key is stored changes no metadata, because the first call did."""
    await talk.append(key="k", conversation_metadata_patch={"turn": 1})
    await talk.append("next", conversation_metadata_patch={"turn": 2})

    await talk.append(key="k", conversation_metadata_patch={"turn": 1})
    await talk.append_messages(messages=[said(key="k")], conversation_metadata_patch={"turn": 1})
    await talk.append_messages(messages=[said(key="k")], on_existing="skip", conversation_metadata_patch={"turn": 1})

    assert (await talk.now()).metadata == {"turn": 2}


async def test_a_patch_with_other_values(talk: Talk) -> None:
    """A patch can be given with a title, an archive and a pin, and a message's with other fields."""
    await talk.append(metadata={"a": 1})

    conversation = await talk.update_conversation(title="New", metadata_patch={"b": 1}, archived=True, pinned=True)
    message = await talk.update_message(seq=1, content="new", payload=[1], metadata_patch={"b": 2}, token_count=3)

    assert (conversation.title, conversation.metadata, conversation.revision) == ("New", {"b": 1}, 2)
    assert None not in (conversation.archived_at, conversation.pinned_at)
    assert (message.content, message.payload, message.metadata, message.token_count) == (
        "new",
        "[1]",
        {"a": 1, "b": 2},
        3,
    )
    assert (await talk.now()).revision == 3


async def test_patches_of_many_callers(committed: Talk) -> None:
    """Sixteen callers that each patch a key of their own lose nothing."""
    await committed.append(key="k")
    thread: dict[str, Any] = {"user_id": "alice", "key": "thread"}

    async def patch(caller: int) -> None:
        for value in range(5):
            await chatdb.upsert_conversation(committed.db, **thread, metadata_patch={f"{caller}": value})
            await committed.update_conversation(metadata_patch={f"{caller}": value})
            await committed.update_message(seq=1, metadata_patch={f"{caller}": value})
            await committed.append(conversation_metadata_patch={f"append {caller}": value})

    await asyncio.gather(*map(patch, range(16)))

    now = await committed.now()
    assert now.metadata == {f"{prefix}{caller}": 4 for caller in range(16) for prefix in ("", "append ")}
    assert (await committed.get_message(seq=1)).metadata == {f"{caller}": 4 for caller in range(16)}
    assert (now.last_seq, now.revision) == (81, 81 + 2 * 80)
    upserted = await chatdb.get_conversation(committed.db, user_id="alice", conversation_key="thread")
    assert upserted.metadata == {f"{caller}": 4 for caller in range(16)}
    assert upserted.revision == 79
