"""Lists of conversations: cursors, archives, pins, previews, and both orders."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

import chatdb
from chatdb import Conversation, ConversationNotFoundError, InvalidInputError, Message
from tests.support.calls import Counting
from tests.support.talk import Talk, said

ORDERS: dict[str, dict[str, Any]] = {
    "listed": {},
    "archived": {"archived": True},
    "all": {"archived": None},
    "created": {"order_by": "created_at"},
    "created, archived": {"order_by": "created_at", "archived": True},
    "created, all": {"order_by": "created_at", "archived": None},
    "earliest": {"order_by": "created_at", "descending": False},
    "earliest, archived": {"order_by": "created_at", "descending": False, "archived": True},
    "earliest, all": {"order_by": "created_at", "descending": False, "archived": None},
}
START = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
async def made(tx: asyncpg.Connection) -> list[Conversation]:
    """Give 14 conversations of two days, some at the same time, archived or pinned, beside those of another user."""
    for number in range(14):
        messages = [said(f"{number}"), said(f"{number}, newest")] if number % 2 else []
        conversation = await chatdb.create_conversation(tx, user_id="alice", key=f"{number}", messages=messages)
        await chatdb.create_conversation(tx, user_id="bob", key=f"{number}", messages=messages)
        place: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
        await chatdb.update_conversation(tx, **place, archived=number % 3 == 0, pinned=number % 4 == 0)
        await tx.execute(
            "update chatdb.conversations set created_at = $2, updated_at = $3 where id = $1",
            conversation.id,
            START + timedelta(hours=(number * 5) % 12 // 2),
            START + timedelta(hours=(number * 7) % 30 // 3 * 3),
        )
    return [await chatdb.get_conversation(tx, user_id="alice", conversation_key=f"{n}") for n in range(14)]


def in_order(made: list[Conversation], arguments: dict[str, Any]) -> list[Conversation]:
    """Return the conversations that a list has, in its order."""
    archived, order = arguments.get("archived", False), arguments.get("order_by", "updated_at")
    found = [each for each in made if archived is None or (each.archived_at is not None) == archived]
    return sorted(found, key=lambda each: (getattr(each, order), each.id), reverse=arguments.get("descending", True))


@pytest.mark.parametrize("cursor", ["Conversation", "cursor", "copy", "key"])
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 14, 20])
@pytest.mark.parametrize("order", ORDERS)
async def test_pages(tx: asyncpg.Connection, made: list[Conversation], order: str, limit: int, cursor: str) -> None:
    """Pages have every conversation once and in order, whichever way the next page is asked for."""
    page = await chatdb.list_conversations(tx, user_id="alice", limit=limit, **ORDERS[order])
    found = list(page)
    while page and len(found) < 100:
        place = {
            "Conversation": {"after": page[-1]},
            "cursor": {"after": page[-1].cursor},
            "copy": {"after": Conversation.model_validate_json(page[-1].model_dump_json())},
            "key": {"after_key": page[-1].key},
        }[cursor]
        page = await chatdb.list_conversations(tx, user_id="alice", limit=limit, **place, **ORDERS[order])
        assert len(page) <= limit
        found += page

    assert found == in_order(made, ORDERS[order])


@pytest.mark.parametrize("order", ORDERS)
async def test_previews(tx: asyncpg.Connection, made: list[Conversation], order: str) -> None:
    """Previews are the conversations of the same list, each with its newest message or None, also in pages."""
    conversations = await chatdb.list_conversations(tx, user_id="alice", **ORDERS[order])

    previews = await chatdb.list_previews(tx, user_id="alice", **ORDERS[order])

    assert [conversation for conversation, _ in previews] == conversations
    for conversation, message in previews:
        history = await chatdb.get_history(tx, user_id="alice", conversation_id=conversation.id, limit=1)
        assert ([] if message is None else [message]) == history
    assert len({message is None for _, message in previews}) == 2
    for place in ({"after": conversations[1]}, {"after": conversations[1].cursor}, {"after_key": conversations[1].key}):
        assert await chatdb.list_previews(tx, user_id="alice", limit=2, **place, **ORDERS[order]) == previews[2:4]
    assert await chatdb.list_previews(tx, user_id="alice", after=conversations[-1], **ORDERS[order]) == []
    assert await chatdb.list_previews(tx, user_id="nobody", **ORDERS[order]) == []


async def test_the_newest_message_of_a_preview(talk: Talk) -> None:
    """The preview's message is the newest that is left, with all its values."""

    async def preview() -> tuple[Conversation, Message | None]:
        [found] = await chatdb.list_previews(talk.db, user_id="alice")
        return found

    assert await preview() == (talk.conversation, None)
    first = await talk.append("1", payload={"a": 1}, metadata={"b": 2}, token_count=3, key="k", role="tool")
    assert await preview() == (await talk.now(), first)
    await talk.append("2")
    await talk.delete_message(seq=2)
    assert await preview() == (await talk.now(), first)
    await talk.delete_message(seq=1)
    assert await preview() == (await talk.now(), None)


async def test_changes_between_pages(db: Any) -> None:
    """What becomes active between two pages comes first, and no page repeats or loses another conversation."""
    talks = [Talk(db, await chatdb.create_conversation(db, user_id="alice", key=f"{number}")) for number in range(6)]

    async def keys(**place: Any) -> str:
        return "".join(f"{each.key}" for each in await chatdb.list_conversations(db, user_id="alice", **place))

    [_, last] = await chatdb.list_conversations(db, user_id="alice", limit=2)
    assert last.key == "4"
    await talks[4].append()  # the cursor itself
    await talks[1].append()  # from a later page
    await talks[3].update_conversation(title="renamed")

    assert await keys(after=last) == await keys(after=last.cursor) == "320"
    assert await keys(after_key="4") == "5320"  # the present place
    assert await keys() == "145320"
    await talks[4].delete_conversation()
    assert await keys(after=last, limit=2) == "32"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["list_conversations", "list_previews"])
async def test_a_missing_after_key(tx: asyncpg.Connection, made: list[Conversation], name: str, order: str) -> None:
    """A key that the user does not have is a ConversationNotFoundError, another user's in the same words."""
    await chatdb.create_conversation(tx, user_id="carol", key="hers")
    said = set()
    for user, key in (("alice", "missing"), ("alice", "hers"), ("nobody", "1")):
        for limit in (1, 20):
            with pytest.raises(ConversationNotFoundError) as raised:
                await getattr(chatdb, name)(tx, user_id=user, after_key=key, limit=limit, **ORDERS[order])
            said.add(str(raised.value))
    assert len(said) == 1


@pytest.mark.parametrize("name", ["list_conversations", "list_previews"])
async def test_after_a_key_that_the_list_does_not_have(
    tx: asyncpg.Connection, made: list[Conversation], name: str
) -> None:
    """An archived conversation's key is a place in the list of the others too, and the other way round."""
    for archived, other in ((False, True), (True, False)):
        for place in in_order(made, {"archived": other}):
            page = await getattr(chatdb, name)(tx, user_id="alice", after_key=place.key, archived=archived)
            found = [each if isinstance(each, Conversation) else each[0] for each in page]
            expected = in_order(made, {"archived": None})
            expected = expected[expected.index(place) + 1 :]
            assert found == [each for each in expected if (each.archived_at is not None) == archived]


@pytest.mark.parametrize("order", ORDERS)
async def test_another_users_cursor_is_a_place(tx: asyncpg.Connection, made: list[Conversation], order: str) -> None:
    """A cursor holds times and an id: another user's picks a place in the caller's own list, and shows nothing else."""
    of_bob = await chatdb.list_conversations(tx, user_id="bob", archived=None)
    for cursor in (*of_bob, *(each.cursor for each in of_bob)):
        page = await chatdb.list_conversations(tx, user_id="alice", after=cursor, **ORDERS[order])
        full = in_order(made, ORDERS[order])
        assert page == full[len(full) - len(page) :]


@pytest.mark.parametrize("name", ["list_conversations", "list_previews"])
@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"descending": False}, "descending"),
        ({"descending": False, "order_by": "updated_at", "archived": None}, "descending"),
        ({"after": "c1AAAA", "after_key": "k"}, "after_key"),
        ({"after": Conversation.model_construct(), "after_key": "k"}, "after_key"),
        ({"after": ""}, "after"),
        ({"after": "c9AAAA"}, "after"),
        ({"order_by": "title"}, "order_by"),
        ({"archived": 1}, "archived"),
    ],
)
async def test_what_no_list_takes(name: str, arguments: dict[str, Any], parameter: str) -> None:
    """A wrong argument is an InvalidInputError that names it, and nothing is sent."""
    db = Counting(None)
    with pytest.raises(InvalidInputError, match=rf"^{parameter}: ") as raised:
        await getattr(chatdb, name)(db, user_id="alice", **arguments)
    assert raised.value.parameter == parameter
    assert db.statements == []


async def test_archive(talk: Talk) -> None:
    """An archived conversation keeps its place, its time of archiving and its messages until it is restored."""
    await talk.append()
    before = await talk.now()

    archived = await talk.update_conversation(archived=True)
    again = await talk.update_conversation(archived=True, title="new")

    assert archived.archived_at is not None
    assert archived == before.model_copy(update={"revision": 2, "archived_at": archived.archived_at})
    assert again.archived_at == archived.archived_at
    assert await chatdb.list_conversations(talk.db, user_id="alice") == []
    assert await chatdb.list_conversations(talk.db, user_id="alice", archived=True) == [again]
    assert await talk.get_history() != []
    await talk.append("in the archive")
    assert (await talk.now()).archived_at == archived.archived_at
    restored = await talk.update_conversation(archived=False)
    assert restored.archived_at is None
    assert await chatdb.list_conversations(talk.db, user_id="alice", archived=True) == []
    assert await chatdb.list_conversations(talk.db, user_id="alice") == [restored]


async def test_pins(db: Any) -> None:
    """Pinned conversations come by the time of pinning, latest first, without archived ones and others' ones."""
    talks = [Talk(db, await chatdb.create_conversation(db, user_id="alice", key=f"{number}")) for number in range(5)]
    await chatdb.create_conversation(db, user_id="bob", key="0")
    await chatdb.update_conversation(db, user_id="bob", conversation_key="0", pinned=True)

    async def keys(**limit: Any) -> str:
        return "".join(f"{each.key}" for each in await chatdb.list_pinned(db, user_id="alice", **limit))

    assert await keys() == ""
    for number in (2, 0, 4):
        pinned = await talks[number].update_conversation(pinned=True)
    assert await chatdb.list_pinned(db, user_id="alice", limit=1) == [pinned]
    assert await keys() == "402"
    await talks[0].append()
    await talks[2].update_conversation(pinned=True)  # already pinned
    assert await keys() == "402"
    assert await keys(limit=2) == "40"
    await talks[0].update_conversation(archived=True)
    assert await keys() == "42"
    await talks[0].update_conversation(archived=False)
    assert await keys() == "402"
    assert (await talks[4].update_conversation(pinned=False)).pinned_at is None
    await talks[2].update_conversation(pinned=False)
    await talks[2].update_conversation(pinned=True)
    assert await keys() == "20"
    assert {each.key for each in await chatdb.list_conversations(db, user_id="alice")} == set("01234")
    assert await chatdb.list_pinned(db, user_id="nobody") == []


async def test_pins_of_one_moment(tx: asyncpg.Connection) -> None:
    """Conversations pinned at the same moment have a fixed order."""
    for number in range(6):
        await chatdb.create_conversation(tx, user_id="alice", key=f"{number}")
    await tx.execute("update chatdb.conversations set pinned_at = $1", START)

    lists = [await chatdb.list_pinned(tx, user_id="alice", limit=limit) for limit in (6, 3, 100)]

    assert lists[0] == lists[2]
    assert lists[1] == lists[0][:3]
    assert [each.id for each in lists[0]] == sorted((each.id for each in lists[0]), reverse=True)


@pytest.mark.parametrize("time", ["0001-01-02 00:00+00", "9999-12-31 23:59:59+00"])
async def test_times_at_the_edges(tx: asyncpg.Connection, time: str) -> None:
    """The first and last times that Python can hold are places like others."""
    for number in range(3):
        await chatdb.create_conversation(tx, user_id="alice", key=f"{number}")
    await tx.execute(f"update chatdb.conversations set updated_at = '{time}', created_at = '{time}'")
    for order in ORDERS.values():
        if order.get("archived"):
            continue
        full = await chatdb.list_conversations(tx, user_id="alice", **order)
        pages = [await chatdb.list_conversations(tx, user_id="alice", after=each.cursor, **order) for each in full]
        assert pages == [full[1:], full[2:], []]


async def test_one_cursor_serves_every_order(tx: asyncpg.Connection, made: list[Conversation]) -> None:
    """A conversation's cursor is a place in each order, so a client can change the order with it."""
    for each, order in itertools.product(made[::4], ORDERS.values()):
        full = in_order(made, order | {"archived": None})
        rest = full[full.index(each) + 1 :]
        archived = order.get("archived", False)
        expected = [one for one in rest if archived is None or (one.archived_at is not None) == archived]
        assert await chatdb.list_conversations(tx, user_id="alice", after=each.cursor, **order) == expected
