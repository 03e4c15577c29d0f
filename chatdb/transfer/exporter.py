"""Count and export everything a user has, in one transaction."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from chatdb._core.driver_errors import mapped_driver_errors
from chatdb._core.query import Query
from chatdb._core.validate import check_user_id
from chatdb.conversations import get_conversation
from chatdb.messages import iter_messages
from chatdb.pool import Pool, set_rls_user, transaction
from chatdb.records import Conversation, Deleted, Message
from chatdb.users import export_user

_count_user = Query("transfer/count_user", Deleted)


async def count_user(pool: Pool, *, user_id: str) -> Deleted:
    """Return how many conversations and messages `delete_user` would delete."""
    user = check_user_id(user_id)
    async with transaction(pool, user_id=user) as connection:
        return await _count_user.fetch_one(connection, user)


async def export_conversations(
    pool: Pool, *, user_id: str, conversation_id: int | None = None
) -> AsyncGenerator[Conversation | Message, None]:
    """
    Iterate over a snapshot of what `export_user` yields, or of one conversation, in one read-only transaction.

    Raises ConversationNotFoundError if the user has no such conversation.
    """
    user = check_user_id(user_id)
    async with transaction(pool) as connection:  # asyncpg's transaction waits too long for ROLLBACK on a silent server
        with mapped_driver_errors():
            await connection.execute("set transaction isolation level repeatable read, read only")
        await set_rls_user(connection, user)
        if conversation_id is None:
            async for record in export_user(connection, user_id=user):
                yield record
            return
        yield await get_conversation(connection, user_id=user, conversation_id=conversation_id)
        async for message in iter_messages(connection, user_id=user, conversation_id=conversation_id):
            yield message
