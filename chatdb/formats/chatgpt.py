"""Reads conversation trees in ChatGPT's export, conversations.json, with all branches."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from chatdb.formats import items, trees

_Object: TypeAlias = dict[str, Any]

_CONTEXTS = {"user_editable_context", "model_editable_context"}
_REASONING = {"thoughts", "reasoning_recap"}
_RESULTS = {"execution_output", "tether_browsing_display", "tether_quote", "sonic_webpage", "system_error"}
_TEXTS = ("text", "result", "content", "user_profile", "user_instructions", "model_set_context")
"""The fields that hold the text of a content without parts: code, output, web pages, reasoning, instructions."""

_MARK = re.compile("\ue200[^\ue200\ue201]*\ue201|\u3010\\d+(?::\\d+)?\u2020[^\u3011]*\u3011")
"""A citation: ChatGPT's private characters around its ids, or the older brackets."""
_STRAY = re.compile("[\ue200-\ue204]")
_KEPT: Final = ("gizmo_id", "voice", "conversation_template_id", "conversation_origin", "workspace_id")


def conversation(source: _Object) -> Iterator[items.Item]:
    """
    Return a conversation, the messages of all its branches, and what was changed or skipped.

    A message that the user did not see is a hidden one of the system; reasoning and calls of tools say so in their
    metadata. The payload is the message as it was exported.

    Raises UnsupportedItemError if there are no messages.
    """
    mapping = items.as_object(source.get("mapping"))
    if mapping is None:
        raise items.UnsupportedItemError("no message tree")
    nodes = trees.Nodes()
    for name, value in items.taken_items(mapping):
        node = items.as_object(value) or {}
        message = node.get("message")
        fields = items.as_object(message) or {}
        key = items.short(fields.get("id"))
        nodes.add(name, message, _pieces, parent=node.get("parent"), sent_at=fields.get("create_time"), key=key)
    pinned_at = items.time_of(source.get("pinned_time"))
    kept = {name: source.get(name) for name in _KEPT}
    return trees.stream(
        trees.Conversation(
            "chatgpt:",
            items.name_of(source.get("conversation_id")) or items.name_of(source.get("id")),
            nodes.by_name,
            source.get("current_node"),
            source.get("title"),
            {"model": source.get("default_model_slug")} | kept,
            items.time_of(source.get("create_time")),
            items.time_of(source.get("update_time")),
            items.flag(source, "is_archived"),
            pinned_at or items.flag(source, "is_starred", "pinned_time"),
            tuple(nodes.skipped),
        )
    )


def _pieces(message: object) -> tuple[trees.Piece, ...]:
    return () if message is None else (piece(message),)


def piece(value: object) -> trees.Piece:
    """Return the message for one of the export, or raise UnsupportedItemError."""
    message = items.as_object(value)
    if message is None:
        raise items.UnsupportedItemError("message is not an object")
    author = items.as_object(message.get("author")) or {}
    role = items.role(author.get("role"))
    content = items.as_object(message.get("content")) or {}
    about = items.as_object(message.get("metadata")) or {}
    kind, recipient = content.get("content_type"), message.get("recipient")
    text = _text(content, about)
    named = items.short(author.get("name"))
    label = None
    if role == "assistant" and isinstance(recipient, str) and recipient not in {"all", ""}:
        label, named, text = items.TOOL_CALL, items.short(recipient), _canvas(text)
    elif kind in _REASONING:
        label = items.REASONING
    elif role == "tool" or kind in _RESULTS:
        label = items.TOOL_RESULT
    elif role == "assistant":
        text = _cited(text, about)
    is_hidden = (
        about.get("is_visually_hidden_from_conversation") is True
        or about.get("is_user_system_message") is True
        or kind in _CONTEXTS
        or (role == "system" and not text)
    )
    is_empty = role == "assistant" and not text.strip() and message.get("status") != "in_progress"
    metadata = items.metadata_of(
        model=items.short(about.get("model_slug")),
        name=named,
        type=label,
        hidden=is_hidden or is_empty,
    )
    state = "aborted" if message.get("status") == "in_progress" else None
    return trees.Piece("system" if is_hidden else role, text, metadata, message, label is None, state)


def _text(content: _Object, about: _Object) -> str:
    """Return the readable text of a content, with a line for each attachment."""
    attachments = [fields for one in items.as_list(about.get("attachments")) or () if (fields := items.as_object(one))]
    parts = items.as_list(content.get("parts"))
    texts: list[str] = []
    named: set[object] = set()
    if parts is not None:
        for part in parts:
            fields = items.as_object(part)
            texts.append(part if isinstance(part, str) else _part(fields, attachments, named) if fields else "")
    else:
        texts += [content[name] for name in ("name", "title", "url") if content.get("content_type") in _RESULTS
                  and isinstance(content.get(name), str)]  # fmt: skip
        texts += [text for name in _TEXTS if isinstance(text := content.get(name), str)]
        texts += _thoughts(content)
    texts += [
        items.attached(one.get("name"), one.get("mime_type", one.get("mimeType")))
        for one in attachments
        if one.get("id") not in named
    ]
    if parts is not None and len(texts) == len(parts) and all(isinstance(part, str) for part in parts):
        return "\n".join(texts)
    return items.lines(*texts)


def _part(part: _Object, attachments: list[_Object], named: set[object]) -> str:
    """Return the text of a part that is no string, and note the attachment that it names."""
    kind, pointer = part.get("content_type", part.get("type")), part.get("asset_pointer")
    if isinstance(pointer, str):
        file_id = pointer.rpartition("/")[2]
        name: object = file_id
        for attachment in attachments:
            if attachment.get("id") == file_id:
                name = attachment.get("name") or file_id
                named.add(file_id)
        made = items.as_object((items.as_object(part.get("metadata")) or {}).get("dalle")) or {}
        if name == file_id and isinstance(made.get("prompt"), str) and made["prompt"]:
            name = made["prompt"]
        return items.attached(name, "image" if kind == "image_asset_pointer" else kind)
    if kind == "search_result_group":
        entries = map(items.as_object, items.as_list(part.get("entries")) or ())
        found = [(items.link(one.get("title"), one.get("url")), one.get("snippet")) for one in entries if one]
        return items.lines(*(text for pair in found for text in pair if isinstance(text, str)))
    if (audio := items.as_object(part.get("audio_asset_pointer"))) is not None:
        return _part(audio, attachments, named)
    text = part.get("text")
    if isinstance(text, str) or not isinstance(kind, str):
        return text if isinstance(text, str) else ""
    return items.attached(None, kind)


def _thoughts(content: _Object) -> list[str]:
    thoughts = content.get("thoughts")
    texts = [thoughts] if isinstance(thoughts, str) else []
    for thought in items.as_list(thoughts) or ():
        fields = items.as_object(thought) or {"content": thought}
        texts += [text for name in ("summary", "content") if isinstance(text := fields.get(name), str)]
    if not texts or content.get("content_type") != "thoughts":
        texts += [text for text in [content.get("summary")] if isinstance(text, str)]
    return texts


def _canvas(text: str) -> str:
    """Return the document of a call that creates one in the canvas, or the text of any other call."""
    if not text.startswith("{"):
        return text
    try:
        fields = items.as_object(json.loads(text)) or {}
    except (ValueError, RecursionError):
        return text
    document = fields.get("content")
    if not isinstance(document, str) or not isinstance(fields.get("name"), str):
        return text
    return f"{fields['name']}\n{document}"


def _cited(text: str, about: _Object) -> str:
    """Return the text with titles and links instead of the marks of citations."""
    references: defaultdict[str, list[str]] = defaultdict(list)
    for one in items.as_list(about.get("content_references")) or ():
        reference = items.as_object(one) or {}
        matched = reference.get("matched_text")
        if isinstance(matched, str) and matched.strip():
            references[matched].append(_reference(reference))
    for one in items.as_list(about.get("citations")) or ():
        reference = items.as_object(one) or {}
        start, end = reference.get("start_ix"), reference.get("end_ix")
        if type(start) is int and type(end) is int and 0 <= start < end <= len(text) and text[start] == "\u3010":
            matched = text[start:end]
            if not references[matched]:
                references[matched].append(_reference(items.as_object(reference.get("metadata")) or {}))
    for matched, found in references.items():
        if matched not in text or (not any(found) and not _MARK.fullmatch(matched)):
            continue
        first, *others = text.split(matched)
        texts = [first]
        for place, other in enumerate(others):
            texts += [found[min(place, len(found) - 1)], other]
        text = "".join(texts)
    if "\u3010" in text:
        text = _MARK.sub(_bracketed, text)
    return _STRAY.sub("", _MARK.sub("", text)) if _STRAY.search(text) else text


def _bracketed(mark: re.Match[str]) -> str:
    """Return the file's name of an old mark that no citation explains; the mark of a web page says only `source`."""
    name = mark[0].rpartition("\u2020")[2][:-1]
    return "" if mark[0][0] == "\ue200" or name in {"", "source"} else f"[{name}]"


def _reference(reference: _Object) -> str:
    alt = reference.get("alt")
    if isinstance(alt, str) and alt.strip():
        return alt
    listed = [one for one in map(items.as_object, items.as_list(reference.get("items")) or ()) if one]
    links = [items.link(one.get("title"), one.get("url")) for one in listed]
    found = ", ".join(link for link in links if link)
    return found or items.link(reference.get("title") or reference.get("name"), reference.get("url"))
