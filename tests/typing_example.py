"""What a user's type checker sees; mypy --strict and pyright check this file in the nox session `types`."""

from typing import assert_type

import asyncpg

import chatdb


async def example(pool: asyncpg.Pool, connection: asyncpg.Connection) -> None:
    """Use every kind of handle and result."""
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
        async with chatdb.transaction(db) as inside, chatdb.transaction(pool), chatdb.transaction(connection):
            assert_type(await chatdb.delete_user(inside, user_id="alice"), chatdb.Deleted)
        await chatdb.check_schema(db)
    async with chatdb.open_embedded() as db:
        await chatdb.get_conversation(db, user_id="alice", conversation_id=at)
    pool = await chatdb.create_pool("postgresql://localhost/chat")
