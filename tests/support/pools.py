"""Helpers for tests of the pool, and calls of each function that can be repeated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import psycopg

import chatdb
from tests.support.calls import NOBODYS

HANG = 30
"""Seconds after which a test counts as hung."""
Session = psycopg.Connection[tuple[Any, ...]]


def answered(where: str | Session, question: str) -> list[tuple[Any, ...]]:
    """Run a query in a session, or in a new one if `where` is a DSN."""
    if isinstance(where, str):
        with psycopg.connect(where, autocommit=True) as session:
            return session.execute(question).fetchall()
    return where.execute(question).fetchall()


def seen_by_the_server(where: str | Session) -> list[tuple[str, str, bool]]:
    """Return state, last statement and whether a transaction is open for each other session of the database."""
    return answered(
        where,
        """
        select state, query, xact_start is not null from pg_stat_activity
        where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
        """,
    )


def kill_sessions(dsn: str) -> int:
    """End every other session of the database, while the event loop is blocked and cannot notice."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute("""
            select count(pg_terminate_backend(pid, 10000)) from pg_stat_activity
            where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
        """).fetchone()[0]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(HANG):
        while not condition():  # noqa: ASYNC110 - it changes in the server
            await asyncio.sleep(0.01)


async def assert_whole(pool: asyncpg.Pool) -> None:
    """Assert that all connections of the pool work at the same time, and none is in a transaction."""
    async with asyncio.timeout(HANG), contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(pool.acquire()) for _ in range(pool.get_max_size())]
        pids = [await connection.fetchval("select pg_backend_pid()") for connection in connections]
        assert len(set(pids)) == pool.get_max_size()
        assert not any(connection.is_in_transaction() for connection in connections)


@contextlib.contextmanager
def loop_errors() -> Any:
    """Collect the errors that the event loop would only log, such as those in callbacks and tasks."""
    errors: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    yield errors
    loop.set_exception_handler(None)


async def _all(messages: AsyncIterator[chatdb.Message]) -> list[chatdb.Message]:
    return [message async for message in messages]


def batch(number: int, *, keyed: bool) -> list[dict[str, Any]]:
    """Return three messages, with keys of this round if `keyed`."""
    return [{"role": "user", "content": "x", "key": f"{number} {place}" if keyed else None} for place in range(3)]


CALLS: dict[str, Callable[[Any, dict[str, Any], int], Any]] = {
    "append_message": lambda db, at, _: chatdb.append_message(db, role="user", content="x", **at),
    "append_message, new key": lambda db, at, n: chatdb.append_message(
        db, role="user", content="x", key=f"new {n}", **at
    ),
    "append_message, stored key": lambda db, at, _: chatdb.append_message(
        db, role="user", content="x", key="key", **at
    ),
    "append_messages": lambda db, at, n: chatdb.append_messages(db, messages=batch(n, keyed=False), **at),
    "append_messages, none": lambda db, at, _: chatdb.append_messages(db, messages=[], **at),
    "append_messages, new keys": lambda db, at, n: chatdb.append_messages(db, messages=batch(n + 1, keyed=True), **at),
    "append_messages, stored keys": lambda db, at, _: chatdb.append_messages(db, messages=batch(0, keyed=True), **at),
    "check_schema": lambda db, _, __: chatdb.check_schema(db),
    "create_conversation": lambda db, at, _: chatdb.create_conversation(db, user_id=at["user_id"]),
    "create_conversation, new key": lambda db, at, _: chatdb.create_conversation(db, user_id=at["user_id"], key="new"),
    "create_conversation, stored key": lambda db, at, _: chatdb.create_conversation(
        db, user_id=at["user_id"], key="key"
    ),
    "delete_conversation": lambda db, at, _: chatdb.delete_conversation(db, **at),
    "delete_message": lambda db, at, _: chatdb.delete_message(db, seq=1, **at),
    "delete_messages_after": lambda db, at, _: chatdb.delete_messages_after(db, seq=1, **at),
    "delete_user": lambda db, at, _: chatdb.delete_user(db, user_id=at["user_id"]),
    "get_conversation": lambda db, at, _: chatdb.get_conversation(db, **at),
    "get_conversation_by_key": lambda db, at, _: chatdb.get_conversation_by_key(db, user_id=at["user_id"], key="key"),
    "get_history": lambda db, at, _: chatdb.get_history(db, **at),
    "get_history, before": lambda db, at, _: chatdb.get_history(db, before_seq=1, **at),
    "get_message": lambda db, at, _: chatdb.get_message(db, seq=1, **at),
    "get_message_by_key": lambda db, at, _: chatdb.get_message_by_key(db, key="key", **at),
    "iter_messages": lambda db, at, _: _all(chatdb.iter_messages(db, **at)),
    "list_conversations": lambda db, at, _: chatdb.list_conversations(db, user_id=at["user_id"]),
    "list_conversations, before": lambda db, at, _: chatdb.list_conversations(
        db, user_id=at["user_id"], before=NOBODYS.model_copy(update={"user_id": at["user_id"]})
    ),
    "list_messages": lambda db, at, _: chatdb.list_messages(db, **at),
    "list_messages, none left": lambda db, at, _: chatdb.list_messages(db, after_seq=1000, **at),
    "update_conversation": lambda db, at, n: chatdb.update_conversation(db, title=f"{n}", **at),
    "update_conversation, nothing": lambda db, at, _: chatdb.update_conversation(db, **at),
    "update_message": lambda db, at, n: chatdb.update_message(db, seq=1, token_count=n, **at),
    "update_message, nothing": lambda db, at, _: chatdb.update_message(db, seq=1, **at),
}
"""Calls of each function that takes a database, one per statement."""
