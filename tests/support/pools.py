"""Helpers for tests of the pool, and calls of each function that can be repeated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any, Final

import asyncpg
import psycopg

import chatdb
from chatdb import NEW
from chatdb.records import ETAG, encode_token
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


def _etag(at: dict[str, Any]) -> str:
    """Return the etag of a conversation with five messages and no edits."""
    return encode_token(ETAG, at["conversation_id"], 5)


def _by_key(at: dict[str, Any]) -> dict[str, Any]:
    return {"user_id": at["user_id"], "conversation_key": "key"}


_USER: Final = {"role": "user", "content": "x"}
_LISTS: Final[dict[str, dict[str, Any]]] = {
    "": {},
    ", after": {"after": NOBODYS},
    ", after a key": {"after_key": "key"},
    ", archived": {"archived": True},
    ", all": {"archived": None},
    ", created": {"order_by": "created_at"},
    ", created ascending": {"order_by": "created_at", "descending": False},
}

CALLS: dict[str, Callable[[Any, dict[str, Any], int], Any]] = {
    "append_message": lambda db, at, _: chatdb.append_message(db, **_USER, **at),
    "append_message, new key": lambda db, at, n: chatdb.append_message(db, **_USER, key=f"new {n}", **at),
    "append_message, stored key": lambda db, at, _: chatdb.append_message(db, **_USER, key="key", **at),
    "append_message, create": lambda db, at, n: chatdb.append_message(
        db, **_USER, user_id=at["user_id"], conversation_key=f"new {n}", create=True, expected=NEW
    ),
    "append_message, expected": lambda db, at, _: chatdb.append_message(
        db, **_USER, expected=_etag(at), conversation_metadata_patch={"a": None}, **at
    ),
    "append_message, parent": lambda db, at, _: chatdb.append_message(db, **_USER, parent_seq=1, **at),
    "append_messages": lambda db, at, n: chatdb.append_messages(db, messages=batch(n, keyed=False), **at),
    "append_messages, none": lambda db, at, _: chatdb.append_messages(db, messages=[], **at),
    "append_messages, new keys": lambda db, at, n: chatdb.append_messages(db, messages=batch(n + 1, keyed=True), **at),
    "append_messages, stored keys": lambda db, at, _: chatdb.append_messages(db, messages=batch(0, keyed=True), **at),
    "append_messages, skip": lambda db, at, n: chatdb.append_messages(
        db, messages=batch(0, keyed=True) + batch(n + 1, keyed=True), on_existing="skip", **at
    ),
    "append_messages, create": lambda db, at, n: chatdb.append_messages(
        db, messages=batch(n, keyed=False), user_id=at["user_id"], conversation_key=f"new {n}", create=True
    ),
    "append_messages, parent": lambda db, at, n: chatdb.append_messages(
        db, messages=batch(n, keyed=False), parent_seq=1, **at
    ),
    "check_schema": lambda db, _, __: chatdb.check_schema(db),
    "create_conversation": lambda db, at, _: chatdb.create_conversation(db, user_id=at["user_id"]),
    "create_conversation, new key": lambda db, at, _: chatdb.create_conversation(db, user_id=at["user_id"], key="new"),
    "create_conversation, stored key": lambda db, at, _: chatdb.create_conversation(
        db, user_id=at["user_id"], key="key"
    ),
    "create_conversation, messages": lambda db, at, n: chatdb.create_conversation(
        db, user_id=at["user_id"], messages=batch(n, keyed=True)
    ),
    "create_conversation, messages and a stored key": lambda db, at, n: chatdb.create_conversation(
        db, user_id=at["user_id"], key="key", messages=batch(n, keyed=True)
    ),
    "delete_branch": lambda db, at, _: chatdb.delete_branch(db, seq=1, **at),
    "delete_branch, expected": lambda db, at, _: chatdb.delete_branch(db, key="key", **_by_key(at), expected=_etag(at)),
    "delete_conversation": lambda db, at, _: chatdb.delete_conversation(db, **at),
    "delete_conversation, expected": lambda db, at, _: chatdb.delete_conversation(
        db, **_by_key(at), expected=_etag(at)
    ),
    "delete_message": lambda db, at, _: chatdb.delete_message(db, seq=1, **at),
    "delete_message, expected": lambda db, at, _: chatdb.delete_message(
        db, key="key", **_by_key(at), expected=_etag(at)
    ),
    "delete_messages_after": lambda db, at, _: chatdb.delete_messages_after(db, after_seq=1, **at),
    "delete_messages_after, expected": lambda db, at, _: chatdb.delete_messages_after(
        db, after_key="key", **_by_key(at), expected=_etag(at)
    ),
    "delete_user": lambda db, at, _: chatdb.delete_user(db, user_id=at["user_id"]),
    "export_user": lambda db, at, _: _all(chatdb.export_user(db, user_id=at["user_id"])),
    "extend_message": lambda db, at, _: chatdb.extend_message(db, key="stream", offset=0, text="x", **at),
    "extend_message, by key": lambda db, at, _: chatdb.extend_message(
        db, key="stream", offset=0, text="x", **_by_key(at)
    ),
    "finish_message": lambda db, at, _: chatdb.finish_message(db, seq=1, **at),
    "finish_message, aborted": lambda db, at, _: chatdb.finish_message(db, key="stream", aborted=True, **_by_key(at)),
    "fork_conversation": lambda db, at, _: chatdb.fork_conversation(db, **at),
    "fork_conversation, another": lambda db, at, _: chatdb.fork_conversation(db, seq=1, new_key="fork", **_by_key(at)),
    "get_branch": lambda db, at, _: chatdb.get_branch(db, **at),
    "get_branch, by key": lambda db, at, _: chatdb.get_branch(db, top_seq=1, before_seq=1, **_by_key(at)),
    "get_context": lambda db, at, _: chatdb.get_context(db, max_tokens=8000, **at),
    "get_conversation": lambda db, at, _: chatdb.get_conversation(db, **at),
    "get_conversation, by key": lambda db, at, _: chatdb.get_conversation(db, **_by_key(at)),
    "get_history": lambda db, at, _: chatdb.get_history(db, **at),
    "get_history, before": lambda db, at, _: chatdb.get_history(db, before_seq=1, **at),
    "get_history, before a key": lambda db, at, _: chatdb.get_history(db, before_key="key", **_by_key(at)),
    "get_message": lambda db, at, _: chatdb.get_message(db, seq=1, **at),
    "get_message, by key": lambda db, at, _: chatdb.get_message(db, key="key", **_by_key(at)),
    "iter_messages": lambda db, at, _: _all(chatdb.iter_messages(db, **at)),
    "list_messages": lambda db, at, _: chatdb.list_messages(db, **at),
    "list_messages, after a key": lambda db, at, _: chatdb.list_messages(db, after_key="key", **_by_key(at)),
    "list_messages, none left": lambda db, at, _: chatdb.list_messages(db, after_seq=1000, **at),
    "list_pinned": lambda db, at, _: chatdb.list_pinned(db, user_id=at["user_id"]),
    "list_streaming": lambda db, at, _: chatdb.list_streaming(db, user_id=at["user_id"], older_than=timedelta(0)),
    "list_versions": lambda db, at, _: chatdb.list_versions(db, **at),
    "load_conversation": lambda db, at, _: chatdb.load_conversation(db, **at),
    "load_conversation, by key": lambda db, at, _: chatdb.load_conversation(db, **_by_key(at)),
    "move_user": lambda db, at, _: chatdb.move_user(db, user_id=at["user_id"], to_user_id="another"),
    "pop_message": lambda db, at, _: chatdb.pop_message(db, **at),
    "pop_message, expected": lambda db, at, _: chatdb.pop_message(db, **_by_key(at), expected=_etag(at)),
    "read_message": lambda db, at, _: chatdb.read_message(db, key="stream", **at),
    "read_message, by key": lambda db, at, _: chatdb.read_message(db, seq=1, offset=1, **_by_key(at)),
    "replace_messages_after": lambda db, at, n: chatdb.replace_messages_after(
        db, after_seq=1, messages=batch(n + 1, keyed=True), expected=_etag(at), **at
    ),
    "search_messages": lambda db, at, _: chatdb.search_messages(db, user_id=at["user_id"], query="x"),
    "search_messages, by id": lambda db, at, _: chatdb.search_messages(db, query="x", **at),
    "search_messages, by key": lambda db, at, _: chatdb.search_messages(db, query="x", **_by_key(at)),
    "start_message": lambda db, at, _: chatdb.start_message(db, **at),
    "start_message, new key": lambda db, at, n: chatdb.start_message(db, key=f"new {n}", **at),
    "start_message, stored key": lambda db, at, _: chatdb.start_message(db, key="stream", **_by_key(at)),
    "switch_branch": lambda db, at, _: chatdb.switch_branch(db, seq=1, **at),
    "switch_branch, expected": lambda db, at, _: chatdb.switch_branch(db, key="key", **_by_key(at), expected=_etag(at)),
    "update_conversation": lambda db, at, n: chatdb.update_conversation(db, title=f"{n}", **at),
    "update_conversation, nothing": lambda db, at, _: chatdb.update_conversation(db, **at),
    "update_conversation, expected": lambda db, at, _: chatdb.update_conversation(
        db, metadata_patch={"a": 1}, archived=True, pinned=True, expected=_etag(at), **_by_key(at)
    ),
    "update_message": lambda db, at, n: chatdb.update_message(db, seq=1, token_count=n, **at),
    "update_message, nothing": lambda db, at, _: chatdb.update_message(db, seq=1, **at),
    "update_message, expected": lambda db, at, _: chatdb.update_message(
        db, key="key", metadata_patch={"a": 1}, expected=_etag(at), **_by_key(at)
    ),
    "upsert_conversation": lambda db, at, n: chatdb.upsert_conversation(
        db, user_id=at["user_id"], key="key", title=f"{n}"
    ),
    "upsert_conversation, patch": lambda db, at, n: chatdb.upsert_conversation(
        db, user_id=at["user_id"], key="key", metadata_patch={"a": n}, archived=True
    ),
    "upsert_conversation, new key": lambda db, at, n: chatdb.upsert_conversation(
        db, user_id=at["user_id"], key=f"new {n}"
    ),
    "upsert_message": lambda db, at, n: chatdb.upsert_message(db, key="key", role="tool", content=f"{n}", **at),
    "upsert_message, new key": lambda db, at, n: chatdb.upsert_message(
        db, key=f"new {n}", **_USER, expected=_etag(at), **at
    ),
    **{
        f"{name}{kind}": lambda db, at, _, name=name, arguments=arguments: getattr(chatdb, name)(
            db, user_id=at["user_id"], **arguments
        )
        for name in ("list_conversations", "list_previews")
        for kind, arguments in _LISTS.items()
    },
}
"""Calls of each function that takes a database, at least one per statement."""
