"""The frameworks whose tables chatdb imports. A separate module, because importing it takes seconds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg
from agents import TResponseInputItem
from agents.extensions.memory import SQLAlchemySession
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_postgres import PostgresChatMessageHistory
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from chatdb._core.dsn import connect_arguments
from tests.support.transfers import SESSION

__all__ = [
    "CHAT",
    "AIMessage",
    "ChatMessage",
    "HumanMessage",
    "PostgresChatMessageHistory",
    "RemoveMessage",
    "TResponseInputItem",
    "agent_session",
    "chat",
]

CHAT: list[BaseMessage] = [
    SystemMessage("Be brief."),
    HumanMessage("What is the weather?", name="alice"),
    AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Köln"}, "id": "c1"}]),
    ToolMessage("rain", tool_call_id="c1", name="weather", artifact={"mm": 3}),
    AIMessage([{"type": "text", "text": "It "}, "rains.", {"type": "reasoning", "reasoning": "so said the tool"}]),
    HumanMessage([{"type": "text", "text": "And here?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]),
    FunctionMessage("42", name="answer"),
    ChatMessage("As you wish.", role="assistant"),
    AIMessageChunk("streamed"),
]


@asynccontextmanager
async def agent_session(dsn: str, name: str = "s1", **options: Any) -> AsyncIterator[SQLAlchemySession]:
    """Yield a session of openai-agents, which creates its tables."""
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(**connect_arguments(dsn)), poolclass=NullPool
    )
    yield SQLAlchemySession(name, engine=engine, create_tables=True, **options)
    await engine.dispose()


def chat(dsn: str, session: str = SESSION, messages: Sequence[BaseMessage] = CHAT, table: str = "chat_history") -> None:
    """Store messages with langchain-postgres."""
    with psycopg.connect(dsn) as connection:
        PostgresChatMessageHistory.create_tables(connection, table)
        PostgresChatMessageHistory(table, session, sync_connection=connection).add_messages(messages)
