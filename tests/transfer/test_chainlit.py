"""Import of the tables of Chainlit's official data layer."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg import sql

import chatdb
from chatdb.formats.chainlit import parse_step
from chatdb.formats.items import Skipped, SourceConversation, SourceMessage
from chatdb.pool import Pool
from chatdb.transfer import tables
from chatdb.transfer.exporter import export_conversations
from chatdb.transfer.importer import CHANGED_SINCE, ImportReport, import_conversations
from tests.support.databases import as_role, execute

pytestmark = pytest.mark.server_independent

TABLES = (
    "create type \"StepType\" as enum ('assistant_message', 'embedding', 'llm', 'retrieval', 'rerank', 'run', "
    "'system_message', 'tool', 'undefined', 'user_message')",
    """
    create table "User" (
        "id" text primary key, "createdAt" timestamp(3) not null default current_timestamp,
        "updatedAt" timestamp(3) not null default current_timestamp, "metadata" jsonb not null default '{}',
        "identifier" text not null unique
    )
    """,
    """
    create table "Thread" (
        "id" text primary key, "createdAt" timestamp(3) not null default current_timestamp,
        "updatedAt" timestamp(3) not null default current_timestamp, "deletedAt" timestamp(3), "name" text,
        "metadata" jsonb not null default '{}', "tags" text[] default '{}',
        "userId" text references "User" on delete set null
    )
    """,
    """
    create table "Step" (
        "id" text primary key, "createdAt" timestamp(3) not null default current_timestamp,
        "updatedAt" timestamp(3) not null default current_timestamp,
        "parentId" text references "Step" on delete cascade,
        "threadId" text references "Thread" on delete cascade, "input" text, "metadata" jsonb not null default '{}',
        "name" text, "output" text, "type" "StepType" not null, "showInput" text default 'json',
        "isError" boolean default false, "startTime" timestamp(3) not null, "endTime" timestamp(3) not null
    )
    """,
    """
    create table "Element" (
        "id" text primary key, "createdAt" timestamp(3) not null default current_timestamp,
        "updatedAt" timestamp(3) not null default current_timestamp, "threadId" text, "metadata" jsonb not null,
        "stepId" text not null references "Step" on delete cascade, "mime" text, "name" text not null,
        "objectKey" text, "url" text, "chainlitKey" text, "display" text, "size" text, "language" text, "page" int,
        "props" jsonb
    )
    """,
    """
    create table "Feedback" (
        "id" text primary key, "createdAt" timestamp(3) not null default current_timestamp,
        "updatedAt" timestamp(3) not null default current_timestamp,
        "name" text not null, "value" double precision not null,
        "comment" text, "stepId" text references "Step" on delete set null
    )
    """,
)

STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def put(dsn: str, table: str, *rows: dict[str, Any]) -> None:
    """Store rows in a table."""
    with psycopg.connect(dsn) as connection:
        for row in rows:
            statement = sql.SQL("insert into {} ({}) values ({})").format(
                sql.Identifier(table),
                sql.SQL(", ").join(map(sql.Identifier, row)),
                sql.SQL(", ").join(sql.Placeholder() * len(row)),
            )
            connection.execute(statement, [json.dumps(v) if isinstance(v, dict) else v for v in row.values()])


def step(
    identifier: str, kind: str, output: str | None, second: float = 0, thread: str = "t1", **fields: Any
) -> dict[str, Any]:
    """Return a row of Step."""
    time = STARTED.replace(tzinfo=None, microsecond=int(second * 1_000_000))
    return {
        "id": identifier,
        "threadId": thread,
        "type": kind,
        "output": output,
        "startTime": time,
        "endTime": time,
    } | fields


STEPS = [
    step("s1", "user_message", "What is the weather in Köln? 🌧", 0.1, name="alice"),
    step("s2", "run", None, 0.2, name="on_message", parentId="s1", metadata={"a": [1]}),
    step("s3", "tool", "rain, 12 °C", 0.3, name="weather", parentId="s2", input='{"city": "Köln"}'),
    step("s4", "llm", "It rains.", 0.3, name="gpt", input="[]"),
    step("s0", "assistant_message", "It rains.", 0.4, name="Assistant"),
    step("s6", "system_message", "The chat ends.", 0.5),
]

MARK = {"framework": "chainlit"}

SAID = [
    ("user", "What is the weather in Köln? 🌧", MARK),
    ("assistant", "", MARK | {"type": "run", "name": "on_message"}),
    ("tool", "rain, 12 °C", MARK | {"type": "tool", "name": "weather"}),
    ("assistant", "", MARK | {"type": "llm", "name": "gpt"}),
    ("assistant", "It rains.", MARK | {"name": "Assistant"}),
    ("system", "The chat ends.", MARK),
]
"""Role, content and metadata expected from STEPS."""


@pytest.fixture
def source(empty_dsn: str) -> str:
    """Return the DSN of a database with Chainlit's tables, and a thread each of Alice, of Bob and of nobody."""
    execute(empty_dsn, *TABLES)
    put(empty_dsn, "User", {"id": "u1", "identifier": "alice"}, {"id": "u2", "identifier": "bob"})
    created = STARTED.replace(tzinfo=None)
    put(
        empty_dsn,
        "Thread",
        {"id": "t1", "userId": "u1", "name": "Weather", "tags": ["a", "b"], "metadata": {"x": {"y": 1}}},
        {"id": "t2", "userId": "u2", "name": None, "tags": None},
        {"id": "t3", "userId": None},
        {"id": "t4", "userId": "u1", "deletedAt": created},
    )
    with psycopg.connect(empty_dsn) as connection:
        connection.execute('update "Thread" set "createdAt" = %s', [created])
    put(
        empty_dsn,
        "Step",
        *STEPS,
        *(step(f"{name}-1", "user_message", "hi", thread=name) for name in ("t2", "t3", "t4")),
    )
    return empty_dsn


def read(dsn: str, chosen: str = "auto", **options: Any) -> list[Any]:
    """Return all items read from a database."""
    with closing(tables.read(dsn, chosen, **options)) as items:
        return list(items)


async def import_all(db: Pool, dsn: str, user: str = "alice", **options: Any) -> ImportReport:
    """Import everything of a user."""
    with closing(tables.read(dsn, user=user, **options)) as items:
        return await import_conversations(db, user_id=user, items=items)


async def stored(db: Pool, key: str, user: str = "alice") -> tuple[chatdb.Conversation, list[chatdb.Message]]:
    """Return a conversation and its messages."""
    conversation = await chatdb.get_conversation(db, user_id=user, conversation_key=key)
    return conversation, await chatdb.get_history(db, user_id=user, conversation_id=conversation.id)


async def test_a_thread(db: Pool, source: str) -> None:
    """A thread of the user arrives with its title and times, and its steps in order, verbatim in the payload."""
    report = await import_all(db, source)
    assert (report.conversations, report.messages, report.skipped, report.changed) == (1, len(STEPS), {}, {})
    conversation, history = await stored(db, "chainlit:t1")
    assert conversation.title == "Weather"
    assert conversation.metadata == MARK | {"tags": ["a", "b"], "metadata": {"x": {"y": 1}}}
    assert conversation.created_at == STARTED
    assert conversation.updated_at == history[-1].created_at == STARTED.replace(microsecond=500_000)
    assert [(m.role, m.content, m.metadata) for m in history] == SAID
    assert [m.key for m in history] == [row["id"] for row in STEPS]
    with psycopg.connect(source) as connection:
        rows = connection.execute('select to_jsonb(s) from "Step" as s where "threadId" = \'t1\'').fetchall()
    originals = {row["id"]: row for (row,) in rows}
    assert [m.payload and m.payload.parsed() for m in history] == [originals[row["id"]] for row in STEPS]
    assert originals["s2"]["metadata"] == {"a": [1]}

    assert [c.key for c in await chatdb.list_conversations(db, user_id="alice")] == ["chainlit:t1"]
    assert (await import_all(db, source, "bob")).messages == 1
    conversation, _ = await stored(db, "chainlit:t2", "bob")
    assert (conversation.title, conversation.metadata) == (None, MARK)
    assert (await import_all(db, source, "carol")).as_dict() == ImportReport().as_dict()


async def test_feedback_and_elements(db: Pool, source: str) -> None:
    """A step's payload has its feedback and elements."""
    element = {"threadId": "t1", "stepId": "s0", "metadata": {"type": "image"}, "name": "map", "objectKey": "u1/map"}
    feedback = {"stepId": "s0", "name": "user_feedback", "value": 1, "comment": "thanks"}
    put(source, "Feedback", *({"id": name} | feedback for name in ("f2", "f1")))
    put(source, "Element", *({"id": name} | element for name in ("e2", "e1")))
    await import_all(db, source)
    _, history = await stored(db, "chainlit:t1")
    payloads = [m.payload.parsed() for m in history if m.payload]
    assert [name for each in payloads for name in ("feedback", "elements") if name in each] == ["feedback", "elements"]
    assert [each["id"] for each in payloads[4]["feedback"]] == ["f1", "f2"]
    assert payloads[4]["feedback"][0].items() >= feedback.items()
    assert [each["id"] for each in payloads[4]["elements"]] == ["e1", "e2"]
    assert payloads[4]["elements"][0].items() >= element.items()


async def test_again_adds_only_what_is_new(db: Pool, source: str) -> None:
    """A second import adds nothing, a third the new steps and threads; a thread with a deleted step is reported."""
    await import_all(db, source)
    before = [record async for record in export_conversations(db, user_id="alice")]
    put(source, "Feedback", {"id": "f1", "stepId": "s0", "name": "user_feedback", "value": 0})
    report = await import_all(db, source)
    assert (report.conversations, report.extended_conversations, report.messages) == (0, 0, 0)
    assert (report.stored_conversations, report.stored_messages, report.skipped) == (1, len(STEPS), {})
    assert [record async for record in export_conversations(db, user_id="alice")] == before

    put(source, "Thread", {"id": "t5", "userId": "u1"})
    put(source, "Step", step("s7", "user_message", "And here?", 0.6), step("s8", "user_message", "new", thread="t5"))
    report = await import_all(db, source)
    assert (report.conversations, report.extended_conversations, report.messages) == (1, 1, 2)
    _, history = await stored(db, "chainlit:t1")
    assert [m.content for m in history] == [*(said for _, said, _ in SAID), "And here?"]

    execute(source, "delete from \"Step\" where id = 's6'")
    put(source, "Step", step("s9", "user_message", "Hello?", 0.7))
    assert (await import_all(db, source)).skipped == {CHANGED_SINCE: (1, 1)}


async def test_equal_times(source: str) -> None:
    """Steps with equal times are in the order in which they were stored."""
    for name in ("z", "b", "a", "c"):
        put(source, "Step", step(name, "user_message", name, 0.9))
    with psycopg.connect(source) as connection:
        for number, name in enumerate(("z", "b", "a", "c")):
            time = STARTED.replace(tzinfo=None, minute=number)
            connection.execute('update "Step" set "createdAt" = %s where id = %s', [time, name])
    assert [item.content for item in read(source, user="alice") if isinstance(item, SourceMessage)][-4:] == [*"zbac"]


async def test_only_some_threads(source: str) -> None:
    """Only the requested threads of the user are read; any other is reported as missing."""
    put(source, "Thread", {"id": "t%5", "userId": "u1"})
    put(source, "Step", step("s7", "user_message", "new", thread="t%5"))
    items = read(source, user="alice", sessions=["t%5"])
    assert [item.key for item in items if isinstance(item, SourceConversation)] == ["chainlit:t%5"]
    missing = [Skipped("no session with this ID", conversations=3)]
    assert read(source, user="alice", sessions=["t2", "t3", "t4"]) == missing


async def test_times_of_another_zone(source: str) -> None:
    """A step's times are in UTC, and a thread's in the server's time zone."""
    (name,) = {psycopg.conninfo.conninfo_to_dict(source)["dbname"]}
    execute(source, f"alter database {name} set timezone = 'Asia/Kathmandu'")
    before = datetime.now(UTC)
    put(source, "Thread", {"id": "t5", "userId": "u1"})
    put(source, "Step", step("s7", "user_message", "new", thread="t5"))
    conversation, message = read(source, user="alice", sessions=["t5"])
    assert message.created_at == STARTED
    assert abs(conversation.created_at - before).total_seconds() < 60
    assert conversation.updated_at == conversation.created_at


async def test_what_cannot_be_imported(db: Pool, source: str) -> None:
    """Threads without steps, and metadata or steps that are too large, are reported; the rest is imported."""
    put(
        source, "Thread", {"id": "t5", "userId": "u1"}, {"id": "t6", "userId": "u1", "metadata": {"x": "a" * 1_100_000}}
    )
    put(source, "Thread", {"id": "x" * 300, "userId": "u1", "name": "n" * 2_000})
    put(source, "Step", step("s7", "user_message", "x", thread="t6"), step("s8", "tool", "y" * 17 * 1024 * 1024, 0.6))
    put(source, "Step", step("z" * 300, "user_message", "é" * 2_500_000, thread="x" * 300))
    report = await import_all(db, source)
    assert report.skipped == {
        "no messages": (1, 0),
        "metadata larger than 1 MiB": (1, 1),
        "larger than 16 MiB as JSON": (0, 1),
    }
    assert (report.conversations, report.messages) == (2, len(STEPS) + 1)
    (long,) = [each for each in await chatdb.list_conversations(db, user_id="alice") if each.key != "chainlit:t1"]
    assert long.metadata == MARK | {"thread_id": "x" * 300}
    assert long.title == "n" * 1_000
    (message,) = await chatdb.get_history(db, user_id="alice", conversation_id=long.id)
    assert len(message.content.encode()) == 4 * 1024 * 1024
    assert message.key is not None
    assert message.key.startswith("sha256-")
    assert (await import_all(db, source)).stored_conversations == 2


async def test_large_elements_count(source: str) -> None:
    """The size of a step includes its feedback and elements."""
    element = {"id": "e1", "stepId": "s6", "metadata": {"x": "y" * 17_000_000}, "name": "map"}
    put(source, "Element", element)
    assert Skipped("larger than 16 MiB as JSON", messages=1, seq=6) in read(source, user="alice")
    put(source, "Feedback", {"id": "f1", "stepId": "s1", "name": "f", "value": 1, "comment": "y" * 17_000_000})
    skipped = [item for item in read(source, user="alice") if isinstance(item, Skipped)]
    assert [(item.seq, item.reason) for item in skipped] == [(n, "larger than 16 MiB as JSON") for n in (0, 6)]


async def test_which_tables(source: str) -> None:
    """The tables are detected; the user is needed; a choice between frameworks, and a table, are errors."""
    with pytest.raises(chatdb.InvalidInputError, match="user: is needed: chainlit's tables"):
        read(source)
    with pytest.raises(chatdb.InvalidInputError, match="table: applies only to langchain: chainlit has"):
        read(source, "chainlit", table="Step", user="alice")
    with pytest.raises(chatdb.InvalidInputError, match=r"looked for .*User, Thread, Step, Element, Feedback"):
        read(source, "openai-agents")
    execute(source, "create table agent_sessions (x int)", "create table agent_messages (x int)")
    with pytest.raises(chatdb.InvalidInputError, match=r"among agent_messages, Step$"):
        read(source, user="alice")
    assert len(read(source, "chainlit", user="alice")) == len(STEPS) + 1
    execute(source, 'alter table "Step" drop column "startTime"')
    with pytest.raises(chatdb.InvalidInputError, match="lacks the expected columns"):
        read(source, "chainlit", user="alice")


@pytest.mark.parametrize("time", ["infinity", "-infinity", "0044-03-15 BC", "20000-01-01"])
async def test_a_time_that_python_has_not(source: str, time: str) -> None:
    """A time that Python cannot represent is an error that names its row."""
    execute(source, f"update \"Step\" set \"startTime\" = '{time}' where id = 's3'")
    with pytest.raises(chatdb.InvalidInputError, match=r"^table: the message s\d or its session has a time"):
        read(source, user="alice")


async def test_a_role_that_may_only_read(source: str, server: str) -> None:
    """SELECT is the only privilege needed; without it the error names it."""
    role = "chainlit_reader"
    execute(server, f"drop role if exists {role}", f"create role {role} login password '{role}'")
    try:
        with pytest.raises(chatdb.ConfigurationError, match="grant it SELECT"):
            read(as_role(source, role), user="alice")
        execute(source, f'grant select on "User", "Thread", "Step", "Element", "Feedback" to {role}')
        assert len(read(as_role(source, role), user="alice")) == len(STEPS) + 1
        execute(source, f'revoke select on "User", "Thread", "Step", "Element", "Feedback" from {role}')
    finally:
        execute(server, f"drop role {role}")


async def test_no_planted_operator_is_called(source: str) -> None:
    """An operator in `public` that fits the columns better than the built-in one is never called."""
    execute(
        source,
        *(
            f'alter table "{table}" alter "{column}" type varchar'
            for table, column in (("User", "identifier"), ("Thread", "id"), ("Step", "id"), ("Step", "threadId"))
        ),
        *(
            f"create function public.captured({left}, {right}) returns bool language plpgsql as "
            f"$$ begin raise exception 'captured'; end $$; "
            f"create operator public.= (leftarg = {left}, rightarg = {right}, function = public.captured)"
            for left, right in (("varchar", "text"), ("varchar", "varchar"), ("text", "varchar"))
        ),
    )
    assert len(read(source, user="alice", sessions=["t1"])) == len(STEPS) + 1
    with pytest.raises(psycopg.errors.RaiseException):
        execute(source, "select from \"User\" where identifier = 'alice'::text")


@pytest.mark.parametrize(
    ("row", "parsed"),
    [
        ({}, ("assistant", "", None, None)),
        ({"type": "banana", "output": "x", "name": "n"}, ("assistant", "", "banana", "n")),
        ({"type": "retrieval", "output": "found"}, ("tool", "found", "retrieval", None)),
        ({"type": "rerank", "output": 1}, ("tool", "", "rerank", None)),
        ({"type": ["tool"], "output": None}, ("assistant", "", None, None)),
    ],
)
def test_steps_of_other_types(row: dict[str, Any], parsed: tuple[Any, ...]) -> None:
    """A step of an unknown type is the assistant's, without a text."""
    assert parse_step(row) == parsed
