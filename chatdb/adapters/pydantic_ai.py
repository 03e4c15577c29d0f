"""
Stores the conversations of pydantic-ai: `load` and `save` for messages alone, ChatDBConversationStore for all of it.

Each ModelRequest and ModelResponse is one message: `content` is its text, `payload` the JSON of pydantic-ai's
ModelMessagesTypeAdapter. Messages that other programs stored are read as text.

Docs: docs/adapters/pydantic-ai.md
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatdb.adapters._settled import settled
from chatdb.errors import ConfigurationError
from chatdb.formats.pydantic_ai import KEY_PREFIX, conversation_of, dump_json, new_message
from chatdb.messages import append_messages

try:
    from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter

    from chatdb.adapters._pydantic_ai_store import ChatDBConversationStore
except ImportError:
    raise ConfigurationError("the extra is not installed: run pip install 'chatdb[pydantic-ai]'") from None

if TYPE_CHECKING:
    from chatdb import Database

__all__ = ["ChatDBConversationStore", "load", "save"]


async def load(
    db: Database, *, user_id: str, conversation_key: str, limit: int | None = None, prefix: str = KEY_PREFIX
) -> list[ModelMessage]:
    """
    Return the messages of a conversation, oldest first, or an empty list if there is none yet.

    `limit` returns only the newest ones. It takes one round trip for 10,000 messages.

    Raises InvalidInputError.
    """
    loaded = await ChatDBConversationStore(db, user_id=user_id, prefix=prefix).load(conversation_key, limit=limit)
    return [] if loaded is None else loaded.messages


async def save(
    db: Database, *, user_id: str, conversation_key: str, messages: Sequence[ModelMessage], prefix: str = KEY_PREFIX
) -> None:
    """
    Append messages, such as `result.new_messages()`, to a conversation, which is created if it is missing.

    They are stored once, even if the connection is lost. It takes one round trip.

    Raises InvalidInputError.
    """
    key, patch = conversation_of(conversation_key, prefix)
    texts = [dump_json(ModelMessagesTypeAdapter, [message])[1:-1] for message in messages]
    batch = [new_message(text, secrets.token_hex(16)) for text in texts]
    if batch:
        change = append_messages(
            db, user_id=user_id, conversation_key=key, messages=batch, create=True, conversation_metadata_patch=patch
        )
        await settled(change)
