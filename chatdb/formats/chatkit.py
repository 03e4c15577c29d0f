"""Maps ChatKit's thread items and attachments, as JSON objects, to role and text, and messages of others to items."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from chatdb._core.validate import MAX_TITLE
from chatdb.errors import InvalidInputError
from chatdb.formats.items import (
    ParsedMessage,
    as_list,
    as_object,
    has_text,
    json_text,
    name_of,
    new_message,
    own_item,
    replace_unstorable,
    texts_of,
)
from chatdb.records import Conversation, Message

FRAMEWORK: Final = "chatkit"
"""The mark of its messages in their metadata, and the name of its extra."""

KEY_PREFIX: Final = f"{FRAMEWORK}:"
"""What precedes a thread's id in the key of its conversation, unless the adapter is told otherwise."""

_SEQ_ID: Final = re.compile("chatdb:seq:([1-9][0-9]{0,17})")
_TASK_TEXTS = ("title", "title_query", "content")
_WIDGET_TEXTS = ("title", "label", "value", "text")


def parse_item(item: dict[str, Any]) -> ParsedMessage:
    """
    Parse a thread item.

    The user's messages have the role user, hidden context the role developer, and a client tool call, which holds its
    output as well, the role tool. Everything else that the assistant shows has the role assistant. The text is what a
    person would read; an item of an unknown type has the texts of its content.
    """
    kind = str(item.get("type"))
    if kind == "user_message":
        return "user", _lines(_user_message(item)), kind, None
    if kind == "client_tool_call":
        return "tool", _text(item.get("output")), kind, item.get("name")
    if kind in {"hidden_context_item", "sdk_hidden_context"}:
        return "developer", _text(item.get("content")), kind, None
    if kind == "widget":
        return "assistant", item.get("copy_text") or _lines(_widget(item.get("widget"))), kind, None
    if kind == "structured_input":
        return "assistant", _lines(_questions(item)), kind, None
    if kind == "task":
        return "assistant", _lines(_task(item.get("task"))), kind, None
    if kind == "workflow":
        workflow = as_object(item.get("workflow")) or {}
        lines = [
            *_task(workflow.get("summary")),
            *(line for task in _objects(workflow, "tasks") for line in _task(task)),
        ]
        return "assistant", _lines(lines), kind, None
    return "assistant", _lines(texts_of(item.get("content"))), kind, None


def parse_attachment(attachment: dict[str, Any]) -> ParsedMessage:
    """Parse an attachment, which the user has uploaded; its text is the name of the file."""
    return "user", str(attachment.get("name") or ""), "attachment", None


def message_of(parameter: str, fields: dict[str, Any]) -> dict[str, Any]:
    """
    Return the fields of the message for an item or an attachment, with its id as key.

    Raises InvalidInputError, which names `parameter`, for an id that `id_of` makes, or a value that is not JSON.
    """
    identifier = fields["id"]
    if _SEQ_ID.fullmatch(identifier):
        raise InvalidInputError(f"{parameter}.id", "belongs to a message that ChatKit did not store")
    payload = json_text(parameter, fields)
    parsed = parse_attachment(fields) if parameter == "attachment" else parse_item(fields)
    return dict(new_message(FRAMEWORK, parsed, payload, name_of(identifier)))


def items_of(message: Message, thread_id: str) -> Iterator[dict[str, Any]]:
    """
    Yield the item of a message, as ChatKit stored it, and then as an item with the message's text.

    Instructions of the system or the developer become hidden context. A tool's message and one without text are none.
    """
    if (item := own_item(message, FRAMEWORK)) is not None:
        yield item
    if not has_text(message):
        return
    fields: dict[str, Any] = {"id": id_of(message), "thread_id": thread_id, "created_at": message.created_at}
    if message.role == "user":
        content = [{"type": "input_text", "text": message.content}]
        yield {"type": "user_message", "content": content, "inference_options": {}, **fields}
    elif message.role == "assistant":
        content = [{"type": "output_text", "text": message.content}]
        yield {"type": "assistant_message", "content": content, **fields}
    else:
        yield {"type": "hidden_context_item", "content": message.content, **fields}


def id_of(message: Message) -> str:
    """Return the id of a message's item. A message without a key, which ChatKit did not store, has one by its seq."""
    return f"chatdb:seq:{message.seq}" if message.key is None else message.key


def address_of(item_id: str) -> dict[str, Any]:
    """Return the seq or the key of the message of an item."""
    match = _SEQ_ID.fullmatch(item_id)
    return {"seq": int(match[1])} if match else {"key": name_of(item_id)}


def thread_metadata(fields: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a thread's conversation, which has the thread as JSON text."""
    return {"framework": FRAMEWORK, "thread": json_text("thread", fields, allow_nan=True)}


def threads_of(conversation: Conversation, prefix: str, thread_id: str | None = None) -> Iterator[dict[str, Any]]:
    """
    Yield the thread of a conversation, as ChatKit stored it, and then one with only its id, title and time.

    The conversation may be a copy of another one, renamed, or not ChatKit's. Its key and title win over
    the stored ones.
    """
    name = (conversation.key or "").removeprefix(prefix)
    plain = {"id": thread_id or name, "title": conversation.title, "created_at": conversation.created_at}
    text = (conversation.metadata or {}).get("thread")
    stored = None
    if isinstance(text, str):
        with suppress(ValueError):
            stored = as_object(json.loads(text))
    if stored is not None:
        if thread_id is not None or name_of(stored.get("id")) != name:
            stored["id"] = plain["id"]
        title = stored.get("title")
        if not isinstance(title, str) or title_of(title) != conversation.title:
            stored["title"] = conversation.title
        yield stored
    yield plain


def title_of(title: str | None) -> str | None:
    """Return a title that a conversation can have: with U+FFFD for NUL and lone surrogates, and cut at its limit."""
    return None if title is None else replace_unstorable(title[:MAX_TITLE])


def _user_message(item: dict[str, Any]) -> Iterator[object]:
    yield item.get("quoted_text")
    yield "".join(texts_of(item.get("content")))
    yield from (attachment.get("name") for attachment in _objects(item, "attachments"))


def _widget(component: object) -> Iterator[object]:
    """Yield the texts of a widget's component and of those inside it."""
    fields = as_object(component) or {}
    yield from (fields.get(name) for name in _WIDGET_TEXTS)
    children = fields.get("children")
    only_child = as_object(children)
    for child in [only_child] if only_child else as_list(children) or ():
        yield from _widget(child)


def _questions(item: dict[str, Any]) -> Iterator[object]:
    for question in _objects(item, "inputs"):
        yield question.get("question")
        answer = as_object(question.get("answer")) or {}
        yield ", ".join(value for value in as_list(answer.get("values")) or () if isinstance(value, str))


def _task(task: object) -> Iterator[object]:
    return map((as_object(task) or {}).get, _TASK_TEXTS)


def _objects(item: dict[str, Any], field: str) -> Iterator[dict[str, Any]]:
    return (fields for value in as_list(item.get(field)) or () if (fields := as_object(value)) is not None)


def _text(value: object) -> str:
    """Return a text, or any other value but None as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _lines(texts: Iterator[Any] | list[Any]) -> str:
    return "\n".join(text for text in texts if text and isinstance(text, str))
