"""Maps the messages of Microsoft Agent Framework, as `Message.to_dict` writes them, to chatdb's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

from chatdb.formats import items
from chatdb.formats.items import ROLES, ParsedMessage, as_list, as_object, texts_of
from chatdb.records import JsonText, Message, NewMessage

FRAMEWORK: Final = "agent-framework"
"""The value of `framework` in the metadata of its messages."""

KEY_PREFIX: Final = f"{FRAMEWORK}:"
"""What precedes a session_id in the key of its conversation, unless the adapter is told otherwise."""


def parse_message(item: dict[str, Any]) -> ParsedMessage:
    """Parse a message; its text is that of its text contents and of the results of functions."""
    contents = [part for value in as_list(item.get("contents")) or () if (part := as_object(value)) is not None]
    author = item.get("role")
    role = ROLES.get(author.lower(), "user") if isinstance(author, str) else "user"
    return role, " ".join(text for part in contents for text in _texts(part)), None, item.get("author_name")


def new_message(item: dict[str, Any], key: str) -> NewMessage:
    """Return the message that stores a message. With NaN or infinity, its payload is a string with the JSON text."""
    try:
        payload = json.dumps(item, allow_nan=False)
    except ValueError:
        payload = json.dumps(json.dumps(item))
    return items.new_message(FRAMEWORK, parse_message(item), JsonText(payload), key)


def key_after(last_key: str, item: dict[str, Any]) -> str:
    """Return the key of a message that follows another one; properties of the application do not count."""
    contents = [{**part, "additional_properties": None} for part in item["contents"]]
    text = json.dumps([last_key, item["role"], contents], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def item_of(message: Message) -> dict[str, Any] | None:
    """
    Return the item of a message: its own payload, or the text of a message that another program stored.

    None for another program's tool results and messages without text.
    """
    if message.payload is not None and (message.metadata or {}).get("framework") == FRAMEWORK:
        value = message.payload.parsed()
        return as_object(json.loads(value) if isinstance(value, str) else value)
    if not items.has_text(message):
        return None
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "contents": [{"type": "text", "text": message.content}]}


def _texts(part: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of a content; the result of a function that has none is shown as JSON."""
    if part.get("type") == "text":
        yield from texts_of(part.get("text"))
    elif part.get("type") == "function_result":
        result = part.get("result")
        texts = list(texts_of(part.get("items"))) or list(texts_of(result))
        yield from texts
        if not texts and result is not None:
            yield json.dumps(result, ensure_ascii=False)
