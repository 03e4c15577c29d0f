"""Messages that grow while they are streamed: start, extend, read, finish, and what a crash has left."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from typing import Any

import pytest

import chatdb
from chatdb import (
    ConflictError,
    ConversationNotFoundError,
    InvalidInputError,
    Message,
    MessageNotFoundError,
)
from chatdb.transfer.exporter import export_conversations
from tests.support.talk import Talk, said

MIB = 1024 * 1024
SECRET = "XYZZY"
ALIKE = "e\u0301👩\u200d👩\u200d👧🇩🇪"
"""Three characters for a reader, in nine code points, of which five are beyond the BMP."""


async def stream(talk: Talk, *texts: str, **arguments: Any) -> Message:
    """Start a message and extend it by each text."""
    message: Message = await talk.start_message(**arguments)
    length = 0
    for text in texts:
        length = await talk.extend_message(seq=message.seq, offset=length, text=text)
    return message


async def text_of(talk: Talk, seq: int = 1) -> str:
    """Return the text so far, which two functions must agree on."""
    tail = await talk.read_message(seq=seq)
    message = await talk.get_message(seq=seq)
    assert (tail.text, tail.offset, tail.state) == (message.content, len(message.content), message.state)
    return str(tail.text)


async def parts(talk: Talk) -> list[tuple[int, int]]:
    """Return the seq and the start of every stored part."""
    rows = await talk.db.fetch("select seq, start from chatdb.message_parts order by seq, start")
    return [(row["seq"], row["start"]) for row in rows]


# start


async def test_start(talk: Talk) -> None:
    """A started message is the newest message, is empty and streaming, and changes the conversation as an append."""
    await talk.append()
    before = await talk.now()

    message = await talk.start_message(key="k", metadata={"model": "m"})

    assert (message.seq, message.role, message.content, message.state) == (2, "assistant", "", "streaming")
    assert (message.key, message.metadata, message.parent_seq) == ("k", {"model": "m"}, None)
    assert (message.payload, message.token_count) == (None, None)
    assert await talk.get_message(seq=2) == message
    now = await talk.now()
    assert (now.last_seq, now.head_seq, now.revision) == (2, 2, before.revision + 1)
    assert now.updated_at == message.created_at > before.updated_at


async def test_start_after_another_message(talk: Talk) -> None:
    """`parent_seq` starts another version; a parent that is missing is refused, and nothing is stored."""
    await talk.fill(3)

    message = await talk.start_message(parent_seq=1)

    assert (message.seq, message.parent_seq) == (4, 1)
    assert [each.seq for each in await talk.get_branch()] == [1, 4]
    with pytest.raises(MessageNotFoundError):
        await talk.start_message(parent_seq=9)
    assert await talk.seqs() == [1, 2, 3, 4]
    assert await parts(talk) == [(4, -1)]
    assert (await talk.start_message(parent_seq=0)).parent_seq == 0


async def test_append_after_a_stream(talk: Talk) -> None:
    """A message that is appended meanwhile follows the one that is streamed, which grows nevertheless."""
    await stream(talk, "ab")
    await talk.append("next")
    await talk.extend_message(seq=1, offset=2, text="c")

    assert await talk.contents() == ["abc", "next"]
    assert (await talk.finish_message(seq=1)).content == "abc"
    assert await talk.contents() == ["abc", "next"]


@pytest.mark.parametrize("state", ["streaming", "aborted", None])
async def test_start_again(talk: Talk, state: str | None) -> None:
    """A repeated start returns the message in any state, with the text so far, and changes nothing."""
    started = await stream(talk, "abc", "def", key="k", metadata={"a": 1})
    if state != "streaming":
        await talk.finish_message(key="k", aborted=state == "aborted")
    before = await talk.now()

    again = await talk.start_message(key="k", metadata={"b": 2})

    assert again == started.model_copy(update={"content": "abcdef", "state": state})
    assert await talk.now() == before
    assert await talk.messages() == [again]


async def test_start_with_the_key_of_an_appended_message(talk: Talk) -> None:
    """A start with the key of a message that never streamed returns that message."""
    appended = await talk.append("whole", role="assistant", key="k")

    assert await talk.start_message(key="k") == appended
    assert await parts(talk) == []


@pytest.mark.parametrize("finished", [False, True])
async def test_start_again_with_another_role(talk: Talk, *, finished: bool) -> None:
    """A key that is stored with another role is refused, and nothing is stored."""
    await stream(talk, SECRET, key="k")
    if finished:
        await talk.finish_message(key="k")
    before = await talk.now(), await talk.messages()

    with pytest.raises(ConflictError, match="another role") as raised:
        await talk.start_message(key="k", role="tool")

    assert SECRET not in repr(raised.value)
    assert (await talk.now(), await talk.messages()) == before


async def test_start_again_after_the_parent_was_deleted(talk: Talk) -> None:
    """A repeated start finds its message by the key even if the parent is gone."""
    await talk.fill(2)
    await stream(talk, "abc", key="k", parent_seq=1)
    await talk.delete_message(seq=1)

    assert (await talk.start_message(key="k", parent_seq=1)).content == "abc"


# extend


async def test_extend(talk: Talk) -> None:
    """Each extension returns the length, and leaves the conversation as it is."""
    await talk.start_message()
    before = await talk.now()

    assert await talk.extend_message(seq=1, offset=0, text="Hello") == 5
    assert await talk.extend_message(seq=1, offset=5, text=", wörld") == 12

    assert await text_of(talk) == "Hello, wörld"
    assert await talk.now() == before


async def test_extend_by_key(talk: Talk) -> None:
    """A message and its conversation are found by their keys."""
    conversation = await chatdb.create_conversation(talk.db, user_id="alice", key="c")
    at: dict[str, Any] = {"user_id": "alice", "conversation_key": "c"}
    await chatdb.start_message(talk.db, **at, key="k")

    assert await chatdb.extend_message(talk.db, **at, key="k", offset=0, text="abc") == 3
    assert (await chatdb.read_message(talk.db, **at, key="k", offset=1)).text == "bc"
    message = await chatdb.finish_message(talk.db, **at, key="k")
    assert (message.conversation_id, message.content) == (conversation.id, "abc")


@pytest.mark.parametrize("text", ["def", "d", "", "defghi", "ü👍"], ids=["same", "shorter", "empty", "longer", "other"])
async def test_the_last_part_is_replaced(talk: Talk, text: str) -> None:
    """An extension at the start of the last part replaces it, and the next one continues after the new text."""
    await stream(talk, "abc", "def")

    assert await talk.extend_message(seq=1, offset=3, text=text) == 3 + len(text)
    assert await text_of(talk) == "abc" + text
    assert await talk.extend_message(seq=1, offset=3 + len(text), text="!") == 4 + len(text)
    assert (await talk.finish_message(seq=1)).content == "abc" + text + "!"


async def test_the_first_part_is_replaced(talk: Talk) -> None:
    """The first part may be sent again too, any number of times."""
    await talk.start_message()
    for text in ("a", "ab", "", "abc", "abc"):
        assert await talk.extend_message(seq=1, offset=0, text=text) == len(text)
    assert await text_of(talk) == "abc"
    assert await parts(talk) == [(1, -1), (1, 0)]


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 5, 7, 8, 2**31, 2**63 - 1])
async def test_extend_elsewhere(talk: Talk, offset: int) -> None:
    """An offset in a gap, in the past or inside the last part is refused with the length, and nothing is stored."""
    await stream(talk, "abc", "def")

    with pytest.raises(ConflictError, match="offset must be 6,") as raised:
        await talk.extend_message(seq=1, offset=offset, text=SECRET)

    assert SECRET not in repr(raised.value)
    assert await text_of(talk) == "abcdef"


async def test_empty_texts(talk: Talk) -> None:
    """An empty text extends by nothing; what comes next takes its offset."""
    await stream(talk, "", "", "abc", "", "")

    assert await text_of(talk) == "abc"
    with pytest.raises(ConflictError):
        await talk.extend_message(seq=1, offset=0, text="")  # the last part is the empty one at 3
    assert await talk.extend_message(seq=1, offset=3, text="def") == 6
    assert (await talk.finish_message(seq=1)).content == "abcdef"


async def test_offsets_count_code_points(talk: Talk) -> None:
    """Offsets are those of Python's `len`, beyond the BMP and between combining characters too."""
    await stream(talk, *ALIKE)

    assert await text_of(talk) == ALIKE
    for offset in range(len(ALIKE) + 1):
        assert (await talk.read_message(seq=1, offset=offset)).text == ALIKE[offset:]
    assert await talk.extend_message(seq=1, offset=len(ALIKE), text="👍" * 3) == len(ALIKE) + 3
    assert (await talk.finish_message(seq=1)).content == ALIKE + "👍" * 3


async def test_four_mebibytes(talk: Talk) -> None:
    """A text of 4 MiB in bytes is stored; one byte more is refused at once, and nothing of it is stored."""
    await stream(talk, *["ü" * (MIB // 2)] * 3, "👍" * (MIB // 4 - 1), "abc")
    length = 3 * (MIB // 2) + MIB // 4 - 1
    assert await talk.extend_message(seq=1, offset=length + 3, text="d") == length + 4
    with pytest.raises(InvalidInputError, match="4 MiB"):
        await talk.extend_message(seq=1, offset=length + 4, text="e")
    with pytest.raises(InvalidInputError, match="4 MiB"):
        await talk.extend_message(seq=1, offset=length + 3, text="ü")
    assert await talk.extend_message(seq=1, offset=length + 4, text="") == length + 4

    content = (await talk.finish_message(seq=1)).content

    assert content == "ü" * (3 * MIB // 2) + "👍" * (MIB // 4 - 1) + "abcd"
    assert len(content.encode()) == 4 * MIB


async def test_bytes_of_a_replaced_part(talk: Talk) -> None:
    """A part that is replaced does not count, however often it is replaced."""
    await talk.start_message()
    for text in ("x" * 3 * MIB, "ü" * 2 * MIB, "", "x" * 4 * MIB, "x" * MIB):
        assert await talk.extend_message(seq=1, offset=0, text=text) == len(text)
    assert await talk.extend_message(seq=1, offset=MIB, text="x" * 3 * MIB) == 4 * MIB
    assert await talk.extend_message(seq=1, offset=MIB, text="x") == MIB + 1
    with pytest.raises(InvalidInputError, match="4 MiB"):
        await talk.extend_message(seq=1, offset=MIB, text="x" * (3 * MIB + 1))
    with pytest.raises(ConflictError):  # the wrong offset matters more than the length
        await talk.extend_message(seq=1, offset=0, text="x" * 4 * MIB)
    assert await talk.extend_message(seq=1, offset=MIB + 1, text="y" * (3 * MIB - 1)) == 4 * MIB
    assert (await talk.finish_message(seq=1)).content == "x" * (MIB + 1) + "y" * (3 * MIB - 1)


@pytest.mark.parametrize("text", ["a\ud83d", "\udc4d", "\ude00\ud83d", "a\x00", b"a", None, "x" * (4 * MIB + 1)])
async def test_invalid_text(talk: Talk, text: object) -> None:
    """Half of a surrogate pair, NUL, a text that is too long and another type are refused, and nothing is stored."""
    await stream(talk, "abc")
    with pytest.raises(InvalidInputError):
        await talk.extend_message(seq=1, offset=3, text=text)
    assert await text_of(talk) == "abc"


@pytest.mark.parametrize("offset", [-1, True, 1.0, "1", None, 2**63])
async def test_invalid_offset(talk: Talk, offset: object) -> None:
    """An offset that is no count is refused, by a reader too."""
    await stream(talk, "abc")
    with pytest.raises(InvalidInputError):
        await talk.extend_message(seq=1, offset=offset, text="d")
    with pytest.raises(InvalidInputError):
        await talk.read_message(seq=1, offset=offset)


@pytest.mark.parametrize("kind", ["finished", "aborted", "appended"])
async def test_extend_what_does_not_stream(talk: Talk, kind: str) -> None:
    """A message that is finished, aborted or was never started is not extended."""
    if kind == "appended":
        await talk.append("abc", key="k")
    else:
        await stream(talk, "abc", key="k")
        await talk.finish_message(key="k", aborted=kind == "aborted")

    for offset in (0, 3, 4):
        with pytest.raises(ConflictError, match="not streaming") as raised:
            await talk.extend_message(key="k", offset=offset, text=SECRET)
        assert SECRET not in repr(raised.value)
    assert await talk.contents() == ["abc"]
    assert await parts(talk) == []


async def test_what_is_missing(talk: Talk) -> None:
    """A message that was deleted or never existed is not found, nor is another user's conversation."""
    await stream(talk, SECRET, key="k")
    await talk.delete_message(key="k")
    calls: list[tuple[str, dict[str, Any]]] = [
        ("extend_message", {"offset": 0, "text": SECRET}),
        ("read_message", {}),
        ("finish_message", {"content": SECRET}),
    ]
    for name, arguments in calls:
        for which in ({"seq": 1}, {"key": "k"}, {"seq": 0}, {"seq": 2**63 - 1}):
            with pytest.raises(MessageNotFoundError) as raised:
                await getattr(talk, name)(**which, **arguments)
            assert SECRET not in repr(raised.value)
        with pytest.raises(ConversationNotFoundError):
            await getattr(chatdb, name)(
                talk.db, user_id="bob", conversation_id=talk.conversation.id, seq=1, **arguments
            )
        with pytest.raises(InvalidInputError):
            await getattr(talk, name)(**arguments)
        with pytest.raises(InvalidInputError):
            await getattr(talk, name)(seq=1, key="k", **arguments)
    with pytest.raises(ConversationNotFoundError):
        await chatdb.start_message(talk.db, user_id="bob", conversation_id=talk.conversation.id)


# read


@pytest.mark.parametrize("state", ["streaming", "aborted", None])
async def test_read_from_any_offset(talk: Talk, state: str | None) -> None:
    """A reader starts anywhere, also in the middle of a part; beyond the end, the text is empty."""
    text = "abcdefg👍üxyz"
    await stream(talk, "abc", "", "defg👍ü", "x", "yz")
    if state != "streaming":
        await talk.finish_message(seq=1, aborted=state == "aborted")

    for offset in (*range(15), 2**31 - 2, 2**31 - 1, 2**31, 2**32, 2**63 - 1):
        tail = await talk.read_message(seq=1, offset=offset)
        assert (tail.text, tail.offset, tail.state) == (text[offset:], len(text), state)


@pytest.mark.parametrize("offset", [0, 1, 2**31 - 1, 2**63 - 1])
async def test_read_what_has_no_text(talk: Talk, offset: int) -> None:
    """A message without a part yet has an empty text."""
    await talk.start_message()
    tail = await talk.read_message(seq=1, offset=offset)
    assert (tail.text, tail.offset, tail.state) == ("", 0, "streaming")
    await talk.finish_message(seq=1)
    tail = await talk.read_message(seq=1, offset=offset)
    assert (tail.text, tail.offset, tail.state) == ("", 0, None)


async def test_a_reader_follows_the_writer(talk: Talk) -> None:
    """A reader that passes the offset of its last answer gets every character once, over the end too."""
    await talk.start_message()
    read, at, length = "", 0, 0
    for text in ("Hel", "lo", "", ", ", "👍", "world"):
        length = await talk.extend_message(seq=1, offset=length, text=text)
        tail = await talk.read_message(seq=1, offset=at)
        read, at = read + tail.text, tail.offset
    await talk.finish_message(seq=1)
    tail = await talk.read_message(seq=1, offset=at)
    assert (read + tail.text, tail.state) == ("Hello, 👍world", None)


# finish


@pytest.mark.parametrize("aborted", [False, True])
async def test_finish(talk: Talk, *, aborted: bool) -> None:
    """A finished message has the text of its parts, which are deleted, and the revision is raised by 1."""
    started = await stream(talk, "abc", "def", key="k", metadata={"a": 1})
    before = await talk.now()

    message = await talk.finish_message(seq=1, aborted=aborted)

    state = "aborted" if aborted else None
    assert message == started.model_copy(update={"content": "abcdef", "state": state})
    assert await talk.messages() == [message]
    now = await talk.now()
    assert now == before.model_copy(update={"revision": before.revision + 1})
    assert await parts(talk) == []


async def test_finish_without_text(talk: Talk) -> None:
    """A message that was never extended is finished with an empty text."""
    await talk.start_message()
    assert (await talk.finish_message(seq=1)).content == ""


async def test_finish_with_values(talk: Talk) -> None:
    """`content` replaces the text, and payload, metadata and token_count are stored."""
    await stream(talk, "abc", metadata={"a": 1})

    message = await talk.finish_message(
        seq=1, content="whole", payload={"p": [1]}, metadata={"b": 2}, token_count=7, aborted=True
    )

    assert (message.content, message.payload, message.metadata) == ("whole", '{"p": [1]}', {"b": 2})
    assert (message.token_count, message.state) == (7, "aborted")
    assert await talk.messages() == [message]
    assert await parts(talk) == []


async def test_finish_with_an_empty_content(talk: Talk) -> None:
    """An empty `content` and empty metadata are values, not None."""
    await stream(talk, "abc", metadata={"a": 1})
    message = await talk.finish_message(seq=1, content="", metadata={}, token_count=0)
    assert (message.content, message.metadata, message.token_count) == ("", {}, 0)


@pytest.mark.parametrize("aborted", [False, True])
async def test_finish_again(talk: Talk, *, aborted: bool) -> None:
    """A repeated finish returns the message, whatever it is given, and changes nothing."""
    await stream(talk, "abc")
    message = await talk.finish_message(seq=1, aborted=aborted, token_count=1)
    before = await talk.now()

    again = await talk.finish_message(seq=1, content="other", token_count=2, metadata={"a": 1}, aborted=not aborted)

    assert again == message
    assert (await talk.messages(), await talk.now()) == ([message], before)


async def test_finish_what_was_never_started(talk: Talk) -> None:
    """An appended message is returned unchanged."""
    message = await talk.append("abc")
    before = await talk.now()
    assert await talk.finish_message(seq=1, content="other", aborted=True) == message
    assert await talk.now() == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"content": "\ud83d"},
        {"content": 1},
        {"content": "x" * (4 * MIB + 1)},
        {"payload": object()},
        {"payload": float("nan")},
        {"metadata": [1]},
        {"metadata": {1: 2}},
        {"token_count": -1},
        {"token_count": True},
        {"token_count": 1.0},
        {"aborted": 1},
        {"aborted": None},
    ],
)
async def test_finish_with_invalid_values(talk: Talk, arguments: dict[str, Any]) -> None:
    """What the message cannot have is refused, and the message streams on."""
    await stream(talk, "abc")
    with pytest.raises(InvalidInputError):
        await talk.finish_message(seq=1, **arguments)
    assert await talk.extend_message(seq=1, offset=3, text="d") == 4


# reads and writes of other functions


async def test_every_read_shows_the_text_so_far(committed: Talk) -> None:
    """Each function that reads messages shows the text that is stored; get_context and a fork leave it out."""
    talk = committed
    await talk.append("question")
    await stream(talk, "abc", "def")
    expected = await talk.get_message(seq=2)
    assert (expected.content, expected.state) == ("abcdef", "streaming")

    assert (await talk.messages())[1] == expected
    assert expected in await talk.get_history()
    assert expected in await talk.get_branch()
    assert [each async for each in talk.iter_messages()][1] == expected
    _, messages = await talk.load_conversation()
    assert expected in messages
    [[_, last]] = await chatdb.list_previews(talk.db, user_id="alice")
    assert last == expected
    exported = [each async for each in export_conversations(talk.db, user_id="alice")]
    assert expected in exported
    assert (await talk.update_message(seq=2, token_count=4)).content == "abcdef"
    context = await talk.get_context(max_tokens=1000)
    assert [each.content for each in context] == ["question"]
    fork = await talk.fork_conversation()
    assert await Talk(talk.db, fork).contents() == ["question"]
    popped = await talk.pop_message()
    assert (popped.seq, popped.content, popped.state) == (2, "abcdef", "streaming")
    assert await parts(talk) == []


async def test_a_finished_message_is_part_of_the_context(talk: Talk) -> None:
    """get_context and a fork have a message when it is finished or aborted."""
    await stream(talk, "abc")
    await talk.finish_message(seq=1)
    await stream_aborted(talk, "def")
    assert [each.content for each in await talk.get_context(max_tokens=1000)] == ["abc", "def"]
    forked = Talk(talk.db, await talk.fork_conversation())
    assert [(each.content, each.state) for each in await forked.messages()] == [("abc", None), ("def", "aborted")]


async def stream_aborted(talk: Talk, text: str) -> None:
    """Store an aborted message."""
    message = await stream(talk, text)
    await talk.finish_message(seq=message.seq, aborted=True)


async def test_another_content_is_refused(talk: Talk) -> None:
    """The content of a message that is streamed is set by finish_message only; its other values can be updated."""
    await stream(talk, "abc", key="k")
    before = await talk.now()

    for call in (
        talk.update_message(seq=1, content=SECRET),
        talk.update_message(key="k", content="", token_count=1),
        talk.upsert_message(key="k", role="assistant", content=SECRET),
        talk.upsert_message(key="k", role="user", content=""),
    ):
        with pytest.raises(ConflictError, match="streaming") as raised:
            await call
        assert SECRET not in repr(raised.value)
    assert await talk.now() == before
    updated = await talk.update_message(seq=1, metadata={"a": 1}, token_count=3)
    assert (updated.content, updated.metadata, updated.state) == ("abc", {"a": 1}, "streaming")
    assert await talk.extend_message(seq=1, offset=3, text="d") == 4
    finished = await talk.finish_message(seq=1)
    assert (finished.content, finished.metadata, finished.token_count) == ("abcd", {"a": 1}, 3)
    assert (await talk.update_message(seq=1, content="other")).content == "other"


async def test_append_with_the_key_of_a_stream(talk: Talk) -> None:
    """An append with the key of a message that is streamed does not change it."""
    await stream(talk, "abc", key="k")
    with contextlib.suppress(ConflictError):
        await talk.append("other", role="assistant", key="k")
    assert await text_of(talk) == "abc"
    assert await talk.extend_message(key="k", offset=3, text="d") == 4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("delete_message", {"seq": 2}),
        ("delete_messages_after", {"after_seq": 1}),
        ("replace_messages_after", {"after_seq": 1, "messages": [said("new")]}),
        ("pop_message", {}),
        ("delete_branch", {"seq": 1}),
        ("delete_conversation", {}),
    ],
)
async def test_deletion_deletes_the_parts(talk: Talk, name: str, arguments: dict[str, Any]) -> None:
    """A message that is deleted while it streams takes its parts with it; the writer learns that it is gone."""
    await talk.append("question")
    await stream(talk, "abc", "def")
    if name == "replace_messages_after":
        arguments = arguments | {"expected": await talk.now()}

    await getattr(talk, name)(**arguments)

    assert await parts(talk) == []
    for call in (
        talk.extend_message(seq=2, offset=6, text="g"),
        talk.finish_message(seq=2),
        talk.read_message(seq=2),
    ):
        with pytest.raises(chatdb.NotFoundError):
            await call


async def test_erasure_deletes_the_parts(talk: Talk) -> None:
    """delete_user deletes the parts of all the user's messages, and no others."""
    bobs = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="bob"))
    await stream(bobs, "bob's")
    await stream(talk, "abc")

    await chatdb.delete_user(talk.db, user_id="alice")

    assert await parts(talk) == [(1, -1), (1, 0)]
    assert await text_of(bobs) == "bob's"


# what a crash has left


async def test_list_streaming(committed: Talk) -> None:
    """A user's messages that were not extended for some time are listed in order, with the text so far."""
    talk = committed
    other = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="alice"))
    bobs = Talk(talk.db, await chatdb.create_conversation(talk.db, user_id="bob"))
    await stream(bobs, "bob's")
    await stream(other, "other")
    await stream(talk, "abc", "def", key="k", metadata={"a": 1})
    await stream(talk)
    await stream_aborted(talk, "aborted")
    await talk.append("whole")
    await asyncio.sleep(0.3)
    await other.extend_message(seq=1, offset=5, text="!")

    async def listed(**age: float) -> list[Message]:
        return await chatdb.list_streaming(talk.db, user_id="alice", older_than=timedelta(**age))

    assert await listed(minutes=1) == []
    old = await listed(seconds=0.25)
    assert old == [await talk.get_message(seq=1), await talk.get_message(seq=2)]
    assert [each.content for each in old] == ["abcdef", ""]
    assert await listed(seconds=0) == [*old, await other.get_message(seq=1)]
    assert await listed(days=10_000) == []
    for message in old:
        await talk.finish_message(seq=message.seq, aborted=True)
    assert [each.content for each in await listed(seconds=0)] == ["other!"]


@pytest.mark.parametrize(
    "older_than",
    [timedelta(microseconds=-1), timedelta.min, timedelta.max, timedelta(days=10_001), True, 1.0, 60, "1 hour", None],
)
async def test_list_streaming_with_an_invalid_age(talk: Talk, older_than: Any) -> None:
    """An age that is negative, too long or no timedelta is refused."""
    with pytest.raises(InvalidInputError, match="older_than"):
        await chatdb.list_streaming(talk.db, user_id="alice", older_than=older_than)


# at the same time


async def test_a_finish_waits_for_an_extension(committed: Talk) -> None:
    """A finish that waits for an extension from elsewhere has its text, although it began before."""
    await stream(committed, "abc")
    async with chatdb.transaction(committed.db, user_id="alice") as connection:
        await committed.through(connection).extend_message(seq=1, offset=3, text="def")
        finishing = asyncio.create_task(committed.finish_message(seq=1))
        await asyncio.sleep(0.2)
        assert not finishing.done()
    assert (await finishing).content == "abcdef"


@pytest.mark.parametrize("text", ["defg", "de"], ids=["longer", "shorter"])
async def test_an_extension_checks_the_offset_after_the_wait(committed: Talk, text: str) -> None:
    """An extension that waits for another one is checked against the length that the other one has stored."""
    await stream(committed, "abc")
    async with chatdb.transaction(committed.db, user_id="alice") as connection:
        first = committed.through(connection)
        await first.extend_message(seq=1, offset=3, text=text)
        await first.extend_message(seq=1, offset=3 + len(text), text="h")
        late = asyncio.create_task(committed.extend_message(seq=1, offset=3, text="xyz"))
        await asyncio.sleep(0.2)
        assert not late.done()
    with pytest.raises(ConflictError, match=f"offset must be {4 + len(text)}"):
        await late
    assert await text_of(committed) == "abc" + text + "h"


async def test_an_extension_that_waits_for_a_finish(committed: Talk) -> None:
    """An extension that waits for a finish from elsewhere is refused; after a rollback it is stored."""
    await stream(committed, "abc")
    late: list[asyncio.Task[int]] = []

    async def finish(offset: int) -> None:
        async with chatdb.transaction(committed.db, user_id="alice") as connection:
            await committed.through(connection).finish_message(seq=1)
            late.append(asyncio.create_task(committed.extend_message(seq=1, offset=offset, text="d")))
            await asyncio.sleep(0.2)
            assert not late[-1].done()
            if offset == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await finish(3)
    assert await late[0] == 4
    await finish(4)
    with pytest.raises(ConflictError, match="not streaming"):
        await late[1]
    assert await committed.contents() == ["abcd"]


async def test_an_extension_does_not_wait_for_the_conversation(committed: Talk) -> None:
    """A transaction that writes to the conversation holds up neither extensions nor readers."""
    await stream(committed, "abc")
    async with chatdb.transaction(committed.db, user_id="alice") as connection:
        await committed.through(connection).append("next")
        async with asyncio.timeout(10):
            assert await committed.extend_message(seq=1, offset=3, text="d") == 4
            assert (await committed.read_message(seq=1)).text == "abcd"


async def test_a_rolled_back_extension(talk: Talk) -> None:
    """What a transaction extends is undone with it, and the same offset is free again."""
    await stream(talk, "abc")
    with contextlib.suppress(ZeroDivisionError):
        async with chatdb.transaction(talk.db):
            await talk.extend_message(seq=1, offset=3, text="def")
            raise ZeroDivisionError
    assert await text_of(talk) == "abc"
    assert await talk.extend_message(seq=1, offset=3, text="xyz") == 6
