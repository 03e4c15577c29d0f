"""Count and export everything a user has, in one transaction."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from chatdb._core.driver_errors import mapped_driver_errors
from chatdb._core.query import Query
from chatdb._core.validate import check_user_id
from chatdb.pool import Pool, set_rls_user, transaction
from chatdb.records import Conversation, Deleted, Message

_count_user = Query("transfer/count_user", Deleted)
_export_conversations = Query("transfer/export_conversations", Conversation)
_export_conversations_messages = Query("transfer/export_conversations_messages", Message)


async def count_user(pool: Pool, *, user_id: str) -> Deleted:
    """Return how many conversations and messages `delete_user` would delete."""
    user = check_user_id(user_id)
    async with transaction(pool, user_id=user) as connection:
        return await _count_user.fetch_one(connection, user)


async def export_conversations(pool: Pool, *, user_id: str) -> AsyncGenerator[Conversation | Message, None]:
    """
    Iterate over a snapshot of a user's conversations, each followed by its messages in order.

    Uses two server-side cursors in one read-only transaction: memory does not grow with the history.
    """
    user = check_user_id(user_id)
    async with transaction(pool) as connection:  # asyncpg's transaction waits too long for ROLLBACK on a silent server
        with mapped_driver_errors():
            await connection.execute("set transaction isolation level repeatable read, read only")
        await set_rls_user(connection, user)
        messages = _export_conversations_messages.iterate(connection, user)
        message = await anext(messages, None)
        async for conversation in _export_conversations.iterate(connection, user):
            yield conversation
            while message is not None and message.conversation_id == conversation.id:
                yield message
                message = await anext(messages, None)
