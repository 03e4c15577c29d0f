"""Functions for all data of one user."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from asyncpg import PostgresError

from chatdb._core.driver_errors import constraint_of
from chatdb._core.query import Database, Query, RunAgainError
from chatdb._core.retry import RetryPolicy
from chatdb._core.validate import MAX_BIGINT, MAX_NAME, check_text, check_timeout, check_user_id
from chatdb.errors import ConfigurationError, ConflictError, InvalidInputError
from chatdb.pool import run_until_settled
from chatdb.records import Conversation, Deleted, Message, Moved

_delete_user = Query("delete_user", Deleted)
_move_user = Query("move_user", Moved, has_refusal=True)
_export_user = Query("export_user", Conversation, idempotent=True)
_export_user_messages = Query("export_user_messages", Message, idempotent=True)

_MOVE_ATTEMPTS: Final = 10

_CONVERSATIONS_PAGE: Final = 100
_MESSAGES_PAGE: Final = 500
_PAGE_BYTES: Final = 8 * 1024 * 1024


async def delete_user(db: Database, *, user_id: str, timeout: float | None = None) -> Deleted:
    """
    Delete all conversations and messages of a user and return the number of deleted rows.

    The counts are 0 for an unknown user. One statement deletes everything or nothing. `timeout`, in seconds, replaces
    the pool's command timeout; raise it for a user with very many messages.

    Raises CommandTimeoutError if the deletion takes longer. SQL: `delete_user.sql`.
    """
    return await _delete_user.fetch_one(db, check_user_id(user_id), timeout=check_timeout(timeout))


async def move_user(db: Database, *, user_id: str, to_user_id: str, timeout: float | None = None) -> Moved:
    """
    Move all conversations of a user, with their messages, to another user and return the number of moved rows.

    One statement moves everything or nothing: ids, `seq`, times and revisions stay. A conversation's key becomes None
    if the other user has a conversation with the same key. The counts are 0 for an unknown user. What the first user
    creates after the statement began stays with that user: call the function again to move it. `timeout` is that of
    `delete_user`.

    With row-level security, the role must be a superuser or have BYPASSRLS; otherwise ConfigurationError is raised.
    Raises InvalidInputError if both users are the same, or if the other one is not in the table that `chatdb
    link-users` references, ConflictError if both users have a conversation with the same id, or if the other user
    stores one of the keys meanwhile (inside your own transaction at once; otherwise after several attempts),
    UnavailableError if the conversations are written without pause, or CommandTimeoutError. SQL: `move_user.sql`, which
    runs again if another write to one of the conversations commits first.
    """
    user = check_user_id(user_id)
    target = check_text("to_user_id", to_user_id, least=1, most=MAX_NAME)
    if user == target:
        raise InvalidInputError("to_user_id", "must be another user than user_id")
    seconds = check_timeout(timeout)
    is_in_transaction = getattr(db, "is_in_transaction", None)
    may_repeat = is_in_transaction is None or not is_in_transaction()
    delays = RetryPolicy(_MOVE_ATTEMPTS - 1, window=seconds or 10.0).backoff_delays()
    while True:
        try:
            return await run_until_settled(_move_user.fetch_one, db, user, target, timeout=seconds)
        except InvalidInputError as error:
            if error.parameter == "user_id":  # the foreign key of link-users
                raise InvalidInputError("to_user_id", str(error).removeprefix("user_id: ")) from error.__cause__
            raise
        except ConfigurationError as error:
            if isinstance(error.__cause__, PostgresError) and constraint_of(error.__cause__) == "pk_conversations":
                raise ConflictError(
                    "both users have a conversation with the same id, probably after a restore, so nothing was moved: "
                    "delete one of the two, after fork_conversation if both must stay"
                ) from error.__cause__
            raise
        except (ConflictError, RunAgainError):
            delay = next(delays, None)
            if not may_repeat or delay is None:
                raise
        await asyncio.sleep(delay)


async def export_user(db: Database, *, user_id: str) -> AsyncIterator[Conversation | Message]:
    """
    Iterate over all conversations of a user, in order of id, each followed by its messages in order of `seq`.

    Data is read in pages: up to 100 conversations, then up to 500 messages of about 8 MiB in all. Between pages the
    iterator holds no connection and at most these in memory. An unknown user yields nothing. A message that is
    streaming has its text so far.

    The pages are not a snapshot: messages that are appended after their conversation was read are left out, and
    what is deleted meanwhile may be missing. For a snapshot, pass a connection in a transaction whose isolation
    level is REPEATABLE READ.

    SQL: `export_user.sql` and `export_user_messages.sql`, once per page.
    """
    user = check_user_id(user_id)
    first_id = -MAX_BIGINT - 1
    while True:
        conversations = await _export_user.fetch_all(db, user, first_id, _CONVERSATIONS_PAGE)
        if not conversations:
            return
        following = iter(conversations)
        conversation = next(following)
        yield conversation
        async for page in _message_pages(db, user, conversations):
            for message in page:
                while conversation.id < message.conversation_id:
                    conversation = next(following)
                    yield conversation
                # a conversation that appeared meanwhile is skipped
                if message.conversation_id == conversation.id and message.seq <= conversation.last_seq:
                    yield message
        for conversation in following:
            yield conversation
        if len(conversations) < _CONVERSATIONS_PAGE or conversations[-1].id == MAX_BIGINT:
            return
        first_id = conversations[-1].id + 1


async def _message_pages(db: Database, user: str, conversations: list[Conversation]) -> AsyncIterator[list[Message]]:
    """Iterate over the messages of a page of conversations, page by page."""
    filled = [conversation for conversation in conversations if conversation.last_seq > 0]
    if not filled:
        return
    place = (filled[0].id, 0)
    end = (filled[-1].id, filled[-1].last_seq)
    while place < end:
        page = await _export_user_messages.fetch_all(db, user, *place, *end, _MESSAGES_PAGE, _PAGE_BYTES)
        if not page:
            return
        yield page
        place = (page[-1].conversation_id, page[-1].seq)
