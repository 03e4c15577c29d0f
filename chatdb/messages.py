"""
Functions for messages. Each function runs the SQL file of the same name in `sql/`.

Decisions: docs/decisions/0001-seq-is-a-counter.md, 0002-tenant-first-keys.md
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from operator import attrgetter
from typing import NoReturn, TypeVar

from chatdb._core.driver_errors import ROW_SUPPRESSED
from chatdb._core.query import Database, Query
from chatdb._core.validate import (
    MAX_BIGINT,
    MAX_NAME,
    as_text_array,
    check_content,
    check_id,
    check_key,
    check_limit,
    check_messages,
    check_metadata,
    check_payload,
    check_role,
    check_seq,
    check_text,
    check_token_count,
    check_user_id,
    if_given,
)
from chatdb.conversations import get_conversation
from chatdb.errors import ConfigurationError, ConflictError, ConversationNotFoundError, MessageNotFoundError
from chatdb.records import UNSET, Deleted, Message, NewMessage, Role, Unset

_append_message = Query("append_message", Message)
_append_message_keyed = Query("append_message_keyed", Message, idempotent=True)
_append_messages = Query("append_messages", Message)
_append_messages_keyed = Query("append_messages_keyed", Message)
# Without user_id and conversation_id in each row, a page of 100 takes an eighth less time under load.
_get_history = Query("get_history", Message, fields_from_args=("user_id", "conversation_id"), idempotent=True)
_list_messages = Query("list_messages", Message, fields_from_args=("user_id", "conversation_id"), idempotent=True)
_get_message = Query("get_message", Message, idempotent=True)
_get_message_by_key = Query("get_message_by_key", Message, idempotent=True)
_update_message = Query("update_message", Message)
_delete_message = Query("delete_message", Deleted)
_delete_messages_after = Query("delete_messages_after", Deleted)

_FoundT = TypeVar("_FoundT", Message, Deleted)

_in_order = attrgetter("seq")


async def append_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int,
    role: Role,
    content: str,
    payload: object = None,
    metadata: Mapping[str, object] | None = None,
    token_count: int | None = None,
    key: str | None = None,
) -> Message:
    """
    Append a message to a conversation and return the stored record.

    `content` is the readable text, at most 4 MiB as UTF-8. `payload` is any JSON value of at most 16 MiB; pass
    `JsonText` to store it byte for byte. `metadata` is a dict of at most 64 KiB as JSON. `token_count` is 0 to 2^31-1.
    `key` is 1 to 255 characters and unique in the conversation. It makes the call safe to repeat: the same key with
    the same role, content, payload text and metadata returns the stored message and writes nothing.

    Raises ConversationNotFoundError, ConflictError if the key is stored with a different body, or InvalidInputError.
    SQL: `append_message.sql`, or `append_message_keyed.sql` with a key.
    """
    body = (
        check_user_id(user_id),
        check_id(conversation_id),
        check_role("role", role),
        check_content("content", content),
        check_payload("payload", payload),
        check_metadata("metadata", metadata),
        check_token_count("token_count", token_count),
    )
    key = check_key("key", key)
    if key is None:
        try:
            return await _append_message.fetch_one(db, *body)
        except ConversationNotFoundError:
            await _raise_row_suppressed(db, user_id, conversation_id)
    message = await _append_message_keyed.fetch_optional(db, *body, key)
    if message is None:
        try:
            await get_message_by_key(db, user_id=user_id, conversation_id=conversation_id, key=key)
        except MessageNotFoundError:
            raise ConfigurationError(ROW_SUPPRESSED.format("messages")) from None
        raise ConflictError(
            "a message with this key but a different body already exists: use a new key for a new message"
        )
    return message


async def _raise_row_suppressed(db: Database, user_id: str, conversation_id: int) -> NoReturn:
    """Raise ConversationNotFoundError, or ConfigurationError if a trigger of the host suppressed the insert."""
    await get_conversation(db, user_id=user_id, conversation_id=conversation_id)
    raise ConfigurationError(ROW_SUPPRESSED.format("messages"))


async def append_messages(
    db: Database, *, user_id: str, conversation_id: int, messages: Iterable[NewMessage | Mapping[str, object]]
) -> list[Message]:
    """
    Append messages in order, all or none, and return the stored records.

    Each message is a `NewMessage` or a dict with its fields. A batch is at most 10,000 messages and 64 MiB of content,
    payload, metadata and keys together; an empty batch returns an empty list. All messages of a batch have the same
    `created_at`. Keys are distinct within a batch. If all keys are already stored with the same bodies, the stored
    messages are returned and nothing is written.

    Raises ConversationNotFoundError, ConflictError if only some keys are stored or a body differs, or
    InvalidInputError, which names the message. SQL: `append_messages.sql`, or `append_messages_keyed.sql` if a message
    has a key.
    """
    user, conversation = check_user_id(user_id), check_id(conversation_id)
    batch = await check_messages(messages)
    if not batch:
        await get_conversation(db, user_id=user, conversation_id=conversation)
        return []
    *columns, token_counts, keys = map(list, zip(*batch, strict=True))
    columns.append(as_text_array(token_counts))
    if not any(keys):
        try:
            stored = await _append_messages.fetch_page(db, user, conversation, *columns)
        except ConversationNotFoundError:
            stored = []
        if len(stored) < len(batch):
            await _raise_row_suppressed(db, user, conversation)
        return sorted(stored, key=_in_order)
    stored = await _append_messages_keyed.fetch_page(db, user, conversation, *columns, keys, idempotent=all(keys))
    if not stored:
        raise ConflictError(
            "only some keys of the batch are stored, or a stored message has a different body, so nothing was written: "
            "use new keys for new messages"
        )
    # A message without a key is new, and new messages get their seq in batch order.
    rank = {key: index for index, key in enumerate(keys)}
    return sorted(stored, key=_in_order if None in rank else lambda message: rank[message.key])


async def get_history(
    db: Database, *, user_id: str, conversation_id: int, limit: int = 100, before_seq: int | None = None
) -> list[Message]:
    """
    Return the newest messages of a conversation, oldest first.

    `limit` is 1 to 10,000. With `before_seq`, return the newest messages before that position: to page back, pass the
    `seq` of the first message of this page. The list is empty if no messages are left.

    Raises ConversationNotFoundError or InvalidInputError. SQL: `get_history.sql`.
    """
    before = MAX_BIGINT if before_seq is None else check_seq("before_seq", before_seq)
    newest_first = await _get_history.fetch_page(
        db, check_user_id(user_id), check_id(conversation_id), before, check_limit("limit", limit)
    )
    newest_first.reverse()
    return newest_first


async def list_messages(
    db: Database, *, user_id: str, conversation_id: int, after_seq: int = 0, limit: int = 100
) -> list[Message]:
    """
    Return the messages of a conversation after a position, oldest first.

    `limit` is 1 to 10,000. For the next page, pass the `seq` of the last message as `after_seq`. Because `seq` follows
    commit order, a reader that continues from there misses no message. The list is empty at the end.

    Raises ConversationNotFoundError or InvalidInputError. SQL: `list_messages.sql`.
    """
    return await _list_messages.fetch_page(
        db,
        check_user_id(user_id),
        check_id(conversation_id),
        check_seq("after_seq", after_seq),
        check_limit("limit", limit),
    )


async def iter_messages(
    db: Database, *, user_id: str, conversation_id: int, after_seq: int = 0, batch: int = 500
) -> AsyncIterator[Message]:
    """
    Iterate over the messages of a conversation after a position, oldest first.

    Messages are read in pages of `batch` (1 to 10,000). Between pages the iterator holds no connection and at most one
    page in memory.

    Raises ConversationNotFoundError, also if the conversation is deleted during the iteration, or InvalidInputError.
    SQL: `list_messages.sql`, once per page.
    """
    limit = check_limit("batch", batch)
    while True:
        page = await list_messages(
            db, user_id=user_id, conversation_id=conversation_id, after_seq=after_seq, limit=limit
        )
        for message in page:
            yield message
        if len(page) < limit:
            return
        after_seq = page[-1].seq


async def get_message(db: Database, *, user_id: str, conversation_id: int, seq: int) -> Message:
    """
    Return one message by its `seq`.

    Raises ConversationNotFoundError, or MessageNotFoundError if the conversation has no message at this position. SQL:
    `get_message.sql`.
    """
    return _or_not_found(
        await _get_message.fetch_optional(db, check_user_id(user_id), check_id(conversation_id), check_seq("seq", seq))
    )


async def get_message_by_key(db: Database, *, user_id: str, conversation_id: int, key: str) -> Message:
    """
    Return one message by its `key`.

    Raises ConversationNotFoundError, or MessageNotFoundError if the conversation has no message with this key. SQL:
    `get_message_by_key.sql`.
    """
    name = check_text("key", key, least=1, most=MAX_NAME)
    return _or_not_found(
        await _get_message_by_key.fetch_optional(db, check_user_id(user_id), check_id(conversation_id), name)
    )


async def update_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int,
    seq: int,
    content: str | Unset = UNSET,
    payload: object = UNSET,
    metadata: Mapping[str, object] | Unset | None = UNSET,
    token_count: int | Unset | None = UNSET,
) -> Message:
    """
    Replace fields of a message and return the stored record.

    None clears a value, except `content`; an argument left `UNSET` keeps it. The limits are those of `append_message`.
    `seq`, `role`, `key` and `created_at` do not change, and the conversation keeps its position in
    `list_conversations`.

    Raises ConversationNotFoundError, MessageNotFoundError or InvalidInputError. SQL: `update_message.sql`.
    """
    at = (check_user_id(user_id), check_id(conversation_id), check_seq("seq", seq))
    if content is UNSET and payload is UNSET and metadata is UNSET and token_count is UNSET:
        return _or_not_found(await _get_message.fetch_optional(db, *at))
    message = await _update_message.fetch_optional(
        db,
        *at,
        *if_given(check_content, "content", content),
        *if_given(check_payload, "payload", payload),
        *if_given(check_metadata, "metadata", metadata),
        *if_given(check_token_count, "token_count", token_count),
    )
    return _or_not_found(message)


async def delete_message(db: Database, *, user_id: str, conversation_id: int, seq: int) -> Deleted:
    """
    Delete one message by its `seq` and return the number of deleted rows.

    The `seq` is never reused and `last_seq` does not change. The message's key becomes free.

    Raises ConversationNotFoundError, or MessageNotFoundError if the conversation has no message at this position. SQL:
    `delete_message.sql`.
    """
    deleted = await _delete_message.fetch_one(
        db, check_user_id(user_id), check_id(conversation_id), check_seq("seq", seq)
    )
    return _or_not_found(deleted if deleted.messages else None)


async def delete_messages_after(db: Database, *, user_id: str, conversation_id: int, seq: int) -> Deleted:
    """
    Delete all messages after `seq`, for an edit or a regeneration, and return the number of deleted rows.

    The deleted positions are never reused and `last_seq` does not change. `seq` may be 0, or the position of a deleted
    message.

    Raises ConversationNotFoundError. SQL: `delete_messages_after.sql`.
    """
    return await _delete_messages_after.fetch_one(
        db, check_user_id(user_id), check_id(conversation_id), check_seq("seq", seq)
    )


def _or_not_found(found: _FoundT | None) -> _FoundT:
    if found is None:
        raise MessageNotFoundError("the conversation has no such message: check seq or key")
    return found
