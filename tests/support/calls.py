"""The signatures of the public functions, and calls of each."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime
from typing import Any

import chatdb
from chatdb import UNSET, Conversation, Message

required = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "create_conversation": {"user_id": required, "title": None, "key": None, "metadata": None},
    "get_conversation": {"user_id": required, "conversation_id": required},
    "get_conversation_by_key": {"user_id": required, "key": required},
    "list_conversations": {"user_id": required, "limit": 20, "before": None},
    "update_conversation": {"user_id": required, "conversation_id": required, "title": UNSET, "metadata": UNSET},
    "delete_conversation": {"user_id": required, "conversation_id": required},
    "delete_user": {"user_id": required, "timeout": None},
    "append_message": {
        "user_id": required,
        "conversation_id": required,
        "role": required,
        "content": required,
        "payload": None,
        "metadata": None,
        "token_count": None,
        "key": None,
    },
    "append_messages": {"user_id": required, "conversation_id": required, "messages": required},
    "get_history": {"user_id": required, "conversation_id": required, "limit": 100, "before_seq": None},
    "list_messages": {"user_id": required, "conversation_id": required, "after_seq": 0, "limit": 100},
    "iter_messages": {"user_id": required, "conversation_id": required, "after_seq": 0, "batch": 500},
    "get_message": {"user_id": required, "conversation_id": required, "seq": required},
    "get_message_by_key": {"user_id": required, "conversation_id": required, "key": required},
    "update_message": {
        "user_id": required,
        "conversation_id": required,
        "seq": required,
        "content": UNSET,
        "payload": UNSET,
        "metadata": UNSET,
        "token_count": UNSET,
    },
    "delete_message": {"user_id": required, "conversation_id": required, "seq": required},
    "delete_messages_after": {"user_id": required, "conversation_id": required, "seq": required},
}
"""Every function on user data, with the defaults of its keyword-only parameters."""
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("create_conversation", {}),
    ("create_conversation", {"key": "new"}),
    ("create_conversation", {"key": "thread"}),
    ("get_conversation", {}),
    ("get_conversation_by_key", {"key": "thread"}),
    ("list_conversations", {}),
    ("list_conversations", {"before": ...}),
    ("update_conversation", {"title": "another"}),
    ("update_conversation", {}),
    ("append_message", {"role": "user", "content": "hello"}),
    ("append_message", {"role": "user", "content": "hello", "key": "new"}),
    ("append_message", {"role": "user", "content": "first", "key": "first"}),
    ("append_messages", {"messages": [{"role": "user", "content": "hello"}]}),
    ("append_messages", {"messages": [{"role": "user", "content": "hello", "key": "newer"}]}),
    ("append_messages", {"messages": [{"role": "user", "content": "first", "key": "first"}]}),
    ("append_messages", {"messages": []}),
    ("get_history", {}),
    ("get_history", {"before_seq": 1}),
    ("list_messages", {}),
    ("iter_messages", {}),
    ("get_message", {"seq": 1}),
    ("get_message_by_key", {"key": "first"}),
    ("update_message", {"seq": 1, "content": "first, corrected"}),
    ("update_message", {"seq": 1}),
    ("delete_message", {"seq": 1}),
    ("delete_messages_after", {"seq": 0}),
    ("delete_conversation", {}),
    ("delete_user", {}),
]
"""Valid calls of every function, one per statement."""
NOBODYS = Conversation(
    id=-1,
    user_id="bob",
    key=None,
    title=None,
    metadata=None,
    last_seq=0,
    created_at=datetime.now(UTC),
    updated_at=datetime.now(UTC),
)
"""A conversation that is not stored."""


async def conversation_with_a_message(db: Any) -> Conversation:
    """Create a conversation with the key "thread" and one message with the key "first"."""
    conversation = await chatdb.create_conversation(db, user_id="alice", key="thread")
    await chatdb.append_message(
        db, user_id="alice", conversation_id=conversation.id, role="user", content="first", key="first"
    )
    return conversation


async def call(db: Any, name: str, arguments: dict[str, Any], conversation: Conversation) -> Any:
    """Call a function on a conversation as its user."""
    arguments = {"user_id": conversation.user_id} | arguments
    if "conversation_id" in SIGNATURES[name]:
        arguments = {"conversation_id": conversation.id} | arguments
    if arguments.get("before") is ...:
        arguments["before"] = conversation
    answer = getattr(chatdb, name)(db, **arguments)
    if name == "iter_messages":
        return [message async for message in answer]
    return await answer


class Counting:
    """A database that records statements and passes them to a real one."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self.statements: list[str] = []

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Record a statement and run it."""
        self.statements.append(query)
        return await self.db.fetch(query, *args, timeout=timeout)


MISSING = 2**62
"""An id that no conversation has."""


async def iterated(db: Any, **arguments: Any) -> list[Message]:
    """Exhaust `iter_messages`."""
    return [message async for message in chatdb.iter_messages(db, **arguments)]


CONVERSATION_CALLS: dict[str, dict[str, Any]] = {
    "append_message": {"role": "user", "content": "x", "key": "k"},
    "append_messages": {"messages": [{"role": "user", "content": "x", "key": "k"}, {"role": "user", "content": "y"}]},
    "delete_conversation": {},
    "delete_message": {"seq": 1},
    "delete_messages_after": {"seq": 0},
    "get_conversation": {},
    "get_history": {},
    "get_message": {"seq": 1},
    "get_message_by_key": {"key": "k"},
    "iter_messages": {},
    "list_messages": {},
    "update_conversation": {"title": "x"},
    "update_message": {"seq": 1, "content": "x"},
}
"""A valid call of every function that takes a conversation."""
