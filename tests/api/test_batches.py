"""Batches of messages with keys: those stored already, a mixture, and the largest."""

from __future__ import annotations

import time
from typing import Any

import pytest

import chatdb
from chatdb import ConflictError, NewMessage, StaleError
from tests.support.talk import Talk, said

A, B, C, D = (said(name, key=name) for name in "abcd")


@pytest.mark.parametrize(
    ("batch", "appended"),
    [
        ([A, B], []),
        ([B, A], []),
        ([C], ["c"]),
        ([A, C], ["c"]),
        ([C, A, D, B], ["c", "d"]),
        ([D, C], ["d", "c"]),
        ([said("other", key="a"), C], ["c"]),
        ([said("other", key="a")], []),
        ([said("1"), A, said("2"), C, said("3")], ["1", "2", "c", "3"]),
        ([said("1"), said("2")], ["1", "2"]),
        ([], []),
    ],
    ids=lambda value: "-".join(each if isinstance(each, str) else each["content"] for each in value) or "none",
)
async def test_skip(talk: Talk, batch: list[dict[str, Any]], appended: list[str]) -> None:
    """`on_existing="skip"` appends the messages whose keys are new, in their order, and returns only these."""
    await talk.append_messages(messages=[A, B])
    before = await talk.now()

    messages = await talk.append_messages(messages=batch, on_existing="skip")

    assert [message.content for message in messages] == appended
    assert [message.seq for message in messages] == list(range(3, 3 + len(appended)))
    assert await talk.list_messages(after_seq=2) == messages
    assert await talk.contents() == ["a", "b", *appended]
    after = await talk.now()
    assert (after.last_seq, after.revision) == (2 + len(appended), 2 + len(appended))
    assert (after.updated_at > before.updated_at) == bool(appended)


async def test_skip_again(talk: Talk) -> None:
    """A skipping call that is repeated appends nothing more and returns an empty list."""
    assert len(await talk.append_messages(messages=[A, B], on_existing="skip")) == 2
    assert await talk.append_messages(messages=[A, B], on_existing="skip") == []
    assert await talk.append_messages(messages=[B, C], on_existing="skip") == await talk.list_messages(after_seq=2)


async def test_skip_does_not_reuse_the_place_of_a_skipped_message(talk: Talk) -> None:
    """Messages after a skipped one are numbered without a gap, and keep their own values."""
    await talk.append_messages(messages=[B])
    full = said("full", key="f", payload={"a": 1}, metadata={"b": 2}, token_count=3, role="tool")

    messages = await talk.append_messages(messages=[A, B, full], on_existing="skip")

    assert [(m.seq, m.key) for m in messages] == [(2, "a"), (3, "f")]
    assert (messages[1].payload, messages[1].metadata, messages[1].token_count) == ('{"a": 1}', {"b": 2}, 3)
    assert await talk.get_message(key="f") == messages[1]


async def test_skip_with_expected(talk: Talk) -> None:
    """A stale `expected` refuses a batch with a new key; a batch without one returns an empty list."""
    stale = await talk.now()
    await talk.append_messages(messages=[A], on_existing="skip", expected=stale)

    with pytest.raises(StaleError):
        await talk.append_messages(messages=[A, B], on_existing="skip", expected=stale)
    with pytest.raises(StaleError):
        await talk.append_messages(messages=[said("no key")], on_existing="skip", expected=stale)
    assert await talk.append_messages(messages=[A], on_existing="skip", expected=stale) == []
    assert await talk.contents() == ["a"]
    assert len(await talk.append_messages(messages=[A, B], on_existing="skip", expected=await talk.now())) == 1


async def test_the_same_key_twice_is_refused(talk: Talk) -> None:
    """A batch has distinct keys, also where stored ones are skipped."""
    with pytest.raises(chatdb.InvalidInputError, match=r"^messages: must have distinct keys$"):
        await talk.append_messages(messages=[A, A], on_existing="skip")


async def test_skip_with_create(talk: Talk) -> None:
    """With `create`, a skipping batch creates the conversation the first time."""
    new = {"user_id": "alice", "conversation_key": "new", "create": True, "on_existing": "skip"}

    assert [m.seq for m in await chatdb.append_messages(talk.db, messages=[A, B], **new)] == [1, 2]
    assert [m.seq for m in await chatdb.append_messages(talk.db, messages=[B, C], **new)] == [3]


LIMIT = 5.0
"""Seconds for the largest batch: 1 on two cores, but 16 if each stored message is compared with the whole batch."""


@pytest.mark.chaos
async def test_the_largest_batch(committed: Talk) -> None:
    """A batch of 10,000 keyed messages is stored, repeated, refused and skipped, each in time that is linear."""
    batch = [NewMessage(role="user", content=f"{n}", key=f"key-{n}", metadata={"n": n}) for n in range(10_000)]
    took = {}

    async def timed(what: str, messages: list[Any], **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return await committed.append_messages(messages=messages, **options)
        except ConflictError as error:
            return type(error)
        finally:
            took[what] = time.perf_counter() - start

    stale = committed.conversation
    other = NewMessage(role="user", content="other", key="key-9999")
    stored = await timed("new", batch)
    assert [message.seq for message in stored] == list(range(1, 10_001))
    assert await timed("again", batch) == stored
    assert await timed("in another order", batch[::-1]) == stored[::-1]
    assert await timed("again, stale", batch, expected=stale) == stored
    assert await timed("another body", [*batch[:-1], other]) is ConflictError
    assert await timed("another body, stale", [*batch[:-1], other], expected=stale) is ConflictError
    assert await timed("a new key", [*batch[:-1], said(key="new")]) is ConflictError
    assert await timed("skip", batch, on_existing="skip") == []
    assert (await committed.now()).last_seq == 10_000
    # later calls have a generic plan, which on PostgreSQL 14 is slower
    assert {what: took[what] for what in [*took][:5] if took[what] > LIMIT} == {}
