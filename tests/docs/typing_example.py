"""The types that a user with asyncpg-stubs sees; `nox -s types` checks them. `typed/` is for users without stubs."""

from pathlib import Path
from typing import assert_type

import asyncpg
from pydantic import PostgresDsn, SecretStr
from sqlalchemy import make_url

import chatdb


async def example(pool: asyncpg.Pool, connection: asyncpg.Connection) -> None:
    """Use each kind of handle and result."""
    async with chatdb.create_pool() as db:
        conversation = await chatdb.create_conversation(db, user_id="alice", metadata={"a": [1]})
        assert_type(conversation, chatdb.Conversation)
        at = conversation.id
        assert_type(await chatdb.get_history(db, user_id="alice", conversation_id=at), list[chatdb.Message])
        async for message in chatdb.iter_messages(pool, user_id="alice", conversation_id=at):
            assert_type(message.role, chatdb.Role)
            assert_type(message.payload, chatdb.JsonText | None)
        batch = [chatdb.NewMessage(role="user", content="hi"), chatdb.NewMessage(role="tool", content="", payload=[1])]
        await chatdb.append_messages(connection, user_id="alice", conversation_id=at, messages=batch)
        await chatdb.append_messages(
            db, user_id="alice", conversation_id=at, messages=[{"role": "user", "content": "hi"}]
        )
        await chatdb.append_message(db, user_id="alice", conversation_id=at, role="narrator", content="")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        await chatdb.update_conversation(db, user_id="alice", conversation_id=at, title=None)
        async with chatdb.stream_message(pool, user_id="alice", conversation_id=at) as stream:
            assert_type(stream, chatdb.MessageStream)
            await stream.write("hi")
        async with chatdb.Watcher(pool, listen_dsn=make_url("postgresql://localhost/chat")) as watcher:
            async for message in watcher.watch(user_id="alice", conversation_id=at):
                assert_type(message, chatdb.Message)
        await with_stubs(db)
        async with chatdb.transaction(db) as inside, chatdb.transaction(pool), chatdb.transaction(connection):
            assert_type(await chatdb.delete_user(inside, user_id="alice"), chatdb.Deleted)
        await chatdb.check_schema(db)
    async with chatdb.open_embedded() as db:
        await chatdb.get_conversation(db, user_id="alice", conversation_id=at)
    pool = await chatdb.create_pool("postgresql://localhost/chat")
    await chatdb.create_pool(SecretStr("postgresql://localhost/chat"), statement_cache_size=0, host=["a", "b"])
    await chatdb.create_pool(PostgresDsn("postgresql://localhost/chat"), server_settings={"geqo": "off"}, init=prepare)
    await chatdb.create_pool(make_url("postgresql://localhost/chat"), max_size=3)
    await chatdb.create_pool(3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await chatdb.create_pool(maxsize=3)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await chatdb.create_pool(max_size="3")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await chatdb.create_pool(statement_cache_size="0")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def prepare(connection: chatdb.Connection) -> None:
    """Configure a connection."""
    await connection.execute("set geqo = off")


async def configure(connection: asyncpg.Connection) -> None:
    """Configure a connection, in a function that has asyncpg's type."""
    await connection.execute("set geqo = off")


async def with_stubs(db: asyncpg.Pool) -> None:
    """Pass chatdb's types to functions that have asyncpg's."""
    pool = await chatdb.create_pool(init=configure, setup=configure)
    async with pool.acquire() as connection:
        await configure(connection)
        row: asyncpg.Record | None = await connection.fetchrow("select 1")
        await connection.copy_from_query("select 1", output=Path("file"), header=True)
    print(row, db.get_size())
