"""
The functions on messages: one SQL file each, of the same name.

Decisions: docs/decisions/0001-seq-is-a-counter.md, 0002-tenant-first-keys.md
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from operator import attrgetter
from typing import Any, NoReturn, TypeVar

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
# without the user and the conversation in each of its rows a page of 100 takes an eighth less time under load
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
    payload: Any = None,  # noqa: ANN401 - any JSON value
    metadata: dict[str, Any] | None = None,
    token_count: int | None = None,
    key: str | None = None,
) -> Message:
    """
    Append a message to a conversation and return it as it is stored.

    `content` is the readable text, up to 4 MiB as UTF-8. `payload` is any JSON value, or `JsonText` to be kept byte
    for byte, up to 16 MiB. With a `key` (1 to 255 characters, unique in the conversation) the call can be repeated:
    the same key with the same role, content, payload text and metadata returns the stored message and moves nothing.

    Raises ConversationNotFoundError when the user has no such conversation, ConflictError when the key was used with
    another body, InvalidInputError. Without a key `append_message.sql`, with one `append_message_keyed.sql`.
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
        raise ConflictError("the key is that of a stored message with another body: use a new key for a new message")
    return message


async def _raise_row_suppressed(db: Database, user_id: str, conversation_id: int) -> NoReturn:
    """Say why an append gave no row: there is no such conversation, or a trigger of the host's returned NULL."""
    await get_conversation(db, user_id=user_id, conversation_id=conversation_id)
    raise ConfigurationError(ROW_SUPPRESSED.format("messages"))


async def append_messages(
    db: Database, *, user_id: str, conversation_id: int, messages: Iterable[NewMessage | Mapping[str, Any]]
) -> list[Message]:
    """
    Append messages in their order, all or nothing, and return them as they are stored.

    They share one `created_at`. The keys in a batch are distinct; either all messages are new, or all have come
    before, under the same keys with the same bodies, and the stored ones come back. No messages append nothing. A batch
    has at most 10,000 messages and 64 MiB of contents, payloads, metadata and keys together.

    Raises ConversationNotFoundError, ConflictError when some keys are new and some are not or a body differs,
    InvalidInputError, which names the message. Without keys `append_messages.sql`, else `append_messages_keyed.sql`.
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
            "some keys of the batch are stored and some are not, or a stored message has another body: nothing was "
            "written"
        )
    # a message without a key is a new one, and new ones have their places in order of the batch
    rank = {key: index for index, key in enumerate(keys)}
    return sorted(stored, key=_in_order if None in rank else lambda message: rank[message.key])


async def get_history(
    db: Database, *, user_id: str, conversation_id: int, limit: int = 100, before_seq: int | None = None
) -> list[Message]:
    """
    Return the newest messages of a conversation, oldest first; with `before_seq` the newest before that place.

    The first `seq` of a page is the `before_seq` of the page before it. `limit` is 1 to 10,000. Empty when there are
    no messages.

    Raises ConversationNotFoundError when the user has no such conversation, whoever else may have it.
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
    Return the messages of a conversation after a place, oldest first.

    The last `seq` of a page is the `after_seq` of the next. Because `seq` follows the order of commits, a reader that
    goes on from there misses nothing. `limit` is 1 to 10,000. Empty at the end.

    Raises ConversationNotFoundError when the user has no such conversation, whoever else may have it.
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
    Iterate over all messages of a conversation after a place, oldest first, in pages of `batch` (1 to 10,000).

    Each page is one `list_messages.sql`; no connection is held and no more than a page is in memory between them.

    Raises ConversationNotFoundError, also when the conversation is deleted meanwhile.
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
    Return the message at a place of a conversation.

    Raises ConversationNotFoundError, or MessageNotFoundError when the conversation has no message there.
    """
    return _or_not_found(
        await _get_message.fetch_optional(db, check_user_id(user_id), check_id(conversation_id), check_seq("seq", seq))
    )


async def get_message_by_key(db: Database, *, user_id: str, conversation_id: int, key: str) -> Message:
    """
    Return the message of a conversation that was appended with this `key`.

    Raises ConversationNotFoundError, or MessageNotFoundError when the conversation has no such message.
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
    payload: Any = UNSET,  # noqa: ANN401 - any JSON value
    metadata: dict[str, Any] | Unset | None = UNSET,
    token_count: int | Unset | None = UNSET,
) -> Message:
    """
    Replace parts of a message; None clears them (not `content`), what is not given stays.

    `seq`, `role`, `key`, `created_at` and the conversation's place in the list stay as they are.

    Raises ConversationNotFoundError, MessageNotFoundError, InvalidInputError.
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
    Delete the message at a place of a conversation. The place stays empty and `last_seq` as it is; its key is free.

    Raises ConversationNotFoundError, or MessageNotFoundError when the conversation has no message there.
    """
    deleted = await _delete_message.fetch_one(
        db, check_user_id(user_id), check_id(conversation_id), check_seq("seq", seq)
    )
    return _or_not_found(deleted if deleted.messages else None)


async def delete_messages_after(db: Database, *, user_id: str, conversation_id: int, seq: int) -> Deleted:
    """
    Delete the messages with a greater `seq`, as an edit or a regeneration needs, and return how many went.

    The places stay empty and `last_seq` as it is.

    Raises ConversationNotFoundError.
    """
    return await _delete_messages_after.fetch_one(
        db, check_user_id(user_id), check_id(conversation_id), check_seq("seq", seq)
    )


def _or_not_found(found: _FoundT | None) -> _FoundT:
    if found is None:
        raise MessageNotFoundError("the conversation has no such message: check seq or key")
    return found
