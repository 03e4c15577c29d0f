"""A conversation with the database that it is in, for tests that call many functions on it."""

from __future__ import annotations

from typing import Any

import chatdb
from chatdb import Conversation, Message


class Talk:
    """A conversation and its database: each function of chatdb is a method, without the arguments that name them."""

    def __init__(self, db: Any, conversation: Conversation) -> None:
        self.db = db
        self.conversation = conversation

    def __getattr__(self, name: str) -> Any:
        """Return a function of chatdb that is on this conversation."""
        place = {"user_id": self.conversation.user_id, "conversation_id": self.conversation.id}
        return lambda **arguments: getattr(chatdb, name)(self.db, **place, **arguments)

    def through(self, db: Any) -> Talk:
        """Return the same conversation through another handle."""
        return Talk(db, self.conversation)

    async def append(self, content: str = "hello", **fields: Any) -> Message:
        """Append a user's message."""
        message: Message = await self.append_message(**({"role": "user", "content": content} | fields))
        return message

    async def fill(self, count: int) -> list[Message]:
        """Append so many messages, whose contents are their places."""
        messages: list[Message] = await self.append_messages(messages=[said(str(seq)) for seq in range(1, count + 1)])
        return messages

    async def now(self) -> Conversation:
        """Return the conversation as it is stored."""
        conversation: Conversation = await self.get_conversation()
        return conversation

    async def messages(self) -> list[Message]:
        """Return the stored messages."""
        messages: list[Message] = await self.list_messages(limit=10_000)
        return messages

    async def seqs(self) -> list[int]:
        """Return the places of the messages that are there."""
        return [message.seq for message in await self.messages()]

    async def contents(self) -> list[str]:
        """Return the contents of the messages that are there."""
        return [message.content for message in await self.messages()]


def said(content: str = "hello", **fields: Any) -> dict[str, Any]:
    """Return a user's message to be appended."""
    return {"role": "user", "content": content} | fields
