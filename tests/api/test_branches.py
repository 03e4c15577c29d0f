"""Branches: edits, regenerated answers, their versions, and forks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

import chatdb
from chatdb import (
    NEW,
    ConflictError,
    Conversation,
    ConversationNotFoundError,
    InvalidInputError,
    JsonText,
    Message,
    MessageNotFoundError,
    StaleError,
)
from tests.support.talk import Talk, said


async def line(talk: Talk, **arguments: Any) -> list[int]:
    """Return the seqs of the line of the head, or of another line."""
    return [message.seq for message in await talk.get_branch(**arguments)]


async def parents(talk: Talk) -> dict[int, int | None]:
    """Return the stored `parent_seq` of each message."""
    return {message.seq: message.parent_seq for message in await talk.messages()}


@pytest.fixture
async def chat(talk: Talk) -> Talk:
    """
    Give a conversation with a question, two answers, an edited question and its answer.

    Its lines are 1 2, 1 3 4 and 5 6, and the head is 6.
    """
    await talk.append("question", key="q")
    await talk.append("answer", role="assistant", key="a")
    await talk.append("second answer", role="assistant", parent_seq=1, key="a2")
    await talk.append("thanks")
    await talk.append("edited question", parent_seq=0, key="q2")
    await talk.append("answer to that", role="assistant")
    return talk


# versions


async def test_edit_and_regenerate(talk: Talk) -> None:
    """An edited question and a regenerated answer are versions beside the first ones, which stay in the log."""
    await talk.fill(4)

    regenerated = await talk.append("4, again", parent_seq=3)
    assert (regenerated.seq, regenerated.parent_seq) == (5, 3)
    assert await line(talk) == [1, 2, 3, 5]
    edited = await talk.append("3, edited", parent_seq=2)
    assert (edited.seq, edited.parent_seq) == (6, 2)
    assert await line(talk) == [1, 2, 6]
    answered = await talk.append("7")
    assert (answered.seq, answered.parent_seq) == (7, None)

    assert await line(talk) == [1, 2, 6, 7]
    assert await talk.list_versions() == {6: [3, 6]}
    assert await talk.seqs() == [1, 2, 3, 4, 5, 6, 7]
    assert (await talk.now()).head_seq == 7


async def test_versions_of_a_page(talk: Talk) -> None:
    """`list_versions` counts all versions of the messages of a page, so that a message is number 2 of 3."""
    await talk.fill(2)
    for content in ("third", "fourth"):
        await talk.append(content, parent_seq=1)
    await talk.append("fifth")
    await talk.append("another fifth", parent_seq=4)

    await talk.switch_branch(seq=3)
    assert await talk.list_versions() == {3: [2, 3, 4]}
    await talk.switch_branch(seq=4)
    assert await line(talk) == [1, 4, 6]
    assert await talk.list_versions() == {4: [2, 3, 4], 6: [5, 6]}
    assert list(await talk.list_versions()) == [4, 6]
    assert await talk.list_versions(limit=1) == {6: [5, 6]}
    assert await talk.list_versions(before_seq=6) == {4: [2, 3, 4]}
    assert await talk.list_versions(before_seq=4) == {}


async def test_a_second_first_message(chat: Talk) -> None:
    """`parent_seq=0` starts a second line, whose first message is a version of the first one."""
    assert await line(chat) == [5, 6]
    assert await chat.list_versions() == {5: [1, 5]}
    assert await parents(chat) == {1: None, 2: None, 3: 1, 4: None, 5: 0, 6: None}
    await chat.switch_branch(seq=1)
    assert await line(chat) == [1, 3, 4]
    assert await chat.list_versions() == {1: [1, 5], 3: [2, 3]}


async def test_readers_follow_the_line(chat: Talk) -> None:
    """The line is what get_branch, load_conversation, list_previews and get_context read; the others read the log."""
    conversation = await chat.switch_branch(seq=2)
    stored = {message.seq: message for message in await chat.messages()}

    for expected in ([1, 2], [5, 6]):
        messages = [stored[seq] for seq in expected]
        assert await chat.get_branch() == messages
        assert await chat.load_conversation() == (conversation, messages)
        assert await chatdb.list_previews(chat.db, user_id="alice") == [(conversation, messages[-1])]
        assert await chat.get_context(max_tokens=1000) == messages
        assert [message.seq for message in await chat.get_history()] == list(range(1, 7))
        conversation = await chat.switch_branch(key="q2")


async def test_pages_of_a_line(chat: Talk) -> None:
    """`before_seq` pages back along a line, and `top_seq` selects a line without moving the head."""
    before = await chat.now()

    assert await line(chat, top_seq=4) == [1, 3, 4]
    assert await line(chat, top_seq=4, limit=2) == [3, 4]
    assert await line(chat, top_seq=4, limit=2, before_seq=3) == [1]
    assert await line(chat, top_seq=4, before_seq=2) == [1]
    assert await line(chat, top_seq=2) == [1, 2]
    assert await line(chat, before_seq=5) == []
    assert await line(chat, before_seq=0) == []
    assert await line(chat, before_seq=99, limit=1) == [6]
    assert await chat.now() == before
    for top_seq in (0, 7):
        with pytest.raises(MessageNotFoundError):
            await chat.get_branch(top_seq=top_seq)


# the head


async def test_switch_to_the_newest_leaf(chat: Talk) -> None:
    """Switching to a message makes the newest message that follows it the head, or the message itself."""
    for seq, head in ((1, 4), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)):
        switched = await chat.switch_branch(seq=seq)
        assert (switched.head_seq, switched.last_seq) == (head, 6)
        assert switched == await chat.now()
    for key, head in (("q", 4), ("a", 2), ("a2", 4), ("q2", 6)):
        assert (await chat.switch_branch(key=key)).head_seq == head


async def test_the_revision_rises_if_the_head_moves(chat: Talk) -> None:
    """A switch raises the revision by one if the head moves, and keeps the place in the list."""
    before = await chat.now()

    assert await chat.switch_branch(seq=5, expected=before) == before
    switched = await chat.switch_branch(seq=2, expected=before)
    assert switched == before.model_copy(update={"head_seq": 2, "revision": before.revision + 1})
    assert await chat.switch_branch(seq=2) == switched
    with pytest.raises(StaleError):
        await chat.switch_branch(seq=5, expected=before)
    assert await chat.now() == switched


async def test_an_append_follows_the_head(chat: Talk) -> None:
    """After a switch, an append of any kind follows the head and becomes it, and the next one follows that."""
    appends: list[Callable[[], Awaitable[Any]]] = [
        lambda: chat.append(),
        lambda: chat.append(key="x"),
        lambda: chat.append_messages(messages=[said(), said()]),
        lambda: chat.append_messages(messages=[said(key="y"), said()]),
        lambda: chat.upsert_message(key="z", role="user", content="hello"),
    ]
    for append in appends:
        before = await chat.switch_branch(seq=2)
        await append()
        now = await chat.now()
        new = list(range(before.last_seq + 1, now.last_seq + 1))
        assert now.head_seq == now.last_seq
        assert await line(chat) == [1, 2, *new]
        assert [(await parents(chat))[seq] for seq in new] == [2, None][: len(new)]
        next_one = await chat.append()
        assert next_one.parent_seq is None
        assert await line(chat) == [1, 2, *new, next_one.seq]
        await chat.delete_branch(seq=new[0])


async def test_no_parent_is_written_in_order(talk: Talk) -> None:
    """A message that follows the newest one has no `parent_seq`, also after a pop, a deletion or with that parent."""
    await talk.fill(3)
    await talk.pop_message()
    assert (await talk.append()).parent_seq is None
    await talk.delete_message(seq=4)
    assert (await talk.append(parent_seq=2)).parent_seq is None
    await talk.delete_messages_after(after_seq=1)
    assert (await talk.append_messages(messages=[said(), said()], parent_seq=1))[0].parent_seq is None
    assert (await talk.append(parent_seq=7)).parent_seq is None
    await talk.delete_branch(seq=6)
    assert (await talk.append()).parent_seq is None
    await talk.replace_messages_after(after_seq=1, messages=[said()], expected=await talk.now())
    assert set((await parents(talk)).values()) == {None}
    await talk.delete_messages_after(after_seq=0)
    assert (await talk.append(parent_seq=0)).parent_seq is None


# deletions


async def test_a_deleted_head_moves_to_its_parent(chat: Talk) -> None:
    """If the head is deleted, the message that it followed becomes the head."""
    await chat.switch_branch(seq=4)
    await chat.delete_message(seq=4)
    assert (await chat.now()).head_seq == 3
    await chat.delete_message(key="a2")
    assert (await chat.now()).head_seq == 1
    await chat.delete_message(seq=1)
    assert (await chat.now()).head_seq == 0
    assert (await line(chat), await chat.load_conversation()) == ([], (await chat.now(), []))
    assert (await chat.append()).parent_seq == 0
    assert await chat.list_versions() == {7: [2, 5, 7]}


async def test_children_of_a_deleted_message(chat: Talk) -> None:
    """The messages that follow a deleted message follow its parent, whether they name it or come next."""
    await chat.append("third answer", parent_seq=1)
    await chat.append("reply to 3", parent_seq=3)
    before = await chat.now()

    await chat.delete_message(seq=3)
    assert await parents(chat) == {1: None, 2: None, 4: 1, 5: 0, 6: None, 7: 1, 8: 1}
    assert (await line(chat), await line(chat, top_seq=4)) == ([1, 8], [1, 4])
    assert await chat.list_versions() == {1: [1, 5], 8: [2, 4, 7, 8]}
    await chat.delete_message(seq=1)
    assert [await line(chat, top_seq=seq) for seq in (2, 4, 6, 7, 8)] == [[2], [4], [5, 6], [7], [8]]
    assert await chat.list_versions() == {8: [2, 4, 5, 7, 8]}
    now = await chat.now()
    assert (now.head_seq, now.last_seq, now.revision) == (8, 8, before.revision + 2)


async def test_pop(chat: Talk) -> None:
    """After a switch, `pop_message` takes messages off that line, and what follows them then follows their parents."""
    await chat.append("reply to 3", parent_seq=3)
    popped = await chat.pop_message()
    assert (popped.seq, popped.parent_seq, popped.content) == (7, 3, "reply to 3")
    assert (await chat.now()).head_seq == 3
    popped = await chat.pop_message()
    assert (popped.seq, popped.parent_seq) == (3, 1)
    assert await parents(chat) == {1: None, 2: None, 4: 1, 5: 0, 6: None}
    assert await line(chat) == [1]
    assert (await chat.pop_message()).seq == 1
    assert await chat.pop_message() is None
    assert (await chat.now()).head_seq == 0
    assert [await line(chat, top_seq=seq) for seq in (2, 4, 6)] == [[2], [4], [5, 6]]


@pytest.mark.parametrize(
    ("head", "after_seq", "left", "new_head"),
    [(6, 3, [1, 2, 3], 0), (4, 3, [1, 2, 3], 3), (4, 2, [1, 2], 1), (2, 2, [1, 2], 2), (2, 4, [1, 2, 3, 4], 2)],
)
async def test_delete_messages_after(chat: Talk, head: int, after_seq: int, left: list[int], new_head: int) -> None:
    """The messages of every branch after a seq are deleted, and the last one left of the line is the head."""
    before = await chat.switch_branch(seq=head)

    deleted = await chat.delete_messages_after(after_seq=after_seq, expected=before)

    assert deleted.messages == 6 - len(left)
    now = await chat.now()
    assert (now.head_seq, now.last_seq, now.revision) == (new_head, 6, before.revision + 1)
    assert await chat.seqs() == left
    follower = await chat.append()
    assert (await line(chat))[-2:] == ([new_head, follower.seq] if new_head else [follower.seq])


@pytest.mark.parametrize(("head", "after_seq", "expected"), [(6, 3, [7]), (4, 2, [1, 7]), (2, 4, [1, 2, 7])])
async def test_replace(chat: Talk, head: int, after_seq: int, expected: list[int]) -> None:
    """New messages follow the last message of the line that is left, and are the head."""
    before = await chat.switch_branch(seq=head)

    (stored,) = await chat.replace_messages_after(after_seq=after_seq, messages=[said()], expected=before)

    assert await line(chat) == expected
    assert stored == (await chat.messages())[-1]
    assert await chat.seqs() == [*range(1, after_seq + 1), 7]
    now = await chat.now()
    assert (now.head_seq, now.revision) == (7, before.revision + 2)


@pytest.mark.parametrize(
    ("head", "place", "deleted", "new_head"),
    [
        (6, {"seq": 1}, [1, 2, 3, 4], 6),
        (4, {"key": "q"}, [1, 2, 3, 4], 0),
        (4, {"key": "a2"}, [3, 4], 1),
        (4, {"seq": 4}, [4], 3),
        (4, {"seq": 2}, [2], 4),
        (6, {"seq": 5}, [5, 6], 0),
    ],
)
async def test_delete_branch(chat: Talk, head: int, place: dict[str, Any], deleted: list[int], new_head: int) -> None:
    """A version is deleted with all that follows it, and if the head is, the message before it is the head."""
    before = await chat.switch_branch(seq=head)

    result = await chat.delete_branch(**place, expected=before)

    assert (result.conversations, result.messages) == (0, len(deleted))
    assert await chat.seqs() == [seq for seq in range(1, 7) if seq not in deleted]
    assert await chat.now() == before.model_copy(update={"head_seq": new_head, "revision": before.revision + 1})
    with pytest.raises(StaleError):
        await chat.delete_branch(seq=6, expected=before)
    with pytest.raises(MessageNotFoundError):
        await chat.delete_branch(**place)
    assert (await chat.now()).revision == before.revision + 1


# parent_seq with the other options


async def test_a_key_with_another_parent(chat: Talk) -> None:
    """A repeated key returns the stored message, whatever its parent, even one that is not stored."""
    before = await chat.now()
    stored = (await chat.messages())[2]

    for parent_seq in (None, 0, 2, 99):
        again = {"role": "assistant", "content": "second answer", "key": "a2", "parent_seq": parent_seq}
        assert await chat.append_message(**again) == stored
        message = said("second answer", role="assistant", key="a2")
        assert await chat.append_messages(messages=[message], parent_seq=parent_seq) == [stored]
        assert await chat.append_messages(messages=[message], on_existing="skip", parent_seq=parent_seq) == []
    assert await chat.now() == before


async def test_the_order_of_errors(chat: Talk) -> None:
    """A missing conversation comes first, then the key, then a stale etag, then a missing parent."""
    old = (await chat.now()).model_copy(update={"revision": 1})
    for messages in (False, True):

        async def append(messages: bool = messages, **arguments: Any) -> None:
            message = said(key=arguments.pop("key", None))
            place = {"user_id": "alice", "conversation_id": chat.conversation.id} | arguments
            if messages:
                await chatdb.append_messages(chat.db, messages=[message, said()], **place)
            else:
                await chatdb.append_message(chat.db, **message, **place)

        with pytest.raises(ConversationNotFoundError):
            await append(conversation_id=-1, key="a", expected=old, parent_seq=99)
        with pytest.raises(ConversationNotFoundError):
            await append(user_id="bob", key="a", expected=old, parent_seq=1)
        with pytest.raises(ConflictError) as raised:
            await append(key="a", expected=old, parent_seq=99)
        assert type(raised.value) is ConflictError
        with pytest.raises(ConflictError):
            await append(key="a", parent_seq=99)
        with pytest.raises(StaleError):
            await append(expected=old, parent_seq=99)
        with pytest.raises(MessageNotFoundError, match="parent_seq"):
            await append(expected=await chat.now(), parent_seq=99)
    assert (await chat.now()).last_seq == 6


async def test_parents_of_others(chat: Talk) -> None:
    """The parent must be stored in this conversation: not in another one, and not deleted."""
    other = Talk(chat.db, await chatdb.create_conversation(chat.db, user_id="alice"))
    await other.append_messages(messages=[said()] * 9)
    await chat.delete_message(seq=4)
    before = await chat.now()

    for parent_seq in (4, 7, 9, 2**63 - 1):
        with pytest.raises(MessageNotFoundError):
            await chat.append(parent_seq=parent_seq)
        with pytest.raises(MessageNotFoundError):
            await chat.append_messages(messages=[said(key="new"), said()], parent_seq=parent_seq)
        with pytest.raises(MessageNotFoundError):
            await chat.append_messages(messages=[said()], on_existing="skip", parent_seq=parent_seq)
        with pytest.raises(MessageNotFoundError):
            await chat.append_messages(messages=[], parent_seq=parent_seq, conversation_metadata_patch={"a": 1})
    assert await chat.now() == before


async def test_a_batch_with_a_parent(chat: Talk) -> None:
    """The first message of a batch follows the parent, and each other one the message before it."""
    stored = await chat.append_messages(messages=[said("x"), said("y", key="y"), said("z")], parent_seq=2)

    assert [(message.seq, message.parent_seq) for message in stored] == [(7, 2), (8, None), (9, None)]
    assert await line(chat) == [1, 2, 7, 8, 9]
    before = await chat.now()
    assert await chat.append_messages(messages=[], parent_seq=1) == []
    assert await chat.now() == before


async def test_skip_with_a_parent(chat: Talk) -> None:
    """With `on_existing="skip"`, the first message that is new follows the parent."""
    batch = [said("q", key="q"), said("x", key="x"), said("a", key="a"), said("y", key="y")]

    stored = await chat.append_messages(messages=batch, on_existing="skip", parent_seq=3)

    assert [(message.seq, message.parent_seq, message.key) for message in stored] == [(7, 3, "x"), (8, None, "y")]
    assert await line(chat) == [1, 3, 7, 8]


async def test_create_with_a_parent(talk: Talk) -> None:
    """With `create=True`, the first message can only follow 0: with another parent, nothing is created."""
    user = {"user_id": "alice", "create": True}
    for number, append in enumerate(
        [
            lambda **arguments: chatdb.append_message(talk.db, **user, **said(), **arguments),
            lambda **arguments: chatdb.append_messages(talk.db, **user, messages=[said(), said()], **arguments),
        ]
    ):
        key = f"new {number}"
        for expected in (None, NEW):
            with pytest.raises(MessageNotFoundError):
                await append(conversation_key=key, parent_seq=1, expected=expected)
        with pytest.raises(ConversationNotFoundError):
            await chatdb.get_conversation(talk.db, user_id="alice", conversation_key=key)
        await append(conversation_key=key, parent_seq=0, expected=NEW)
        history = await chatdb.get_history(talk.db, user_id="alice", conversation_key=key)
        assert {message.parent_seq for message in history} == {None}
        await append(conversation_key=key, parent_seq=1)
        conversation = await chatdb.get_conversation(talk.db, user_id="alice", conversation_key=key)
        assert conversation.head_seq == conversation.last_seq == 2 * (number + 1)


# fork_conversation


async def copies(talk: Talk, fork: Conversation) -> list[Message]:
    """Return the messages of a fork."""
    found: list[Message] = await Talk(talk.db, fork).messages()
    return found


def without_place(message: Message) -> dict[str, Any]:
    """Return what a fork keeps of a message."""
    return message.model_dump(exclude={"id", "conversation_id", "seq", "parent_seq"})


async def test_fork(chat: Talk) -> None:
    """A fork has the line with all values of its messages, numbered from 1, and the source stays as it is."""
    await chat.append(
        "full", parent_seq=4, role="tool", key="f", payload=JsonText('{"b":1,  "a":\t[1e3, "\\u0000"]}'),
        metadata={"m": 1}, token_count=7,
    )  # fmt: skip
    await chat.update_conversation(title="A title", metadata={"a": [1]}, archived=True, pinned=True)
    before = await chat.now()
    earlier = [(seq, before.created_at - timedelta(days=seq)) for seq in range(1, before.last_seq + 1)]
    await chat.db.executemany("update chatdb.messages set created_at = $2 where seq = $1", earlier)
    log = await chat.messages()

    fork = await chat.fork_conversation()

    expected = [log[seq - 1] for seq in (1, 3, 4, 7)]
    stored = await copies(chat, fork)
    assert [without_place(message) for message in stored] == [without_place(message) for message in expected]
    assert [(message.seq, message.parent_seq) for message in stored] == [(1, None), (2, None), (3, None), (4, None)]
    assert stored[-1].payload == '{"b":1,  "a":\t[1e3, "\\u0000"]}'
    assert (fork.title, fork.metadata, fork.key) == ("A title", {"a": [1]}, None)
    assert (fork.last_seq, fork.head_seq, fork.revision) == (4, 4, 4)
    assert (fork.archived_at, fork.pinned_at) == (None, None)
    assert fork == await Talk(chat.db, fork).now()
    assert fork.created_at - before.created_at >= timedelta(hours=1)
    assert (await chat.now(), await chat.messages()) == (before, log)


@pytest.mark.parametrize(
    ("place", "expected"),
    [({}, [5, 6]), ({"seq": 4}, [1, 3, 4]), ({"key": "a2"}, [1, 3]), ({"seq": 2}, [1, 2]), ({"key": "q2"}, [5])],
)
async def test_fork_up_to_a_message(chat: Talk, place: dict[str, Any], expected: list[int]) -> None:
    """A fork ends with the head, or with a message of any branch."""
    fork = await chat.fork_conversation(**place, new_key="fork")

    assert fork.key == "fork"
    contents = {message.seq: message.content for message in await chat.messages()}
    assert [message.content for message in await copies(chat, fork)] == [contents[seq] for seq in expected]
    assert (await chat.now()).head_seq == 6


async def test_fork_of_nothing(talk: Talk) -> None:
    """A fork of an empty conversation, or of an empty line, is empty."""
    fork = await talk.fork_conversation(new_key="empty")
    assert (fork.title, fork.last_seq, fork.head_seq, fork.revision) == ("Talk", 0, 0, 0)
    assert (await Talk(talk.db, fork).append()).seq == 1

    await talk.fill(1)
    await talk.append("another", parent_seq=0)
    await talk.pop_message()
    assert (await copies(talk, await talk.fork_conversation())) == []


@pytest.mark.not_on_citus("in a transaction, a fork sends each message to its node, which takes longer")
@pytest.mark.owner
async def test_a_line_of_many_runs(talk: Talk) -> None:
    """Two tabs that write in turn: to fork their line takes time for each run, not for each pair of them."""
    place = (talk.conversation.user_id, talk.conversation.id)
    await talk.db.execute(
        """
        insert into chatdb.messages (user_id, conversation_id, seq, parent_seq, role, content, created_at)
        select $1, $2, seq, greatest(seq - 2, 0), 'user', 'hello', pg_catalog.now()
        from pg_catalog.generate_series(1, 20000) as seq
        """,
        *place,
    )
    await talk.db.execute("update chatdb.conversations set last_seq = 20000 where user_id = $1 and id = $2", *place)
    await talk.db.execute("analyze chatdb.messages")
    await talk.db.execute("set local statement_timeout = '5s'")

    assert (await talk.fork_conversation()).last_seq == 10_000


@pytest.mark.owner
async def test_versions_of_a_long_line(talk: Talk) -> None:
    """Two answers at each step: the versions take time for each message of the page, not for each pair of them."""
    place = (talk.conversation.user_id, talk.conversation.id)
    await talk.db.execute(
        """
        insert into chatdb.messages (user_id, conversation_id, seq, parent_seq, role, content, created_at)
        select $1, $2, seq, case when seq % 2 = 1 and seq > 1 then seq - 2 end, 'user', 'hello', pg_catalog.now()
        from pg_catalog.generate_series(1, 20001) as seq
        """,
        *place,
    )
    await talk.db.execute("update chatdb.conversations set last_seq = 20001 where user_id = $1 and id = $2", *place)
    await talk.db.execute("analyze chatdb.messages")
    await talk.db.execute("set local statement_timeout = '5s'")

    versions = await talk.list_versions(limit=10_000)

    assert versions == {seq: [seq - 1, seq] for seq in range(3, 20_002, 2)}


async def test_fork_errors(chat: Talk) -> None:
    """A taken key, a message that is not there or another user's conversation: an error, and nothing is copied."""
    await chatdb.create_conversation(chat.db, user_id="alice", key="taken")
    await chatdb.create_conversation(chat.db, user_id="bob", key="free")
    before = await chatdb.list_conversations(chat.db, user_id="alice")

    with pytest.raises(ConflictError, match="new_key"):
        await chat.fork_conversation(new_key="taken")
    for place in ({"seq": 0}, {"seq": 7}, {"key": "none"}):
        with pytest.raises(MessageNotFoundError):
            await chat.fork_conversation(**place, new_key="taken")
    with pytest.raises(ConversationNotFoundError):
        await chatdb.fork_conversation(chat.db, user_id="bob", conversation_id=chat.conversation.id, new_key="free")
    assert await chatdb.list_conversations(chat.db, user_id="alice") == before
    assert (await chat.fork_conversation(new_key="free")).key == "free"


# bad input


@pytest.mark.parametrize(
    ("name", "arguments", "parameter"),
    [
        ("append_message", said(parent_seq=-1), "parent_seq"),
        ("append_message", said(parent_seq=True), "parent_seq"),
        ("append_message", said(parent_seq="1"), "parent_seq"),
        ("append_message", said(parent_seq=2**63), "parent_seq"),
        ("append_messages", {"messages": [said()], "parent_seq": -1}, "parent_seq"),
        ("append_messages", {"messages": [], "parent_seq": False}, "parent_seq"),
        ("get_branch", {"limit": 0}, "limit"),
        ("get_branch", {"limit": 10_001}, "limit"),
        ("get_branch", {"before_seq": -1}, "before_seq"),
        ("get_branch", {"top_seq": True}, "top_seq"),
        ("list_versions", {"limit": 0}, "limit"),
        ("list_versions", {"before_seq": "1"}, "before_seq"),
        ("switch_branch", {}, "seq"),
        ("switch_branch", {"seq": 1, "key": "q"}, "key"),
        ("switch_branch", {"seq": True}, "seq"),
        ("switch_branch", {"seq": 1, "expected": NEW}, "expected"),
        ("delete_branch", {}, "seq"),
        ("delete_branch", {"seq": 1, "key": "q"}, "key"),
        ("delete_branch", {"seq": -1}, "seq"),
        ("fork_conversation", {"seq": 1, "key": "q"}, "key"),
        ("fork_conversation", {"seq": -1}, "seq"),
        ("fork_conversation", {"new_key": ""}, "new_key"),
        ("get_context", {"max_tokens": 0}, "max_tokens"),
        ("get_context", {"max_tokens": -1}, "max_tokens"),
        ("get_context", {"max_tokens": True}, "max_tokens"),
        ("get_context", {"max_tokens": 1, "limit": 0}, "limit"),
    ],
)
async def test_bad_input(chat: Talk, name: str, arguments: dict[str, Any], parameter: str) -> None:
    """A wrong argument is an InvalidInputError that names it, and nothing is written."""
    before = await chat.now(), await chat.messages()

    with pytest.raises(InvalidInputError) as raised:
        await getattr(chat, name)(**arguments)

    assert raised.value.parameter == parameter
    assert (await chat.now(), await chat.messages()) == before


@pytest.mark.parametrize("name", ["switch_branch", "delete_branch"])
async def test_a_version_that_is_not_there(chat: Talk, name: str) -> None:
    """A deleted version, one of another conversation, or none is a MessageNotFoundError, and nothing is written."""
    other = Talk(chat.db, await chatdb.create_conversation(chat.db, user_id="alice"))
    await other.append_messages(messages=[said(key="other"), *[said()] * 8])
    await chat.delete_branch(seq=3)
    before = await chat.now(), await chat.messages()

    for place in ({"seq": 3}, {"seq": 4}, {"seq": 9}, {"seq": 0}, {"key": "a2"}, {"key": "other"}):
        with pytest.raises(MessageNotFoundError):
            await getattr(chat, name)(**place)
        with pytest.raises(ConversationNotFoundError):
            await getattr(chatdb, name)(chat.db, user_id="bob", conversation_id=chat.conversation.id, **place)
    assert (await chat.now(), await chat.messages()) == before
