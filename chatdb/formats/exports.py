"""The formats of other products' files: how to tell them apart, how to read one, and how a user gets it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

from chatdb.formats import (
    chatgpt,
    claude,
    deepseek,
    gemini,
    grok,
    items,
    librechat,
    messages,
    open_webui,
    sharegpt,
    trees,
)

_Object: TypeAlias = dict[str, Any]


class Format(NamedTuple):
    """A format: its product, how a user gets the file, and the function that reads one conversation."""

    product: str
    how: str
    conversation: Callable[[_Object], Iterator[items.Item]]
    message: Callable[[_Object], tuple[trees.Piece, ...]] | None = None
    """Reads one message again, which an import kept as payload."""


def _activity(source: _Object) -> Iterator[items.Item]:
    """Read what is no entry of an activity on its own: a prompt of AI Studio."""
    return gemini.ai_studio(source)


def _chatgpt_pieces(message: object) -> tuple[trees.Piece, ...]:
    return (chatgpt.piece(message),)


FORMATS: Final = {
    "chatgpt": Format(
        "ChatGPT",
        "Settings > Data controls > Export data; the link to the .zip comes by e-mail",
        chatgpt.conversation,
        _chatgpt_pieces,
    ),
    "claude": Format(
        "Claude.ai",
        "Settings > Privacy > Export data; the link to the .zip comes by e-mail",
        claude.conversation,
        claude.pieces,
    ),
    "messages": Format(
        "lists of messages with role and content: OpenAI fine-tuning files, Hugging Face data sets, UI messages of the "
        "AI SDK",
        "a .json or .jsonl file of the data set",
        messages.conversation,
        messages.pieces_of,
    ),
    "open-webui": Format(
        "Open WebUI",
        "Settings > Data controls > Export chats, or a chat's menu > Download > JSON",
        open_webui.conversation,
        open_webui.pieces,
    ),
    "librechat": Format(
        "LibreChat",
        "a conversation's menu > Export > JSON, once for each conversation",
        librechat.conversation,
        librechat.pieces,
    ),
    "gemini": Format(
        "Gemini",
        "takeout.google.com: select My Activity, then only Gemini Apps, in JSON; for AI Studio: download the prompt "
        "from Google Drive",
        _activity,
    ),
    "grok": Format("Grok", "accounts.x.ai > Data > Download account data", grok.conversation, grok.pieces),
    "deepseek": Format("DeepSeek", "Settings > Data > Export all data", deepseek.conversation, deepseek.pieces),
    "sharegpt": Format(
        "ShareGPT and its cousins, such as LLaMA-Factory",
        "a .json or .jsonl file of the data set",
        sharegpt.conversation,
    ),
}
"""By name, as in --format."""

_NAME: Final = re.compile("[a-z][A-Za-z_]{0,29}")
"""A field that a program names; anything else may be a text."""


def name_of(value: object) -> str | None:
    """Return the name of the format of a conversation, or of what a file of one conversation begins with."""
    fields = items.as_object(value)
    if fields is None:
        listed = items.as_list(value)
        return "messages" if listed and _is_message(listed[0]) else None
    mapping = items.as_object(fields.get("mapping"))
    if mapping is not None:
        nodes = [items.as_object(node) or {} for node in mapping.values()]
        found = [items.as_object(node.get("message")) or {} for node in nodes]
        is_deepseek = "inserted_at" in fields or any("fragments" in message for message in found)
        return "deepseek" if is_deepseek else "chatgpt"
    if items.as_list(fields.get("chat_messages")) is not None:
        return "claude"
    if items.as_object(fields.get("conversation")) is not None and items.as_list(fields.get("responses")) is not None:
        return "grok"
    chat = items.as_object(fields.get("chat")) or fields
    if items.as_object((items.as_object(chat.get("history")) or {}).get("messages")) is not None or (
        chat is not fields and items.as_list(chat.get("messages")) is not None
    ):
        return "open-webui"
    if items.as_list(fields.get("messagesTree")) is not None or _has_message_ids(fields):
        return "librechat"
    if items.as_object(fields.get("chunkedPrompt")) is not None or is_activity(fields):
        return "gemini"
    for name in messages.LISTS:
        listed = items.as_list(fields.get(name))
        if listed is not None:
            first = next((each for one in listed if (each := items.as_object(one))), None) or {}
            if "from" in first or (not listed and name in {"conversations", "items"}):
                return "sharegpt"
            if _is_message(first) or (not listed and name == "messages"):
                return "messages"
    return None


def is_activity(fields: _Object) -> bool:
    """Whether this is an entry of Google's My Activity."""
    return all(isinstance(fields.get(name), str) for name in ("title", "time", "header")) and "products" in fields


def is_message(value: object) -> bool:
    """Whether this is a single message of a list, not a conversation."""
    return _is_message(value)


def described(value: object) -> str:
    """Say what a value of unknown format looks like, by the names of its fields."""
    listed = items.as_list(value)
    if listed is not None:
        return f"a list of {described(listed[0])}" if listed else "an empty list"
    fields = items.as_object(value)
    if fields is None:
        return "text or numbers"
    if not fields:
        return "empty objects"
    names = [f'"{name}"' for name in fields if _NAME.fullmatch(name)][:8]
    if len(fields) > len(names):
        names.append("others" if names else "other names")
    return f"objects with the fields {', '.join(names)}"


def _is_message(value: object) -> bool:
    fields = items.as_object(value) or {}
    role = fields.get("role", fields.get("from"))
    return isinstance(role, str) and bool({"content", "parts", "value", "tool_calls", "text"} & fields.keys())


def _has_message_ids(fields: _Object) -> bool:
    listed = items.as_list(fields.get("messages")) or ()
    return any("messageId" in message for one in listed if (message := items.as_object(one)))
