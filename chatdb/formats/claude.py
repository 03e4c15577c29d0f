"""Reads conversations of Claude.ai's export, conversations.json, and of browser extensions that save one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from chatdb.formats import blocks, items, trees

_Object: TypeAlias = dict[str, Any]


def conversation(source: _Object) -> Iterator[items.Item]:
    """
    Return a conversation, the messages of all its branches, and what was changed or skipped.

    Reasoning, calls of tools and their results are messages of their own. Raises UnsupportedItemError if there are no
    messages.
    """
    listed = items.as_list(source.get("chat_messages"))
    if listed is None:
        raise items.UnsupportedItemError("no list of messages")
    is_tree = any("parent_message_uuid" in (items.as_object(message) or {}) for message in listed)
    nodes = trees.Nodes()
    for place, value in enumerate(items.taken(listed), 1):
        message = items.as_object(value) or {}
        key = items.short(message.get("uuid"))
        parent, sent_at = message.get("parent_message_uuid", nodes.last), message.get("created_at")
        nodes.add(nodes.name_for(key, place), message, pieces, parent=parent, sent_at=sent_at, key=key)
    current = source.get("current_leaf_message_uuid")
    project = items.as_object(source.get("project")) or {}
    kept = {name: source.get(name) for name in ("model", "summary")} | {"project": project.get("name")}
    return trees.stream(
        trees.Conversation(
            "claude:",
            items.name_of(source.get("uuid")),
            nodes.by_name,
            current if current in nodes.by_name or is_tree else nodes.last,
            source.get("name") or None,
            kept,
            items.time_of(source.get("created_at")),
            items.time_of(source.get("updated_at")),
            items.flag(source, "is_archived"),
            items.flag(source, "is_starred"),
            tuple(nodes.skipped),
        )
    )


def pieces(message: _Object) -> tuple[trees.Piece, ...]:
    """Return the messages for one of the export, or raise UnsupportedItemError."""
    role = items.role(message.get("sender", message.get("role")))
    found = list(blocks.parts(items.as_list(message.get("content")) or ()))
    if not any(part.text for part, _ in found) and isinstance(text := message.get("text"), str):
        found.append((blocks.Part(text), None))
    named: dict[str, None] = {}
    for field in ("attachments", "files", "files_v2"):
        for one in items.as_list(message.get(field)) or ():
            fields = items.as_object(one) or {}
            name = fields.get("file_name") or ("pasted text" if fields.get("extracted_content") else None)
            named[items.attached(name, fields.get("file_type", fields.get("file_kind")))] = None
    return blocks.pieces(role, found, message, model=message.get("model"), attachments="\n".join(named))
