"""Write conversations in formats of other programs: ChatGPT's export, fine-tuning messages, and Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from chatdb.formats import chatgpt, items
from chatdb.formats.items import REASONING, TOOL_CALL, TOOL_RESULT
from chatdb.records import Conversation, Message

_ROOT: Final = "client-created-root"


class Writer(NamedTuple):
    """A format: what a file begins with, how conversations are written and separated, and what it ends with."""

    start: str
    write: Callable[[Conversation, list[Message]], tuple[str, int]]
    """Returns the text of a conversation, or '' to leave it out, and how many of its messages are in it."""
    between: str
    end: str


def line_of(conversation: Conversation, messages: list[Message]) -> list[Message]:
    """Return the messages of the current line, oldest first."""
    places = {message.seq: place for place, message in enumerate(messages)}
    line: list[Message] = []
    place = places.get(conversation.head_seq, -1)
    while place >= 0:
        message = messages[place]
        line.append(message)
        place = place - 1 if message.parent_seq is None else places.get(message.parent_seq, -1)
    return line[::-1]


def _about(message: Message) -> dict[str, Any]:
    return message.metadata or {}


def _is_said(message: Message) -> bool:
    return items.has_text(message) and _about(message).get("type") != TOOL_RESULT


def _dumped(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can hold in a file
        return json.dumps(value)
    return text


def chatgpt_conversation(conversation: Conversation, messages: list[Message]) -> tuple[str, int]:
    """Return a conversation with all branches as an object of ChatGPT's conversations.json."""
    identifier = (conversation.key or "").removeprefix("chatgpt:") or f"chatdb-{conversation.id}"
    mapping: dict[str, dict[str, Any]] = {_ROOT: {"id": _ROOT, "message": None, "parent": None, "children": []}}
    names = {0: _ROOT}
    before = 0
    for message in messages:
        name = message.key or f"{identifier}-{message.seq}"
        parent = names.get(before if message.parent_seq is None else message.parent_seq, _ROOT)
        mapping[parent]["children"].append(name)
        node: dict[str, Any] = {
            "id": name,
            "message": _chatgpt_message(message, name),
            "parent": parent,
            "children": [],
        }
        mapping[name] = node
        names[message.seq] = name
        before = message.seq
    about = conversation.metadata or {}
    value = {
        "title": conversation.title,
        "create_time": conversation.created_at.timestamp(),
        "update_time": conversation.updated_at.timestamp(),
        "mapping": mapping,
        "current_node": names.get(conversation.head_seq, _ROOT),
        "conversation_id": identifier,
        "id": identifier,
        "default_model_slug": about.get("model"),
        "gizmo_id": about.get("gizmo_id"),
        "is_archived": conversation.archived_at is not None,
        "is_starred": conversation.pinned_at is not None,
    }
    return _dumped(value), len(messages)


def _chatgpt_message(message: Message, name: str) -> dict[str, Any]:
    """Return the message that an import kept if its text is still the same, or one that reads the same."""
    kept = None if message.payload is None else items.as_object(message.payload.parsed())
    if kept is not None and items.as_object(kept.get("author")) and items.as_object(kept.get("content")):
        try:
            if chatgpt.piece(kept).text == message.content and kept.get("id") == message.key:
                return kept
        except items.UnsupportedItemError:
            pass
    about = _about(message)
    kind, author = about.get("type"), about.get("name")
    content: dict[str, Any] = {"content_type": "text", "parts": [message.content]}
    if kind == REASONING:
        content = {"content_type": "thoughts", "thoughts": [{"summary": "", "content": message.content}]}
    is_hidden = about.get("hidden") is True and message.role == "system"
    return {
        "id": name,
        "author": {"role": message.role, "name": None if kind == TOOL_CALL else author, "metadata": {}},
        "create_time": message.created_at.timestamp(),
        "content": content,
        "status": "finished_successfully" if message.state is None else "in_progress",
        "weight": 1.0,
        "metadata": ({"model_slug": about["model"]} if "model" in about else {})
        | ({"is_visually_hidden_from_conversation": True} if is_hidden else {}),
        "recipient": (author or "tool") if kind == TOOL_CALL else "all",
    }


def fine_tuning_line(conversation: Conversation, messages: list[Message]) -> tuple[str, int]:
    """Return the texts of the current line as a line of OpenAI's fine-tuning format, without tools and reasoning."""
    said = [message for message in line_of(conversation, messages) if _is_said(message)]
    value = {"messages": [{"role": message.role, "content": message.content} for message in said]}
    return (_dumped(value) if said else ""), len(said)


def markdown_section(conversation: Conversation, messages: list[Message]) -> tuple[str, int]:
    """Return what a person saw of the current line, with reasoning and tools as labelled quotes."""
    title = " ".join((conversation.title or "Untitled").split())
    parts = [f"# {title}", f"*{conversation.created_at:%Y-%m-%d %H:%M} UTC*"]
    count = 0
    for message in line_of(conversation, messages):
        about = _about(message)
        if about.get("hidden") is True or not message.content:
            continue
        count += 1
        label = {REASONING: "reasoning", TOOL_CALL: "tool call", TOOL_RESULT: "tool result"}.get(
            about.get("type") or ""
        )
        author = message.role.capitalize() + (f" ({label})" if label else "")
        named = f": {about['name']}" if label and isinstance(about.get("name"), str) else ""
        text = message.content
        if label or message.role == "tool":
            text = "\n".join(f"> {line}".rstrip() for line in text.splitlines())
        parts += [f"## {author}{named}", text]
    return "\n\n".join(parts), count


WRITERS: Final = {
    "chatgpt": Writer("[\n", chatgpt_conversation, ",\n", "\n]\n"),
    "messages": Writer("", fine_tuning_line, "\n", "\n"),
    "markdown": Writer("", markdown_section, "\n\n---\n\n", "\n"),
}
"""By name, as in --format; `jsonl` is in jsonlines.py."""
