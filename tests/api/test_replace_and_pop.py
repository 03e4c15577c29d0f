"""The end of a conversation that is replaced or taken off: an edit, a regeneration, an undo."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import chatdb
from chatdb import ConflictError, Message, StaleError
from tests.support.talk import Talk, said

NEW_MESSAGES = [said("x", key="x"), said("y")]


@pytest.fixture
async def chat(talk: Talk) -> Talk:
    """Give a conversation with the messages 1 to 5, whose keys are their places, without the third."""
    await talk.append_messages(messages=[said(f"{n}", key=f"{n}") for n in range(1, 6)])
    await talk.delete_message(seq=3)
    return talk


@pytest.mark.parametrize(
    ("after_seq", "left"),
    [(0, ""), (1, "1"), (2, "12"), (3, "12"), (4, "124"), (5, "1245"), (6, "1245"), (2**63 - 1, "1245")],
)
@pytest.mark.parametrize("messages", [[], NEW_MESSAGES], ids=["none", "two"])
async def test_replace(chat: Talk, after_seq: int, left: str, messages: list[Any]) -> None:
    """What comes after the place goes, be it 0, a hole or beyond the end, and the new messages come at new places."""
    before = await chat.now()

    stored = await chat.replace_messages_after(after_seq=after_seq, messages=messages, expected=before)

    assert [message.seq for message in stored] == [6, 7][: len(messages)]
    assert "".join(await chat.contents()) == left + ("xy" if messages else "")
    assert (await chat.messages())[len(left) :] == stored
    now = await chat.now()
    assert (now.last_seq, now.revision) == (5 + len(messages), before.revision + len(messages) + 1)
    assert {message.created_at for message in stored} == ({now.updated_at} if messages else set())
    assert (now.updated_at > before.updated_at) == bool(messages)


async def test_replace_stores_all_values(chat: Talk) -> None:
    """New messages come back with their values, in their order, with or without keys."""
    full = said("full", key="f", payload={"a": 1}, metadata={"b": 2}, token_count=3, role="tool")

    stored = await chat.replace_messages_after(
        after_seq=1, messages=[said("1"), full, said("3")], expected=await chat.now()
    )

    assert [message.content for message in stored] == ["1", "full", "3"]
    message = stored[1]
    assert (message.payload, message.metadata, message.token_count) == ('{"a": 1}', {"b": 2}, 3)
    assert await chat.list_messages(after_seq=1) == stored


async def test_replace_takes_the_keys_of_what_goes(chat: Talk) -> None:
    """New messages may have the keys of those that go, in another order and with other bodies."""
    messages = [said("five", key="5"), said("2", key="2"), said("three", key="3"), said("four", key="4")]

    stored = await chat.replace_messages_after(after_seq=1, messages=messages, expected=await chat.now())

    assert [(message.seq, message.key) for message in stored] == [(6, "5"), (7, "2"), (8, "3"), (9, "4")]
    assert await chat.contents() == ["1", "five", "2", "three", "four"]


@pytest.mark.parametrize("content", ["2", "other"])
async def test_replace_with_the_key_of_what_stays(chat: Talk, content: str) -> None:
    """A key of a message that stays is a ConflictError, whatever the body, and nothing is written."""
    before = await chat.now(), await chat.messages()

    with pytest.raises(ConflictError) as raised:
        async with chatdb.transaction(chat.db):
            await chat.replace_messages_after(
                after_seq=2, messages=[said("new"), said(content, key="2")], expected=before[0]
            )

    assert type(raised.value) is ConflictError
    assert (await chat.now(), await chat.messages()) == before


async def test_replace_again(chat: Talk) -> None:
    """A repeated call returns what the first one stored if all its messages have keys, and else is a StaleError."""
    read = await chat.now()
    keyed = [said("y", key="y"), said("x", key="x", metadata={"a": 1}, payload=[1])]
    stored = await chat.replace_messages_after(after_seq=1, messages=keyed, expected=read)
    now = await chat.now()
    assert await chat.replace_messages_after(after_seq=1, messages=keyed, expected=read) == stored
    await chat.append("later")
    assert await chat.replace_messages_after(after_seq=1, messages=keyed, expected=read.etag) == stored
    assert (await chat.now()).revision == now.revision + 1

    for messages in ([said("z", key="y"), keyed[1]], [keyed[0], said("no key")], [], [said("other", key="z")]):
        with pytest.raises(StaleError):
            await chat.replace_messages_after(after_seq=1, messages=messages, expected=read)
    with pytest.raises(StaleError):  # the messages are stored, but not after this place
        await chat.replace_messages_after(after_seq=7, messages=keyed, expected=read)
    assert await chat.contents() == ["1", "y", "x", "later"]


async def test_replace_in_an_empty_conversation(talk: Talk) -> None:
    """Where there is nothing to replace, the new messages are appended."""
    stored = await talk.replace_messages_after(after_seq=0, messages=NEW_MESSAGES, expected=talk.conversation)

    assert [message.seq for message in stored] == [1, 2]


async def test_replacements_of_many_callers(committed: Talk) -> None:
    """Eight callers that regenerate the same answer leave one, also while a ninth appends."""
    await committed.fill(2)
    for _ in range(10):
        read = await committed.now()

        async def replace(caller: int, read: chatdb.Conversation = read) -> bool:
            try:
                await committed.replace_messages_after(after_seq=1, messages=[said(f"caller {caller}")], expected=read)
            except StaleError:
                return False
            return True

        *replaced, appended = await asyncio.gather(*map(replace, range(8)), committed.append("ninth"))
        contents = await committed.contents()
        assert sum(replaced) <= 1
        assert appended.content in contents  # no replacement that did not see it has deleted it
        assert len([content for content in contents if content.startswith("caller")]) <= 1 + (sum(replaced) == 0)


# pop_message


async def test_pop(chat: Talk) -> None:
    """The newest message goes and comes back with all its values; its place is not used again."""
    newest = await chat.append("6", payload={"a": 1}, metadata={"b": 2}, token_count=3, key="6", role="tool")
    before = await chat.now()

    assert await chat.pop_message() == newest
    assert (await chat.now()) == before.model_copy(update={"head_seq": 5, "revision": before.revision + 1})
    popped = [await chat.pop_message() for _ in range(5)]
    assert [message and message.seq for message in popped] == [5, 4, 2, 1, None]
    assert await chat.pop_message() is None
    assert (await chat.append("next", key="6")).seq == 7


async def test_pop_after_deletions(chat: Talk) -> None:
    """The newest message is the last that is left, not the last that was appended."""
    await chat.delete_message(seq=5)
    assert (await chat.pop_message()).seq == 4
    await chat.delete_messages_after(after_seq=0)
    assert await chat.pop_message() is None


async def test_pops_of_many_callers(committed: Talk) -> None:
    """Sixteen callers take each message once, newest first, while others append."""
    await committed.fill(40)
    popped: list[Message] = []

    async def pop() -> None:
        for _ in range(3):
            message = await committed.pop_message()
            assert message is not None
            popped.append(message)

    await asyncio.gather(*(pop() for _ in range(16)), *(committed.append("new") for _ in range(10)))

    left = await committed.seqs()
    assert len({message.seq for message in popped}) == len(popped) == 48
    assert sorted([*left, *(message.seq for message in popped)]) == list(range(1, 51))
    assert left == [1, 2]
