"""
Functions for conversations. Each function runs the SQL file of the same name in `sql/`.

Decisions: docs/decisions/0002-tenant-first-keys.md, 0003-the-list-is-ordered-by-day.md,
0012-one-statement-for-id-and-key.md
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeVar

from chatdb._core.driver_errors import ROW_SUPPRESSED
from chatdb._core.query import Database, JoinedQuery, Query
from chatdb._core.validate import (
    MAX_NAME,
    as_columns,
    check_after,
    check_bool,
    check_choice,
    check_conversation,
    check_conversation_metadata,
    check_conversation_patch,
    check_expected,
    check_key,
    check_limit,
    check_messages,
    check_text,
    check_title,
    check_user_id,
    if_given,
    refuse_both,
)
from chatdb.errors import ConfigurationError, ConversationNotFoundError, InvalidInputError, UnavailableError
from chatdb.pool import run_until_settled
from chatdb.records import NEW, UNSET, Conversation, Deleted, Message, New, NewMessage, Unset
from chatdb.replicas import reader_at_least, refuse_reader

_create_conversation = Query("create_conversation", Conversation)
_create_conversation_keyed = Query("create_conversation_keyed", Conversation, idempotent=True)
_create_conversation_messages = Query("create_conversation_messages", Conversation, has_refusal=True)
_upsert_conversation = Query("upsert_conversation", Conversation, idempotent=True)
_get_conversation = Query("get_conversation", Conversation, idempotent=True)
_load_conversation = JoinedQuery("load_conversation", Conversation, idempotent=True)
_list_conversations = Query("list_conversations", Conversation, idempotent=True)
_list_conversations_after = Query("list_conversations_after", Conversation, idempotent=True)
_list_conversations_archived = Query("list_conversations_archived", Conversation, idempotent=True)
_list_conversations_all = Query("list_conversations_all", Conversation, idempotent=True)
_list_conversations_created = Query("list_conversations_created", Conversation, idempotent=True)
_list_conversations_created_ascending = Query("list_conversations_created_ascending", Conversation, idempotent=True)
_list_previews = JoinedQuery("list_previews", Conversation, idempotent=True)
_list_previews_archived = JoinedQuery("list_previews_archived", Conversation, idempotent=True)
_list_previews_all = JoinedQuery("list_previews_all", Conversation, idempotent=True)
_list_previews_created = JoinedQuery("list_previews_created", Conversation, idempotent=True)
_list_previews_created_ascending = JoinedQuery("list_previews_created_ascending", Conversation, idempotent=True)
_list_pinned = Query("list_pinned", Conversation, idempotent=True)
_update_conversation = Query("update_conversation", Conversation, has_refusal=True)
_delete_conversation = Query("delete_conversation", Deleted, has_refusal=True)

QueryT = TypeVar("QueryT", Query[Conversation], JoinedQuery)

_NO_MESSAGES: Final[tuple[NewMessage, ...]] = ()

_ATTEMPTS: Final = 10
"""Attempts to create a conversation whose key others create and delete; on a busy machine, three can all fail."""


async def create_conversation(
    db: Database,
    *,
    user_id: str,
    title: str | None = None,
    key: str | None = None,
    metadata: Mapping[str, object] | None = None,
    messages: Iterable[NewMessage | Mapping[str, object]] = _NO_MESSAGES,
    expected: New | None = None,
) -> Conversation:
    """
    Create a conversation, with its first messages if any, or return the one that already has this `key`.

    `key` is 1 to 255 characters and unique per user. It makes the call safe to repeat: a stored conversation with this
    key is returned unchanged, and the other arguments are ignored; with `expected=NEW`, it raises StaleError instead.
    `title` is at most 1,000 characters. `metadata` is a dict of at most 1 MiB as JSON. `messages` are those of
    `append_messages`.

    Raises StaleError or InvalidInputError. SQL: `create_conversation.sql`, `create_conversation_keyed.sql` with a key,
    or `create_conversation_messages.sql` with messages or `expected`.
    """
    user = check_user_id(user_id)
    title = check_title("title", title)
    data = check_conversation_metadata("metadata", metadata)
    key = check_key("key", key)
    if expected is not None and expected is not NEW:
        raise InvalidInputError("expected", "must be NEW or None")
    # with NEW, a retry would refuse the conversation that the first try created
    is_idempotent = key is not None and expected is not NEW
    batch = [] if messages is _NO_MESSAGES else await check_messages(messages)
    if batch or (expected is NEW and key is not None):
        for _ in range(_ATTEMPTS):
            created = await _create_conversation_messages.fetch_all(
                db, user, title, data, key, expected is NEW, *as_columns(batch), idempotent=is_idempotent
            )
            if created:
                return created[0]
            if key is None:
                raise ConfigurationError(ROW_SUPPRESSED.format("conversations"))
    elif key is None:
        try:
            return await _create_conversation.fetch_one(db, user, title, data)
        except ConversationNotFoundError:  # the statement returned no row
            raise ConfigurationError(ROW_SUPPRESSED.format("conversations")) from None
    else:
        for _ in range(_ATTEMPTS):
            # Empty if another caller inserted the key after the statement's snapshot.
            stored = await _create_conversation_keyed.fetch_all(db, user, title, data, key)
            if stored:
                return stored[0]
    raise UnavailableError(
        "other callers keep creating and deleting a conversation with this key: try again", sent=True
    )


async def upsert_conversation(
    db: Database,
    *,
    user_id: str,
    key: str,
    title: str | None = None,
    metadata: Mapping[str, object] | None = None,
    metadata_patch: Mapping[str, object] | Unset = UNSET,
    archived: bool | Unset | None = UNSET,
) -> Conversation:
    """
    Create the conversation with this `key`, or replace its title and metadata, and return the stored record.

    The limits are those of `create_conversation`. With `metadata_patch`, the stored metadata is not replaced: the patch
    is merged into it, as in `update_conversation`. `archived` does what it does there; left `UNSET`, it changes
    nothing. The revision rises only if a value changes.

    Raises InvalidInputError. SQL: `upsert_conversation.sql`.
    """
    patch: tuple[str | None, list[str] | None] = (None, None)
    if metadata_patch is not UNSET:
        refuse_both("metadata_patch", "metadata", metadata)
        patch = check_conversation_patch("metadata_patch", metadata_patch)
    stored = await _upsert_conversation.fetch_all(
        db,
        check_user_id(user_id),
        check_text("key", key, least=1, most=MAX_NAME),
        check_title("title", title),
        check_conversation_metadata("metadata", metadata),
        *patch,
        None if archived is UNSET else archived is not None and check_bool("archived", archived),
    )
    if not stored:
        raise ConfigurationError(ROW_SUPPRESSED.format("conversations"))
    return stored[0]


async def get_conversation(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    at_least: int | None = None,
) -> Conversation:
    """
    Return one conversation by its id or its key.

    `at_least` is for a reader: a replica answers only if its `last_seq` is at least this; otherwise the primary does.

    Raises ConversationNotFoundError if the user has no such conversation, even if another user has one with this id, or
    InvalidInputError unless exactly one of `conversation_id` and `conversation_key` is given. SQL:
    `get_conversation.sql`.
    """
    if at_least is not None:
        db = reader_at_least(db, at_least, _has_last_seq)
    return await _get_conversation.fetch_one(
        db, check_user_id(user_id), *check_conversation(conversation_id, conversation_key)
    )


async def load_conversation(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    limit: int = 100,
    at_least: int | None = None,
) -> tuple[Conversation, list[Message]]:
    """
    Return a conversation and the newest messages of its current line, oldest first, in one round trip.

    `limit` is 1 to 10,000 messages. `at_least` is that of `get_conversation`.

    Raises ConversationNotFoundError or InvalidInputError. SQL: `load_conversation.sql`.
    """
    if at_least is not None:
        db = reader_at_least(db, at_least, _has_last_seq)
    conversation, newest_first = await _load_conversation.fetch_with_messages(
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        check_limit("limit", limit),
    )
    newest_first.reverse()
    return conversation, newest_first


def _has_last_seq(rows: list[Any], at_least: int) -> bool:
    return bool(rows[0]["last_seq"] >= at_least)


OrderBy = Literal["updated_at", "created_at"]


async def list_conversations(
    db: Database,
    *,
    user_id: str,
    limit: int = 20,
    after: Conversation | str | None = None,
    after_key: str | None = None,
    archived: bool | None = False,
    order_by: OrderBy = "updated_at",
    descending: bool = True,
) -> list[Conversation]:
    """
    Return a page of a user's conversations, latest activity first.

    `limit` is 1 to 10,000. For the next page, pass the last conversation of this page, or its `cursor`, as `after`. Its
    position at the time of reading counts, so no page repeats a conversation; one that becomes active in the meantime
    moves to the first page. `after_key` starts after the current position of the conversation with this key instead.

    `archived` selects the conversations that are not archived (False), those that are (True), or both (None).
    `order_by="created_at"` lists by creation, and then `descending=False` starts with the oldest. The list is empty for
    an unknown user.

    Raises ConversationNotFoundError if no conversation has `after_key`, or InvalidInputError. SQL:
    `list_conversations.sql`, or the file with the suffix `_after`, `_archived`, `_all`, `_created` or
    `_created_ascending`.
    """
    is_plain = after is None and after_key is None and archived is False and descending is True
    if is_plain and type(order_by) is str and order_by == "updated_at":
        return await _list_conversations.fetch_all(db, check_user_id(user_id), check_limit("limit", limit))
    query, user, args = _page(_LISTS, user_id, limit, after, after_key, archived, order_by, descending)
    return await query.fetch_page(db, user, *args)


async def list_previews(
    db: Database,
    *,
    user_id: str,
    limit: int = 20,
    after: Conversation | str | None = None,
    after_key: str | None = None,
    archived: bool | None = False,
    order_by: OrderBy = "updated_at",
    descending: bool = True,
) -> list[tuple[Conversation, Message | None]]:
    """
    Return a page of a user's conversations, each with the newest message of its line, or None if it has none.

    The arguments and errors are those of `list_conversations`. SQL: `list_previews.sql`, or the file with the suffix
    `_archived`, `_all`, `_created` or `_created_ascending`.
    """
    query, user, args = _page(_PREVIEWS, user_id, limit, after, after_key, archived, order_by, descending)
    return await query.fetch_pairs(db, user, *args)


_LISTS: dict[tuple[str, bool | None], Query[Conversation]] = {
    ("updated_at", False): _list_conversations_after,
    ("updated_at", True): _list_conversations_archived,
    ("updated_at", None): _list_conversations_all,
    ("created_at", True): _list_conversations_created,
    ("created_at", False): _list_conversations_created_ascending,
}
_PREVIEWS: dict[tuple[str, bool | None], JoinedQuery] = {
    ("updated_at", False): _list_previews,
    ("updated_at", True): _list_previews_archived,
    ("updated_at", None): _list_previews_all,
    ("created_at", True): _list_previews_created,
    ("created_at", False): _list_previews_created_ascending,
}
"""Queries by `order_by` and `archived`; those by creation, by `descending`."""


def _page(
    queries: dict[tuple[str, bool | None], QueryT],
    user_id: str,
    limit: int,
    after: Conversation | str | None,
    after_key: str | None,
    archived: bool | None,
    order_by: str,
    descending: bool,
) -> tuple[QueryT, str, tuple[Any, ...]]:
    """Return the query of a page, the user and the other arguments."""
    user = check_user_id(user_id)
    rows = check_limit("limit", limit)
    order = check_choice("order_by", order_by, "updated_at", "created_at")
    is_descending = check_bool("descending", descending)
    chosen = None if archived is None else check_bool("archived", archived)
    if after_key is not None:
        refuse_both("after_key", "after", after)
    time, identifier = check_after(after, order)
    place: tuple[Any, ...] = (time, identifier, check_key("after_key", after_key))
    if order == "created_at":
        return queries[order, is_descending], user, (*place, chosen, rows)
    if not is_descending:
        raise InvalidInputError("descending", 'can be False only with order_by="created_at"')
    return queries[order, chosen], user, (*place, rows)


async def list_pinned(db: Database, *, user_id: str, limit: int = 100) -> list[Conversation]:
    """
    Return a user's pinned conversations, latest pin first, without archived ones.

    `limit` is 1 to 10,000.

    Raises InvalidInputError. SQL: `list_pinned.sql`.
    """
    return await _list_pinned.fetch_all(db, check_user_id(user_id), check_limit("limit", limit))


async def update_conversation(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    title: str | Unset | None = UNSET,
    metadata: Mapping[str, object] | Unset | None = UNSET,
    metadata_patch: Mapping[str, object] | Unset = UNSET,
    archived: bool | Unset | None = UNSET,
    pinned: bool | Unset | None = UNSET,
    expected: Conversation | str | None = None,
) -> Conversation:
    """
    Change a conversation and return the stored record.

    None clears a value; an argument left `UNSET` keeps it. `metadata_patch` is merged into the top level of the
    metadata, and a None in it removes that key. `archived` and `pinned` set `archived_at` and `pinned_at`; False or
    None clears them. `updated_at` does not change, so the conversation keeps its position in `list_conversations`. The
    revision rises only if a value changes.

    `expected`, a Conversation or its `etag`, raises StaleError if another caller has written to the conversation since.

    Raises ConversationNotFoundError, StaleError or InvalidInputError. SQL: `update_conversation.sql`, which runs again
    if another write to the conversation commits first.
    """
    user = check_user_id(user_id)
    address = check_conversation(conversation_id, conversation_key)
    if metadata_patch is not UNSET:
        refuse_both("metadata_patch", "metadata", None if metadata is UNSET else metadata_patch)
    patch = (None, None) if metadata_patch is UNSET else check_conversation_patch("metadata_patch", metadata_patch)
    values = (
        *if_given(check_title, "title", title),
        *if_given(check_conversation_metadata, "metadata", metadata),
        *patch,
        None if archived is UNSET else archived is not None and check_bool("archived", archived),
        None if pinned is UNSET else pinned is not None and check_bool("pinned", pinned),
    )
    state = check_expected(expected)
    if values == _NO_VALUES and expected is None:
        refuse_reader(db, "update_conversation")
        return await _get_conversation.fetch_one(db, user, *address)
    return await run_until_settled(_update_conversation.fetch_one, db, user, *address, *values, *state)


_NO_VALUES = (False, None, False, None, None, None, None, None)


async def delete_conversation(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    expected: Conversation | str | None = None,
) -> Deleted:
    """
    Delete a conversation with all its messages and return the number of deleted rows.

    `expected`, a Conversation or its `etag`, raises StaleError if another caller has written to the conversation since.

    Raises ConversationNotFoundError, StaleError or InvalidInputError. SQL: `delete_conversation.sql`, which runs again
    if another write to the conversation commits first.
    """
    return await run_until_settled(
        _delete_conversation.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_expected(expected),
    )
