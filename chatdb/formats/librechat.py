"""Reads conversations that LibreChat exports as JSON, one a file, as a list or as a tree of messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from chatdb.formats import blocks, items, trees

_Object: TypeAlias = dict[str, Any]

_THINKING = re.compile(r"\s*:::thinking\n(.*?)\n?:::\s*", re.DOTALL)
_MARKS = re.compile("\ue202turn\\d+[a-z]+\\d+|[\ue200-\ue206]|\\\\ue202turn\\d+[a-z]+\\d+|\\\\ue20[0-6]")
"""What its web search writes into answers instead of links."""


def conversation(source: _Object) -> Iterator[items.Item]:
    """
    Return a conversation, the messages of all its branches, and what was changed or skipped.

    Raises UnsupportedItemError if there are no messages.
    """
    tree = items.as_list(source.get("messagesTree"))
    listed = tree if tree is not None else items.as_list(source.get("messages"))
    if listed is None:
        raise items.UnsupportedItemError("no list of messages")
    nodes = trees.Nodes()
    models: dict[str, None] = {}
    options = items.as_object(source.get("options")) or {}
    for place, (message, above) in enumerate(_walk(listed), 1):
        key = items.short(message.get("messageId"))
        parent, sent_at = message.get("parentMessageId", above or nodes.last), message.get("createdAt")
        nodes.add(nodes.name_for(key, place), message, pieces, parent=parent, sent_at=sent_at, key=key)
        if isinstance(model := message.get("model"), str) and model:
            models[model] = None
    return trees.stream(
        trees.Conversation(
            "librechat:",
            items.name_of(source.get("conversationId")),
            nodes.by_name,
            None,
            source.get("title"),
            {
                "model": options.get("model") or source.get("model") or next(iter(models), None),
                "endpoint": source.get("endpoint") or options.get("endpoint"),
            },
            items.time_of(source.get("createdAt")),
            items.time_of(source.get("updatedAt")),
            items.flag(source, "isArchived"),
            skipped=tuple(nodes.skipped),
        )
    )


def _walk(listed: list[Any]) -> Iterator[tuple[_Object, object]]:
    """Yield each message and the id of the one above it in the tree, parents first, however deep the tree is."""
    waiting: list[tuple[Any, object]] = [(message, None) for message in reversed([*items.taken(listed)])]
    while waiting:
        value, above = waiting.pop()
        message = items.as_object(value) or {}
        children = items.as_list(message.get("children"))
        if children is not None:
            waiting += [(child, message.get("messageId")) for child in reversed(children)]
            message = {name: each for name, each in message.items() if name != "children"}
        yield message, above


def pieces(message: _Object) -> tuple[trees.Piece, ...]:
    """Return the messages for one of the export, or raise UnsupportedItemError."""
    is_users = message.get("isCreatedByUser")
    if isinstance(is_users, bool):
        role = "user" if is_users else "assistant"
    else:
        role = items.role(message.get("role", message.get("sender")))
    listed = items.as_list(message.get("content"))
    found = list(blocks.parts(listed or ()))
    if not any(part.text for part, _ in found):
        found = _thoughts(message.get("text") if isinstance(message.get("text"), str) else message.get("content"))
    found = [(part._replace(text=_MARKS.sub("", part.text)), block) for part, block in found]
    named: dict[str, None] = {}
    for field in ("files", "attachments"):
        for one in items.as_list(message.get(field)) or ():
            fields = items.as_object(one) or {}
            if isinstance(name := fields.get("filename") or fields.get("name"), str):
                named[items.attached(name, fields.get("type"))] = None
    return blocks.pieces(
        role,
        found,
        message,
        model=message.get("model") if role == "assistant" else None,
        attachments="\n".join(named),
        state="aborted" if message.get("unfinished") is True else None,
    )


def _thoughts(text: object) -> list[tuple[blocks.Part, object]]:
    if not isinstance(text, str):
        return []
    if (match := _THINKING.match(text)) is None:
        return [(blocks.Part(text), None)]
    return [(blocks.Part(match[1], items.REASONING), match[0]), (blocks.Part(text[match.end() :]), None)]
