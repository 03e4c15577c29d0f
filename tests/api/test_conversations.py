"""The functions on conversations, case by case."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

import chatdb
from chatdb import Conversation, ConversationNotFoundError, Deleted
from tests.support.calls import NOBODYS, SIGNATURES

WRITTEN = "select xmin::text, ctid::text, last_seq, updated_at from chatdb.conversations where id = $1"
IDENTITY = "select last_value from chatdb.conversations_id_seq"

ON_A_CONVERSATION = {
    "get_conversation": {},
    "update_conversation": {"title": "mine"},
    "delete_conversation": {},
    "append_message": {"role": "user", "content": "mine"},
    "append_messages": {"messages": [{"role": "user", "content": "mine"}]},
    "get_history": {},
    "list_messages": {},
    "iter_messages": {},
    "get_message": {"seq": 1},
    "update_message": {"seq": 1, "content": "mine"},
    "delete_message": {"seq": 1},
    "delete_messages_after": {"after_seq": 0},
    "load_conversation": {},
    "get_branch": {},
    "list_versions": {},
    "search_messages": {"query": "mine"},
    "switch_branch": {"seq": 1},
    "fork_conversation": {},
    "get_context": {"max_tokens": 8000},
    "delete_branch": {"seq": 1},
    "pop_message": {},
    "replace_messages_after": {
        "after_seq": 0,
        "messages": [{"role": "user", "content": "mine", "key": "first"}],
        "expected": NOBODYS,
    },
    "upsert_message": {"key": "first", "role": "user", "content": "mine"},
    "start_message": {"key": "first"},
    "extend_message": {"seq": 1, "offset": 0, "text": "mine"},
    "read_message": {"seq": 1},
    "finish_message": {"seq": 1, "content": "mine"},
    "stream_message": {},
}
"""Every function with a `conversation_id`."""

VARIANTS = [
    *ON_A_CONVERSATION.items(),
    ("append_message", {"role": "user", "content": "mine", "key": "first"}),
    ("append_messages", {"messages": [{"role": "user", "content": "mine", "key": "first"}]}),
    ("append_messages", {"messages": []}),
    ("update_conversation", {}),
    ("update_message", {"seq": 1}),
    ("append_message", {"role": "user", "content": "mine", "expected": NOBODYS}),
    ("append_messages", {"messages": [{"role": "user", "content": "mine"}], "expected": NOBODYS}),
    ("append_messages", {"messages": [], "conversation_metadata_patch": {"a": 1}}),
    ("append_messages", {"messages": [{"role": "user", "content": "mine", "key": "first"}], "on_existing": "skip"}),
    ("upsert_message", {"key": "second", "role": "user", "content": "mine", "expected": NOBODYS}),
    ("update_conversation", {"title": "mine", "expected": NOBODYS}),
    ("update_message", {"key": "first", "content": "mine", "expected": NOBODYS}),
    ("delete_message", {"key": "first", "expected": NOBODYS}),
    ("delete_messages_after", {"after_key": "first", "expected": NOBODYS}),
    ("delete_conversation", {"expected": NOBODYS}),
    ("pop_message", {"expected": NOBODYS}),
    ("append_message", {"role": "user", "content": "mine", "parent_seq": 1}),
    ("append_message", {"role": "user", "content": "mine", "parent_seq": 0}),
    ("append_messages", {"messages": [{"role": "user", "content": "mine"}], "parent_seq": 1}),
    ("switch_branch", {"key": "first", "expected": NOBODYS}),
    ("delete_branch", {"key": "first", "expected": NOBODYS}),
    ("fork_conversation", {"seq": 1, "new_key": "fork"}),
    ("fork_conversation", {"key": "first"}),
    ("get_branch", {"top_seq": 1}),
    ("get_message", {"key": "first"}),
    ("get_history", {"before_key": "first"}),
    ("list_messages", {"after_key": "first"}),
    ("start_message", {"parent_seq": 1}),
    ("extend_message", {"key": "first", "offset": 4, "text": "mine"}),
    ("read_message", {"key": "first", "offset": 2}),
    ("finish_message", {"key": "first", "aborted": True}),
]


async def create(db, user_id="alice", **fields):
    """Create a conversation, by default Alice's."""
    return await chatdb.create_conversation(db, user_id=user_id, **fields)


async def append(db, conversation, **fields):
    """Append a message to the conversation."""
    place = {"user_id": conversation.user_id, "conversation_id": conversation.id}
    return await chatdb.append_message(db, **place, **({"role": "user", "content": "hello"} | fields))


async def listed(db, **page):
    """Return the ids on a page of Alice's conversations."""
    return [found.id for found in await chatdb.list_conversations(db, user_id="alice", **page)]


async def paged(db, limit):
    """Return all of Alice's conversations, read in pages."""
    found = page = await chatdb.list_conversations(db, user_id="alice", limit=limit)
    while page and len(found) < 100:  # more than any test creates
        page = await chatdb.list_conversations(db, user_id="alice", limit=limit, after=page[-1])
        found = found + page
    return found


async def created_at_intervals(db, seconds):
    """Create a conversation for each number, last active that many seconds before a fixed time."""
    made = []
    for ago in seconds:
        conversation = await create(db)
        active = datetime(2026, 3, 1, 5, tzinfo=UTC) - timedelta(seconds=ago)
        await db.execute("update chatdb.conversations set updated_at = $2 where id = $1", conversation.id, active)
        made.append(await chatdb.get_conversation(db, user_id="alice", conversation_id=conversation.id))
    return made


async def result(answer):
    """Await a coroutine, the first item of an async iterator, or the start of a stream."""
    if isinstance(answer, chatdb.MessageStream):
        return await answer.__aenter__()
    return await (anext(answer) if hasattr(answer, "__anext__") else answer)


async def test_create(tx):
    """A new conversation has the given values, no messages, and equal times of creation and activity."""
    start = await tx.fetchval("select clock_timestamp()")

    conversation = await create(tx, title="Plans", key="thread-1", metadata={"model": "small", "tags": ["a", None]})

    assert conversation == Conversation(
        id=conversation.id,
        user_id="alice",
        key="thread-1",
        title="Plans",
        metadata={"model": "small", "tags": ["a", None]},
        last_seq=0,
        head_seq=0,
        revision=0,
        created_at=conversation.created_at,
        updated_at=conversation.created_at,
        archived_at=None,
        pinned_at=None,
    )
    assert start <= conversation.created_at <= await tx.fetchval("select clock_timestamp()")


async def test_create_with_nothing_but_a_user(tx):
    """Only the user is required; omitted values are None."""
    conversation = await create(tx)

    assert (conversation.key, conversation.title, conversation.metadata) == (None, None, None)


async def test_create_without_a_key_makes_another(tx):
    """Without a key, each call creates a new conversation."""
    assert (await create(tx, title="Plans")).id != (await create(tx, title="Plans")).id


async def test_create_with_a_stored_key(tx):
    """A stored key returns the stored conversation, whatever else is passed."""
    first = await create(tx, key="thread-1", title="Plans", metadata={"model": "small"})

    assert await create(tx, key="thread-1", title="Other plans", metadata={"model": "large"}) == first


@pytest.mark.owner
async def test_create_with_a_stored_key_writes_nothing(tx):
    """A stored key writes no row version, uses no identity value, and returns the current state."""
    first = await create(tx, key="thread-1")
    await append(tx, first)
    row, number = await tx.fetchrow(WRITTEN, first.id), await tx.fetchval(IDENTITY)

    again = await create(tx, key="thread-1")

    assert again.last_seq == 1
    assert await tx.fetchrow(WRITTEN, first.id) == row
    assert await tx.fetchval(IDENTITY) == number


async def test_create_keeps_the_activity_of_a_stored_key(db):
    """Getting a conversation by its key does not move it in the list."""
    first = await create(db, key="thread-1")

    assert (await create(db, key="thread-1")).updated_at == first.updated_at


async def test_create_with_another_users_key(tx):
    """A key is unique per user: two users can use the same key for two conversations."""
    of_alice, of_bob = await create(tx, key="thread-1"), await create(tx, "bob", key="thread-1")

    assert of_alice.id != of_bob.id
    assert await chatdb.get_conversation(tx, user_id="bob", conversation_key="thread-1") == of_bob


async def test_key_of_a_deleted_conversation_is_free(tx):
    """After a deletion the key creates a new conversation."""
    first = await create(tx, key="thread-1")
    await chatdb.delete_conversation(tx, user_id="alice", conversation_id=first.id)

    second = await create(tx, key="thread-1")

    assert second.id != first.id
    assert second.last_seq == 0


async def test_keys_differ_by_every_character(tx):
    """Keys and user ids are compared exactly, not by locale rules."""
    names = ["ss", "ß", "SS", "e\u0301", "\u00e9", "key", "key "]

    assert len({(await create(tx, key=name)).id for name in names}) == len(names)
    assert len({(await create(tx, user_id=name, key="k")).id for name in names}) == len(names)


async def test_get(tx):
    """A conversation is returned by its id as stored."""
    conversation = await create(tx, key="thread-1", title="Plans", metadata={"model": "small"})

    assert await chatdb.get_conversation(tx, user_id="alice", conversation_id=conversation.id) == conversation


async def test_get_by_key(tx):
    """A conversation is returned by its key as stored."""
    conversation = await create(tx, key="thread-1", title="Plans", metadata={"model": "small"})

    assert await chatdb.get_conversation(tx, user_id="alice", conversation_key="thread-1") == conversation


@pytest.mark.parametrize(("user_id", "key"), [("alice", "thread-2"), ("bob", "thread-1")], ids=["missing", "foreign"])
async def test_get_by_a_missing_key(tx, user_id, key):
    """A key that this user does not use raises ConversationNotFoundError, even if another user does."""
    await create(tx, key="thread-1")

    with pytest.raises(ConversationNotFoundError):
        await chatdb.get_conversation(tx, user_id=user_id, conversation_key=key)


def test_every_function_on_a_conversation_is_tried():
    """The two tests below cover every function that takes `conversation_id`."""
    assert ON_A_CONVERSATION.keys() == {name for name, others in SIGNATURES.items() if "conversation_id" in others}


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
async def test_foreign_is_missing(tx, name, arguments):
    """Another user's conversation raises the same error and text as a missing one, and stays unchanged."""
    conversation = await create(tx)
    message = await append(tx, conversation, key="first", content="hers")
    said = set()
    for user_id, conversation_id in [("bob", conversation.id), ("alice", -1), ("carol", 2**63 - 1)]:
        with pytest.raises(ConversationNotFoundError) as raised:
            await result(getattr(chatdb, name)(tx, user_id=user_id, conversation_id=conversation_id, **arguments))
        said.add(str(raised.value))

    assert len(said) == 1
    assert await chatdb.list_messages(tx, user_id="alice", conversation_id=conversation.id) == [message]
    assert await chatdb.list_conversations(tx, user_id="alice") == [
        conversation.model_copy(update={"last_seq": 1, "head_seq": 1, "revision": 1, "updated_at": message.created_at}),
    ]


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
async def test_deleted_is_missing(tx, name, arguments):
    """Every function raises ConversationNotFoundError for a deleted conversation, even one that had messages."""
    conversation = await create(tx)
    await append(tx, conversation, key="first")
    await chatdb.delete_conversation(tx, user_id="alice", conversation_id=conversation.id)

    with pytest.raises(ConversationNotFoundError):
        await result(getattr(chatdb, name)(tx, user_id="alice", conversation_id=conversation.id, **arguments))


async def test_list_is_by_latest_activity(db):
    """The list is ordered by latest activity, newest first."""
    first, second, third = [await create(db) for _ in range(3)]
    assert await listed(db) == [third.id, second.id, first.id]

    await append(db, second)
    assert await listed(db) == [second.id, third.id, first.id]

    await append(db, first)
    assert await listed(db) == [first.id, second.id, third.id]


async def test_list_has_whole_conversations(tx):
    """A listed conversation has all its values."""
    conversation = await create(tx, key="thread-1", title="Plans", metadata={"model": "small"})

    assert await chatdb.list_conversations(tx, user_id="alice") == [conversation]


async def test_list_is_one_users(tx):
    """The list contains only the user's own conversations."""
    mine = await create(tx)
    await create(tx, "bob")

    assert await listed(tx) == [mine.id]


async def test_list_of_an_unknown_user(tx):
    """An unknown user's list is empty on every page."""
    conversation = await create(tx)

    assert await chatdb.list_conversations(tx, user_id="bob") == []
    assert await chatdb.list_conversations(tx, user_id="bob", after=conversation) == []


async def test_list_limit(tx):
    """A page has the first `limit` conversations, 20 by default."""
    for _ in range(21):
        await create(tx)
    everything = await listed(tx, limit=10_000)

    assert len(everything) == 21
    assert await listed(tx) == everything[:20]
    assert await listed(tx, limit=1) == everything[:1]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
async def test_list_pages_of_equal_times(tx, limit):
    """Pages over conversations with equal times skip none and repeat none."""
    made = [await create(tx) for _ in range(7)]
    await tx.execute("update chatdb.conversations set updated_at = $1", made[0].updated_at)

    assert [each.id for each in await paged(tx, limit)] == [each.id for each in made[::-1]]


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "UTC", "Pacific/Pago_Pago"])
async def test_list_pages_over_days(tx, limit, zone):
    """Pages cross day and hour boundaries in any session time zone."""
    hour = 3600
    made = await created_at_intervals(tx, [0, 3 * hour, 3 * hour + 1, 26 * hour, 30 * hour, 50 * hour, 400 * 24 * hour])
    await tx.execute(f"set local timezone to '{zone}'")

    assert await paged(tx, limit) == made


async def test_list_with_an_append_between_pages(db):
    """A conversation that becomes active between two pages moves to page one; the second page skips nothing else."""
    first, second, third, fourth = [await create(db) for _ in range(4)]
    page = await chatdb.list_conversations(db, user_id="alice", limit=2)
    assert [found.id for found in page] == [fourth.id, third.id]

    await append(db, first)  # from a later page
    await append(db, third)  # the cursor itself

    assert await listed(db, after=page[-1]) == [second.id]
    assert await listed(db, limit=2) == [third.id, first.id]


async def test_list_cursor_survives_its_own_deletion(tx):
    """The cursor works by its values, even after a round trip through JSON or its conversation's deletion."""
    first, second = await created_at_intervals(tx, [20, 10])
    await chatdb.delete_conversation(tx, user_id="alice", conversation_id=second.id)
    cursor = Conversation.model_validate_json(second.model_dump_json())

    assert await listed(tx, after=cursor) == [first.id]
    assert await listed(tx, after=first) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"title": "New"}, {"title": "New", "metadata": {"a": 1}}),
        ({"title": None}, {"title": None, "metadata": {"a": 1}}),
        ({"title": ""}, {"title": "", "metadata": {"a": 1}}),
        ({"title": chatdb.UNSET}, {"title": "Old", "metadata": {"a": 1}}),
        ({"metadata": {"b": [2]}}, {"title": "Old", "metadata": {"b": [2]}}),
        ({"metadata": None}, {"title": "Old", "metadata": None}),
        ({"metadata": {}}, {"title": "Old", "metadata": {}}),
        ({"title": None, "metadata": None}, {"title": None, "metadata": None}),
        ({"title": "New", "metadata": {}}, {"title": "New", "metadata": {}}),
        ({}, {"title": "Old", "metadata": {"a": 1}}),
    ],
    ids=repr,
)
async def test_update(tx, change, expected):
    """A given value replaces the stored one, None clears it, and an omitted one stays."""
    conversation = await create(tx, key="thread-1", title="Old", metadata={"a": 1})

    updated = await chatdb.update_conversation(tx, user_id="alice", conversation_id=conversation.id, **change)

    changes = expected != {"title": "Old", "metadata": {"a": 1}}
    assert updated == conversation.model_copy(update=expected | {"revision": int(changes)})
    assert await chatdb.get_conversation(tx, user_id="alice", conversation_id=conversation.id) == updated


async def test_update_leaves_the_others(tx):
    """The user's other conversations stay unchanged."""
    one, other = await create(tx, title="one"), await create(tx, title="other")

    await chatdb.update_conversation(tx, user_id="alice", conversation_id=one.id, title="new")

    assert await chatdb.get_conversation(tx, user_id="alice", conversation_id=other.id) == other


async def test_update_keeps_the_place_in_the_list(db):
    """Renaming does not move a conversation in the list."""
    first, second = await create(db), await create(db)

    renamed = await chatdb.update_conversation(db, user_id="alice", conversation_id=first.id, title="Renamed")

    assert renamed.updated_at == first.updated_at
    assert await listed(db) == [second.id, first.id]


async def test_delete(tx):
    """The conversation and its messages are deleted and counted, and nothing else."""
    conversation, other = await create(tx), await create(tx)
    for _ in range(3):
        await append(tx, conversation)
    kept = await append(tx, other)

    deleted = await chatdb.delete_conversation(tx, user_id="alice", conversation_id=conversation.id)

    assert deleted == Deleted(conversations=1, messages=3)
    assert await tx.fetch("select from chatdb.messages where conversation_id = $1", conversation.id) == []
    assert await chatdb.list_messages(tx, user_id="alice", conversation_id=other.id) == [kept]


async def test_delete_counts_what_is_there(tx):
    """Only existing messages count: not ones deleted before, and 0 for an empty conversation."""
    conversation, empty = await create(tx), await create(tx)
    for _ in range(3):
        await append(tx, conversation)
    await chatdb.delete_message(tx, user_id="alice", conversation_id=conversation.id, seq=2)

    for found, messages in [(conversation, 2), (empty, 0)]:
        deleted = await chatdb.delete_conversation(tx, user_id="alice", conversation_id=found.id)
        assert deleted == Deleted(conversations=1, messages=messages)


async def test_delete_cascades_in_the_database(tx):
    """Deleting a conversation with SQL deletes its messages too."""
    conversation = await create(tx)
    await append(tx, conversation)

    await tx.execute("delete from chatdb.conversations where id = $1", conversation.id)

    assert await tx.fetchval("select count(*) from chatdb.messages") == 0


async def test_delete_user(tx):
    """All of the user's conversations and messages are deleted and counted; another user's stay."""
    for messages in (2, 0, 3):
        conversation = await create(tx)
        for _ in range(messages):
            await append(tx, conversation)
    of_bob = await create(tx, "bob")
    kept = await append(tx, of_bob)

    assert await chatdb.delete_user(tx, user_id="alice") == Deleted(conversations=3, messages=5)
    assert await chatdb.list_conversations(tx, user_id="alice") == []
    assert await chatdb.list_messages(tx, user_id="bob", conversation_id=of_bob.id) == [kept]
    assert await tx.fetchval("select count(*) from chatdb.messages") == 1


async def test_delete_an_unknown_user(tx):
    """An unknown user counts 0."""
    await create(tx, "bob")

    assert await chatdb.delete_user(tx, user_id="alice") == Deleted(conversations=0, messages=0)


async def test_delete_user_takes_a_timeout(db, dsn):
    """The timeout of `delete_user` replaces the pool's, shorter or longer."""
    await create(db)
    async with chatdb.create_pool(dsn, command_timeout=0.5) as hurried:
        async with chatdb.transaction(db) as other:
            await other.execute("select from chatdb.conversations where user_id = 'alice' for update")
            with pytest.raises(chatdb.CommandTimeoutError):
                await asyncio.wait_for(chatdb.delete_user(db, user_id="alice", timeout=0.01), 10)
            patient = asyncio.create_task(chatdb.delete_user(hurried, user_id="alice", timeout=30))
            await asyncio.sleep(0.7)
        assert await patient == Deleted(conversations=1, messages=0)


async def test_the_list_within_a_transaction(db):
    """The conversation with the later append comes first, however long ago its transaction began."""
    first = await chatdb.create_conversation(db, user_id="alice")
    async with chatdb.transaction(db) as connection:
        await connection.execute("select")
        second = await chatdb.create_conversation(db, user_id="alice")
        await chatdb.append_message(connection, user_id="alice", conversation_id=first.id, role="user", content="later")
    assert [c.id for c in await chatdb.list_conversations(db, user_id="alice")] == [first.id, second.id]
