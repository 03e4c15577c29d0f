"""Import of tables that the other frameworks wrote: complete, in order and only once."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, get_args, get_type_hints

import psycopg
import pytest
from psycopg import sql

import chatdb
from chatdb.formats import openai
from chatdb.formats.items import Changed, Skipped, SourceConversation, SourceMessage
from chatdb.pool import Pool
from chatdb.transfer import files, tables
from chatdb.transfer.exporter import export_conversations
from chatdb.transfer.importer import CHANGED_SINCE, OTHER_OF_KEY, ImportReport, import_conversations
from tests.support.databases import as_role, execute
from tests.support.transfers import SESSION, exported, portable

pytestmark = pytest.mark.server_independent

OTHER = "0190b1c0-0000-7000-8000-000000000002"

RUN: list[Any] = [
    {"role": "user", "content": "What is the weather in Köln? 🌧"},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Ask the tool."}]},
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Köln"}', "id": "fc_1"},
    {"type": "function_call_output", "call_id": "c1", "output": "rain, 12 °C"},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [
            {"type": "output_text", "text": "It rains, ", "annotations": []},
            {"type": "output_text", "text": "at 12 °C.", "annotations": []},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "And in this picture?"},
            {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"},
        ],
    },
    {"type": "message", "role": "developer", "content": "Be brief."},
]
"""Items that a run of an agent stores in a session."""

OPENAI = {"framework": "openai-agents"}

SAID = [
    ("user", "What is the weather in Köln? 🌧", OPENAI),
    ("assistant", "Ask the tool.", OPENAI | {"type": "reasoning"}),
    ("assistant", "", OPENAI | {"type": "function_call", "name": "weather"}),
    ("tool", "rain, 12 °C", OPENAI | {"type": "function_call_output"}),
    ("assistant", "It rains, at 12 °C.", OPENAI),
    ("user", "And in this picture?", OPENAI),
    ("developer", "Be brief.", OPENAI),
]
"""Role, content and metadata expected from RUN."""

ROLES = ["system", "user", "assistant", "tool", "assistant", "user", "tool", "assistant", "assistant"]


def frameworks() -> Any:
    """Import the frameworks lazily: it takes seconds, and pytest inspects a module's globals."""
    return importlib.import_module("tests.support.frameworks")


async def run_agent(dsn: str, name: str = "s1", items: Sequence[Any] = RUN, **options: Any) -> None:
    """Store items with openai-agents."""
    async with frameworks().agent_session(dsn, name, **options) as session:
        await session.add_items(list(items))


def put(dsn: str, session: str, *items: str) -> None:
    """Store items as text in openai-agents' tables with SQL."""
    with psycopg.connect(dsn) as connection:
        connection.execute("insert into agent_sessions (session_id) values (%s) on conflict do nothing", [session])
        for item in items:
            connection.execute("insert into agent_messages (session_id, message_data) values (%s, %s)", [session, item])


def read(dsn: str, *arguments: Any, **options: Any) -> list[Any]:
    """Return all items read from a database."""
    with closing(tables.read(dsn, *arguments, **options)) as items:
        return list(items)


def texts(items: list[Any]) -> list[str]:
    """Return the texts of the messages."""
    return [item.content for item in items if isinstance(item, SourceMessage)]


def keys(items: list[Any]) -> list[str | None]:
    """Return the keys of the conversations."""
    return [item.key for item in items if isinstance(item, SourceConversation)]


async def import_all(db: Pool, dsn: str, *, user: str = "alice", **options: Any) -> ImportReport:
    """Import everything in a database."""
    with closing(tables.read(dsn, **options)) as items:
        return await import_conversations(db, user_id=user, items=items)


async def stored(db: Pool, key: str, user: str = "alice") -> tuple[chatdb.Conversation, list[chatdb.Message]]:
    """Return a conversation and its messages."""
    conversation = await chatdb.get_conversation(db, user_id=user, conversation_key=key)
    return conversation, await chatdb.get_history(db, user_id=user, conversation_id=conversation.id)


async def everything(db: Pool, user: str = "alice") -> list[Any]:
    """Return all records of a user."""
    return [record async for record in export_conversations(db, user_id=user)]


@pytest.mark.parametrize("ascii_only", [True, False])
async def test_openai_agents(db: Pool, empty_dsn: str, ascii_only: bool) -> None:
    """A session arrives in order, with roles, texts and times; its items can restore it."""
    before = datetime.now(UTC)
    await run_agent(empty_dsn, items=RUN[:4], ensure_ascii=ascii_only)
    await run_agent(empty_dsn, items=RUN[4:], ensure_ascii=ascii_only)
    report = await import_all(db, empty_dsn)
    assert (report.conversations, report.messages, report.skipped, report.changed) == (1, len(RUN), {}, {})

    conversation, history = await stored(db, "openai-agents:s1")
    assert [(m.role, m.content, m.metadata) for m in history] == SAID
    with psycopg.connect(empty_dsn) as connection:
        rows = connection.execute("select id::text, message_data from agent_messages order by id").fetchall()
    assert [(m.key, m.payload) for m in history] == rows
    assert before <= conversation.created_at <= history[0].created_at <= history[-1].created_at
    assert history[-1].created_at <= conversation.updated_at <= datetime.now(UTC)

    async with frameworks().agent_session(empty_dsn, "s2") as session:
        await session.add_items([m.payload.parsed() for m in history if m.payload is not None])
        assert await session.get_items() == RUN


async def test_langchain(db: Pool, empty_dsn: str) -> None:
    """A history arrives in order, with roles and LangChain's texts; its items can restore it."""
    before = datetime.now(UTC)
    frameworks().chat(empty_dsn)
    report = await import_all(db, empty_dsn)
    assert (report.conversations, report.messages) == (1, len(frameworks().CHAT))
    assert (report.skipped, report.changed) == ({}, {})

    conversation, history = await stored(db, SESSION)
    assert [m.role for m in history] == ROLES
    assert [m.content for m in history] == [str(m.text) for m in frameworks().CHAT]
    assert [m.metadata for m in history] == [
        None,
        {"name": "alice"},
        None,
        {"name": "weather"},
        None,
        None,
        {"type": "function", "name": "answer"},
        {"type": "chat"},
        {"type": "AIMessageChunk"},
    ]
    with psycopg.connect(empty_dsn) as connection:
        rows = connection.execute("select id::text, message::text from chat_history order by id").fetchall()
        assert [(m.key, m.payload) for m in history] == rows
        assert before <= conversation.created_at == history[0].created_at
        assert conversation.updated_at == history[-1].created_at <= datetime.now(UTC)

        again = frameworks().PostgresChatMessageHistory("chat_history", OTHER, sync_connection=connection)
        for message in history:
            connection.execute(
                "insert into chat_history (session_id, message) values (%s, %s)", [OTHER, str(message.payload)]
            )
        assert again.get_messages() == frameworks().CHAT


def test_every_type_of_item_is_known() -> None:
    """Each item type of the Responses API has a role. If this fails, give a role to the API's new type."""
    types: dict[str, Any] = {}
    for item in get_args(frameworks().TResponseInputItem):
        hints = get_type_hints(item)
        (kind, *_) = get_args(next((a for a in get_args(hints["type"]) if get_args(a)), hints["type"]))
        types[kind] = openai.parse_message({"type": kind, "role": next(iter(get_args(hints.get("role"))), None)})[0]
    assert len(types) > 25
    assert types["mcp_call"] == types["item_reference"] == types["reasoning"] == "assistant"
    assert types["custom_tool_call_output"] == types["program_output"] == "tool"
    assert types["mcp_approval_response"] == "user"
    assert types["additional_tools"] == types["compaction_trigger"] == "developer"


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"type": "reasoning", "summary": [{"text": "a"}, {"text": "b"}], "content": [{"text": "c"}]}, "a\nb\nc"),
        ({"type": "function_call_output", "output": [{"type": "input_text", "text": "a"}, {"text": 1}]}, "a"),
        ({"type": "shell_call_output", "output": [{"stdout": "out", "stderr": "err", "outcome": {}}]}, "out\nerr"),
        ({"type": "program_output", "result": "4"}, "4"),
        ({"type": "image_generation_call", "result": "base64"}, ""),
        ({"type": "mcp_call", "output": "of the server's", "arguments": "{}"}, ""),
        ({"role": "user", "content": None}, ""),
        ({"role": "user", "content": {"text": "no list"}}, ""),
    ],
)
def test_readable_text(item: dict[str, Any], text: str) -> None:
    """The content is an item's readable text; the rest is only in the payload."""
    assert openai.parse_message(item)[1] == text


@pytest.mark.parametrize("framework", ["openai-agents", "langchain"])
async def test_again_adds_only_what_is_new(db: Pool, empty_dsn: str, framework: str) -> None:
    """A second import adds nothing; a third adds the new messages of each session."""

    async def say(session: str, *words: str) -> None:
        if framework == "langchain":
            frameworks().chat(empty_dsn, session, [frameworks().HumanMessage(word) for word in words])
        else:
            await run_agent(empty_dsn, session, [{"role": "user", "content": word} for word in words])

    await say(SESSION, "one", "two")
    await say(OTHER, "uno")
    assert (await import_all(db, empty_dsn)).messages == 3
    before = await everything(db)
    report = await import_all(db, empty_dsn)
    assert (report.conversations, report.extended_conversations, report.messages) == (0, 0, 0)
    assert (report.stored_conversations, report.stored_messages, report.skipped) == (2, 3, {})
    assert await everything(db) == before

    await say(SESSION, "three")
    await say("0190b1c0-0000-7000-8000-000000000003", "eins")
    report = await import_all(db, empty_dsn)
    assert (report.conversations, report.extended_conversations, report.messages) == (1, 1, 2)
    key = SESSION if framework == "langchain" else f"openai-agents:{SESSION}"
    conversation, history = await stored(db, key)
    assert [m.content for m in history] == ["one", "two", "three"]
    assert conversation.last_seq == 3
    assert conversation.updated_at >= history[-1].created_at


async def test_a_session_that_was_rewritten(db: Pool, empty_dsn: str) -> None:
    """A session whose last item was replaced, or that was restarted, is skipped and reported."""
    await run_agent(empty_dsn, items=RUN[:2])
    await import_all(db, empty_dsn)
    async with frameworks().agent_session(empty_dsn) as session:
        await session.pop_item()
        assert (await import_all(db, empty_dsn)).stored_messages == 1, "shorter, but the same so far"
        await session.add_items(RUN[3:6])
        assert (await import_all(db, empty_dsn)).skipped == {CHANGED_SINCE: (1, 3)}
        await session.clear_session()
        await session.add_items(RUN[:1])
        assert (await import_all(db, empty_dsn)).skipped == {OTHER_OF_KEY: (1, 1)}
    assert [m.content for m in (await stored(db, "openai-agents:s1"))[1]] == [SAID[0][1], SAID[1][1]]


async def test_the_order_is_the_frameworks(empty_dsn: str) -> None:
    """A summary that openai-agents inserted with an earlier item's time is read at that position."""
    async with frameworks().agent_session(empty_dsn) as session:
        await session.add_items(RUN[:2])
        await session.add_items(RUN[3:4])
        with psycopg.connect(empty_dsn) as connection:
            connection.execute(
                "insert into agent_messages (session_id, message_data, created_at) "
                'select session_id, \'{"role": "user", "content": "summary"}\', created_at '
                "from agent_messages order by id limit 1"
            )
        said = [item.get("content") or item.get("output") or "Ask the tool." for item in await session.get_items()]
    assert texts(read(empty_dsn)) == said == [SAID[0][1], "Ask the tool.", "summary", "rain, 12 °C"]


async def test_times_are_those_of_the_servers_zone(empty_dsn: str) -> None:
    """openai-agents' times without a zone are interpreted in the server's time zone."""
    (name,) = {psycopg.conninfo.conninfo_to_dict(empty_dsn)["dbname"]}
    execute(empty_dsn, f"alter database {name} set timezone = 'Asia/Kathmandu'")
    before = datetime.now(UTC)
    await run_agent(empty_dsn)
    conversation, first, *_ = read(empty_dsn)
    assert before <= conversation.created_at <= first.created_at <= datetime.now(UTC)
    assert first.created_at.tzinfo is UTC


async def test_only_some_sessions(db: Pool, empty_dsn: str) -> None:
    """Only the requested sessions are imported; a missing one is reported."""
    for name in ("s1", "s2", "s'3", "{s4}"):
        await run_agent(empty_dsn, name, [{"role": "user", "content": name}])
    assert sorted(texts(read(empty_dsn, sessions=["{s4}", "s'3", "s1", "s1"]))) == ["s'3", "s1", "{s4}"]
    assert read(empty_dsn, sessions=["s", "S1"]) == [Skipped("no session with this ID", conversations=2)]
    report = await import_all(db, empty_dsn, sessions=["nobody's"])
    assert report.took_nothing

    for session in (SESSION, OTHER):
        frameworks().chat(empty_dsn, session, [frameworks().HumanMessage(session)])
    assert texts(read(empty_dsn, "langchain", sessions=[SESSION.upper()])) == [SESSION]
    missing = str(uuid.uuid4())
    *_, last = read(empty_dsn, "langchain", sessions=[OTHER, missing])
    assert last == Skipped("no session with this ID", conversations=1)
    with pytest.raises(chatdb.InvalidInputError, match="session: must be a UUID") as refused:
        read(empty_dsn, "langchain", sessions=["secret"])
    assert "secret" not in str(refused.value)


async def test_another_user_is_not_touched(db: Pool, empty_dsn: str) -> None:
    """A session imported for two users makes a separate conversation for each."""
    await run_agent(empty_dsn)
    await import_all(db, empty_dsn)
    before = await everything(db)
    await run_agent(empty_dsn, items=RUN[:1])
    assert (await import_all(db, empty_dsn, user="bob")).messages == len(RUN) + 1
    assert await everything(db) == before


HOSTILE = [
    ("{", "invalid JSON, or JSON with NaN, numbers of over 4,300 digits or nesting deeper than 200 levels"),
    ("", "invalid JSON, or JSON with NaN, numbers of over 4,300 digits or nesting deeper than 200 levels"),
    ('{"role": "user", "content": NaN}', "invalid JSON, or JSON with NaN,"),
    ('{"role": "user", "content": ' + "[" * 300 + "]" * 300 + "}", "invalid JSON, or JSON with NaN,"),
    ("[" * 100_000, "invalid JSON, or JSON with NaN,"),
    ("null", "not a JSON object"),
    ('[{"role": "user"}]', "not a JSON object"),
    ('{"type": "reasoning", "encrypted_content": "' + "x" * 16 * 1024 * 1024 + '"}', "larger than 16 MiB as JSON"),
]


@pytest.mark.parametrize(("item", "reason"), HOSTILE, ids=range(len(HOSTILE)))
async def test_what_cannot_be_taken(db: Pool, empty_dsn: str, item: str, reason: str) -> None:
    """An item that cannot be imported leaves a gap in seq and is reported; later items still arrive."""
    await run_agent(empty_dsn, items=RUN[:1])
    put(empty_dsn, "s1", item)
    report = await import_all(db, empty_dsn)
    ((said, counts),) = report.skipped.items()
    assert said.startswith(reason)
    assert counts == (0, 1)
    conversation, history = await stored(db, "openai-agents:s1")
    assert ([m.seq for m in history], conversation.last_seq) == ([1], 2)
    before = await everything(db)
    again = await import_all(db, empty_dsn)
    assert (again.stored_conversations, again.extended_conversations, again.messages) == (1, 0, 0)
    assert await everything(db) == before

    await run_agent(empty_dsn, items=RUN[1:2])
    report = await import_all(db, empty_dsn)
    assert (report.extended_conversations, report.messages) == (1, 1)
    conversation, history = await stored(db, "openai-agents:s1")
    assert ([m.seq for m in history], conversation.last_seq) == ([1, 3], 3)


OPAQUE = [
    ("{}", None),
    ('{"type": "banana", "content": "?"}', "banana"),
    ('{"type": ["reasoning"]}', None),
    ('{"role": "wizard", "content": "?"}', None),
    ('{"role": ["user"], "content": "?"}', None),
    ('{"__enc__": 1, "v": 1, "kid": "hkdf-v1", "payload": "x"}', "encrypted"),
]


@pytest.mark.parametrize(("item", "kind"), OPAQUE, ids=range(len(OPAQUE)))
async def test_an_opaque_item(db: Pool, empty_dsn: str, item: str, kind: str | None) -> None:
    """An encrypted item, or one of an unknown type or role, is the assistant's, with the item as payload."""
    await run_agent(empty_dsn, items=RUN[:1])
    put(empty_dsn, "s1", item)
    report = await import_all(db, empty_dsn)
    assert (report.messages, report.skipped) == (2, {})
    [_, message] = (await stored(db, "openai-agents:s1"))[1]
    assert (message.role, message.payload) == ("assistant", item)
    assert message.content == ("?" if "?" in item else "")
    assert message.metadata == OPENAI | ({"type": kind} if kind else {})


async def test_a_long_text_is_cut(db: Pool, empty_dsn: str) -> None:
    """The content is at most 4 MiB of an item's text; the payload has it whole."""
    text = "x\0" + "é" * 2_500_000
    await run_agent(empty_dsn, items=[{"role": "user", "content": text}])
    report = await import_all(db, empty_dsn)
    assert (report.messages, report.skipped, len(report.changed)) == (1, {}, 1)
    [message] = (await stored(db, "openai-agents:s1"))[1]
    assert 4 * 1024 * 1024 - 3 < len(message.content.encode()) <= 4 * 1024 * 1024
    assert text.replace("\0", "\ufffd").startswith(message.content)
    assert message.payload is not None
    assert message.payload.parsed() == {"role": "user", "content": text}


async def test_a_session_of_which_nothing_can_be_taken(db: Pool, empty_dsn: str) -> None:
    """A session without importable items, without items, or without an ID makes no conversation."""
    await run_agent(empty_dsn, "a", RUN[:3])
    put(empty_dsn, "b", "{", "null")
    async with frameworks().agent_session(empty_dsn, "c") as session:
        await session.add_items(RUN[:1])
        await session.pop_item()
    await run_agent(empty_dsn, "", RUN[:2])
    await run_agent(empty_dsn, "d", RUN[:1])
    report = await import_all(db, empty_dsn)
    assert (report.conversations, report.messages) == (2, 4)
    assert report.skipped.pop("no messages that can be imported") == (1, 0)
    assert report.skipped.pop("no messages") == (1, 0)
    assert report.skipped.pop("session without an ID") == (1, 2)
    assert [counts for _, counts in report.skipped.items()] == [(0, 1), (0, 1)]
    keys = {c.key: c.last_seq for c in await chatdb.list_conversations(db, user_id="alice")}
    assert keys == {"openai-agents:a": 3, "openai-agents:d": 1}


async def test_what_postgresql_cannot_hold(db: Pool, empty_dsn: str) -> None:
    """NUL and lone surrogates are replaced in the content and counted."""
    items = [{"role": "user", "content": "nul \0 here"}, {"role": "user", "content": "half \ud83d pair"}]
    items.append({"type": "function_call", "name": "\0", "call_id": "c", "arguments": "{}"})
    await run_agent(empty_dsn, items=items)
    report = await import_all(db, empty_dsn)
    assert (report.skipped, sum(few for _, few in report.changed.values())) == ({}, 2)
    _, history = await stored(db, "openai-agents:s1")
    assert [m.content for m in history] == ["nul \ufffd here", "half \ufffd pair", ""]
    assert [m.payload.parsed() for m in history if m.payload is not None] == items


async def test_long_ids_make_keys(db: Pool, empty_dsn: str) -> None:
    """A session ID that is too long for a key is replaced by its hash."""
    names = ["x" * 300, "x" * 301]
    for name in names:
        await run_agent(empty_dsn, name, RUN[:1])
    assert (await import_all(db, empty_dsn)).conversations == 2
    stored = await chatdb.list_conversations(db, user_id="alice", order_by="created_at", descending=False)
    assert [c.metadata for c in stored] == [{"openai-agents-id": json.dumps(name)} for name in names]
    assert (await import_all(db, empty_dsn)).stored_conversations == 2


def test_langchains_strange_messages(empty_dsn: str) -> None:
    """Removal instructions, unknown roles or types, and non-messages are reported; the rest is imported."""
    frameworks().chat(
        empty_dsn,
        messages=[
            frameworks().HumanMessage("a"),
            frameworks().RemoveMessage(id="x"),
            frameworks().ChatMessage("b", role="wizard"),
            frameworks().AIMessage("c"),
        ],
    )
    with psycopg.connect(empty_dsn) as connection:
        for item in ('{"type": "banana", "data": {}}', '{"type": "ai"}', "null", '"ai"', '{"type": 1, "data": {}}'):
            connection.execute("insert into chat_history (session_id, message) values (%s, %s)", [SESSION, item])
    items = read(empty_dsn)
    assert [(m.seq, m.content) for m in items if isinstance(m, SourceMessage)] == [(1, "a"), (4, "c")]
    assert items[0].last_seq == 9
    assert [(s.reason, s.seq) for s in items if isinstance(s, Skipped)] == [
        ("instruction to remove a message", 2),
        ('unknown role: "wizard"', 3),
        ("unknown type", 5),
        ("unknown type", 6),
        ("not a JSON object", 7),
        ("not a JSON object", 8),
        ("unknown type", 9),
    ]
    assert not any(isinstance(item, Changed) for item in items)


@pytest.mark.parametrize("name", ["message_store", "Chat_History", "select", "größe"])
def test_a_table_of_any_name(empty_dsn: str, name: str) -> None:
    """LangChain's table is found by its columns, or by its exact name."""
    frameworks().chat(empty_dsn, table=name)
    assert texts(read(empty_dsn)) == texts(read(empty_dsn, table=name)) == [str(m.text) for m in frameworks().CHAT]
    assert texts(read(empty_dsn, table=f"public.{name}")) == texts(read(empty_dsn))


def test_a_table_in_another_schema(empty_dsn: str) -> None:
    """A table outside the search_path is found, and can be named with its schema."""
    frameworks().chat(empty_dsn)
    execute(empty_dsn, 'create schema "a.b ""c"', 'alter table chat_history set schema "a.b ""c"')
    count = len(frameworks().CHAT)
    assert len(texts(read(empty_dsn))) == len(texts(read(empty_dsn, table='a.b "c.chat_history'))) == count
    with pytest.raises(chatdb.InvalidInputError, match="table: was not found"):
        read(empty_dsn, table="chat_history")


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "missing", "no.such", "pg_catalog.pg_class", "a\nb", "x" * 1_000),
        *(
            "chat_history; drop table chat_history",
            'chat_history" where true --',
            "chat_history where true",
            "%s",
            "{}",
        ),
    ],
)
def test_a_table_that_is_none(empty_dsn: str, name: str) -> None:
    """A name without such a table, or with SQL in it, is refused and has no effect."""
    frameworks().chat(empty_dsn)
    with pytest.raises(chatdb.InvalidInputError, match=r"table: was not found.*session_id uuid"):
        read(empty_dsn, table=name)
    assert len(texts(read(empty_dsn))) == len(frameworks().CHAT)


async def test_no_planted_operator_is_called(empty_dsn: str) -> None:
    """An operator in `public` that fits the columns better than the built-in one is never called."""
    await run_agent(empty_dsn)
    frameworks().chat(empty_dsn, SESSION)
    kinds = ("varchar", "information_schema.sql_identifier", "information_schema.character_data")
    execute(
        empty_dsn,
        *(
            f"create function public.captured({left}, {right}) returns bool language plpgsql as "
            f"$$ begin raise exception 'captured'; end $$; "
            f"create operator public.= (leftarg = {left}, rightarg = {right}, function = public.captured)"
            for left in kinds
            for right in ("text", "name", left)
        ),
    )
    assert len(texts(read(empty_dsn, "openai-agents", sessions=["s1"]))) == len(RUN)
    assert len(texts(read(empty_dsn, "langchain", sessions=[SESSION]))) == len(frameworks().CHAT)
    with pytest.raises(psycopg.errors.RaiseException):
        execute(empty_dsn, "select from agent_messages where session_id = any('{s1}'::text[])")


async def test_which_tables(empty_dsn: str) -> None:
    """If no table or several match, the error lists them; an option chooses one."""
    for chosen in ("auto", *tables.FORMATS):
        with pytest.raises(chatdb.InvalidInputError, match=r"looked for agent_sessions and agent_messages .*uuid"):
            read(empty_dsn, chosen)
    execute(empty_dsn, "create table notes (id int, session_id uuid, message text, created_at date)")
    execute(empty_dsn, "create table posts (id int, session_id text, message jsonb, created_at date)")
    with pytest.raises(chatdb.InvalidInputError, match="looked for"):
        read(empty_dsn)
    await run_agent(empty_dsn)
    frameworks().chat(empty_dsn)
    with pytest.raises(chatdb.InvalidInputError, match=r"among agent_messages, public\.chat_history$"):
        read(empty_dsn)
    assert keys(read(empty_dsn, "openai-agents")) == ["openai-agents:s1"]
    assert keys(read(empty_dsn, "langchain")) == keys(read(empty_dsn, table="chat_history")) == [SESSION]
    frameworks().chat(empty_dsn, OTHER, table="message_store")
    with pytest.raises(chatdb.InvalidInputError, match=r"among public\.chat_history, public\.message_store$"):
        read(empty_dsn, "langchain")
    assert keys(read(empty_dsn, table="message_store")) == [OTHER]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "chatgpt"}, "format: must be one of auto, openai-agents, langchain"),
        ({"format": "openai-agents", "table": "t"}, "table: applies only to langchain"),
        ({"table": "nul \0"}, "table: contains a NUL"),
        ({"sessions": ["half \ud83d"]}, "session: contains a lone surrogate"),
    ],
)
def test_wrong_arguments(empty_dsn: str, options: dict[str, Any], sentence: str) -> None:
    """Invalid arguments are refused before anything is sent."""
    with pytest.raises(chatdb.InvalidInputError, match=sentence):
        read(empty_dsn, **options)


async def test_tables_of_another_form(empty_dsn: str) -> None:
    """Tables with openai-agents' names but other columns are refused."""
    execute(empty_dsn, "create table agent_sessions (name text)", "create table agent_messages (name text)")
    with pytest.raises(chatdb.InvalidInputError, match="lacks the expected columns"):
        read(empty_dsn)


TIMES = ["infinity", "-infinity", "0044-03-15 BC", "20000-01-01"]


@pytest.mark.parametrize("time", TIMES)
async def test_a_time_that_python_has_not(db: Pool, empty_dsn: str, time: str) -> None:
    """A time that Python cannot represent is an error that names its row; nothing is stored."""
    await run_agent(empty_dsn)
    await run_agent(empty_dsn, "s2")
    with psycopg.connect(empty_dsn) as connection:
        [(last,)] = connection.execute("select max(id) from agent_messages").fetchall()
    wrong = f"the message {last} or its session has a time that is infinite or outside the years 1 to 9999"
    execute(empty_dsn, f"update agent_messages set created_at = '{time}' where id = {last}")
    with pytest.raises(chatdb.InvalidInputError, match=wrong):
        await import_all(db, empty_dsn)
    assert await chatdb.list_conversations(db, user_id="alice") == []


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("column", ["created_at", "updated_at"])
async def test_a_session_whose_time_python_has_not(empty_dsn: str, column: str, time: str) -> None:
    """The same holds for the times of a session, with and without messages."""
    await run_agent(empty_dsn)
    execute(empty_dsn, f"update agent_sessions set {column} = '{time}'")
    with pytest.raises(chatdb.InvalidInputError, match=r"^table: the message 1 or its session has a time"):
        read(empty_dsn)
    execute(empty_dsn, "delete from agent_messages")
    with pytest.raises(chatdb.InvalidInputError, match=r"^table: a session without messages has a time"):
        read(empty_dsn)


@pytest.mark.parametrize("time", TIMES)
async def test_a_time_of_langchains_that_python_has_not(empty_dsn: str, time: str) -> None:
    """The same holds for langchain's messages."""
    frameworks().chat(empty_dsn)
    execute(empty_dsn, f"update chat_history set created_at = '{time}'")
    with pytest.raises(chatdb.InvalidInputError, match=r"^table: the message 1 or its session has a time"):
        read(empty_dsn)


async def test_items_without_a_session(empty_dsn: str) -> None:
    """Items without a session row, possible without the foreign key, are read too."""
    await run_agent(empty_dsn)
    execute(empty_dsn, "alter table agent_messages drop constraint agent_messages_session_id_fkey")
    execute(empty_dsn, "delete from agent_sessions")
    conversation, *messages = read(empty_dsn)
    assert (conversation.key, len(messages)) == ("openai-agents:s1", len(RUN))
    assert conversation.created_at == messages[0].created_at


async def test_a_role_that_may_only_read(empty_dsn: str, server: str) -> None:
    """SELECT is the only privilege needed; without it the error names it."""
    role = f"reader_{uuid.uuid4().hex[:8]}"
    execute(server, f"create role {role} login password '{role}'")
    try:
        await run_agent(empty_dsn)
        reader = as_role(empty_dsn, role)
        with pytest.raises(chatdb.ConfigurationError, match="grant it SELECT"):
            read(reader)
        execute(empty_dsn, f"grant select on agent_sessions, agent_messages to {role}")
        assert len(texts(read(reader))) == len(RUN)
        execute(empty_dsn, f"revoke select on agent_sessions, agent_messages from {role}")
    finally:
        execute(server, f"drop role {role}")


@pytest.mark.parametrize(
    ("dsn", "error", "sentence"),
    [
        ("postgresql://alice:secret@127.0.0.1:1/x", chatdb.UnavailableError, "cannot be reached"),
        (
            "postgresql+psycopg2://alice:secret@127.0.0.1:1/x",
            chatdb.ConfigurationError,
            "must start with postgresql://",
        ),
        ("postgresql://alice:sec#ret@127.0.0.1:1/x", chatdb.ConfigurationError, "percent-encode"),
    ],
)
def test_a_dsn_that_does_not_fit(dsn: str, error: type[Exception], sentence: str) -> None:
    """An unusable DSN raises a chatdb error that does not quote it."""
    with pytest.raises(error, match=sentence) as refused:
        read(dsn)
    assert "alice" not in str(refused.value)
    assert "ret" not in str(refused.value)


async def test_one_moment_is_read(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import reads a snapshot and does not see changes during the import."""
    monkeypatch.setattr(tables, "_PAGE", 1)
    for number in range(3):
        await run_agent(empty_dsn, f"s{number}", RUN)
    with closing(tables.read(empty_dsn)) as items:
        first = next(items)
        await run_agent(empty_dsn, "s1", RUN)
        await run_agent(empty_dsn, "s4", RUN)
        execute(empty_dsn, "delete from agent_messages where session_id = 's2'")
        rest = list(items)
    assert [c.last_seq for c in [first, *rest] if isinstance(c, SourceConversation)] == [len(RUN)] * 3
    assert len(texts(rest)) == 3 * len(RUN)
    with psycopg.connect(empty_dsn) as connection:
        idle = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        assert connection.execute(idle).fetchone() == (0,), "the connection is closed"


async def test_a_server_that_goes_away(db: Pool, empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the connection is lost during the import, nothing is stored and a chatdb error is raised."""
    monkeypatch.setattr(tables, "_PAGE", 1)
    await run_agent(empty_dsn)
    others = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"

    def cut(items: Any) -> Any:
        yield next(items)
        execute(empty_dsn, f"{others} and pid <> pg_backend_pid()")
        yield from items

    with closing(tables.read(empty_dsn)) as items, pytest.raises(chatdb.UnavailableError, match="source server"):
        await import_conversations(db, user_id="alice", items=cut(items))
    assert await everything(db) == []


def test_pages_and_portions(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of any length arrive complete and in order, whatever the fetch size."""
    for number in range(3):
        session = str(uuid.UUID(int=number + 1))
        frameworks().chat(
            empty_dsn, session, [frameworks().HumanMessage(f"{number} {n} " + "x" * (n % 7) * 100) for n in range(25)]
        )
    whole = read(empty_dsn)
    assert [c.last_seq for c in whole if isinstance(c, SourceConversation)] == [25] * 3
    assert [m.seq for m in whole if isinstance(m, SourceMessage)] == list(range(1, 26)) * 3
    for page, size in ((1, 1), (7, 2_000), (10, 10**9), (1_000, 500)):
        monkeypatch.setattr(tables, "_PAGE", page)
        monkeypatch.setattr(tables, "_BYTES", size)
        assert read(empty_dsn) == whole


@pytest.mark.chaos
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_tables(empty_dsn: str) -> None:
    """Reading tables of 200 MB, with consecutive messages of 8 MB and one of 80 MB, takes under 130 MB of memory."""
    asyncio.run(run_agent(empty_dsn, items=RUN[:1]))
    with psycopg.connect(empty_dsn) as connection:
        connection.execute(
            "insert into agent_messages (session_id, message_data) "
            "select 's1', json_build_object('role', 'user', 'content', '', 'picture', repeat('x', size)) "
            "from (select case when n between 101 and 120 then 8000000 when n = 200 then 80000000 else 10000 end "
            "from generate_series(1, 4000) as n) as sizes (size)"
        )
    program = """
        import sys
        from pathlib import Path
        from chatdb.transfer import tables

        size = sum(len(item.payload) for item in tables.read(sys.argv[1]) if hasattr(item, "payload"))
        assert size > 190_000_000, size
        (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        print(int(peak.split()[1]) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), empty_dsn], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"figure: import of tables of 200 MB: {int(done.stdout)} MB of memory at the peak")
    assert int(done.stdout) < 130


def test_without_psycopg() -> None:
    """Without psycopg, the error names the extra."""
    program = """
        import sys
        sys.modules["psycopg"] = None
        from chatdb import ConfigurationError
        from chatdb.transfer import tables

        try:
            list(tables.read("postgresql://localhost/x"))
        except ConfigurationError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout.strip() == tables.MISSING, done.stderr


@pytest.mark.parametrize("name", ["100%", "%s", "%(sessions)s", "{table}", 'a"; drop table b; --', "--", "a\\b", "'"])
def test_a_table_that_was_renamed(empty_dsn: str, name: str) -> None:
    """A table name with any characters is quoted as an identifier."""
    frameworks().chat(empty_dsn)
    with psycopg.connect(empty_dsn) as connection:
        connection.execute(sql.SQL("alter table chat_history rename to {}").format(sql.Identifier(name)))
    assert len(texts(read(empty_dsn))) == len(texts(read(empty_dsn, table=name))) == len(frameworks().CHAT)


async def test_exported_again(db: Pool, empty_dsn: str) -> None:
    """Conversations from tables can be exported and imported again without loss, gaps included."""
    await run_agent(empty_dsn, items=RUN[:3])
    put(empty_dsn, "s1", "{")
    await run_agent(empty_dsn, items=RUN[3:])
    await import_all(db, empty_dsn)
    lines = await exported(db)
    assert [line["seq"] for line in map(json.loads, lines.splitlines()) if line["type"] == "message"] == [
        1,
        2,
        3,
        5,
        6,
        7,
        8,
    ]
    report = await import_conversations(db, user_id="bob", items=files.read(io.BytesIO(lines), "chatdb"))
    assert report.skipped == {}
    assert portable(await exported(db, "bob")) == portable(lines)
