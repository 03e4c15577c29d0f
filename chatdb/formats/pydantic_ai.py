"""Maps the messages of pydantic-ai, as its ModelMessagesTypeAdapter writes them, to chatdb's and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from chatdb.errors import InvalidInputError
from chatdb.formats import items
from chatdb.formats.items import ParsedMessage, as_list, as_object, name_of, texts_of
from chatdb.records import Conversation, JsonText, Message, NewMessage

FRAMEWORK: Final = "pydantic-ai"
"""The value of `framework` in the metadata of its messages."""

KEY_PREFIX: Final = f"{FRAMEWORK}:"
"""What precedes a conversation_id in the key of its conversation, unless the adapter is told otherwise."""

_ID: Final = f"{FRAMEWORK}-id"
"""The conversation_id as JSON, in the metadata of a conversation whose key has only a hash of it."""

_ROLES: Final = {
    "user-prompt": "user",
    "speech": "user",
    "tool-return": "tool",
    "builtin-tool-return": "tool",
    "retry-prompt": "tool",
    "retry-feedback": "tool",
    "system-prompt": "system",
}
"""The role of a request by its parts; one with parts of several roles has the first of these."""


def conversation_of(conversation_id: str, prefix: str = KEY_PREFIX) -> tuple[str, dict[str, str] | None]:
    """Return the key of a conversation, and metadata with the conversation_id if the key has only a hash of it."""
    name = name_of(conversation_id)
    return prefix + name, None if name == conversation_id else {_ID: json.dumps(conversation_id)}


def id_of(conversation: Conversation, prefix: str) -> str:
    """Return the conversation_id of a conversation."""
    stored = (conversation.metadata or {}).get(_ID)
    return str(json.loads(stored)) if isinstance(stored, str) else (conversation.key or "").removeprefix(prefix)


def parse_message(item: dict[str, Any]) -> ParsedMessage:
    """
    Parse a ModelRequest or a ModelResponse.

    A response has the role assistant. A request has the role user if it has a prompt, tool if it has only results of
    tools, and system if it has only instructions. The text is that of the parts with this role.
    """
    parts = [part for value in as_list(item.get("parts")) or () if (part := as_object(value)) is not None]
    if item.get("kind") == "response":
        texts = (text for part in parts if part.get("part_kind") in _SAID for text in _texts(part, "assistant"))
        return "assistant", "\n".join(texts), None, None
    roles = {part.get("part_kind"): _ROLES.get(str(part.get("part_kind"))) for part in parts}
    role = next((role for role in _ROLES.values() if role in roles.values()), "system")
    parts = [part for part in parts if roles[part.get("part_kind")] == role]
    names = {part.get("tool_name") for part in parts if role == "tool"}
    texts = (text for part in parts for text in _texts(part, role))
    return role, "\n".join(texts), None, names.pop() if len(names) == 1 else None


_SAID: Final = ("text", "speech", "compaction")


def _texts(part: dict[str, Any], role: str) -> Iterator[str]:
    """Yield the texts of a part; the result of a tool that has none is shown as JSON."""
    content = part.get("content") or part.get("transcript")
    texts = list(texts_of(content))
    yield from texts
    if role == "tool" and not texts and content is not None:
        yield json.dumps(content, ensure_ascii=False)


def new_message(payload: str, key: str) -> NewMessage:
    """Return the message that stores the JSON text of a ModelRequest or a ModelResponse."""
    return items.new_message(FRAMEWORK, parse_message(json.loads(payload)), JsonText(payload), key)


def item_of(message: Message) -> str | None:
    """
    Return the JSON text of a message: its own payload, or the text of a message that another program stored.

    None for another program's tool results and messages without text.
    """
    if is_own(message) and message.payload is not None:
        return message.payload
    if not items.has_text(message):
        return None
    time = message.created_at.isoformat()
    if message.role == "assistant":
        part = {"part_kind": "text", "content": message.content}
        return json.dumps({"kind": "response", "parts": [part], "timestamp": time})
    kind = "user-prompt" if message.role == "user" else "system-prompt"
    part = {"part_kind": kind, "content": message.content, "timestamp": time}
    return json.dumps({"kind": "request", "parts": [part]})


def is_own(message: Message) -> bool:
    """Return whether a message was stored for pydantic-ai."""
    return (message.metadata or {}).get("framework") == FRAMEWORK


def entry_id_of(message: Message) -> str:
    """Return the id of a message's entry: its key, or a name for a message that another program stored."""
    return message.key if message.key and is_own(message) else foreign_id(message.conversation_id, message.seq)


def foreign_id(conversation_id: int, seq: int) -> str:
    """Return the id of the entry of a message that another program stored."""
    return f"chatdb:{conversation_id}:{seq}"


def foreign_seq(entry_id: str, conversation_id: int) -> int | None:
    """Return the seq in an id from `foreign_id`, or None for any other id."""
    prefix, seq = foreign_id(conversation_id, 0)[:-1], entry_id.rpartition(":")[2]
    return int(seq) if entry_id.startswith(prefix) and seq.isdecimal() else None


def dump_json(adapter: TypeAdapter[Any], value: object) -> str:
    """
    Return pydantic's JSON text, or one with escapes for lone surrogates, which pydantic refuses.

    Raises InvalidInputError for a value without JSON.
    """
    with suppress(PydanticSerializationError):
        return adapter.dump_json(value).decode()
    with suppress(PydanticSerializationError, ValueError):
        return json.dumps(adapter.dump_python(value, mode="json"), separators=(",", ":"), allow_nan=False)
    raise InvalidInputError("messages", "must have only values that pydantic-ai can write as JSON")


def parse_json(adapter: TypeAdapter[Any], text: str) -> Any:  # noqa: ANN401 - of the adapter's type
    """Return the value of a JSON text from `dump_json`."""
    with suppress(ValidationError):
        return adapter.validate_json(text)
    return adapter.validate_python(json.loads(text))
