"""
The functions on conversations: one SQL file each, of the same name.

Decisions: docs/decisions/0002-tenant-first-keys.md, 0003-the-list-is-ordered-by-day.md
"""

from __future__ import annotations

from typing import Any

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
    metadata: dict[str, Any] | None = None,
) -> Conversation:
    """
    Create a conversation of a user, or return the one that already has this `key`.

    With a `key` (1 to 255 characters, unique per user) the call can be repeated: the stored conversation comes back
    unchanged, whatever the other arguments say, and nothing is written. `title` has at most 1,000 characters,
    `metadata` at most 1 MiB as JSON.

    Raises InvalidInputError.
    """
    user = check_user_id(user_id)
    title = check_title("title", title)
    data = check_conversation_metadata("metadata", metadata)
    key = check_key("key", key)
    if key is None:
        try:
            return await _create_conversation.fetch_one(db, user, title, data)
        except ConversationNotFoundError:  # it gave no row
            raise ConfigurationError(ROW_SUPPRESSED.format("conversations")) from None
    for _ in range(3):
        # empty if another caller stored the key between the statement's look and its insertion
        stored = await _create_conversation_keyed.fetch_all(db, user, title, data, key)
        if stored:
            return stored[0]
    raise UnavailableError("other callers create and delete this key all the time: try again", sent=True)


async def get_conversation(db: Database, *, user_id: str, conversation_id: int) -> Conversation:
    """
    Return one conversation of a user.

    Raises ConversationNotFoundError when the user has no such conversation, whoever else may have it.
    """
    return await _get_conversation.fetch_one(db, check_user_id(user_id), check_id(conversation_id))


async def get_conversation_by_key(db: Database, *, user_id: str, key: str) -> Conversation:
    """
    Return the conversation of a user that was created with this `key`.

    Raises ConversationNotFoundError when the user has none.
    """
    name = check_text("key", key, least=1, most=MAX_NAME)
    return await _get_conversation_by_key.fetch_one(db, check_user_id(user_id), name)


async def list_conversations(
    db: Database, *, user_id: str, limit: int = 20, before: Conversation | None = None
) -> list[Conversation]:
    """
    Return a page of a user's conversations, latest activity first; empty for an unknown user.

    `before` is the last conversation of the previous page. The next page starts after the place that it had when it
    was read, so nothing comes twice, and what became active meanwhile stands on page one. `limit` is 1 to 10,000.

    Raises InvalidInputError. The first page is `list_conversations.sql`, later ones `list_conversations_before.sql`.
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
    metadata: dict[str, Any] | Unset | None = UNSET,
) -> Conversation:
    """
    Replace the title or the metadata of a conversation; None clears them, what is not given stays.

    The conversation keeps its place in the list: `updated_at` is the time of the last append.

    Raises ConversationNotFoundError, InvalidInputError.
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
    Delete a conversation with all its messages, and return how many rows went.

    A message that another caller appends at this very moment goes too, uncounted.

    Raises ConversationNotFoundError.
    """
    return await _delete_conversation.fetch_one(db, check_user_id(user_id), check_id(conversation_id))
