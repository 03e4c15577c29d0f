"""Loads a conversation with its newest messages, in as many pages as it takes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from chatdb.branches import get_branch
from chatdb.conversations import load_conversation

if TYPE_CHECKING:
    from chatdb import Conversation, Database, Message

PAGE: Final = 10_000


async def load_newest(
    db: Database, *, user_id: str, key: str, most: int | None = None
) -> tuple[Conversation, list[Message]]:
    """
    Return a conversation and the newest messages of its line, oldest first: `most`, or all.

    One round trip for each 10,000 messages. Raises ConversationNotFoundError.
    """
    most = sys.maxsize if most is None else most
    size = max(1, min(most, PAGE))
    conversation, page = await load_conversation(db, user_id=user_id, conversation_key=key, limit=size)
    messages = page
    while len(page) == size and len(messages) < most:
        seq, top = messages[0].seq, conversation.head_seq
        page = await get_branch(
            db, user_id=user_id, conversation_id=conversation.id, limit=size, before_seq=seq, top_seq=top
        )
        messages = page + messages
    return conversation, messages[len(messages) - min(most, len(messages)) :]
