"""Reads the current branch of each conversation tree in ChatGPT's export, conversations.json."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypeAlias

from chatdb._core.validate import MAX_TITLE
from chatdb.formats import items

_Object: TypeAlias = dict[str, Any]

_TEXTS = ("text", "result", "content", "user_profile", "user_instructions", "model_set_context")
"""The fields that hold the text of a content without parts: code, output, web pages, reasoning, instructions."""

_NEVER = datetime.min.replace(tzinfo=UTC)


def conversation(source: _Object) -> list[items.Item]:
    """
    Return a conversation, the messages of its current branch, and the number of messages on other branches.

    A message with more than text keeps its original in `payload`. A message without a time gets the time of the
    previous message or of the conversation.

    Raises UnsupportedItemError if the branch is empty or has a message that chatdb cannot store.
    """
    mapping = items.as_object(source.get("mapping"))
    if mapping is None:
        raise items.UnsupportedItemError("no message tree")
    nodes = {name: node for name, value in mapping.items() if (node := items.as_object(value))}
    branch = _messages([nodes[name] for name in _branch(nodes, source.get("current_node"))])
    if not branch:
        raise items.UnsupportedItemError("no messages")
    elsewhere = len(_messages(list(nodes.values()))) - len(branch)

    updated_at = _time(source.get("update_time"))
    times = [time for message in branch if (time := _time(message.get("create_time")))]
    created_at = _time(source.get("create_time")) or next(iter(times), updated_at)

    said: list[tuple[str, str]] = []
    messages: list[items.SourceMessage] = []
    keys: set[str | None] = set()
    latest, replaced = created_at, 0
    for seq, message in enumerate(branch, 1):
        author = items.as_object(message.get("author")) or {}
        known = items.role(author.get("role"))
        text, is_all = _text(items.as_object(message.get("content")) or {})
        content, payload = items.body(text, None if is_all else message)
        replaced += content != text
        key = items.short(message.get("id"))
        key = None if key in keys else key
        keys.add(key)
        latest = _time(message.get("create_time")) or latest
        model = items.short((items.as_object(message.get("metadata")) or {}).get("model_slug"))
        metadata = items.metadata_of(model=model, name=items.short(author.get("name")))
        messages.append(items.SourceMessage(seq, known, content, payload, metadata, None, key, latest))
        said.append((known, text))

    name = items.name_of(source.get("conversation_id")) or items.name_of(source.get("id"))
    key = f"chatgpt:{name}" if name else f"chatgpt::{items.fingerprint(said)}"
    title, is_cut = _title(source.get("title"))
    last_at = updated_at or latest
    head = items.SourceConversation(
        key, title, None, len(messages), created_at, last_at, *_archived_and_pinned(source, last_at)
    )
    stream: list[items.Item] = [head, *messages]
    if is_cut:
        stream.append(items.Changed("title truncated to 1,000 characters", conversations=1))
    if replaced:
        stream.append(items.Changed(items.REPLACED, messages=replaced))
    if elsewhere:
        stream.append(items.Skipped("not on the current branch", messages=elsewhere))
    return stream


def _archived_and_pinned(source: _Object, last_at: datetime | None) -> tuple[datetime | None, datetime | None]:
    """Return the times of archiving and pinning, or of the last change if the export has only a flag."""
    flagged_at = last_at or items.UNKNOWN_TIME
    archived_at = flagged_at if source.get("is_archived") is True else None
    pinned_at = _time(source.get("pinned_time")) or (flagged_at if source.get("is_starred") is True else None)
    return archived_at, pinned_at


def _branch(nodes: dict[str, _Object], current: object) -> list[str]:
    """Return the node names from the root to the current node or, if unknown, to the newest leaf."""
    if not isinstance(current, str) or current not in nodes:
        parents = {parent for node in nodes.values() if isinstance(parent := node.get("parent"), str)}
        leaves = [name for name in nodes if name not in parents] or list(nodes)
        current = max(reversed(leaves), key=lambda name: _written(nodes[name]), default=None)
    path: dict[str, None] = {}
    while isinstance(current, str) and current in nodes and current not in path:
        path[current] = None
        current = nodes[current].get("parent")
    return list(reversed(path))


def _messages(nodes: list[_Object]) -> list[_Object]:
    return [message for node in nodes if (message := items.as_object(node.get("message"))) is not None]


def _written(node: _Object) -> datetime:
    return _time((items.as_object(node.get("message")) or {}).get("create_time")) or _NEVER


def _time(seconds: object) -> datetime | None:
    """Return the time for a Unix timestamp in seconds, or None if it is out of range."""
    if not isinstance(seconds, int | float) or seconds <= 0:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):  # milliseconds, NaN or infinity
        return None


def _text(content: _Object) -> tuple[str, bool]:
    """Return the readable text of a content, and whether the content has nothing else."""
    parts = items.as_list(content.get("parts"))
    if parts is not None:
        texts = [part if isinstance(part, str) else (items.as_object(part) or {}).get("text") for part in parts]
        is_all = content.get("content_type") == "text" and all(isinstance(part, str) for part in parts)
        return "\n".join(text for text in texts if isinstance(text, str)), is_all
    texts = [content.get(name) for name in _TEXTS]
    thoughts = items.as_list(content.get("thoughts")) or ()
    texts += [(items.as_object(thought) or {}).get("content") for thought in thoughts]
    return "\n".join(text for text in texts if text and isinstance(text, str)), False


def _title(value: object) -> tuple[str | None, bool]:
    if not isinstance(value, str):
        return None, False
    return items.replace_unstorable(value[:MAX_TITLE]), len(value) > MAX_TITLE
