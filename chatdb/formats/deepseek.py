"""Reads conversation trees of DeepSeek's export, conversations.json, with all branches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from chatdb.formats import blocks, items, trees

_Object: TypeAlias = dict[str, Any]

_CITATION = re.compile(r"\[citation:(\d+)\]")


def conversation(source: _Object) -> Iterator[items.Item]:
    """
    Return a conversation, the messages of all its branches, and what was changed or skipped.

    The newest leaf is the head. Raises UnsupportedItemError if there are no messages.
    """
    mapping = items.as_object(source.get("mapping"))
    if mapping is None:
        raise items.UnsupportedItemError("no message tree")
    nodes = trees.Nodes()
    for name, value in items.taken_items(mapping):
        node = items.as_object(value) or {}
        message = node.get("message")
        sent_at = (items.as_object(message) or {}).get("inserted_at")
        key = items.short(node.get("id")) or items.short(name)
        nodes.add(name, message, _pieces, parent=node.get("parent"), sent_at=sent_at, key=key)
    return trees.stream(
        trees.Conversation(
            "deepseek:",
            items.name_of(source.get("id")),
            nodes.by_name,
            source.get("current_node"),
            source.get("title"),
            {},
            items.time_of(source.get("inserted_at")),
            items.time_of(source.get("updated_at")),
            items.flag(source, "archived"),
            items.flag(source, "pinned"),
            tuple(nodes.skipped),
        )
    )


def _pieces(message: object) -> tuple[trees.Piece, ...]:
    return () if message is None else pieces(items.as_object(message))


def pieces(message: _Object | None) -> tuple[trees.Piece, ...]:
    """Return the messages for one of the export, or raise UnsupportedItemError."""
    if message is None:
        raise items.UnsupportedItemError("message is not an object")
    listed = items.as_list(message.get("fragments"))
    found: list[tuple[blocks.Part, object]] = []
    is_users = False
    links: dict[str, str] = {}
    for one in listed or ():
        fragment = items.as_object(one) or {}
        kind = fragment.get("type")
        is_users = is_users or kind == "REQUEST"
        found.append((_part(kind, fragment, links), fragment))
    if listed:
        role = "user" if is_users else "assistant"
    else:  # older exports
        role = items.role(message.get("role"))
        for field, label in (
            ("reasoning_content", items.REASONING),
            ("thinking_content", items.REASONING),
            ("content", None),
        ):
            if isinstance(text := message.get(field), str) and text:
                found.append((blocks.Part(text, label), text))
    found = [
        (
            part if part.kind else part._replace(text=_CITATION.sub(lambda mark: _linked(mark, links), part.text)),
            fragment,
        )
        for part, fragment in found
    ]
    files = [items.as_object(one) or {"file_name": one} for one in items.as_list(message.get("files")) or ()]
    return blocks.pieces(
        role,
        found,
        message,
        model=message.get("model") if role == "assistant" else None,
        attachments="\n".join(items.attached(one.get("file_name") or one.get("name")) for one in files),
        state="aborted" if message.get("status") in {"WIP", "INCOMPLETE"} else None,
    )


def _part(kind: object, fragment: _Object, links: dict[str, str]) -> blocks.Part:
    content = fragment.get("content")
    text = blocks.as_text(content)
    if kind == "THINK":
        return blocks.Part(text, items.REASONING)
    if kind in {"REQUEST", "RESPONSE"} or not isinstance(kind, str):
        return blocks.Part(text)
    for place, one in enumerate(items.as_list(fragment.get("results")) or items.as_list(content) or (), 1):
        result = items.as_object(one) or {}
        links[str(result.get("cite_index") or place)] = items.link(result.get("title"), result.get("url"))
    shown = text if isinstance(content, str) else ""
    return blocks.Part(items.lines(shown, *links.values()) or text, items.TOOL_RESULT, kind.lower())


def _linked(mark: re.Match[str], links: dict[str, str]) -> str:
    return f" ({links[mark[1]]})" if links.get(mark[1]) else ""
