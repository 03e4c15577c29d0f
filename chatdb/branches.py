"""
Functions for branches. Each function runs the SQL file of the same name in `sql/`.

A conversation is a log of messages in order of `seq`. A *line* is a path through it that ends with its *head*: each
message follows the one before it in order of `seq`, unless its `parent_seq` names another. *Versions* are messages that
follow the same message.

Decisions: docs/decisions/0014-branches-are-runs.md, 0015-context-by-a-run-condition.md
"""

from __future__ import annotations

from chatdb._core.query import Database, HistoryQuery, Query
from chatdb._core.validate import (
    MAX_BIGINT,
    check_conversation,
    check_expected,
    check_int,
    check_key,
    check_limit,
    check_message,
    check_seq,
    check_user_id,
    refuse_both,
)
from chatdb.pool import run_until_settled
from chatdb.records import Conversation, Deleted, Message, MessageVersions

_get_branch = Query("get_branch", Message, from_arguments=("user_id", "conversation_id"), idempotent=True)
_get_branch_top = HistoryQuery("get_branch_top", first="top_seq")
_get_context = HistoryQuery("get_context")
_list_versions = Query("list_versions", MessageVersions, idempotent=True)
_switch_branch = Query("switch_branch", Conversation, has_refusal=True)
_delete_branch = Query("delete_branch", Deleted, has_refusal=True)
_fork_conversation = Query("fork_conversation", Conversation, has_refusal=True)


async def get_branch(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    limit: int = 100,
    before_seq: int | None = None,
    top_seq: int | None = None,
) -> list[Message]:
    """
    Return the newest messages of the current line, oldest first.

    `limit` is 1 to 10,000. With `before_seq`, return the newest messages of the line before that position: to page
    back, pass the `seq` of the first message of this page. `top_seq` selects the line that ends with that message
    instead. The list is empty if no messages are left. Without branches, the line is the whole conversation.

    Raises ConversationNotFoundError, MessageNotFoundError if no message has `top_seq`, or InvalidInputError. SQL:
    `get_branch.sql`, or `get_branch_top.sql` with `top_seq` or a key.
    """
    user = check_user_id(user_id)
    address = check_conversation(conversation_id, conversation_key)
    top = None if top_seq is None else check_seq("top_seq", top_seq)
    before = MAX_BIGINT if before_seq is None else check_seq("before_seq", before_seq)
    rows = check_limit("limit", limit)
    if top is None and address[0] is not None:
        newest_first = await _get_branch.fetch_page(db, user, address[0], before, rows)
    else:
        newest_first = await _get_branch_top.fetch_history(db, user, *address, top, before, rows)
    newest_first.reverse()
    return newest_first


async def list_versions(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    limit: int = 100,
    before_seq: int | None = None,
) -> dict[int, list[int]]:
    """
    Return the messages of a page of the current line that have other versions, each with the seqs of all its versions.

    The page is that of `get_branch` with the same `limit` and `before_seq`. The result maps the `seq` of a message to
    the seqs of its versions, itself included, in ascending order: the message is number `seqs.index(seq) + 1` of
    `len(seqs)`, the "2 of 3" of a chat. `switch_branch` selects another version.

    Raises ConversationNotFoundError or InvalidInputError. SQL: `list_versions.sql`.
    """
    found = await _list_versions.fetch_page(
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        MAX_BIGINT if before_seq is None else check_seq("before_seq", before_seq),
        check_limit("limit", limit),
    )
    return {each.seq: each.seqs for each in sorted(found, key=lambda each: each.seq)}


async def switch_branch(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    seq: int | None = None,
    key: str | None = None,
    expected: Conversation | str | None = None,
) -> Conversation:
    """
    Make the newest message that follows a version the head, and return the stored conversation.

    `seq` or `key` names the version; if nothing follows it, it becomes the head itself. The next append follows the
    head. The conversation keeps its position in `list_conversations`, and its revision rises if the head changes.
    `expected`, a Conversation or its `etag`, raises StaleError if another caller has written to the conversation since.

    Raises ConversationNotFoundError, StaleError, MessageNotFoundError or InvalidInputError. SQL: `switch_branch.sql`,
    which runs again if another write to the conversation commits first.
    """
    return await run_until_settled(
        _switch_branch.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_message(seq, key),
        *check_expected(expected),
    )


async def delete_branch(
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
    Delete a version and all messages that follow it, and return the number of deleted rows.

    `seq` or `key` names the version. If the head is deleted, the message before the version becomes the head. The
    deleted positions are never reused and `last_seq` does not change. `expected` is that of `switch_branch`.

    Raises ConversationNotFoundError, StaleError, MessageNotFoundError or InvalidInputError. SQL: `delete_branch.sql`,
    which runs again if another write to the conversation commits first.
    """
    return await run_until_settled(
        _delete_branch.fetch_one,
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        *check_message(seq, key),
        *check_expected(expected),
    )


async def fork_conversation(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    seq: int | None = None,
    key: str | None = None,
    new_key: str | None = None,
) -> Conversation:
    """
    Copy the current line, or the line up to a message, into a new conversation, and return that.

    `seq` or `key` names the last message to copy. Title and metadata are copied, and of each message everything but its
    `id` and `seq`: the new ones start at 1. `new_key` is the key of the new conversation.

    Raises ConversationNotFoundError, MessageNotFoundError, ConflictError if the user already has a conversation with
    `new_key`, or InvalidInputError. SQL: `fork_conversation.sql`.
    """
    if key is not None:
        refuse_both("key", "seq", seq)
    return await _fork_conversation.fetch_one(
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        None if seq is None else check_seq("seq", seq),
        check_key("key", key),
        check_key("new_key", new_key),
    )


async def get_context(
    db: Database,
    *,
    user_id: str,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    max_tokens: int,
    limit: int = 1000,
) -> list[Message]:
    """
    Return the newest messages of the current line that fit a model's window, oldest first.

    Together they have at most `max_tokens` (1 to 2**63-1) tokens. A message without `token_count` counts as one token
    for every four bytes of its content, plus one; its payload does not count. If the line begins with a system or
    developer message, that message comes first and counts too. `limit` is 1 to 10,000 messages besides it.

    The messages begin with one of the user, unless the whole line fits, and an assistant's message, the call, comes
    before each result of a tool. If the last turn alone is too large, only the leading message is returned, or nothing
    if that is too large as well.

    Raises ConversationNotFoundError or InvalidInputError. SQL: `get_context.sql`, which stops reading at the first
    message that does not fit; PostgreSQL 14 reads `limit` messages.
    """
    newest_first = await _get_context.fetch_history(
        db,
        check_user_id(user_id),
        *check_conversation(conversation_id, conversation_key),
        check_int("max_tokens", max_tokens, least=1),
        check_limit("limit", limit),
    )
    newest_first.reverse()
    return newest_first
