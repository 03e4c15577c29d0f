"""Maps lists of typed blocks, as the APIs of Anthropic, OpenAI and the AI SDK have them, to messages to store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

from chatdb.formats import items
from chatdb.formats.trees import Piece

_Object: TypeAlias = dict[str, Any]

_TEXTS: Final = {"text", "input_text", "output_text", "voice_note", "refusal", "markdown", "transcript", "knowledge"}
_REASONING: Final = {"thinking", "reasoning", "think", "redacted_thinking", "reasoning_content"}
_UNSEEN: Final = {"step-start", "step-finish", "token_budget", "flag"}


class Part(NamedTuple):
    """What a block says: a text of the message itself, or reasoning, a call of a tool or its result."""

    text: str
    kind: str | None = None
    name: str | None = None


def parts(blocks: Iterable[object]) -> Iterator[tuple[Part, object]]:
    """Yield what each block says, with the block."""
    for block in blocks:
        fields = items.as_object(block)
        if isinstance(block, str):
            yield Part(block), block
        elif fields is not None:
            for part in _parts(fields):
                yield part, block


def pieces(
    role: str,
    found: Iterable[tuple[Part, object]],
    original: object,
    *,
    model: object = None,
    name: object = None,
    attachments: str = "",
    state: str | None = None,
) -> tuple[Piece, ...]:
    """
    Return the messages for what the blocks of a foreign message say: texts in a row are one.

    The first text has the whole message as payload, any other has its block. A message without a text is an empty one.
    """
    runs: list[tuple[Part, object]] = []
    for part, block in found:
        if runs and part.kind is None and runs[-1][0].kind is None:
            runs[-1] = Part(items.lines(runs[-1][0].text, part.text)), [runs[-1][1], block]
        elif part.text or part.kind == items.TOOL_CALL:
            runs.append((part, block))
    said = [place for place, (part, _) in enumerate(runs) if part.kind is None]
    if not runs or (attachments and not said):
        said.append(len(runs))
        runs.append((Part(""), None))
    main = said[0] if said else 0
    if attachments:
        part, block = runs[said[-1]]
        runs[said[-1]] = Part(items.lines(part.text, attachments)), block
    is_empty = role == "assistant" and len(runs) == 1 and not runs[0][0].text and state is None
    return tuple(
        Piece(
            "tool" if part.kind == items.TOOL_RESULT else role,
            part.text,
            items.metadata_of(
                model=items.short(model), name=items.short(part.name or name), type=part.kind, hidden=is_empty
            ),
            original if place == main else block,
            part.kind is None,
            state if place == len(runs) - 1 else None,
        )
        for place, (part, block) in enumerate(runs)
    )


def as_text(value: object) -> str:
    """Return a value that a tool was given or returned as text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    listed = items.as_list(value)
    if listed and all(items.as_object(one) is not None and "type" in one for one in listed):
        return items.lines(*(part.text for part, _ in parts(listed)))
    return json.dumps(value, ensure_ascii=False)


def _parts(block: _Object) -> Iterator[Part]:
    kind = block.get("type")
    kind = kind if isinstance(kind, str) else "text"
    name = items.short(block.get("name") or block.get("toolName") or block.get("tool_name"))
    if kind in _UNSEEN or kind.startswith("data-"):
        return
    if kind in _TEXTS:
        yield Part(_cited(_text(block), block))
    elif kind in _REASONING:
        yield Part(_text(block) or _summaries(block), items.REASONING)
    elif kind in {"tool-invocation", "tool_call"} and (call := items.as_object(block.get(_inner(kind)))) is not None:
        named = items.short(call.get("toolName") or call.get("name"))
        yield Part(as_text(call.get("args", call.get("arguments"))), items.TOOL_CALL, named)
        result = call.get("result", call.get("output"))
        if result not in (None, ""):
            yield Part(as_text(result), items.TOOL_RESULT, named)
    elif kind in {"dynamic-tool", "tool-call"} or (kind.startswith("tool-") and kind != "tool-result"):
        named = name or items.short(kind.removeprefix("tool-"))
        yield Part(as_text(block.get("input", block.get("args"))), items.TOOL_CALL, named)
        result = block.get("output") if block.get("output") is not None else block.get("errorText")
        if result is not None:
            yield Part(as_text(result), items.TOOL_RESULT, named)
    elif kind.endswith(("tool_use", "_call")):
        call = block.get("input", block.get("arguments", block.get("action")))
        yield Part(as_text(call), items.TOOL_CALL, name or items.short(kind))
    elif kind == "tool-result" or kind.endswith(("tool_result", "_call_output")):
        result = next((block[key] for key in ("content", "output", "result") if block.get(key) is not None), "")
        yield Part(as_text(result), items.TOOL_RESULT, name)
    elif kind in {"source-url", "source-document", "source"}:
        source = items.as_object(block.get("source")) or block
        yield Part(items.link(source.get("title"), source.get("url")))
    elif kind == "message":
        yield from (part for part, _ in parts(items.as_list(block.get("content")) or ()))
    else:
        yield Part(_named(block, kind))


def _inner(kind: str) -> str:
    return "toolInvocation" if kind == "tool-invocation" else "tool_call"


def _text(block: _Object) -> str:
    for name in ("text", "thinking", "think", "reasoning", "content", "transcript", "refusal", "data"):
        value = block.get(name)
        value = (items.as_object(value) or {}).get("value") if items.as_object(value) else value
        if isinstance(value, str) and value and not (name == "data" and block.get("type") == "redacted_thinking"):
            return value
        if items.as_list(value):
            return items.lines(*items.texts_of(value))
    if block.get("type") == "knowledge":
        return items.link(block.get("title"), block.get("url"))
    title = block.get("title")
    return title if isinstance(title, str) else ""


def _summaries(block: _Object) -> str:
    found = [items.as_object(one) or {} for one in items.as_list(block.get("summary") or block.get("summaries")) or ()]
    return items.lines(*(text for one in found for key in ("summary", "text") if isinstance(text := one.get(key), str)))


def _cited(text: str, block: _Object) -> str:
    """Return the text with a link behind each passage that cites something."""
    found: list[tuple[int, str]] = []
    for one in [*(items.as_list(block.get("citations")) or ()), *(items.as_list(block.get("annotations")) or ())]:
        citation = items.as_object(one) or {}
        details = items.as_object(citation.get("details")) or items.as_object(citation.get("url_citation")) or citation
        reference = items.link(
            citation.get("title") or details.get("title") or details.get("document_title"),
            citation.get("url") or details.get("url"),
        )
        end = citation.get("end_index", details.get("end_index"))
        if reference:
            found.append((end if type(end) is int and 0 <= end <= len(text) else len(text), f" ({reference})"))
    for end, reference in sorted(dict.fromkeys(found), reverse=True):
        if reference[2:-1] not in text:
            text = text[:end] + reference + text[end:]
    return text


def _named(block: _Object, kind: str) -> str:
    """Return the line that names an image, a file or whatever else a block is."""
    inner = items.as_object(block.get(kind)) or items.as_object(block.get("source")) or {}
    for fields in (block, inner):
        for key in ("filename", "file_name", "name", "title", "url", "file_id", "fileId", "alt"):
            value = fields.get(key)
            if isinstance(value, str) and value and not value.startswith("data:"):
                return items.attached(value[:500], f"{kind} {block.get('mediaType', block.get('mimeType', ''))}")
    text = "" if kind in {"image_url", "input_image", "image", "file", "document"} else _text(block)
    return text or f"[{'image' if 'image' in kind else kind}]"
