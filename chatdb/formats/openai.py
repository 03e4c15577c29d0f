"""Reads items of OpenAI's Responses API as stored by openai-agents."""

from __future__ import annotations

from typing import Any

from chatdb.formats.items import UNKNOWN_TYPE, ParsedMessage, UnsupportedItemError, role, texts_of

_AUTHORS = {
    **dict.fromkeys(("reasoning", "compaction", "program", "item_reference"), "assistant"),
    **dict.fromkeys(("mcp_list_tools", "mcp_approval_request"), "assistant"),
    **dict.fromkeys(("configuration_update", "compaction_trigger"), "developer"),
    "mcp_approval_response": "user",
}
"""Roles for item types that have none, except calls and outputs."""


def parse_message(item: dict[str, Any]) -> ParsedMessage:
    """Parse a Responses API item; a call has the role assistant, its output the role tool."""
    if "__enc__" in item:
        raise UnsupportedItemError("encrypted by openai-agents' EncryptedSession")
    kind = item.get("type")
    if item.get("role") is not None:
        return role(item["role"]), "".join(texts_of(item.get("content"))), None if kind == "message" else kind, None
    if not isinstance(kind, str):
        raise UnsupportedItemError(UNKNOWN_TYPE)
    author, fields = _AUTHORS.get(kind), ["summary", "content"]
    if kind.endswith("_output"):
        author, fields = "tool", ["output", "result"]
    elif kind.endswith("_call"):
        author, fields = "assistant", []
    if author is None:
        raise UnsupportedItemError(UNKNOWN_TYPE)
    return author, "\n".join(text for field in fields for text in texts_of(item.get(field))), kind, item.get("name")
