"""Functions on all data of a user: moving it to another user, exporting it, and deleting all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import chatdb
from chatdb import (
    ConflictError,
    Conversation,
    ConversationNotFoundError,
    Deleted,
    InvalidInputError,
    Message,
    MessageNotFoundError,
    Moved,
)
from chatdb.admin.users_link import link_users
from tests.support.talk import Talk, said

GUEST: dict[str, Any] = {"user_id": "guest"}
ANN: dict[str, Any] = {"user_id": "ann"}

TABLES = """
    select c.relname from pg_catalog.pg_class as c
    inner join pg_catalog.pg_attribute as a on a.attrelid = c.oid
    where c.relnamespace = 'chatdb'::regnamespace and c.relkind in ('r', 'p') and a.attname = 'user_id'
    order by c.relname
"""
"""The tables that have rows of a user."""


async def fill(db: Any, user: str) -> None:
    """Store something of each kind: keys, branches, an archived and a pinned conversation, and a stream."""
    at = {"user_id": user, "conversation_key": "branches"}
    await chatdb.create_conversation(
        db, user_id=user, key="branches", title="t", metadata={"a": 1}, messages=[said("1"), said("2", key="two")]
    )
    await chatdb.append_message(db, **at, role="assistant", content="3", payload={"b": 2}, parent_seq=1)
    await chatdb.switch_branch(db, **at, seq=2)
    await chatdb.create_conversation(db, user_id=user)
    pinned = await chatdb.create_conversation(db, user_id=user, messages=[said("😀" * 3)])
    await chatdb.update_conversation(db, user_id=user, conversation_id=pinned.id, pinned=True, archived=True)
    await chatdb.append_message(db, user_id=user, conversation_key="stream", create=True, role="user", content="?")
    started = await chatdb.start_message(db, user_id=user, conversation_key="stream", key="answer")
    await chatdb.extend_message(
        db, user_id=user, conversation_id=started.conversation_id, seq=started.seq, offset=0, text="half "
    )
    await chatdb.extend_message(
        db, user_id=user, conversation_id=started.conversation_id, seq=started.seq, offset=5, text="done"
    )


async def exported(db: Any, user: str) -> list[Conversation | Message]:
    """Return everything of a user."""
    return [record async for record in chatdb.export_user(db, user_id=user)]


async def counts(db: Any, user: str) -> dict[str, int]:
    """Return how many rows each table has of a user."""
    tables = [row["relname"] for row in await db.fetch(TABLES)]
    return {
        table: await db.fetchval(f"select count(*) from chatdb.{table} where user_id = $1", user) for table in tables
    }


# --- move_user -----------------------------------------------------------------------------------------------------


async def test_a_guest_becomes_a_user(db):
    """Everything of the guest is the user's afterwards, unchanged, and the guest has nothing."""
    await fill(db, "guest")
    await chatdb.create_conversation(db, **ANN, key="own", messages=[said("kept")])
    before = await exported(db, "guest")
    own = await exported(db, "ann")
    rows = await counts(db, "guest")

    moved = await chatdb.move_user(db, **GUEST, to_user_id="ann")

    assert moved == Moved(conversations=4, messages=6)
    assert await exported(db, "guest") == []
    assert set((await counts(db, "guest")).values()) == {0}
    assert all(rows.values())
    now = [record for record in await exported(db, "ann") if record not in own]
    assert now == [record.model_copy(update={"user_id": "ann"}) for record in before]


async def test_branches_and_streams_go_on_after_a_move(db):
    """The user follows the head that the guest selected, and finishes the message that the guest's reply streamed."""
    await fill(db, "guest")
    await chatdb.move_user(db, **GUEST, to_user_id="ann")

    line = await chatdb.get_branch(db, **ANN, conversation_key="branches")
    assert [message.content for message in line] == ["1", "2"]
    appended = await chatdb.append_message(db, **ANN, conversation_key="branches", role="user", content="4")
    assert (appended.seq, appended.parent_seq) == (4, 2)
    at = ANN | {"conversation_key": "stream", "key": "answer"}
    assert (await chatdb.read_message(db, **at)).text == "half done"
    assert await chatdb.extend_message(db, **at, offset=9, text="!") == 10
    assert (await chatdb.finish_message(db, **at)).content == "half done!"
    assert await db.fetchval("select count(*) from chatdb.message_parts") == 0


async def test_the_guest_gets_not_found_errors_after_a_move(db):
    """A moved conversation is missing for the guest, whatever the guest was doing with it."""
    await fill(db, "guest")
    found = await chatdb.get_conversation(db, **GUEST, conversation_key="stream")
    at = GUEST | {"conversation_id": found.id}
    async with chatdb.Watcher(db, poll=0.1) as watcher:
        watched = watcher.watch(**at, after_seq=found.last_seq)
        waiting = asyncio.ensure_future(anext(watched))
        await asyncio.sleep(0.3)
        await chatdb.move_user(db, **GUEST, to_user_id="ann")
        with pytest.raises(ConversationNotFoundError):
            await asyncio.wait_for(waiting, 10)
    with pytest.raises(ConversationNotFoundError):
        await chatdb.append_message(db, **at, role="user", content="late")
    with pytest.raises(ConversationNotFoundError):
        await chatdb.extend_message(db, **at, key="answer", offset=9, text="late")


async def test_a_key_that_both_users_have(db):
    """The target's conversation keeps the key, the moved one loses it, and other keys stay."""
    mine = await chatdb.create_conversation(db, **ANN, key="both")
    theirs = await chatdb.create_conversation(db, **GUEST, key="both")
    other = await chatdb.create_conversation(db, **GUEST, key="other")

    assert await chatdb.move_user(db, **GUEST, to_user_id="ann") == Moved(conversations=2, messages=0)

    keys = {each.id: each.key for each in await chatdb.list_conversations(db, **ANN)}
    assert keys == {mine.id: "both", theirs.id: None, other.id: "other"}


async def test_an_etag_holds_after_a_move(db):
    """A move is no edit: what was read before it still counts as read."""
    before = await chatdb.create_conversation(db, **GUEST, messages=[said()])
    await chatdb.move_user(db, **GUEST, to_user_id="ann")
    at = ANN | {"conversation_id": before.id}
    await chatdb.append_message(db, **at, role="user", content="next", expected=before.etag)


async def test_move_an_unknown_user(db):
    """An unknown user counts 0, and the target need not have anything."""
    assert await chatdb.move_user(db, user_id="nobody", to_user_id="ann") == Moved(conversations=0, messages=0)


@pytest.mark.parametrize(
    ("user", "target", "parameter"),
    [
        ("guest", "guest", "to_user_id"),
        ("guest", "", "to_user_id"),
        ("guest", None, "to_user_id"),
        ("guest", "a\0", "to_user_id"),
        ("guest", "\ud800", "to_user_id"),
        ("guest", "x" * 256, "to_user_id"),
        ("guest", 1, "to_user_id"),
        ("", "ann", "user_id"),
        (None, "ann", "user_id"),
    ],
)
async def test_move_to_oneself_or_to_nobody(db, user, target, parameter):
    """A target that is the same user, or no user at all, is refused, and nothing moves."""
    await chatdb.create_conversation(db, **GUEST)
    with pytest.raises(InvalidInputError) as caught:
        await chatdb.move_user(db, user_id=user, to_user_id=target)
    assert caught.value.parameter == parameter
    assert len(await chatdb.list_conversations(db, **GUEST)) == 1


async def test_move_in_a_transaction(db):
    """A move is part of the caller's transaction."""
    await fill(db, "guest")
    before = await exported(db, "guest")
    async with chatdb.transaction(db) as connection:
        block = connection.transaction()
        await block.start()
        assert (await chatdb.move_user(connection, **GUEST, to_user_id="ann")).messages == 6
        await block.rollback()
    assert await exported(db, "guest") == before
    async with chatdb.transaction(db) as connection:
        await chatdb.move_user(connection, **GUEST, to_user_id="ann")
        await chatdb.append_message(connection, **ANN, conversation_key="branches", role="user", content="4")
    assert await exported(db, "guest") == []


WRITES: dict[str, Callable[[Talk], Any]] = {
    "append": lambda talk: talk.append("late"),
    "extend": lambda talk: talk.extend_message(key="stream", offset=1, text="b"),
    "replace the last part": lambda talk: talk.extend_message(key="stream", offset=0, text="b"),
    "finish": lambda talk: talk.finish_message(key="stream"),
    "start": lambda talk: talk.start_message(),
    "update": lambda talk: talk.update_message(seq=1, content="new"),
    "pop": lambda talk: talk.delete_message(seq=1),
    "rename": lambda talk: talk.update_conversation(title="new"),
    "delete": lambda talk: talk.delete_conversation(),
}


@pytest.mark.parametrize("write", WRITES)
async def test_a_move_that_waits_for_a_write(db, write):
    """A move takes along what another write committed while it waited."""
    first = await chatdb.create_conversation(db, **GUEST, messages=[said()])
    second = await chatdb.create_conversation(db, **GUEST, messages=[said()])
    await chatdb.start_message(db, **GUEST, conversation_id=first.id, key="stream")
    await chatdb.extend_message(db, **GUEST, conversation_id=first.id, key="stream", offset=0, text="a")
    async with chatdb.transaction(db) as connection:
        await WRITES[write](Talk(connection, first))
        move = asyncio.ensure_future(chatdb.move_user(db, **GUEST, to_user_id="ann"))
        await asyncio.sleep(0.3)
        assert not move.done()
        before = await exported(connection, "guest")
    moved = await move

    assert await exported(db, "guest") == []
    assert set((await counts(db, "guest")).values()) == {0}
    assert await exported(db, "ann") == [record.model_copy(update={"user_id": "ann"}) for record in before]
    assert moved.conversations + moved.messages == len(before)
    assert second.id in {record.id for record in before}


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_that_waits_for_a_move(db, write):
    """A write that waited for a move finds the conversation or the message missing, and changes nothing."""
    first = await chatdb.create_conversation(db, **GUEST, messages=[said()])
    await chatdb.start_message(db, **GUEST, conversation_id=first.id, key="stream")
    await chatdb.extend_message(db, **GUEST, conversation_id=first.id, key="stream", offset=0, text="a")
    async with chatdb.transaction(db) as connection:
        await chatdb.move_user(connection, **GUEST, to_user_id="ann")
        before = await exported(connection, "ann")
        late = asyncio.ensure_future(WRITES[write](Talk(db, first)))
        await asyncio.sleep(0.3)
        assert not late.done()
    with pytest.raises((ConversationNotFoundError, MessageNotFoundError)):
        await late
    assert await exported(db, "ann") == before
    assert await exported(db, "guest") == []


async def test_the_target_creates_the_same_key_meanwhile(db):
    """The move waits for the target's new conversation, runs again, and its own loses the key."""
    mine = await chatdb.create_conversation(db, **GUEST, key="same")
    async with chatdb.transaction(db) as connection:
        theirs = await chatdb.create_conversation(connection, **ANN, key="same")
        move = asyncio.ensure_future(chatdb.move_user(db, **GUEST, to_user_id="ann"))
        await asyncio.sleep(0.3)
        assert not move.done()
    assert await move == Moved(conversations=1, messages=0)
    keys = {each.id: each.key for each in await chatdb.list_conversations(db, **ANN)}
    assert keys == {mine.id: None, theirs.id: "same"}


async def test_the_target_creates_the_same_key_during_a_transaction(db):
    """In the caller's own transaction, the move raises a ConflictError and nothing moves."""
    await chatdb.create_conversation(db, **GUEST, key="same")

    async def move() -> Moved:
        async with chatdb.transaction(db) as connection:
            return await chatdb.move_user(connection, **GUEST, to_user_id="ann")

    async with chatdb.transaction(db) as connection:
        await chatdb.create_conversation(connection, **ANN, key="same")
        moving = asyncio.ensure_future(move())
        await asyncio.sleep(0.3)
    with pytest.raises(ConflictError):
        await moving
    assert [each.key for each in await chatdb.list_conversations(db, **GUEST)] == ["same"]


@pytest.mark.owner
async def test_both_users_have_a_conversation_with_the_same_id(db):
    """As after a restore with an old sequence: the move raises a ConflictError that says how to go on."""
    mine = await chatdb.create_conversation(db, **GUEST, key="mine", messages=[said("of the guest")])
    await db.execute("insert into chatdb.conversations (user_id, id) values ('ann', $1)", mine.id)
    await chatdb.append_message(db, **ANN, conversation_id=mine.id, role="user", content="of ann")
    with pytest.raises(ConflictError, match="the same id"):
        await chatdb.move_user(db, **GUEST, to_user_id="ann")
    assert len(await exported(db, "guest")) == len(await exported(db, "ann")) == 2
    await chatdb.fork_conversation(db, **GUEST, conversation_id=mine.id)
    await chatdb.delete_conversation(db, **GUEST, conversation_id=mine.id)
    assert await chatdb.move_user(db, **GUEST, to_user_id="ann") == Moved(conversations=1, messages=1)


async def test_a_conversation_created_during_a_move_stays_with_the_guest(db):
    """What the guest creates after the statement began is the guest's, until the next move."""
    first = await chatdb.create_conversation(db, **GUEST)
    async with chatdb.transaction(db) as connection:
        await connection.execute(
            "select from chatdb.conversations where user_id = 'guest' and id = $1 for update", first.id
        )
        move = asyncio.ensure_future(chatdb.move_user(db, **GUEST, to_user_id="ann"))
        await asyncio.sleep(0.3)
        late = await chatdb.create_conversation(db, **GUEST, messages=[said()])
    assert await move == Moved(conversations=1, messages=0)
    assert [each.id for each in await chatdb.list_conversations(db, **GUEST)] == [late.id]
    assert await chatdb.move_user(db, **GUEST, to_user_id="ann") == Moved(conversations=1, messages=1)


@pytest.mark.not_on_citus("link-users needs a reference table there")
@pytest.mark.owner
async def test_move_to_a_user_who_is_not_linked(db, dsn):
    """With a link to the host's users, a target without a row there is refused by name, and nothing moves."""
    await fill(db, "guest")
    await db.execute("create table public.users (id text primary key); insert into public.users values ('guest')")
    await asyncio.to_thread(link_users, dsn, table="public.users")
    with pytest.raises(InvalidInputError, match="link-users") as caught:
        await chatdb.move_user(db, **GUEST, to_user_id="ann")
    assert caught.value.parameter == "to_user_id"
    assert len(await chatdb.list_conversations(db, **GUEST, archived=None)) == 4
    await db.execute("insert into public.users values ('ann')")
    assert (await chatdb.move_user(db, **GUEST, to_user_id="ann")).messages == 6


async def test_move_takes_a_timeout(db):
    """The timeout of `move_user` replaces the pool's."""
    await chatdb.create_conversation(db, **GUEST)
    async with chatdb.transaction(db) as other:
        await other.execute("select from chatdb.conversations where user_id = 'guest' for update")
        with pytest.raises(chatdb.CommandTimeoutError):
            await asyncio.wait_for(chatdb.move_user(db, **GUEST, to_user_id="ann", timeout=0.1), 10)
    assert len(await chatdb.list_conversations(db, **GUEST)) == 1


# --- export_user ---------------------------------------------------------------------------------------------------


async def test_export_yields_each_conversation_before_its_messages(db):
    """Conversations come in order of id, messages in order of seq, and another user's never."""
    await fill(db, "guest")
    await fill(db, "ann")
    records = await exported(db, "guest")
    expected: list[Conversation | Message] = []
    for each in sorted(await chatdb.list_conversations(db, **GUEST, archived=None), key=lambda each: each.id):
        expected += [each, *await chatdb.list_messages(db, **GUEST, conversation_id=each.id)]
    assert records == expected
    assert [record.content for record in records if isinstance(record, Message)][-1] == "half done"


async def test_export_an_unknown_user(db):
    """An unknown user yields nothing."""
    await fill(db, "ann")
    assert await exported(db, "nobody") == []


async def test_export_many_pages(db):
    """Many conversations, and one with many messages, come complete, in order, once each."""
    await db.execute(
        """
        insert into chatdb.conversations (user_id, last_seq)
        select 'guest', case when i = 150 then 1700 when i % 3 = 0 then 0 else i % 7 end
        from generate_series(1, 300) as i
        """
    )
    await db.execute(
        """
        insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at)
        select user_id, id, s, 'user', s::text, now()
        from chatdb.conversations, generate_series(1, last_seq) as s
        """
    )
    records = await exported(db, "guest")
    rows = await db.fetch(
        """
        select c.id, m.seq from chatdb.conversations as c
        left join chatdb.messages as m on m.conversation_id = c.id and m.user_id = c.user_id order by c.id, m.seq
        """
    )
    expected: list[tuple[int, int]] = []
    for row in rows:
        if (row["id"], 0) not in expected[-2000:]:
            expected.append((row["id"], 0))
        if row["seq"] is not None:
            expected.append((row["id"], row["seq"]))
    assert [
        (record.id, 0) if isinstance(record, Conversation) else (record.conversation_id, record.seq)
        for record in records
    ] == expected


# --- delete_user ---------------------------------------------------------------------------------------------------


async def test_delete_user_leaves_no_row_in_any_table(db):
    """In each table of the schema that has a user, nothing of the deleted user is left and all of another one is."""
    await fill(db, "guest")
    await fill(db, "ann")
    before = await counts(db, "guest")
    others = await counts(db, "ann")
    assert {"conversations", "messages", "message_parts"} <= before.keys()
    assert all(before.values()), "fill() must store rows in each table"

    deleted = await chatdb.delete_user(db, **GUEST)

    assert deleted == Deleted(conversations=before["conversations"], messages=before["messages"])
    assert await counts(db, "guest") == dict.fromkeys(before, 0)
    assert await counts(db, "ann") == others
