"""Reads conversations of Grok's export, one object with all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from chatdb.formats import blocks, items, trees

_Object: TypeAlias = dict[str, Any]

_RENDER = re.compile(r"<grok:render\b.*?</grok:render>|<grok:render\b[^>]*/>", re.DOTALL)
_CITATION = re.compile(r'name="citation_id">\s*"?(\w+)')


def conversation(source: _Object) -> Iterator[items.Item]:
    """
    Return a conversation, the messages of all its branches, and what was changed or skipped.

    Raises UnsupportedItemError if there are no messages.
    """
    about = items.as_object(source.get("conversation"))
    listed = items.as_list(source.get("responses"))
    if about is None or listed is None:
        raise items.UnsupportedItemError("no list of responses")
    # an export without parents lists one line
    has_parents = any(isinstance(_response(value).get("parent_response_id"), str) for value in listed)
    nodes = trees.Nodes()
    for place, value in enumerate(items.taken(listed), 1):
        response = _response(value)
        key = items.short(response.get("_id") or response.get("response_id"))
        parent = response.get("parent_response_id", nodes.last) if has_parents else nodes.last
        sent_at = response.get("create_time")
        nodes.add(nodes.name_for(key, place), response, pieces, parent=parent, sent_at=sent_at, key=key)
    identifier = about.get("id") or about.get("conversation_id") or about.get("_id")
    current = about.get("leaf_response_id")
    return trees.stream(
        trees.Conversation(
            "grok:",
            items.name_of(identifier),
            nodes.by_name,
            current if has_parents else nodes.last,
            about.get("title"),
            {"summary": about.get("summary")},
            items.time_of(about.get("create_time")),
            items.time_of(about.get("modify_time")),
            items.flag(about, "archived"),
            items.flag(about, "starred"),
            tuple(nodes.skipped),
        )
    )


def _response(value: object) -> _Object:
    wrapped = items.as_object(value) or {}
    return items.as_object(wrapped.get("response")) or wrapped


def pieces(response: _Object) -> tuple[trees.Piece, ...]:
    """Return the messages for one of the export, or raise UnsupportedItemError."""
    role = items.role(response.get("sender"))
    found: list[tuple[blocks.Part, object]] = [
        (blocks.Part(text, items.REASONING), {name: text})
        for name in ("thinking_trace", "thinking")
        if isinstance(text := response.get(name), str)
    ]
    text = response.get("message")
    found.append((blocks.Part(_cited(text, response) if isinstance(text, str) else ""), None))
    named = [
        items.attached(_name(one), "image" if "image" in field else None)
        for field in ("file_attachments", "image_attachments", "generated_image_urls")
        for one in items.as_list(response.get(field)) or ()
    ]
    return blocks.pieces(
        role,
        found,
        response,
        model=response.get("model") if role == "assistant" else None,
        attachments="\n".join(named),
        state="aborted" if response.get("partial") is True else None,
    )


def _name(value: object) -> object:
    fields = items.as_object(value)
    if fields is None:
        return value
    return next((fields[name] for name in ("file_name", "fileName", "name", "url", "id") if fields.get(name)), None)


def _cited(text: str, response: _Object) -> str:
    """Return the text with links instead of the marks of citations."""
    links: dict[str, str] = {}
    for field in ("web_search_results", "cited_web_search_results", "citations"):
        for place, one in enumerate(items.as_list(response.get(field)) or ()):
            fields = items.as_object(one) or {"url": one}
            number = fields.get("citation_id", fields.get("id", place))
            links.setdefault(str(number), items.link(fields.get("title"), fields.get("url")))

    def linked(match: re.Match[str]) -> str:
        named = _CITATION.search(match[0])
        found = links.get(named[1], "") if named else ""
        return f" ({found})" if found else ""

    return _RENDER.sub(linked, text)
