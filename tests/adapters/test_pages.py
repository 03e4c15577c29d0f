"""Runs the pages about LangChain, LangGraph and SQLAlchemy."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import asyncpg
import psycopg
import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    RemoveMessage,
    ToolMessage,
    message_to_dict,
    messages_from_dict,
)
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

import chatdb
from chatdb._core.dsn import connect_arguments
from chatdb.adapters.openai_agents import ChatDBSession
from chatdb.admin.row_security import protect_tables
from chatdb.testing.databases import Databases
from tests.support.command import chatdb_process
from tests.support.databases import as_role, cloned, execute
from tests.support.frameworks import CHAT, PostgresChatMessageHistory, chat
from tests.support.pages import run_blocks
from tests.support.paths import ROOT
from tests.support.proxy import Proxy
from tests.support.roles import Roles
from tests.support.transfers import SESSION

pytestmark = pytest.mark.server_independent

TABLE = "create table orders (user_id text, item text unique)"


def engine_of(dsn: str) -> AsyncEngine:
    """Return an engine on a database."""
    return create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(**connect_arguments(dsn)))


@pytest.fixture
async def engine(dsn: str) -> AsyncIterator[AsyncEngine]:
    """Yield an engine on the test's database, with the page's table."""
    execute(dsn, TABLE)
    made = engine_of(dsn)
    yield made
    await made.dispose()


async def sqlalchemy_page() -> Any:
    """Return the functions of the page."""
    scope: dict[str, Any] = {}
    await run_blocks("sqlalchemy", scope)
    return scope


async def test_one_transaction_with_sqlalchemy(engine: AsyncEngine, db: chatdb.Pool) -> None:
    """The page's functions commit the row and the message together, and roll back both."""
    page = await sqlalchemy_page()

    async def stored() -> tuple[list[str], list[str]]:
        async with engine.connect() as connection:
            items = [str(row.item) for row in await connection.execute(text("select item from orders order by item"))]
        try:
            history = await chatdb.get_history(db, user_id="alice", conversation_key="orders")
        except chatdb.ConversationNotFoundError:
            return items, []
        return items, [message.content for message in history]

    with pytest.raises(chatdb.InvalidInputError):
        await page["order"](engine, "", "nothing")
    await page["order"](engine, "alice", "milk")
    async with AsyncSession(engine) as session:
        await page["order_with_session"](session, "alice", "tea")
        with pytest.raises(IntegrityError):
            await page["order_with_session"](session, "alice", "tea")
    expected = ["milk", "tea"], ["I have ordered milk.", "I have ordered tea."]
    assert await stored() == expected

    place: Any = {"user_id": "alice", "conversation_key": "orders"}
    said: Any = {"role": "user", "content": "lost", "payload": {"a": [1]}, "metadata": {"b": 2}}
    async with engine.connect() as connection:  # without COMMIT
        raw = await page["driver_connection"](connection)
        await chatdb.append_message(raw, **place, **said)
        await connection.execute(text("insert into orders values ('alice', 'jam')"))
        [message] = await chatdb.get_history(raw, **place, limit=1)
        assert (message.content, message.metadata) == ("lost", {"b": 2})
        assert message.payload is not None
        assert message.payload.parsed() == {"a": [1]}
    assert await stored() == expected


async def test_savepoints_with_sqlalchemy(engine: AsyncEngine, db: chatdb.Pool) -> None:
    """After an error inside a savepoint of either side, the transaction goes on."""
    page = await sqlalchemy_page()
    place: Any = {"user_id": "alice", "conversation_key": "orders"}

    async def fail_inside(savepoint: AbstractAsyncContextManager[Any], raw: asyncpg.Connection) -> None:
        async with savepoint:
            await chatdb.append_message(raw, **place, role="user", content="gone")
            await chatdb.append_message(raw, **place, role="user", content="other", key="k")

    async with engine.begin() as connection:
        raw = await page["driver_connection"](connection)
        first = await chatdb.append_message(raw, **place, role="user", content="one", key="k", create=True)
        for savepoint in (chatdb.transaction(raw), connection.begin_nested()):
            with pytest.raises(chatdb.ConflictError):
                await fail_inside(savepoint, raw)
        await chatdb.append_message(raw, **place, role="user", content="two")
        assert first.seq == 1
    assert [message.content for message in await chatdb.get_history(db, **place)] == ["one", "two"]


async def test_a_call_on_sqlalchemys_connection_is_one_round_trip(dsn: str) -> None:
    """An append is one round trip."""
    page = await sqlalchemy_page()
    place: Any = {"user_id": "alice", "conversation_key": "orders", "create": True}
    with Proxy(dsn) as proxy:
        engine = engine_of(proxy.dsn)
        async with engine.begin() as connection:
            raw = await page["driver_connection"](connection)
            await chatdb.append_message(raw, **place, role="user", content="one")
            proxy.clear()
            await chatdb.append_message(raw, **place, role="user", content="two")
            assert proxy.round_trips == 1
        await engine.dispose()


async def test_sqlalchemy_behind_row_level_security(databases: Databases, roles: Roles) -> None:
    """A transaction of chatdb that names the user is a savepoint in that of SQLAlchemy."""
    page = await sqlalchemy_page()
    with cloned(databases, roles) as dsn:
        protect_tables(as_role(dsn, roles.owner))
        engine = engine_of(as_role(dsn, roles.app))
        async with engine.begin() as connection:
            raw = await page["driver_connection"](connection)
            async with chatdb.transaction(raw, user_id="alice"):
                await chatdb.append_message(
                    raw, user_id="alice", conversation_key="orders", create=True, role="user", content="one"
                )
        async with chatdb.create_pool(as_role(dsn, roles.app), row_level_security=True) as db:
            [message] = await chatdb.get_history(db, user_id="alice", conversation_key="orders")
            assert message.content == "one"
        await engine.dispose()


def model() -> GenericFakeChatModel:
    """Return a model that answers in order."""
    return GenericFakeChatModel(messages=iter([AIMessage("Hi."), AIMessage("Warm.\0")]))


async def test_the_page_about_langchain(dsn: str, db: chatdb.Pool) -> None:
    """What LangChain stored is imported and loaded as it was, the page's run is saved, and others are read as text."""
    chat(dsn)
    page = (ROOT / "docs" / "adapters" / "langchain.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^chatdb (import .*)$", page, re.MULTILINE)
    _, source, *options, _ = line.split()
    assert source == "postgresql://localhost/chat"
    for _ in range(2):
        chatdb_process("import", dsn, *options, SESSION, env={"DATABASE_URL": dsn})
    scope: dict[str, Any] = {"db": db, "session_id": SESSION, "model": model()}
    await run_blocks("langchain", scope)
    assert scope["history"] == CHAT
    await run_blocks("langchain", scope)
    assert [message.content for message in scope["history"][len(CHAT) :]] == ["And tomorrow?", "Hi."]
    await chatdb.append_message(db, user_id="alice", conversation_key=SESSION, role="developer", content="Be brief.")
    loaded = await scope["load"](db, "alice", SESSION)
    assert [message.content for message in loaded[len(CHAT) :]] == [
        "And tomorrow?",
        "Hi.",
        "And tomorrow?",
        "Warm.\0",
        "Be brief.",
    ]
    assert await scope["load"](db, "bob", SESSION) == []
    session = ChatDBSession(SESSION, db=db, user_id="alice", prefix="")
    assert (await session.get_items(limit=2))[0] == {"role": "assistant", "content": "Warm.\ufffd"}


@pytest.mark.parametrize(
    ("name", "function", "prefix"), [("langchain", "save", ""), ("langgraph", "mirror", "langgraph:")]
)
async def test_texts_that_postgresql_refuses_and_chunks(db: chatdb.Pool, name: str, function: str, prefix: str) -> None:
    """The functions of both pages store NUL, a lone surrogate and a chunk, whose messages come back equal."""
    scope: dict[str, Any] = {"db": db, "session_id": SESSION, "model": model()}
    await run_blocks(name, scope)
    messages = [HumanMessage("a\0b\ud800", id="m1"), AIMessageChunk("Warm.", id="m2")]
    await scope[function](db, "alice", "new", messages)
    stored = await chatdb.get_history(db, user_id="alice", conversation_key=f"{prefix}new")
    assert [(each.role, each.content) for each in stored] == [("user", "a\ufffdb\ufffd"), ("assistant", "Warm.")]
    payloads = [each.payload.parsed() for each in stored if each.payload is not None]
    assert messages_from_dict(payloads) == messages


async def test_round_trips_next_to_langchains(dsn: str) -> None:
    """The page's functions take one round trip each, and its table is right about LangChain's class."""
    chat(dsn)
    scope: dict[str, Any] = {"session_id": SESSION, "model": model()}
    turn = [HumanMessage("And tomorrow?"), AIMessage("Warm.")]
    found: list[list[int]] = []
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1) as db:
            scope["db"] = db
            await run_blocks("langchain", scope)
            await run_blocks("langchain", scope)
            for call in (scope["load"](db, "alice", SESSION), scope["save"](db, "alice", SESSION, turn)):
                proxy.clear()
                await call
                found.append([proxy.round_trips])
        async with await psycopg.AsyncConnection.connect(proxy.dsn) as connection:
            history = PostgresChatMessageHistory("chat_history", SESSION, async_connection=connection)
            await history.aadd_messages(turn)
            for place, call in enumerate((history.aget_messages(), history.aadd_messages(turn))):
                await connection.commit()
                proxy.clear()
                await call
                found[place].append(proxy.round_trips)
    page = (ROOT / "docs" / "adapters" / "langchain.md").read_text(encoding="utf-8")
    assert found == [[int(number) for number in row] for row in re.findall(r"\| ([0-9]+) \| ([0-9]+) \|", page)]


async def test_the_page_about_langgraph(dsn: str) -> None:
    """A graph's messages are mirrored once, in one round trip, whatever the graph removes later."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1) as db:
            scope: dict[str, Any] = {"db": db, "model": model()}
            await run_blocks("langgraph", scope)
            history = scope["history"]
            assert [(message.role, message.content) for message in history] == [
                ("user", "Hello"),
                ("assistant", "Hi."),
                ("user", "And in Rome?"),
                ("assistant", "Warm.\ufffd"),
            ]
            messages = scope["state"]["messages"]
            assert list(map(message_to_dict, scope["messages"])) == list(map(message_to_dict, messages))
            assert [message.key for message in history] == [message.id for message in messages]
            place: Any = {"user_id": "alice", "conversation_key": "langgraph:t1"}
            config = scope["config"]
            await scope["graph"].aupdate_state(config, {"messages": [RemoveMessage(id=messages[0].id)]})
            call: Any = {"name": "weather", "args": {}, "id": "c1"}
            await scope["graph"].aupdate_state(
                config, {"messages": [AIMessage("", tool_calls=[call]), ToolMessage("rain", tool_call_id="c1")]}
            )
            state = await scope["graph"].aget_state(config)
            for _ in range(2):
                proxy.clear()
                await scope["mirror"](db, "alice", "t1", state.values["messages"])
                assert proxy.round_trips == 1
            stored = await chatdb.get_history(db, **place)
            assert [message.seq for message in stored] == [1, 2, 3, 4, 5, 6]
            assert stored[:4] == history
            assert [(message.role, message.content) for message in stored[4:]] == [("assistant", ""), ("tool", "rain")]


async def test_the_index(db: chatdb.Pool, capsys: pytest.CaptureFixture[str]) -> None:
    """The block of the index prints what another framework stored, and its table names each extra and class."""
    scope: dict[str, Any] = {}
    await run_blocks("README", scope)
    await scope["continue_elsewhere"](db)
    assert capsys.readouterr().out == "Is it warm in Rome?\n"
    page = (ROOT / "docs" / "adapters" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.*?\]\((.*?)\.md\) \| `chatdb\[(.*?)\]` \| `(\w+)`", page, re.MULTILINE)
    assert len(rows) == 5
    for name, extra, store in rows:
        assert name == extra
        module = importlib.import_module(f"chatdb.adapters.{extra.replace('-', '_')}")
        assert inspect.isclass(getattr(module, store))
    linked = set(re.findall(r"\]\((\S+\.md)\)", page))
    pages = {file.name for file in (ROOT / "docs" / "adapters").glob("*.md")} - {"README.md"}
    assert linked & pages == pages


def test_the_versions() -> None:
    """The table of the frameworks' versions has those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "reference" / "compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| (\S+) \| (?:from )?([\d.]+)(?:, below ([\d.]+))? \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for extra, package, least, below in rows:
        major, minor = least.split(".")[:2]
        limit = below or f"{major}.{int(minor) + 1}"
        assert project["optional-dependencies"][extra] == [f"{package}>={least},<{limit}"]
