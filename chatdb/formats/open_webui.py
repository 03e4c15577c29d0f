"""Reads chats exported from Open WebUI: all of them, or one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from typing import Any, TypeAlias

from chatdb.formats import blocks, items, trees

_Object: TypeAlias = dict[str, Any]

_DETAILS = re.compile(r"<details\b([^>]*)>(.*?)</details>\n?", re.DOTALL)
_SUMMARY = re.compile(r"\s*<summary>.*?</summary>\s*", re.DOTALL)
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def conversation(source: _Object) -> Iterator[items.Item]:
    """
    Return a chat, the messages of all its branches, and what was changed or skipped.

    Raises UnsupportedItemError if there are no messages.
    """
    chat = items.as_object(source.get("chat")) or source
    history = items.as_object(chat.get("history")) or {}
    tree = items.as_object(history.get("messages"))
    named = (
        tree if tree else {str(place): one for place, one in enumerate(items.as_list(chat.get("messages")) or (), 1)}
    )
    nodes = trees.Nodes()
    for name, value in items.taken_items(named):
        message = items.as_object(value) or {}
        parent = message.get("parentId") if tree else nodes.last
        key = items.short(message.get("id")) or (items.short(name) if tree else None)
        nodes.add(name, message, pieces, parent=parent, sent_at=message.get("timestamp"), key=key)
    models = [one for one in items.as_list(chat.get("models")) or () if isinstance(one, str)]
    about = items.as_object(source.get("meta")) or {}
    tags = items.as_list(about.get("tags")) or items.as_list(chat.get("tags")) or ()
    return trees.stream(
        trees.Conversation(
            "open-webui:",
            items.name_of(source.get("id")) or items.name_of(chat.get("id")),
            nodes.by_name,
            history.get("currentId") if tree else nodes.last,
            source.get("title") or chat.get("title"),
            {"model": ", ".join(models), "tags": ", ".join(tag for tag in tags if isinstance(tag, str))},
            items.time_of(source.get("created_at")) or items.time_of(chat.get("timestamp")),
            items.time_of(source.get("updated_at")),
            items.flag(source, "archived"),
            items.flag(source, "pinned"),
            tuple(nodes.skipped),
        )
    )


def pieces(message: _Object) -> tuple[trees.Piece, ...]:
    """Return the messages for one of the export, or raise UnsupportedItemError."""
    role = items.role(message.get("role"))
    output = items.as_list(message.get("output"))
    content = message.get("content")
    found = list(blocks.parts(output or ()))
    if not any(part.kind is None and part.text for part, _ in found):
        listed = items.as_list(content)
        found += blocks.parts(listed) if listed is not None else _details(content) if isinstance(content, str) else ()
    problem = items.as_object(message.get("error")) or {}
    if isinstance(problem.get("content"), str):
        found.append((blocks.Part(f"[error: {problem['content']}]"), problem))
    found += [(blocks.Part(source), None) for source in _sources(message)]
    files = [items.as_object(one) or {} for one in items.as_list(message.get("files")) or ()]
    attachments = [items.attached(_file_name(one), one.get("type")) for one in files]
    return blocks.pieces(
        role,
        found,
        message,
        model=message.get("model") if role == "assistant" else None,
        attachments="\n".join(attachments),
        state="aborted" if message.get("done") is False else None,
    )


def _file_name(fields: _Object) -> object:
    inner = items.as_object(fields.get("file")) or {}
    url = fields.get("url")
    name = fields.get("name") or inner.get("filename") or url
    return "image" if isinstance(name, str) and name.startswith("data:") else name


def _details(content: str) -> Iterator[tuple[blocks.Part, object]]:
    """Yield the texts of a content, and its reasoning and calls of tools, which are in HTML's <details>."""
    end = 0
    for match in _DETAILS.finditer(content):
        given = {name: unescape(value) for name, value in _ATTRIBUTE.findall(match[1])}
        kind = given.get("type")
        if kind not in {"reasoning", "tool_calls", "code_interpreter"}:
            continue
        if before := content[end : match.start()].strip():
            yield blocks.Part(before), before
        end = match.end()
        inner = unescape(_SUMMARY.sub("", match[2])).strip()
        if kind == "reasoning":
            text = "\n".join(line.removeprefix("> ").removeprefix(">") for line in inner.splitlines())
            yield blocks.Part(text, items.REASONING), match[0]
        else:
            name = items.short(given.get("name")) or kind
            yield blocks.Part(given.get("arguments") or inner, items.TOOL_CALL, name), match[0]
            if result := given.get("result") or given.get("output"):
                yield blocks.Part(result, items.TOOL_RESULT, name), match[0]
    if rest := content[end:].strip() if end else content:
        yield blocks.Part(rest), rest


def _sources(message: _Object) -> Iterator[str]:
    for number, one in enumerate(items.as_list(message.get("sources")) or (), 1):
        source = items.as_object((items.as_object(one) or {}).get("source")) or {}
        url = source.get("url") or (source["urls"][0] if items.as_list(source.get("urls")) else None)
        named = source.get("name")
        if url is None and isinstance(named, str) and named.startswith("http"):
            url = named
        if reference := items.link(named, url):
            yield f"[{number}] {reference}"
