"""Maps items of OpenAI's Responses API, as openai-agents stores them, to messages and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from chatdb.errors import InvalidInputError
from chatdb.formats.items import (
    ROLES,
    ParsedMessage,
    as_object,
    has_text,
    json_text,
    new_message,
    own_item,
    texts_of,
)
from chatdb.records import Message, NewMessage

FRAMEWORK: Final = "openai-agents"
"""The mark of its messages in their metadata, and the name of its extra."""

KEY_PREFIX: Final = f"{FRAMEWORK}:"
"""What precedes a session's id in the key of its conversation, unless the adapter is told otherwise."""

_AUTHORS: Final = {
    "mcp_approval_response": "user",
    **dict.fromkeys(("configuration_update", "compaction_trigger"), "developer"),
}
"""Roles for item types that have none, other than outputs, which have the role tool. The rest is the assistant's."""


def parse_message(item: Mapping[str, Any]) -> ParsedMessage:
    """
    Parse a Responses API item; a call has the role assistant, its output the role tool.

    An opaque item, such as one that EncryptedSession has encrypted, or one of an unknown type or role, is the
    assistant's.
    """
    if "__enc__" in item:
        return "assistant", "", "encrypted", None
    kind = item.get("type")
    if item.get("role") is not None:
        word = item["role"]
        author = ROLES.get(word.lower(), "assistant") if isinstance(word, str) else "assistant"
        return author, "".join(texts_of(item.get("content"))), None if kind == "message" else kind, None
    if not isinstance(kind, str):
        return "assistant", "", None, None
    author, fields = _AUTHORS.get(kind, "assistant"), ["summary", "content"]
    if kind.endswith("_output"):
        author, fields = "tool", ["output", "result"]
    elif kind.endswith("_call"):
        fields = []
    return author, "\n".join(text for field in fields for text in texts_of(item.get(field))), kind, item.get("name")


def message_of(item: object, key: str, parameter: str = "item") -> NewMessage:
    """
    Return the message for an item, with the item itself as payload.

    Raises InvalidInputError, which names `parameter`, if the item is not a dict of JSON values.
    """
    fields = as_object(item)
    if fields is None:
        raise InvalidInputError(parameter, f"must be a dict, not {type(item).__name__}")
    payload = json_text(parameter, fields)
    return new_message(FRAMEWORK, parse_message(fields), payload, key)


def item_of(message: Message) -> dict[str, Any] | None:
    """
    Return the item of a message: its own payload, or the text of another framework's message.

    None for another framework's tool results and messages without text.
    """
    item = own_item(message, FRAMEWORK)
    if item is None and has_text(message):
        return {"role": message.role, "content": message.content}
    return item
