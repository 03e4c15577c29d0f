"""Several frameworks on one conversation: what one has written, the others and chatdb's functions read as text."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from itertools import permutations
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

import agent_framework as af
import pydantic_ai.messages as pai
import pytest
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageItem,
    ClientToolCallItem,
    InferenceOptions,
    ThreadMetadata,
    UserMessageItem,
    UserMessageTextContent,
)
from google.adk.errors import StaleSessionError
from google.adk.events import Event
from google.genai import types
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import ConversationConflict

import chatdb
from chatdb.adapters import pydantic_ai
from chatdb.adapters.agent_framework import ChatDBHistoryProvider
from chatdb.adapters.chatkit import ChatDBStore
from chatdb.adapters.google_adk import ChatDBSessionService
from chatdb.adapters.openai_agents import ChatDBSession
from chatdb.admin.row_security import protect_tables
from chatdb.testing.databases import Databases
from tests.support.command import chatdb_process as command
from tests.support.databases import as_role, cloned
from tests.support.pgbouncer import OPTIONS, VERSIONS, pgbouncer
from tests.support.roles import Roles

KEY = "app:t1"
"""As google-adk names its session `t1` of the app `app`."""

NOW = datetime(2026, 11, 29, 12, 30, 15, 123456)  # noqa: DTZ001 - as ChatKit's server makes them

Said = tuple[str, str]
"""A role and a text."""


class Framework(NamedTuple):
    """How a framework's adapter writes a turn to the conversation, reads it, and what its items say."""

    write: Callable[[chatdb.Pool, str], Awaitable[Sequence[Any]]]
    """Store a question, a call of a tool, its result and an answer, and return them."""
    read: Callable[[chatdb.Pool, str], Awaitable[Sequence[Any]]]
    """Return all items that the adapter finds in the conversation of a user."""
    say: Callable[[Any], Said | None]
    """Return the role and the text of an item, or None for one of a tool."""


def turn(name: str) -> list[Said]:
    """Return what a person reads of a framework's turn."""
    return [("user", f"{name} asks für 🚂"), ("assistant", f"{name} answers 100 %")]


# openai-agents


async def write_openai(db: chatdb.Pool, name: str) -> list[Any]:
    """Append items."""
    (_, question), (_, answer) = turn(name)
    items: list[Any] = [
        {"role": "user", "content": question},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "message", "role": "assistant", "id": "m", "content": [{"type": "output_text", "text": answer}]},
    ]
    await ChatDBSession(KEY, db=db, user_id="alice", prefix="").add_items(items)
    return items


async def read_openai(db: chatdb.Pool, user: str) -> list[Any]:
    """Return the items of the session."""
    return await ChatDBSession(KEY, db=db, user_id=user, prefix="").get_items()


def say_openai(item: Any) -> Said | None:
    """Return what an item says."""
    if "role" not in item:
        return None
    content = item["content"]
    return item["role"], content if isinstance(content, str) else content[0]["text"]


# ChatKit


async def write_chatkit(db: chatdb.Pool, name: str) -> list[Any]:
    """Save the thread, as a server does with a new title, and add items."""
    (_, question), (_, answer) = turn(name)
    store: ChatDBStore[str] = ChatDBStore(db, user_id=str, prefix="")
    await store.save_thread(ThreadMetadata(id=KEY, title="Trip", created_at=NOW), "alice")
    fields: Any = {"thread_id": KEY, "created_at": NOW}
    items: list[Any] = [
        UserMessageItem(
            id=token_hex(8),
            content=[UserMessageTextContent(text=question)],
            inference_options=InferenceOptions(),
            **fields,
        ),
        ClientToolCallItem(
            id=token_hex(8), status="completed", call_id="c1", name="weather", arguments={}, output="rain", **fields
        ),
        AssistantMessageItem(id=token_hex(8), content=[AssistantMessageContent(text=answer)], **fields),
    ]
    for item in items:
        await store.add_thread_item(KEY, item, "alice")
    return items


async def read_chatkit(db: chatdb.Pool, user: str) -> list[Any]:
    """Return the items of the thread."""
    store: ChatDBStore[str] = ChatDBStore(db, user_id=str, prefix="")
    return (await store.load_thread_items(KEY, None, 1_000, "asc", user)).data


def say_chatkit(item: Any) -> Said | None:
    """Return what an item says."""
    roles = {"user_message": "user", "assistant_message": "assistant"}
    if item.type == "hidden_context_item":
        return "developer", item.content
    return (roles[item.type], item.content[0].text) if item.type in roles else None


# Agent Framework


async def write_agent_framework(db: chatdb.Pool, name: str) -> list[Any]:
    """Load the history, as a run does, and save messages."""
    (_, question), (_, answer) = turn(name)
    messages = [
        af.Message("user", [question]),
        af.Message("assistant", [af.Content.from_function_call("c1", "weather", arguments={})]),
        af.Message("tool", [af.Content.from_function_result("c1", result="rain")]),
        af.Message("assistant", [answer]),
    ]
    provider = ChatDBHistoryProvider(db, user_id="alice", prefix="")
    state: dict[str, Any] = {}
    await provider.get_messages(KEY, state=state)
    await provider.save_messages(KEY, messages, state=state)
    return [message.to_dict() for message in messages]


async def read_agent_framework(db: chatdb.Pool, user: str) -> list[Any]:
    """Return the messages of the session."""
    provider = ChatDBHistoryProvider(db, user_id=user, prefix="")
    return [message.to_dict() for message in await provider.get_messages(KEY)]


def say_agent_framework(item: Any) -> Said | None:
    """Return what a message says."""
    part = item["contents"][0]
    return (item["role"], part["text"]) if part["type"] == "text" else None


# pydantic-ai


def pydantic_turn(name: str) -> list[pai.ModelMessage]:
    """Return messages."""
    (_, question), (_, answer) = turn(name)
    return [
        pai.ModelRequest([pai.UserPromptPart(question)]),
        pai.ModelResponse([pai.ToolCallPart("weather", {}, "c1")]),
        pai.ModelRequest([pai.ToolReturnPart("weather", "rain", "c1")]),
        pai.ModelResponse([pai.TextPart(answer)]),
    ]


async def write_pydantic(db: chatdb.Pool, name: str) -> list[Any]:
    """Save messages."""
    messages = pydantic_turn(name)
    await pydantic_ai.save(db, user_id="alice", conversation_key=KEY, messages=messages, prefix="")
    return messages


async def read_pydantic(db: chatdb.Pool, user: str) -> list[Any]:
    """Load the messages."""
    return await pydantic_ai.load(db, user_id=user, conversation_key=KEY, prefix="")


async def write_pydantic_store(db: chatdb.Pool, name: str) -> list[Any]:
    """Load the conversation and save it with new messages."""
    store = pydantic_ai.ChatDBConversationStore(db, user_id="alice", prefix="")
    conversation = await store.load(KEY) or Conversation(messages=[], conversation_id=KEY)
    messages = pydantic_turn(name)
    conversation.messages = [*conversation.messages, *messages]
    await store.save(conversation)
    return messages


async def read_pydantic_store(db: chatdb.Pool, user: str) -> list[Any]:
    """Return the messages of the stored conversation."""
    conversation = await pydantic_ai.ChatDBConversationStore(db, user_id=user, prefix="").load(KEY)
    return [] if conversation is None else conversation.messages


def say_pydantic(item: Any) -> Said | None:
    """Return what a message says."""
    roles = {"user-prompt": "user", "system-prompt": "system", "text": "assistant"}
    part = item.parts[0]
    return (roles[part.part_kind], part.content) if part.part_kind in roles else None


# google-adk


async def write_adk(db: chatdb.Pool, name: str) -> list[Any]:
    """Get the session or create it, and append events, the last of which changes the state."""
    (_, question), (_, answer) = turn(name)
    service = ChatDBSessionService(db, prefix="")
    place: Any = {"app_name": "app", "user_id": "alice", "session_id": "t1"}
    session = await service.get_session(**place) or await service.create_session(**place)
    call = types.Part(function_call=types.FunctionCall(name="weather", args={}))
    result = types.Part(function_response=types.FunctionResponse(name="weather", response={"result": "rain"}))
    parts = [
        ("user", types.Part(text=question)),
        ("agent", call),
        ("agent", result),
        ("agent", types.Part(text=answer)),
    ]
    events = [
        Event(
            author=author,
            invocation_id="i1",
            content=types.Content(role="user" if author == "user" else "model", parts=[part]),
        )
        for author, part in parts
    ]
    events[-1].actions.state_delta["city"] = "Köln"
    return [await service.append_event(session, event) for event in events]


async def read_adk(db: chatdb.Pool, user: str) -> list[Any]:
    """Return the events of the session."""
    session = await ChatDBSessionService(db, prefix="").get_session(app_name="app", user_id=user, session_id="t1")
    return [] if session is None else session.events


def say_adk(item: Any) -> Said | None:
    """Return what an event says."""
    part = item.content.parts[0]
    return (item.author.replace("agent", "assistant"), part.text) if part.text else None


FRAMEWORKS = {
    "openai-agents": Framework(write_openai, read_openai, say_openai),
    "chatkit": Framework(write_chatkit, read_chatkit, say_chatkit),
    "agent-framework": Framework(write_agent_framework, read_agent_framework, say_agent_framework),
    "pydantic-ai": Framework(write_pydantic, read_pydantic, say_pydantic),
    "pydantic-ai-store": Framework(write_pydantic_store, read_pydantic_store, say_pydantic),
    "google-adk": Framework(write_adk, read_adk, say_adk),
}


async def said(db: chatdb.Pool, name: str, user: str = "alice") -> list[Said]:
    """Return the texts that a framework reads in the conversation."""
    framework = FRAMEWORKS[name]
    return [text for item in await framework.read(db, user) if (text := framework.say(item)) is not None]


async def write_all(db: chatdb.Pool) -> dict[str, Sequence[Any]]:
    """Write a turn of each framework, and return the items."""
    return {name: await framework.write(db, name) for name, framework in FRAMEWORKS.items()}


def kept(written: Sequence[Any], found: Sequence[Any]) -> bool:
    """Tell whether the items are found one after another."""
    return any(list(found[place : place + len(written)]) == list(written) for place in range(len(found)))


@pytest.mark.parametrize(("first", "second"), list(permutations(FRAMEWORKS, 2)))
async def test_every_pair(db: chatdb.Pool, first: str, second: str) -> None:
    """The second reads the first's turn as text and answers; the first finds its items unchanged, and the answer."""
    one, other = FRAMEWORKS[first], FRAMEWORKS[second]
    written = await one.write(db, first)
    assert list(await one.read(db, "alice")) == list(written)
    assert await said(db, second) == turn(first)
    answered = await other.write(db, second)
    found = await other.read(db, "alice")
    assert list(found[-len(answered) :]) == list(answered)
    assert await said(db, second) == [*turn(first), *turn(second)]
    again = await one.read(db, "alice")
    assert list(again[: len(written)]) == list(written)
    assert await said(db, first) == [*turn(first), *turn(second)]
    await one.write(db, "again")
    for name in (first, second):
        assert await said(db, name) == [*turn(first), *turn(second), *turn("again")]
    for framework in (one, other):
        assert not await framework.read(db, "bob")


async def test_what_one_keeps_of_the_conversation_survives_the_others(db: chatdb.Pool) -> None:
    """The title of a thread, the state of a session and the usage of a conversation are there after each other turn."""
    store = pydantic_ai.ChatDBConversationStore(db, user_id="alice", prefix="")
    conversation = Conversation(messages=[], conversation_id=KEY)
    conversation.usage.requests = 7
    await store.save(conversation, scope="web")
    for name in ("google-adk", "chatkit", *FRAMEWORKS):
        await FRAMEWORKS[name].write(db, name)
        loaded = await store.load(KEY)
        assert loaded is not None
        assert loaded.usage.requests == 7
        assert [record.scope for record in await store.list_conversations()] == ["web"]
        session = await ChatDBSessionService(db, prefix="").get_session(
            app_name="app", user_id="alice", session_id="t1"
        )
        assert session is not None
        assert session.state == {"city": "Köln"}
    thread = await ChatDBStore(db, user_id="alice", prefix="").load_thread(KEY, None)
    assert (thread.title, thread.created_at) == ("Trip", NOW)


async def test_frameworks_that_write_at_once(db: chatdb.Pool) -> None:
    """Nothing is lost, each framework's batch stays together, and all read the texts in one order."""
    names = [name for name in FRAMEWORKS if name not in ("chatkit", "google-adk", "pydantic-ai-store")]
    await FRAMEWORKS["chatkit"].write(db, "chatkit")
    turns = [name for name in names for _ in range(5)]
    written = await asyncio.gather(*(FRAMEWORKS[name].write(db, f"{name} {at}") for at, name in enumerate(turns)))
    for name, items in zip(turns, written, strict=True):
        assert kept(items, await FRAMEWORKS[name].read(db, "alice"))
    texts = await said(db, "chatkit")
    assert len(texts) == 2 + 2 * len(turns)
    for name in FRAMEWORKS:
        assert await said(db, name) == texts


async def test_a_session_and_a_conversation_that_others_continued(db: chatdb.Pool) -> None:
    """ADK and pydantic-ai's store raise their own errors for what they read before another framework's turn."""
    service = ChatDBSessionService(db, prefix="")
    store = pydantic_ai.ChatDBConversationStore(db, user_id="alice", prefix="")
    await write_adk(db, "google-adk")
    session = await service.get_session(app_name="app", user_id="alice", session_id="t1")
    conversation = await store.load(KEY)
    assert session is not None
    assert conversation is not None
    await write_openai(db, "openai-agents")
    with pytest.raises(StaleSessionError):
        await service.append_event(session, Event(author="user", invocation_id="i2"))
    conversation.messages = [*conversation.messages, *pydantic_turn("late")]
    with pytest.raises(ConversationConflict):
        await store.save(conversation)
    assert await said(db, "chatkit") == [*turn("google-adk"), *turn("openai-agents")]


async def test_chatdbs_functions_read_all(db: chatdb.Pool) -> None:
    """The conversation of all frameworks is listed, searched and exported once, with a context for a model."""
    await write_all(db)
    place: Any = {"user_id": "alice", "conversation_key": KEY}
    [conversation] = await chatdb.list_conversations(db, user_id="alice", archived=None)
    assert (conversation.key, conversation.title) == (KEY, "Trip")
    [(_, newest)] = await chatdb.list_previews(db, user_id="alice")
    assert newest is not None
    assert newest.content == "google-adk answers 100 %"
    expected = [text for name in FRAMEWORKS for text in turn(name)]
    for role, text in expected:
        found = await chatdb.search_messages(db, user_id="alice", query=text)
        assert [(match.role, match.snippet) for match in found] == [(role, text)]
        assert not await chatdb.search_messages(db, user_id="bob", query=text)
    assert len(await chatdb.search_messages(db, query="rain", **place)) == len(FRAMEWORKS)
    exported = [record async for record in chatdb.export_user(db, user_id="alice")]
    messages = [record for record in exported if isinstance(record, chatdb.Message)]
    assert len(exported) == len(messages) + 1
    assert [(each.role, each.content) for each in messages if each.content not in ("", "rain")] == expected
    assert messages == await chatdb.get_history(db, limit=1_000, **place)
    marks = [(each.metadata or {}).get("framework") for each in messages]
    assert list(dict.fromkeys(marks)) == [name for name in FRAMEWORKS if name != "pydantic-ai-store"]
    context = await chatdb.get_context(db, max_tokens=100_000, **place)
    assert context == messages


async def test_the_command_line_shows_exports_and_imports_all(dsn: str, tmp_path: Path) -> None:
    """`chatdb show` prints each text, and another user who imports the export reads the same items."""
    async with chatdb.create_pool(dsn) as db:
        written = await write_all(db)
        [conversation] = await chatdb.list_conversations(db, user_id="alice")
        env, file = {"DATABASE_URL": dsn}, tmp_path / "alice.jsonl"
        shown = command("show", str(conversation.id), "--user", "alice", env=env)
        assert all(text in shown for name in FRAMEWORKS for _, text in turn(name))
        command("export", "--user", "alice", "--output", file, env=env)
        command("import", file, "--user", "carol", env=env)
        for name, framework in FRAMEWORKS.items():
            assert kept(written[name], await framework.read(db, "carol"))
            assert await said(db, name, "carol") == await said(db, name)


async def test_what_chatdb_appends_is_read_by_all(db: chatdb.Pool) -> None:
    """Texts of every role are read by each framework; the results of tools and empty messages are left out."""
    await write_all(db)
    new: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": "", "payload": chatdb.JsonText('{"calls": []}')},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    await chatdb.append_messages(db, user_id="alice", conversation_key=KEY, messages=new)
    for name in FRAMEWORKS:
        rules, answer = (await said(db, name))[-2:]
        assert answer == ("assistant", "It rains.")
        assert rules[0] in {"developer", "system"}
        assert rules[1] == "Be brief."


async def test_the_prefixes_keep_the_frameworks_apart(db: chatdb.Pool) -> None:
    """With the default prefixes, one id in five frameworks is five conversations."""
    message: Any = {"role": "user", "content": "openai-agents"}
    await ChatDBSession("t1", db=db, user_id="alice").add_items([message])
    await ChatDBStore(db, user_id="alice").save_thread(ThreadMetadata(id="t1", created_at=NOW), None)
    await ChatDBHistoryProvider(db, user_id="alice").save_messages("t1", [af.Message("user", ["agent-framework"])])
    await pydantic_ai.save(db, user_id="alice", conversation_key="t1", messages=pydantic_turn("pydantic-ai"))
    await ChatDBSessionService(db).create_session(app_name="app", user_id="alice", session_id="t1")
    keys = {each.key for each in await chatdb.list_conversations(db, user_id="alice", archived=None)}
    assert keys == {
        "openai-agents:t1",
        "chatkit:t1",
        "agent-framework:t1",
        "pydantic-ai:t1",
        "google-adk:app:t1",
    }


async def test_behind_row_level_security(databases: Databases, roles: Roles) -> None:
    """All frameworks read all texts, and another user reads none."""
    with cloned(databases, roles) as dsn:
        protect_tables(as_role(dsn, roles.owner))
        async with chatdb.create_pool(as_role(dsn, roles.app), row_level_security=True, max_size=2) as db:
            await write_all(db)
            for name, framework in FRAMEWORKS.items():
                assert await said(db, name) == [text for each in FRAMEWORKS for text in turn(each)]
                assert not await framework.read(db, "bob")


@pytest.mark.server_independent
@pytest.mark.parametrize("version", VERSIONS)
async def test_through_poolers(dsn: str, tmp_path: Path, version: str) -> None:
    """In transaction mode, over several connections to the server, each framework reads its items and all texts."""
    with pgbouncer(dsn, tmp_path, version, server_round_robin=1) as pooled:
        async with chatdb.create_pool(pooled, **OPTIONS[version]) as db:
            empty = await asyncio.gather(*(framework.read(db, "bob") for framework in FRAMEWORKS.values()))
            assert not any(empty)
            written = await write_all(db)
            for name, framework in FRAMEWORKS.items():
                assert kept(written[name], await framework.read(db, "alice"))
                assert await said(db, name) == [text for each in FRAMEWORKS for text in turn(each)]
                assert not await framework.read(db, "bob")


def damaged(framework: str, key: str) -> dict[str, Any]:
    """Return a message with an item that the framework cannot read, and with a secret in it."""
    secret = "secret words"
    items: dict[str, Any] = {
        "google-adk": {"author": "user", "id": 5, "timestamp": secret},
        "pydantic-ai": {"kind": "request", "parts": [{"part_kind": secret, "content": secret}]},
        "agent-framework": {"type": secret, "role": "user", "contents": []},
        "chatkit": {"id": "a", "name": secret, "mime_type": {"x": secret}, "type": "file"},
    }
    metadata = {"framework": framework}
    return {"role": "user", "content": "x", "payload": items[framework], "metadata": metadata, "key": key}


@pytest.mark.parametrize("framework", ["google-adk", "pydantic-ai", "agent-framework", "chatkit"])
async def test_an_unreadable_item_is_not_quoted(db: chatdb.Pool, framework: str) -> None:
    """An item that the installed release cannot read is an error of chatdb's, without the item's texts."""
    at: dict[str, Any] = {"user_id": "alice", "conversation_key": f"{framework}:app:t1", "create": True}
    if framework == "chatkit":
        at["conversation_key"] = "chatkit::attachments"
    await chatdb.append_message(db, **at, **damaged(framework, "a"))
    reads: dict[str, Callable[[], Awaitable[Any]]] = {
        "google-adk": lambda: ChatDBSessionService(db).get_session(app_name="app", user_id="alice", session_id="t1"),
        "pydantic-ai": lambda: pydantic_ai.load(db, user_id="alice", conversation_key="app:t1"),
        "agent-framework": lambda: ChatDBHistoryProvider(db, user_id="alice").get_messages("app:t1"),
        "chatkit": lambda: ChatDBStore[None](db, user_id="alice").load_attachment("a", None),
    }
    with pytest.raises(chatdb.ChatDBError, match=r"cannot read a stored \w+ \(") as raised:
        await reads[framework]()
    assert "secret" not in "".join(traceback.format_exception(raised.value))
