"""Reads and appends more than one statement of chatdb takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from chatdb.branches import get_branch
from chatdb.conversations import list_previews, load_conversation
from chatdb.errors import NotFoundError
from chatdb.messages import append_messages
from chatdb.pool import transaction

if TYPE_CHECKING:
    from chatdb import Conversation, Database, Message, NewMessage

PAGE: Final = 10_000
_LEAST: Final = 100
"""Messages of a further page, which is read if some messages of a page were left out."""
_BATCH_BYTES: Final = 48 * 1024 * 1024
"""Below the 64 MiB of a batch, because keys and metadata count as well."""

ItemT = TypeVar("ItemT")


async def load_newest(
    db: Database, *, user_id: str, key: str, item_of: Callable[[Message], ItemT | None], limit: int | None = None
) -> tuple[Conversation, list[ItemT]]:
    """
    Return a conversation and the newest items of its line, oldest first: `limit`, which is at least 1, or all.

    `item_of` returns the item of a message, or None to leave it out. One round trip for each 10,000 messages. Raises
    ConversationNotFoundError.
    """
    wanted = sys.maxsize if limit is None else limit
    size = min(wanted, PAGE)
    conversation, page = await load_conversation(db, user_id=user_id, conversation_key=key, limit=size)
    items = [item for message in page if (item := item_of(message)) is not None]
    while len(page) == size and len(items) < wanted:
        size = min(max(wanted - len(items), _LEAST), PAGE)
        # by id, because another conversation may have the key by now
        line: Any = {"conversation_id": conversation.id, "before_seq": page[0].seq, "top_seq": page[0].seq}
        try:
            page = await get_branch(db, user_id=user_id, limit=size, **line)
        except NotFoundError:  # deleted between two pages: begin again
            return await load_newest(db, user_id=user_id, key=key, item_of=item_of, limit=limit)
        items[:0] = [item for message in page if (item := item_of(message)) is not None]
    return conversation, items[-wanted:]


async def list_all_previews(db: Database, *, user_id: str) -> list[tuple[Conversation, Message | None]]:
    """Return all conversations of a user with their newest messages, 10,000 in a round trip."""
    previews = page = await list_previews(db, user_id=user_id, limit=PAGE, archived=None)
    while len(page) == PAGE:
        page = await list_previews(db, user_id=user_id, limit=PAGE, archived=None, after=page[-1][0])
        previews = previews + page
    return previews


async def append_all(db: Database, messages: Iterable[NewMessage], *, user_id: str, **options: Any) -> None:  # noqa: ANN401
    """
    Append messages, all or none, with the options of `append_messages`.

    More than 10,000 messages or 48 MiB are one transaction of several round trips, which is not repeated.
    """
    batches: list[list[NewMessage]] = []
    batch_size = 0
    for message in messages:
        size = len(message.content.encode()) + len(str(message.payload))
        if not batches or len(batches[-1]) == PAGE or batch_size + size > _BATCH_BYTES:
            batches.append([])
            batch_size = 0
        batches[-1].append(message)
        batch_size += size
    if len(batches) == 1:
        await append_messages(db, user_id=user_id, messages=batches[0], **options)
    elif batches:
        async with transaction(db, user_id=user_id) as connection:
            for batch in batches:
                await append_messages(connection, user_id=user_id, messages=batch, **options)
