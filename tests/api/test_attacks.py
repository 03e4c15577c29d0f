"""Faults that an adversary found: waiting writes, retries by the pool, sentinels, and large keyed batches."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import chatdb
from chatdb import (
    NEW,
    UNSET,
    ConfigurationError,
    ConversationNotFoundError,
    InvalidInputError,
    MessageNotFoundError,
    UnavailableError,
)
from tests.support.databases import execute
from tests.support.proxy import Proxy, Statement

USER: dict[str, Any] = {"user_id": "ann"}
AT: dict[str, Any] = USER | {"conversation_key": "c"}
BLOCKED = "select exists (select from pg_catalog.pg_locks where not granted)"

Write = Callable[[Any], Awaitable[Any]]


def turn(key: str, content: str = "old") -> dict[str, Any]:
    """Return a message with a key."""
    return {"role": "user", "content": content, "key": key}


async def after(db: chatdb.Pool, first: Write, second: Write) -> Any:
    """Run `second` while a transaction that ran `first` is open, commit it, and return the result of `second`."""
    async with chatdb.transaction(db) as connection:
        await first(connection)
        waiting = asyncio.ensure_future(second(db))
        async with asyncio.timeout(30):
            while not await connection.fetchval(BLOCKED):
                assert not waiting.done(), waiting
                await asyncio.sleep(0.01)
    async with asyncio.timeout(30):
        return await waiting


async def start_over(db: Any) -> None:
    """Delete the conversation and create another with its key, in the caller's transaction."""
    await chatdb.delete_conversation(db, **AT)
    await chatdb.create_conversation(db, **USER, key="c", title="new", messages=[turn("k9")])


@pytest.mark.parametrize("has_expected", [False, True])
async def test_update_conversation_waits_for_its_deletion(db: chatdb.Pool, has_expected: bool) -> None:
    """An update of a conversation that another caller deletes meanwhile raises ConversationNotFoundError."""
    conversation = await chatdb.create_conversation(db, **USER, key="c")
    expected = conversation if has_expected else None
    with pytest.raises(ConversationNotFoundError):
        await after(
            db,
            lambda db: chatdb.delete_conversation(db, **AT),
            lambda db: chatdb.update_conversation(db, **AT, title="x", expected=expected),
        )


WRITES: dict[str, Write] = {
    "update_conversation": lambda db: chatdb.update_conversation(db, **AT, title="x"),
    "keyed": lambda db: chatdb.append_message(db, **AT, **turn("k")),
    "patch": lambda db: chatdb.append_message(db, **AT, role="user", content="", conversation_metadata_patch={"a": 1}),
    "batch": lambda db: chatdb.append_messages(db, **AT, messages=[turn("k")]),
    "skip": lambda db: chatdb.append_messages(db, **AT, messages=[turn("k")], on_existing="skip"),
    "upsert_message": lambda db: chatdb.upsert_message(db, **AT, **turn("k")),
    "update_message": lambda db: chatdb.update_message(db, **AT, key="k9", content="x"),
}


@pytest.mark.parametrize("name", WRITES)
async def test_write_waits_for_a_conversation_that_starts_over(db: chatdb.Pool, name: str) -> None:
    """A write by key goes to the new conversation if its key moves to another one in a single transaction."""
    await chatdb.create_conversation(db, **USER, key="c", title="old", messages=[turn("k9")])
    await after(db, start_over, WRITES[name])
    assert (await chatdb.get_conversation(db, **AT)).revision == 2


@pytest.mark.parametrize("change", [{"content": "new"}, {"metadata_patch": {"a": 1}}, {"content": "old"}], ids=str)
@pytest.mark.parametrize("place", [{"seq": 1}, {"key": "k1"}], ids=str)
async def test_update_message_waits_for_its_deletion(
    db: chatdb.Pool, place: dict[str, Any], change: dict[str, Any]
) -> None:
    """An update of a message that another caller deletes meanwhile raises MessageNotFoundError."""
    await chatdb.create_conversation(db, **USER, key="c", messages=[turn("k1")])
    with pytest.raises(MessageNotFoundError):
        await after(
            db,
            lambda db: chatdb.delete_message(db, **AT, seq=1),
            lambda db: chatdb.update_message(db, **AT, **place, **change),
        )


async def test_update_message_waits_for_another_update(db: chatdb.Pool) -> None:
    """An update to the value before another caller's update is written after it."""
    await chatdb.create_conversation(db, **USER, key="c", messages=[turn("k1")])
    updated = await after(
        db,
        lambda db: chatdb.update_message(db, **AT, seq=1, content="new", token_count=3),
        lambda db: chatdb.update_message(db, **AT, seq=1, content="old"),
    )
    assert (updated.content, updated.token_count) == ("old", 3)
    assert await chatdb.get_message(db, **AT, seq=1) == updated


async def test_skip_waits_for_a_keyed_append(db: chatdb.Pool) -> None:
    """`on_existing="skip"` also skips a key that another caller stores while the call waits."""
    await chatdb.create_conversation(db, **USER, key="c")
    added = await after(
        db,
        lambda db: chatdb.append_message(db, **AT, **turn("k1")),
        lambda db: chatdb.append_messages(db, **AT, messages=[turn("k1"), turn("k2")], on_existing="skip"),
    )
    assert [(message.seq, message.key) for message in added] == [(2, "k2")]


async def test_skip_waits_for_a_deletion(db: chatdb.Pool) -> None:
    """`on_existing="skip"` appends a message whose key becomes free while the call waits."""
    await chatdb.create_conversation(db, **USER, key="c", messages=[turn("k1")])
    added = await after(
        db,
        lambda db: chatdb.delete_message(db, **AT, key="k1"),
        lambda db: chatdb.append_messages(db, **AT, messages=[turn("k1"), turn("k2")], on_existing="skip"),
    )
    assert [(message.seq, message.key) for message in added] == [(2, "k1"), (3, "k2")]


@pytest.mark.parametrize("value", [NEW, UNSET], ids=str)
def test_sentinels_survive_copies(value: object) -> None:
    """NEW and UNSET stay the same objects in copies and pickles, because functions compare them by identity."""
    assert copy.copy(value) is value
    assert copy.deepcopy({"expected": value})["expected"] is value
    assert all(pickle.loads(pickle.dumps(value, protocol)) is value for protocol in range(6))


@pytest.mark.parametrize("seq", [0, 1])
async def test_before_seq_with_before_key(db: chatdb.Pool, seq: int) -> None:
    """`before_seq`, even 0, cannot be given together with `before_key`."""
    await chatdb.create_conversation(db, **USER, key="c", messages=[turn("k1")])
    with pytest.raises(InvalidInputError, match="before_key"):
        await chatdb.get_history(db, **AT, before_seq=seq, before_key="k1")


async def test_patch_without_messages_that_changes_nothing(db: chatdb.Pool) -> None:
    """An empty batch raises the revision if its patch changes the metadata, and not otherwise."""
    before = await chatdb.create_conversation(db, **USER, key="c", metadata={"a": 1})
    patch: dict[str, Any] = {"a": 1, "b": None}
    assert await chatdb.append_messages(db, **AT, messages=[], conversation_metadata_patch=patch) == []
    assert await chatdb.get_conversation(db, **AT) == before
    assert await chatdb.append_messages(db, **AT, messages=[], conversation_metadata_patch={"a": None}) == []
    changed = await chatdb.get_conversation(db, **AT)
    assert (changed.metadata, changed.revision) == (None, before.revision + 1)


UNREPEATABLE: dict[str, Callable[[chatdb.Pool, str], Awaitable[Any]]] = {
    "create": lambda db, _: chatdb.create_conversation(db, **USER, key="new", expected=NEW),
    "create with messages": lambda db, _: chatdb.create_conversation(
        db, **USER, key="new", expected=NEW, messages=[turn("k")]
    ),
    "empty batch": lambda db, etag: chatdb.append_messages(
        db, **AT, messages=[], expected=etag, conversation_metadata_patch={"a": 1}
    ),
}


@pytest.mark.parametrize("name", UNREPEATABLE)
async def test_pool_does_not_repeat_what_would_be_stale(dsn: str, name: str) -> None:
    """The pool reports a lost answer as unknown where its own retry could only raise StaleError."""
    lost: list[str] = []

    def watch(statement: Statement) -> bool:
        if "/* chatdb." in statement.sql and statement.answered and not lost:
            lost.append(statement.sql)
            return True
        return False

    async with chatdb.create_pool(dsn) as direct:
        etag = (await chatdb.create_conversation(direct, **USER, key="c")).etag
    with Proxy(dsn, watch=watch) as proxy:
        async with chatdb.create_pool(proxy.dsn) as db:
            with pytest.raises(UnavailableError) as error:
                await UNREPEATABLE[name](db, etag)
    assert lost
    assert error.value.sent is None


async def test_a_large_keyed_batch_is_repeated_quickly(db: chatdb.Pool) -> None:
    """Repeating a batch of 10,000 keys takes about as long as storing it: the time is not quadratic."""
    batch = [turn(f"key {number}") for number in range(10_000)]
    await chatdb.create_conversation(db, **USER, key="c")
    started = time.perf_counter()
    stored = await chatdb.append_messages(db, **AT, messages=batch)
    took = time.perf_counter() - started
    started = time.perf_counter()
    assert await chatdb.append_messages(db, **AT, messages=batch) == stored
    assert time.perf_counter() - started < 5 * took + 0.5


SUPPRESSED: dict[str, tuple[str, Callable[[chatdb.Pool, str], Awaitable[Any]]]] = {
    "upsert_conversation": ("conversations", lambda db, _: chatdb.upsert_conversation(db, **USER, key="new")),
    "pop_message": ("messages", lambda db, _: chatdb.pop_message(db, **AT)),
    "replace_messages_after": (
        "messages",
        lambda db, etag: chatdb.replace_messages_after(db, **AT, after_seq=1, messages=[turn("new")], expected=etag),
    ),
}


@pytest.mark.owner
@pytest.mark.parametrize("name", SUPPRESSED)
async def test_a_trigger_suppresses_the_row(dsn: str, db: chatdb.Pool, name: str) -> None:
    """A host's trigger that suppresses the row is reported as such, not as a missing conversation or other callers."""
    etag = (await chatdb.create_conversation(db, **USER, key="c", messages=[turn("k1")])).etag
    table, write = SUPPRESSED[name]
    execute(
        dsn,
        "create function public.suppress() returns trigger language plpgsql as 'begin return null; end'",
        f"create trigger suppress before insert or delete on chatdb.{table} for each row "
        "execute function public.suppress()",
    )
    with pytest.raises(ConfigurationError, match="suppressed"):
        await write(db, etag)
