"""
The baseline: the persistence layer in the documents that chatdb started from.

It has SQLModel entities with the original's indexes, SQLAlchemy's asyncio sessions on asyncpg, and the service's own
steps: look up the conversation by its user, add the message, update `updated_at`, commit, refresh. The only change is
`Field(ondelete="CASCADE", sa_type=Text)`, which replaces arguments that current SQLModel rejects.
"""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg
from pydantic import NaiveDatetime
from sqlalchemy import Text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlmodel import Field, SQLModel, select

from chatdb._core.dsn import connect_arguments


def utc_now() -> datetime:
    """Return the current UTC time without a time zone, as the original stores it."""
    return datetime.now(UTC).replace(tzinfo=None)


class Conversation(SQLModel, table=True):
    """A conversation of a user."""

    __tablename__ = "conversations"

    id: int | None = Field(default=None, primary_key=True)
    user_id: str = Field(index=True)
    created_at: NaiveDatetime = Field(default_factory=utc_now)
    updated_at: NaiveDatetime = Field(default_factory=utc_now)


class Message(SQLModel, table=True):
    """A message in a conversation."""

    __tablename__ = "messages"

    id: int | None = Field(default=None, primary_key=True)
    conversation_id: int = Field(foreign_key="conversations.id", index=True, ondelete="CASCADE")
    user_id: str = Field(index=True)
    role: str
    content: str = Field(sa_type=Text)
    created_at: NaiveDatetime = Field(default_factory=utc_now)


FILL = (
    "insert into public.conversations (id, user_id, created_at, updated_at) "
    "select id, user_id, created_at at time zone 'UTC', updated_at at time zone 'UTC' from chatdb.conversations",
    "insert into public.messages (id, conversation_id, user_id, role, content, created_at) "
    "select id, conversation_id, user_id, role, content, created_at at time zone 'UTC' from chatdb.messages",
    "select setval('public.conversations_id_seq', max(id)) from public.conversations",
    "select setval('public.messages_id_seq', max(id)) from public.messages",
    "vacuum (freeze, analyze) public.conversations, public.messages",
)
"""Statements that copy chatdb's rows to the original's tables in the same physical order."""


def engine(dsn: str, connections: int) -> AsyncEngine:
    """Return an engine for a database, given an asyncpg DSN."""
    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(**connect_arguments(dsn)),  # asyncpg does not accept libpq's options
        pool_size=connections,
    )


def sessions(made: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Return a factory for the service's sessions, one session per call."""
    return async_sessionmaker(made, expire_on_commit=False)


async def _owned(session: AsyncSession, user_id: str, conversation_id: int) -> Conversation:
    found = await session.execute(
        select(Conversation).where(Conversation.id == conversation_id, Conversation.user_id == user_id)
    )
    return found.scalar_one()


async def create_conversation(session: AsyncSession, user_id: str) -> Conversation:
    """Create a conversation and return the stored record."""
    conversation = Conversation(user_id=user_id)
    session.add(conversation)
    await session.commit()
    await session.refresh(conversation)
    return conversation


async def add_message(session: AsyncSession, user_id: str, conversation_id: int, role: str, content: str) -> Message:
    """Append a message to the user's conversation and return the stored record."""
    conversation = await _owned(session, user_id, conversation_id)
    message = Message(conversation_id=conversation_id, user_id=user_id, role=role, content=content)
    session.add(message)
    conversation.updated_at = utc_now()
    session.add(conversation)
    await session.commit()
    await session.refresh(message)
    return message


async def history(session: AsyncSession, user_id: str, conversation_id: int, limit: int) -> list[Message]:
    """Return the newest messages, oldest first."""
    newest = (
        select(Message)
        .where(Message.conversation_id == conversation_id, Message.user_id == user_id)
        .order_by(Message.created_at.desc(), Message.id.desc())  # type: ignore[attr-defined, union-attr]
        .limit(limit)
    )
    return list(reversed((await session.execute(newest)).scalars().all()))


async def list_conversations(session: AsyncSession, user_id: str, limit: int) -> list[Conversation]:
    """Return the user's conversations, latest activity first."""
    latest = (
        select(Conversation)
        .where(Conversation.user_id == user_id)
        .order_by(Conversation.updated_at.desc())  # type: ignore[attr-defined]
        .limit(limit)
    )
    return list((await session.execute(latest)).scalars().all())


async def delete_conversation(session: AsyncSession, user_id: str, conversation_id: int) -> None:
    """Delete the user's conversation. The cascade deletes its messages."""
    await session.delete(await _owned(session, user_id, conversation_id))
    await session.commit()
