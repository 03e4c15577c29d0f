"""
Functions for conversations. Each function runs the SQL file of the same name in `sql/`.

Decisions: docs/decisions/0002-tenant-first-keys.md, 0003-the-list-is-ordered-by-day.md
"""

from __future__ import annotations

from collections.abc import Mapping

from chatdb._core.driver_errors import ROW_SUPPRESSED
from chatdb._core.query import Database, Query
from chatdb._core.validate import (
    MAX_NAME,
    check_before,
    check_conversation_metadata,
    check_id,
    check_key,
    check_limit,
    check_text,
    check_title,
    check_user_id,
    if_given,
)
from chatdb.errors import ConfigurationError, ConversationNotFoundError, UnavailableError
from chatdb.records import UNSET, Conversation, Deleted, Unset

_create_conversation = Query("create_conversation", Conversation)
_create_conversation_keyed = Query("create_conversation_keyed", Conversation, idempotent=True)
_get_conversation = Query("get_conversation", Conversation, idempotent=True)
_get_conversation_by_key = Query("get_conversation_by_key", Conversation, idempotent=True)
_list_conversations = Query("list_conversations", Conversation, idempotent=True)
_list_conversations_before = Query("list_conversations_before", Conversation, idempotent=True)
_update_conversation = Query("update_conversation", Conversation)
_delete_conversation = Query("delete_conversation", Deleted)


async def create_conversation(
    db: Database,
    *,
    user_id: str,
    title: str | None = None,
    key: str | None = None,
    metadata: Mapping[str, object] | None = None,
) -> Conversation:
    """
    Create a conversation, or return the one that already has this `key`.

    `key` is 1 to 255 characters and unique per user. It makes the call safe to repeat: a stored conversation with this
    key is returned unchanged, and the other arguments are ignored. `title` is at most 1,000 characters. `metadata` is
    a dict of at most 1 MiB as JSON.

    Raises InvalidInputError. SQL: `create_conversation.sql`, or `create_conversation_keyed.sql` with a key.
    """
    user = check_user_id(user_id)
    title = check_title("title", title)
    data = check_conversation_metadata("metadata", metadata)
    key = check_key("key", key)
    if key is None:
        try:
            return await _create_conversation.fetch_one(db, user, title, data)
        except ConversationNotFoundError:  # the statement returned no row
            raise ConfigurationError(ROW_SUPPRESSED.format("conversations")) from None
    for _ in range(3):
        # Empty if another caller inserted the key after the statement's snapshot.
        stored = await _create_conversation_keyed.fetch_all(db, user, title, data, key)
        if stored:
            return stored[0]
    raise UnavailableError("other callers keep creating and deleting this key: try again", sent=True)


async def get_conversation(db: Database, *, user_id: str, conversation_id: int) -> Conversation:
    """
    Return one conversation by its id.

    Raises ConversationNotFoundError if the user has no such conversation, even if another user has. SQL:
    `get_conversation.sql`.
    """
    return await _get_conversation.fetch_one(db, check_user_id(user_id), check_id(conversation_id))


async def get_conversation_by_key(db: Database, *, user_id: str, key: str) -> Conversation:
    """
    Return one conversation by its `key`.

    Raises ConversationNotFoundError if the user has no conversation with this key. SQL:
    `get_conversation_by_key.sql`.
    """
    name = check_text("key", key, least=1, most=MAX_NAME)
    return await _get_conversation_by_key.fetch_one(db, check_user_id(user_id), name)


async def list_conversations(
    db: Database, *, user_id: str, limit: int = 20, before: Conversation | None = None
) -> list[Conversation]:
    """
    Return a page of a user's conversations, latest activity first.

    `limit` is 1 to 10,000. For the next page, pass the last conversation of this page as `before`. Its position at the
    time of reading counts, so no page repeats a conversation; one that becomes active in the meantime moves to the
    first page. The list is empty for an unknown user.

    Raises InvalidInputError. SQL: `list_conversations.sql`, or `list_conversations_before.sql` with `before`.
    """
    user = check_user_id(user_id)
    limit = check_limit("limit", limit)
    if before is None:
        return await _list_conversations.fetch_all(db, user, limit)
    return await _list_conversations_before.fetch_all(db, user, *check_before(before), limit)


async def update_conversation(
    db: Database,
    *,
    user_id: str,
    conversation_id: int,
    title: str | Unset | None = UNSET,
    metadata: Mapping[str, object] | Unset | None = UNSET,
) -> Conversation:
    """
    Replace the title or metadata of a conversation and return the stored record.

    None clears a value; an argument left `UNSET` keeps it. `updated_at` does not change, so the conversation keeps its
    position in `list_conversations`.

    Raises ConversationNotFoundError or InvalidInputError. SQL: `update_conversation.sql`.
    """
    user, conversation = check_user_id(user_id), check_id(conversation_id)
    if title is UNSET and metadata is UNSET:
        return await _get_conversation.fetch_one(db, user, conversation)
    return await _update_conversation.fetch_one(
        db,
        user,
        conversation,
        *if_given(check_title, "title", title),
        *if_given(check_conversation_metadata, "metadata", metadata),
    )


async def delete_conversation(db: Database, *, user_id: str, conversation_id: int) -> Deleted:
    """
    Delete a conversation with all its messages and return the number of deleted rows.

    A message that another caller appends at the same time is deleted too, but not counted.

    Raises ConversationNotFoundError. SQL: `delete_conversation.sql`.
    """
    return await _delete_conversation.fetch_one(db, check_user_id(user_id), check_id(conversation_id))
