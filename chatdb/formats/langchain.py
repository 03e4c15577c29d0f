"""Reads LangChain messages as stored by langchain-postgres."""

from __future__ import annotations

from typing import Any

from chatdb.formats.items import UNKNOWN_TYPE, ParsedMessage, UnsupportedItemError, as_object, role, texts_of

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}


def parse_message(item: dict[str, Any]) -> ParsedMessage:
    """Parse a LangChain message; a message chunk counts as a message."""
    kind, data = item.get("type"), as_object(item.get("data"))
    if not isinstance(kind, str) or data is None:
        raise UnsupportedItemError(UNKNOWN_TYPE)
    whole = kind.removesuffix("MessageChunk").lower() if kind.endswith("MessageChunk") else kind
    if whole == "remove":
        raise UnsupportedItemError("instruction to remove a message")
    author = role(data.get("role")) if whole == "chat" else _ROLES.get(whole)
    if author is None:
        raise UnsupportedItemError(UNKNOWN_TYPE)
    usual = kind in {"human", "ai", "system", "tool"}
    return author, "".join(texts_of(data.get("content"))), None if usual else kind, data.get("name")
