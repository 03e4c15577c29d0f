"""
Functions for messages. Each function runs the SQL file of the same name in `sql/`.

Decisions: docs/decisions/0001-seq-is-a-counter.md, 0002-tenant-first-keys.md,
0011-revision-and-compare-and-set.md, 0012-one-statement-for-id-and-key.md
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final, Literal

from chatdb._core.driver_errors import ROW_SUPPRESSED
from chatdb._core.query import AppendQuery, Database, HistoryQuery, Query
from chatdb._core.validate import (
    MAX_BIGINT,
    MAX_NAME,
    as_columns,
    check_bool,
    check_choice,
    check_content,
    check_conversation,
    check_conversation_patch,
    check_expected,
    check_key,
    check_limit,
    check_message,
    check_messages,
    check_metadata,
    check_patch,
    check_payload,
    check_position,
    check_role,
    check_seq,
    check_text,
    check_token_count,
    check_user_id,
    if_given,
    refuse_both,
)
from chatdb.conversations import get_conversation
from chatdb.errors import ConfigurationError, ConversationNotFoundError, InvalidInputError
from chatdb.pool import run_until_settled
from chatdb.records import UNSET, Conversation, Deleted, Message, New, NewMessage, Role, Unset
from chatdb.replicas import primary_of, reader_at_least, refuse_reader

_SENT: Final = ("role", "content", "payload", "token_count", "key")

_append_message = Query(
    "append_message", Message, from_arguments=("user_id",), from_messages=_SENT, hint="conversation_id"
)
_append_message_conditional = Query(
    "append_message_conditional",
    Message,
    from_arguments=("user_id",),
    from_messages=("role", "content", "payload", "key"),
    has_refusal=True,
    hint="conversation_id",
)
_append_messages = AppendQuery(
    "append_messages", Message, from_arguments=("user_id",), from_messages=_SENT, hint="conversation_id"
)
_append_messages_two = AppendQuery(
    "append_messages_two", Message, from_arguments=("user_id",), from_messages=_SENT, hint="conversation_id"
)
_append_messages_conditional = AppendQuery(
    "append_messages_conditional",
    Message,
    from_arguments=("user_id",),
    from_messages=("role", "content", "payload"),
    has_refusal=True,
    hint="conversation_id",
)
_upsert_message = Query(
    "upsert_message",
    Message,
    from_arguments=("user_id",),
    from_messages=_SENT,
    has_refusal=True,
    idempotent=True,
    hint="conversation_id",
)
_replace_messages_after = AppendQuery(
    "replace_messages_after",
    Message,
    from_arguments=("user_id",),
    from_messages=("role", "content", "payload"),
    has_refusal=True,
    hint="conversation_id",
)
_pop_message = Query("pop_message", Message, has_refusal=True)
# without the subquery of a key, a page of 20 takes 4 % less time; without the user and the conversation in each row, a
# page of 100 takes an eighth less under load
_get_history = Query("get_history", Message, from_arguments=("user_id", "conversation_id"), idempotent=True)
_get_history_by_key = Query("get_history_by_key", Message, from_arguments=("user_id",), idempotent=True)
_get_history_before_key = HistoryQuery("get_history_before_key", first="before_key")
_list_messages = HistoryQuery("list_messages")
_list_messages_after_key = HistoryQuery("list_messages_after_key", first="after_key")
_get_message = Query("get_message", Message, idempotent=True)
_update_message = Query("update_message", Message, has_refusal=True)
_delete_message = Query("delete_message", Deleted, has_refusal=True)
_delete_messages_after = Query("delete_messages_after", Deleted, has_refusal=True)


async def append_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    role: Role,
    content: str,
    payload: object = None,
    metadata: Mapping[str, object] | None = None,
    token_count: int | None = None,
    key: str | None = None,
    create: bool = False,
    parent_seq: int | None = None,
    expected: Conversation | str | New | None = None,
    conversation_metadata_patch: Mapping[str, object] | None = None,
) -> Message:
    """
    Append a message to a conversation, after its head, and return the stored record.

    `content` is the readable text, at most 4 MiB as UTF-8. `payload` is any JSON value of at most 16 MiB; pass
    `JsonText` to store it byte for byte. `metadata` is a dict of at most 64 KiB as JSON. `token_count` is 0 to
    2,147,483,647. `key` is 1 to 255 characters and unique in the conversation. It makes the call safe to repeat: the
    same key with the same role, content, payload text and metadata returns the stored message and writes nothing.

    `create=True` creates a missing conversation with this `conversation_key`. `parent_seq` is the message that this one
    follows instead of the head: a second answer to a question, for example, or 0 for another first message. The new
    message becomes the head. `expected` (a Conversation, its `etag`, or `NEW` for a conversation that must not exist
    yet) raises StaleError if another caller has written to the conversation since. `conversation_metadata_patch` is
    merged into the top level of the conversation's metadata, and a None in it removes that key.

    Raises ConversationNotFoundError, ConflictError if the key is stored with a different body, StaleError,
    MessageNotFoundError if no message has `parent_seq`, or InvalidInputError. SQL: `append_message.sql`, or
    `append_message_conditional.sql` with any of these options.
    """
    user = check_user_id(user_id)
    address = check_conversation(conversation_id, conversation_key)
    message = (
        check_role("role", role),
        check_content("content", content),
        None if payload is None else check_payload("payload", payload),
        None if metadata is None else check_metadata("metadata", metadata),
        None if token_count is None else check_token_count("token_count", token_count),
        None if key is None else check_key("key", key),
    )
    is_plain = create is False and parent_seq is None and expected is None and conversation_metadata_patch is None
    if is_plain and key is None:
        for _ in range(3):
            with contextlib.suppress(ConversationNotFoundError):
                return await _append_message.fetch_one(db, user, *address, *message[:5], messages=(message,))
            # without a row, there was no conversation, or a trigger suppressed the row
            await get_conversation(db, user_id=user, conversation_id=conversation_id, conversation_key=conversation_key)
        raise ConfigurationError(ROW_SUPPRESSED.format("messages"))
    options = _check_options(address, create, parent_seq, expected, conversation_metadata_patch)
    return await run_until_settled(
        _append_message_conditional.fetch_one,
        db,
        user,
        *address,
        *message,
        *options,
        messages=(message,),
        idempotent=key is not None,
    )


def _check_options(
    address: tuple[int | None, str | None], create: object, parent_seq: object, expected: object, patch: object
) -> tuple[bool, int | None, int | None, str | None, list[str] | None, int | None]:
    """Return a conditional append's arguments: create, expected id and revision, patch, removed keys and parent."""
    may_create = check_bool("create", create)
    if may_create and address[1] is None:
        raise InvalidInputError("create", "can be True only with a conversation_key")
    parent = None if parent_seq is None else check_seq("parent_seq", parent_seq)
    identifier, revision = check_expected(expected, may_be_new=may_create)
    merged, removed = None, None
    if patch is not None:
        merged, removed = check_conversation_patch("conversation_metadata_patch", patch)
    # an etag belongs to a stored conversation: if that is missing, it was deleted
    return may_create and revision in {None, -1}, identifier, revision, merged, removed, parent


async def append_messages(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    messages: Iterable[NewMessage | Mapping[str, object]],
    on_existing: Literal["conflict", "skip"] = "conflict",
    create: bool = False,
    parent_seq: int | None = None,
    expected: Conversation | str | New | None = None,
    conversation_metadata_patch: Mapping[str, object] | None = None,
) -> list[Message]:
    """
    Append messages in order, all or none, and return the stored records.

    Each message is a `NewMessage` or a dict with its fields. A batch is at most 10,000 messages and 64 MiB of content,
    payload, metadata and keys together; an empty batch returns an empty list. All messages of a batch have the same
    `created_at`. Keys are distinct within a batch. If all keys are already stored with the same bodies, the stored
    messages are returned and nothing is written. `on_existing="skip"` appends only the messages whose keys are new, and
    returns only these. The first message follows `parent_seq` or the head, and each other one the message before it.
    The other options are those of `append_message`.

    Raises ConversationNotFoundError, ConflictError if only some keys are stored or a body differs, StaleError,
    MessageNotFoundError if no message has `parent_seq`, or InvalidInputError, which names the message. SQL:
    `append_messages.sql`, `append_messages_two.sql` for two messages by conversation_id, or
    `append_messages_conditional.sql` with keys or any of the options.
    """
    user = check_user_id(user_id)
    address = check_conversation(conversation_id, conversation_key)
    skip = check_choice("on_existing", on_existing, "conflict", "skip") == "skip"
    batch = await check_messages(messages)
    has_keys = any(message[-1] is not None for message in batch)
    is_plain = create is False and parent_seq is None and expected is None and conversation_metadata_patch is None
    if is_plain and not batch:
        refuse_reader(db, "append_messages")
        await get_conversation(db, user_id=user, conversation_id=conversation_id, conversation_key=conversation_key)
        return []
    if is_plain and not has_keys:
        for _ in range(3):
            with contextlib.suppress(ConversationNotFoundError):
                if len(batch) == 2 and conversation_key is None:
                    two = (*batch[0][:5], *batch[1][:5])
                    stored = await _append_messages_two.fetch_appended(db, user, address[0], *two, messages=batch)
                else:
                    columns = as_columns(batch)[:5]
                    stored = await _append_messages.fetch_appended(db, user, *address, *columns, messages=batch)
                if len(stored) < len(batch):
                    break
                return stored
            # without a row, there was no conversation, or a trigger suppressed the rows
            await get_conversation(db, user_id=user, conversation_id=conversation_id, conversation_key=conversation_key)
        raise ConfigurationError(ROW_SUPPRESSED.format("messages"))
    options = _check_options(address, create, parent_seq, expected, conversation_metadata_patch)
    return await run_until_settled(
        _append_messages_conditional.fetch_appended,
        db,
        user,
        *address,
        *as_columns(batch),
        skip,
        *options,
        messages=batch,
        # an empty batch leaves no key by which a retry could find that the first try succeeded
        idempotent=all(message[-1] is not None for message in batch) and (expected is None or bool(batch)),
    )


async def upsert_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    key: str,
    role: Role,
    content: str,
    payload: object = None,
    metadata: Mapping[str, object] | None = None,
    token_count: int | None = None,
    expected: Conversation | str | None = None,
) -> Message:
    """
    Append the message with this `key`, or replace the stored one, and return the stored record.

    A replaced message keeps its `seq` and `created_at`. A message that is stored with the same values is returned and
    nothing is written. The limits are those of `append_message`. `expected` is that of `update_message`.

    Raises ConversationNotFoundError, StaleError or InvalidInputError. SQL: `upsert_message.sql`.
    """
    message = (
        check_role("role", role),
        check_content("content", content),
        check_payload("payload", payload),
        check_metadata("metadata", metadata),
        check_token_count("token_count", token_count),
        check_text("key", key, least=1, most=MAX_NAME),
    )
    return await run_until_settled(
        _upsert_message.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *message,
        *check_expected(expected),
        messages=(message,),
    )


async def replace_messages_after(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    after_seq: int,
    messages: Iterable[NewMessage | Mapping[str, object]],
    expected: Conversation | str,
) -> list[Message]:
    """
    Delete all messages after `after_seq`, append others in their place, and return the stored records.

    Messages of every branch are deleted; to keep them, append with `parent_seq` instead. The new ones follow the last
    message of the current line that is left.

    `expected`, a Conversation or its `etag`, is required: it guarantees that the deleted messages are those that the
    caller has read. `after_seq` may be 0, or the position of a deleted message. If every message has a key and is
    already stored after `after_seq`, the stored messages are returned, so the call is safe to repeat.

    Raises ConversationNotFoundError, ConflictError if an earlier message has one of the keys, StaleError or
    InvalidInputError. SQL: `replace_messages_after.sql`.
    """
    user = check_user_id(user_id)
    address = check_conversation(conversation_id, conversation_key)
    place = check_seq("after_seq", after_seq)
    if expected is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise InvalidInputError("expected", "must be the Conversation as it was read, or its etag")
    state = check_expected(expected)
    batch = await check_messages(messages)
    return await run_until_settled(
        _replace_messages_after.fetch_appended, db, user, *address, place, *state, *as_columns(batch), messages=batch
    )


async def pop_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    expected: Conversation | str | None = None,
) -> Message | None:
    """
    Delete the head, the newest message of the current line, and return it, or None if there is none.

    The message before it on the line becomes the head. The `seq` is never reused. `expected` is that of
    `update_message`.

    Raises ConversationNotFoundError, StaleError or InvalidInputError. SQL: `pop_message.sql`, which runs again if
    another write to the conversation commits first.
    """
    return await run_until_settled(
        _pop_message.fetch_optional,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_expected(expected),
    )


async def get_history(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    limit: int = 100,
    before_seq: int | None = None,
    before_key: str | None = None,
    at_least: int | None = None,
) -> list[Message]:
    """
    Return the newest messages of a conversation, of all branches, oldest first.

    `get_branch` returns the messages of one line. `limit` is 1 to 10,000. With `before_seq` or `before_key`, return the
    newest messages before that message: to page back, pass the `seq` of the first message of this page. The list is
    empty if no messages are left.

    `at_least` is for a reader: a replica answers only if it returns a message with this `seq` or a later one, or the
    message before `before_seq` if that is earlier. Otherwise the primary does.

    Raises ConversationNotFoundError, MessageNotFoundError if no message has `before_key`, or InvalidInputError. SQL:
    `get_history.sql`, `get_history_by_key.sql`, or `get_history_before_key.sql` with `before_key`.
    """
    user = check_user_id(user_id)
    address = check_conversation(conversation_id, conversation_key)
    seq, key = check_position("before", before_seq, before_key, start=MAX_BIGINT)
    rows = check_limit("limit", limit)
    if at_least is not None:
        last = MAX_BIGINT if seq is None else seq - 1
        db = reader_at_least(db, at_least, lambda found, least: bool(found[0]["seq"] >= min(least, last)))
    if key is not None:
        newest_first = await _get_history_before_key.fetch_history(db, user, *address, key, rows)
    elif address[0] is not None:
        newest_first = await _get_history.fetch_page(db, user, address[0], seq, rows)
    else:
        newest_first = await _get_history_by_key.fetch_page(db, user, address[1], seq, rows)
    newest_first.reverse()
    return newest_first


async def list_messages(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    after_seq: int = 0,
    after_key: str | None = None,
    limit: int = 100,
    at_least: int | None = None,
) -> list[Message]:
    """
    Return the messages of a conversation after a position, oldest first.

    `limit` is 1 to 10,000. For the next page, pass the `seq` of the last message as `after_seq`. Because `seq` follows
    commit order, a reader that continues from there misses no message. `after_key` starts after the message with this
    key instead. The list is empty at the end.

    `at_least` is for a reader: a replica answers only if it returns `limit` messages, or one with this `seq` or a later
    one. Otherwise the primary does.

    Raises ConversationNotFoundError, MessageNotFoundError if no message has `after_key`, or InvalidInputError. SQL:
    `list_messages.sql`, or `list_messages_after_key.sql` with `after_key`.
    """
    user = check_user_id(user_id)
    address = check_conversation(conversation_id, conversation_key)
    seq, key = check_position("after", after_seq, after_key)
    rows = check_limit("limit", limit)
    if at_least is not None:
        db = reader_at_least(db, at_least, lambda found, least: _reaches(found, rows, least))
    if key is None:
        return await _list_messages.fetch_history(db, user, *address, seq, rows)
    return await _list_messages_after_key.fetch_history(db, user, *address, key, rows)


def _reaches(rows: list[Any], limit: int, seq: int) -> bool:
    """Return whether a page of a replica is full or has a message with this `seq` or a later one."""
    page = rows if rows[-1]["id"] is not None else rows[:-1]
    return len(page) >= limit or bool(page[-1]["seq"] >= seq)


async def iter_messages(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    after_seq: int = 0,
    batch: int = 500,
) -> AsyncIterator[Message]:
    """
    Iterate over the messages of a conversation after a position, oldest first.

    Messages are read in pages of `batch` (1 to 10,000). Between pages the iterator holds no connection and at most one
    page in memory.

    Raises ConversationNotFoundError, also if the conversation is deleted during the iteration, or InvalidInputError.
    SQL: `list_messages.sql`, once per page.
    """
    limit = check_limit("batch", batch)
    primary = primary_of(db)
    while True:
        page = await list_messages(
            primary,
            user_id=user_id,
            conversation_id=conversation_id,
            conversation_key=conversation_key,
            after_seq=after_seq,
            limit=limit,
        )
        for message in page:
            yield message
        if len(page) < limit:
            return
        after_seq = page[-1].seq


async def get_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    seq: int | None = None,
    key: str | None = None,
) -> Message:
    """
    Return one message by its `seq` or its `key`.

    Raises ConversationNotFoundError, MessageNotFoundError, or InvalidInputError. SQL: `get_message.sql`.
    """
    return await _get_message.fetch_message(
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_message(seq, key),
    )


async def update_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    seq: int | None = None,
    key: str | None = None,
    content: str | Unset = UNSET,
    payload: object = UNSET,
    metadata: Mapping[str, object] | Unset | None = UNSET,
    metadata_patch: Mapping[str, object] | Unset = UNSET,
    token_count: int | Unset | None = UNSET,
    expected: Conversation | str | None = None,
) -> Message:
    """
    Replace fields of a message and return the stored record.

    None clears a value, except `content`; an argument left `UNSET` keeps it. The limits are those of `append_message`.
    `metadata_patch` is merged into the top level of the metadata, and a None in it removes that key. `seq`, `role`,
    `key` and `created_at` do not change, and the conversation keeps its position in `list_conversations`.

    `expected`, a Conversation or its `etag`, raises StaleError if another caller has written to the conversation since.

    Raises ConversationNotFoundError, StaleError, MessageNotFoundError or InvalidInputError. SQL: `update_message.sql`,
    which runs again if another write to the conversation commits first.
    """
    user = check_user_id(user_id)
    address = (*check_conversation(conversation_id, conversation_key), *check_message(seq, key))
    if metadata_patch is not UNSET:
        refuse_both("metadata_patch", "metadata", None if metadata is UNSET else metadata_patch)
    patch = (None, None) if metadata_patch is UNSET else check_patch("metadata_patch", metadata_patch)
    values = (
        *if_given(check_content, "content", content),
        *if_given(check_payload, "payload", payload),
        *if_given(check_metadata, "metadata", metadata),
        *patch,
        *if_given(check_token_count, "token_count", token_count),
    )
    state = check_expected(expected)
    if values == _NO_VALUES and expected is None:
        refuse_reader(db, "update_message")
        return await _get_message.fetch_message(db, user, *address)
    return await run_until_settled(_update_message.fetch_one, db, user, *address, *values, *state)


_NO_VALUES = (False, None, False, None, False, None, None, None, False, None)


async def delete_message(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    seq: int | None = None,
    key: str | None = None,
    expected: Conversation | str | None = None,
) -> Deleted:
    """
    Delete one message by its `seq` or its `key`, and return the number of deleted rows.

    The messages that follow it then follow its parent, which becomes the head if the message was the head. The `seq` is
    never reused and `last_seq` does not change. Its key can be used again. `expected` is that of `update_message`.

    Raises ConversationNotFoundError, StaleError, MessageNotFoundError or InvalidInputError. SQL: `delete_message.sql`,
    which runs again if another write to the conversation commits first.
    """
    return await run_until_settled(
        _delete_message.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_message(seq, key),
        *check_expected(expected),
    )


async def delete_messages_after(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    after_seq: int | None = None,
    after_key: str | None = None,
    expected: Conversation | str | None = None,
) -> Deleted:
    """
    Delete all messages after a position, on every branch, and return the number of deleted rows.

    To edit or regenerate and keep the other versions, append with `parent_seq` instead.

    The position is `after_seq`, which may be 0 or that of a deleted message, or the message with `after_key`. The
    deleted positions are never reused and `last_seq` does not change. `expected` is that of `update_message`.

    Raises ConversationNotFoundError, StaleError, MessageNotFoundError if no message has `after_key`, or
    InvalidInputError. SQL: `delete_messages_after.sql`, which runs again if another write to the conversation commits
    first.
    """
    if after_seq is None and after_key is None:
        raise InvalidInputError("after_seq", "is required unless after_key is given")
    return await run_until_settled(
        _delete_messages_after.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_position("after", after_seq, after_key),
        *check_expected(expected),
    )
