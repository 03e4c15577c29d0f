"""Later exports of the same conversations: what is new comes in, what the user changed stays, nothing doubles."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest

import chatdb
from chatdb.pool import Pool
from chatdb.transfer import files
from chatdb.transfer.importer import SAME_ID, ImportReport, import_conversations
from chatdb.transfer.merging import CHANGED, EDITED_IN_BOTH, FLAGGED, RENAMED, RENAMED_IN_BOTH
from tests.support.samples import AI_STUDIO, CHATGPT, SAMPLES


async def load(db: Pool, value: Any) -> ImportReport:
    """Import a file with this JSON value."""
    file = io.BytesIO(json.dumps(value).encode())
    return await import_conversations(db, user_id="alice", items=files.read(file, files.detect(file)))


async def stored(db: Pool) -> tuple[chatdb.Conversation, dict[str | None, chatdb.Message]]:
    """Return the user's only conversation, and its messages by key."""
    (conversation,) = await chatdb.list_conversations(db, user_id="alice", archived=None)
    history = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
    return conversation, {message.key: message for message in history}


async def line(db: Pool) -> list[str]:
    """Return the texts of the current line."""
    (conversation,) = await chatdb.list_conversations(db, user_id="alice", archived=None)
    branch = await chatdb.get_branch(db, user_id="alice", conversation_id=conversation.id)
    return [message.content for message in branch]


def said(name: str, role: str, text: str, at: float, **fields: Any) -> dict[str, Any]:
    """Return a message of a ChatGPT export."""
    return {
        "id": name,
        "author": {"role": role},
        "create_time": 1_700_000_000 + at,
        "content": {"content_type": "text", "parts": [text]},
        "status": "finished_successfully",
    } | fields


def export(current: str, *messages: tuple[str | None, dict[str, Any]], title: str = "A title") -> list[dict[str, Any]]:
    """Return a ChatGPT export of one conversation, of messages with the id of the one that each follows."""
    mapping = {one["id"]: {"id": one["id"], "parent": parent, "message": one} for parent, one in messages}
    times = {"create_time": 1_700_000_000.0, "update_time": 1_700_000_100.0}
    return [{"title": title, "conversation_id": "c", "current_node": current, "mapping": mapping} | times]


Q, A = (None, said("q", "user", "Why?", 1)), ("q", said("a", "assistant", "So.", 2))
FIRST = export("a", Q, A)


@pytest.mark.parametrize("name", SAMPLES)
async def test_the_same_export_again_changes_nothing(db: Pool, name: str) -> None:
    """Each format finds what it stored."""
    first = await load(db, SAMPLES[name][1])
    before = [record async for record in chatdb.export_user(db, user_id="alice")]
    again = await load(db, SAMPLES[name][1])
    assert (again.conversations, again.messages, again.extended_conversations) == (0, 0, 0)
    assert (again.stored_conversations, again.stored_messages) == (first.conversations, first.messages)
    assert {CHANGED, EDITED_IN_BOTH, FLAGGED, RENAMED, RENAMED_IN_BOTH} & {*again.changed} == set()
    assert [record async for record in chatdb.export_user(db, user_id="alice")] == before


async def test_an_answer_that_was_still_written(db: Pool) -> None:
    """Its text is completed, and the report says where."""
    await load(db, export("a", Q, ("q", said("a", "assistant", "So", 2, status="in_progress"))))
    assert (await stored(db))[1]["a"].state == "aborted"
    report = await load(db, FIRST)
    conversation, messages = await stored(db)
    assert (messages["a"].content, messages["a"].state) == ("So.", None)
    assert report.changed == {CHANGED: (0, 1)}
    assert report.places[CHANGED] == ['conversation "A title", message #2']
    assert conversation.revision == 3
    assert (await load(db, FIRST)).changed == {}


async def test_another_branch_and_a_longer_line(db: Pool) -> None:
    """New messages follow the stored ones that they follow in the export, and its line is selected."""
    await load(db, FIRST)
    report = await load(
        db,
        export("u", Q, A, ("q", said("b", "assistant", "Other.", 3)), ("b", said("u", "user", "Thanks", 4))),
    )
    assert (report.extended_conversations, report.messages, report.stored_messages) == (1, 2, 2)
    assert await line(db) == ["Why?", "Other.", "Thanks"]
    assert len((await stored(db))[1]) == 4


async def test_messages_that_sort_before_the_stored_ones(db: Pool) -> None:
    """A message with an earlier time is new too, if the user has deleted none."""
    await load(db, FIRST)
    await load(db, export("a", Q, ("q", said("z", "assistant", "Early.", 1.5)), A))
    assert sorted(message.content for message in (await stored(db))[1].values()) == ["Early.", "So.", "Why?"]
    assert await line(db) == ["Why?", "So."]


async def test_a_conversation_that_went_on_here(db: Pool) -> None:
    """The user's own messages stay, and so does their line."""
    await load(db, FIRST)
    conversation, _ = await stored(db)
    await chatdb.append_message(db, user_id="alice", conversation_id=conversation.id, role="user", content="Mine")
    await load(db, export("u", Q, A, ("a", said("u", "user", "Theirs", 4)), ("u", said("v", "assistant", "Yes", 5))))
    assert await line(db) == ["Why?", "So.", "Mine"]
    _, messages = await stored(db)
    assert (messages["u"].parent_seq, messages["v"].parent_seq) == (2, None)
    at: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id, "top_seq": messages["v"].seq}
    assert [each.content for each in await chatdb.get_branch(db, **at)] == ["Why?", "So.", "Theirs", "Yes"]


async def test_deleted_messages_stay_deleted(db: Pool) -> None:
    """What the user deleted here does not come back, and new messages follow the one before it."""
    await load(db, FIRST)
    conversation, _ = await stored(db)
    await chatdb.delete_message(db, user_id="alice", conversation_id=conversation.id, seq=2)
    report = await load(db, export("u", Q, A, ("a", said("u", "user", "Thanks", 4))))
    assert report.messages == 1
    assert await line(db) == ["Why?", "Thanks"]


@pytest.mark.parametrize(
    ("ours", "theirs", "content", "reason"),
    [
        ("So. Edited", "So.", "So. Edited", None),
        (None, "So it is.", "So it is.", CHANGED),
        ("So. Edited", "So it is.", "So. Edited", EDITED_IN_BOTH),
        ("So it is.", "So it is.", "So it is.", None),
    ],
)
async def test_an_edited_message(db: Pool, ours: str | None, theirs: str, content: str, reason: str | None) -> None:
    """The text that changed on one side is taken; if both did, the one here stays and is named."""
    await load(db, FIRST)
    conversation, _ = await stored(db)
    if ours is not None:
        at: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
        await chatdb.update_message(db, **at, seq=2, content=ours)
    report = await load(db, export("a", Q, ("q", said("a", "assistant", theirs, 2))))
    assert (await stored(db))[1]["a"].content == content
    assert report.changed == ({reason: (0, 1)} if reason else {})


@pytest.mark.parametrize(
    ("ours", "theirs", "title", "reason"),
    [
        ("Mine", "A title", "Mine", None),
        (None, "Theirs", "Theirs", RENAMED),
        ("Mine", "Theirs", "Mine", RENAMED_IN_BOTH),
        ("Theirs", "Theirs", "Theirs", None),
    ],
)
async def test_a_renamed_conversation(db: Pool, ours: str | None, theirs: str, title: str, reason: str | None) -> None:
    """The title that changed on one side is taken; if both did, the one here stays and is named."""
    await load(db, FIRST)
    conversation, _ = await stored(db)
    if ours is not None:
        await chatdb.update_conversation(db, user_id="alice", conversation_id=conversation.id, title=ours)
    report = await load(db, export("a", Q, A, title=theirs))
    assert (await stored(db))[0].title == title
    assert report.changed == ({reason: (1, 0)} if reason else {})
    if reason == RENAMED:
        assert (await load(db, export("a", Q, A, title="Third"))).changed == {RENAMED: (1, 0)}


async def test_two_conversations_of_one_id_in_a_file(db: Pool) -> None:
    """The second one becomes another line of the first, whose own line stays selected."""
    other = export("b", (None, said("p", "user", "Second", 3)), ("p", said("b", "assistant", "Two", 4)))
    report = await load(db, [*FIRST, *other])
    assert report.changed == {SAME_ID: (1, 0)}
    assert report.places[SAME_ID] == ['conversation "A title"']
    assert await line(db) == ["Why?", "So."]
    conversation, messages = await stored(db)
    at: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id, "top_seq": messages["b"].seq}
    assert [each.content for each in await chatdb.get_branch(db, **at)] == ["Second", "Two"]


@pytest.mark.parametrize("name", ["is_archived", "is_starred"])
@pytest.mark.parametrize(
    ("before", "ours", "theirs", "after", "is_reported"),
    [
        (False, None, True, True, True),
        (True, None, False, False, True),
        (True, None, None, True, False),
        (False, True, False, True, False),
        (True, False, True, False, False),
        (False, True, True, True, False),
        (True, False, False, False, False),
    ],
)
async def test_a_flag(
    db: Pool, name: str, before: bool, ours: bool | None, theirs: bool | None, after: bool, is_reported: bool
) -> None:
    """A flag that the export has changed since is set, unless the user changed it here and the export did not."""
    await load(db, [FIRST[0] | {name: before}])
    conversation, _ = await stored(db)
    field = {"is_archived": "archived", "is_starred": "pinned"}[name]
    if ours is not None:
        change: dict[str, Any] = {field: ours}
        await chatdb.update_conversation(db, user_id="alice", conversation_id=conversation.id, **change)
    later = [FIRST[0] | ({} if theirs is None else {name: theirs})]
    report = await load(db, later)
    conversation, _ = await stored(db)
    assert (getattr(conversation, f"{field}_at") is not None) == after
    assert report.changed == ({FLAGGED: (1, 0)} if is_reported else {})
    assert (await load(db, later)).changed == {}
    if theirs is not None:  # the import knows what this export had
        changed = await load(db, [FIRST[0] | {name: not theirs}])
        assert changed.changed == ({FLAGGED: (1, 0)} if after == theirs else {})


def talk(*texts: str, style: str = "messages", **fields: Any) -> dict[str, Any]:
    """Return a conversation of a data set, without ids."""
    names = {"messages": ("role", "content", "user", "assistant"), "conversations": ("from", "value", "human", "gpt")}
    who, what, *roles = names[style]
    return {style: [{who: roles[place % 2], what: text} for place, text in enumerate(texts)]} | fields


async def texts(db: Pool) -> list[list[str]]:
    """Return the texts of the line of each conversation, in order of storage."""
    conversations = await chatdb.list_conversations(db, user_id="alice", archived=None)
    at: list[dict[str, Any]] = [
        {"user_id": "alice", "conversation_id": number} for number in sorted(c.id for c in conversations)
    ]
    return [[message.content for message in await chatdb.get_branch(db, **each)] for each in at]


@pytest.mark.parametrize("style", ["messages", "conversations"])
async def test_a_list_without_ids_that_grew(db: Pool, style: str) -> None:
    """It is found by the texts of all that is stored of it, extended again and again, and never doubled."""
    await load(db, [talk("a", "b", style=style)])
    for length in (3, 4, 6):
        grown = [talk(*"abcdef"[:length], style=style)]
        report = await load(db, grown)
        assert (report.conversations, report.extended_conversations, report.stored_conversations) == (0, 1, 0)
        again = await load(db, grown)
        assert (again.conversations, again.messages, again.stored_conversations) == (0, 0, 1)
        assert await texts(db) == [[*"abcdef"[:length]]]
    assert (await load(db, [talk("a", "b", style=style)])).stored_conversations == 1


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ([talk("a", "b")], [talk("a", "x", "c")], [["a", "b"], ["a", "x", "c"]]),
        ([talk("a")], [talk("a", "b")], [["a"], ["a", "b"]]),  # a question alone is too little
        ([talk("a", "b")], [talk("a", "b"), talk("a", "b", "c")], [["a", "b"], ["a", "b", "c"]]),
        ([talk("a", "b"), talk("a", "b", "c")], [], [["a", "b"], ["a", "b", "c"]]),
        ([talk("a", "b"), talk("a", "b", "c")], [talk(*"abcd")], [["a", "b"], [*"abcd"]]),
        ([talk("a", "b")], [talk(*"abcd"), talk(*"abxy")], [[*"abcd"], [*"abxy"]]),
        ([talk("a", "b", style="conversations", id="1")], [talk(*"abc", style="conversations", id="2")],
         [["a", "b"], [*"abc"]]),
    ],
)  # fmt: skip
async def test_which_list_is_which(db: Pool, first: list[Any], later: list[Any], expected: list[list[str]]) -> None:
    """Another conversation of the same file, or one that a file has as it was, is not the beginning of one."""
    await load(db, first)
    if later:
        await load(db, later)
        assert (await load(db, later)).messages == 0
    assert sorted(await texts(db)) == sorted(expected)


async def test_a_list_without_ids_that_went_on_here_too(db: Pool) -> None:
    """What the export has else becomes another line, and the user's own stays selected."""
    await load(db, [talk("a", "b")])
    (conversation,) = await chatdb.list_conversations(db, user_id="alice")
    at: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
    await chatdb.append_message(db, **at, role="user", content="Mine")
    await chatdb.update_message(db, **at, seq=1, content="Edited")
    report = await load(db, [talk("a", "b", "c", "d")])
    assert (report.messages, report.changed) == (2, {})
    assert await texts(db) == [["Edited", "b", "Mine"]]
    assert [each.content for each in await chatdb.get_branch(db, **at, top_seq=5)] == ["Edited", "b", "c", "d"]


async def test_a_prompt_of_ai_studio_that_grew(db: Pool) -> None:
    """It has no id either."""
    chunks = AI_STUDIO["chunkedPrompt"]["chunks"]
    await load(db, AI_STUDIO)
    more = [*chunks, {"role": "user", "text": "And a duck's?"}]
    report = await load(db, AI_STUDIO | {"chunkedPrompt": {"chunks": more}})
    assert (report.conversations, report.messages, report.extended_conversations) == (0, 1, 1)


async def test_a_long_list_without_ids_grows_across_batches(db: Pool) -> None:
    """It is extended, and compared, whatever a batch has of it."""
    names = [f"n{number}" for number in range(9_000)]
    await load(db, [talk(*names[:100])])
    await load(db, [talk(*names[:6_000])])
    report = await load(db, [talk(*names)])
    assert (report.messages, report.stored_messages, report.conversations) == (3_000, 6_000, 0)
    assert await texts(db) == [names[-50:]] or (await texts(db))[0][-1] == names[-1]


async def test_a_long_conversation_grows_across_batches(db: Pool) -> None:
    """Merging does not depend on where a batch ends."""
    names = [f"n{number}" for number in range(6_000)]

    def chain(until: int) -> list[dict[str, Any]]:
        pairs = [(names[n - 1] if n else None, said(names[n], "user", names[n], n / 100)) for n in range(until)]
        return export(names[until - 1], *pairs)

    await load(db, chain(10))
    first = await load(db, chain(3_000))
    report = await load(db, chain(6_000))
    assert (first.messages, report.messages, report.extended_conversations) == (2_990, 3_000, 1)
    conversation, _ = await stored(db)
    texts = [each.content async for each in chatdb.iter_messages(db, user_id="alice", conversation_id=conversation.id)]
    assert texts == names
    assert conversation.head_seq == 6_000


async def test_every_kind_of_piece_is_updated(db: Pool) -> None:
    """A message that a later export has with another text is updated in each format that keeps it."""
    await load(db, CHATGPT)
    later = copy.deepcopy(CHATGPT)
    later[0]["mapping"]["n5"]["message"]["content"]["thoughts"] = "Spelt, then."
    later[0]["mapping"]["n7"]["message"] |= {"status": "finished_successfully"}
    report = await load(db, later)
    _, messages = await stored(db)
    assert messages["n5"].content == "Spelt, then."
    assert messages["n7"].state is None
    assert report.changed == {CHANGED: (0, 2)}
