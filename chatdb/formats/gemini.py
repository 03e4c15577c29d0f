"""Reads Gemini: the entries of Google Takeout's MyActivity.json, and prompts saved by AI Studio."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple, TypeAlias

from chatdb._core.validate import MAX_TITLE
from chatdb.formats import blocks, html, items, trees

_Object: TypeAlias = dict[str, Any]

NO_THREAD: Final = "entry without a thread: stored as a conversation of its own"
NOT_A_PROMPT: Final = "entry is no prompt, but another activity"
OTHER_PRODUCT: Final = "entry of another Google product"

_PREFIXES: Final = (
    "Prompted ", "Said ", "Asked ", "Prompt: ", "Eingegebener Prompt: ", "Prompt eingegeben: ", "Gesagt: ",
    "A envoyé la requête : ", "Requête envoyée : ", "Ha enviado la petición: ", "Se envió la instrucción: ",
    "Prompt inviato: ", "Enviou o comando: ", "Comando enviado: ",
)  # fmt: skip
"""What Takeout writes before a prompt. `Prefix.of` learns that of any other language."""

_THREAD: Final = re.compile(r"/app/([0-9A-Za-z_-]+)")


_BEFORE_PROMPT: Final = (" ", ":", "\N{FULLWIDTH COLON}", "「", '"', "“", "\N{NO-BREAK SPACE}")


def _common(texts: Sequence[str]) -> str:
    """Return what all texts begin with."""
    return "".join(each[0] for each in takewhile(lambda each: len({*each}) == 1, zip(*texts, strict=False)))


class Entry(NamedTuple):
    """What is known of an entry before its conversation is put together."""

    thread: str
    """The id of its conversation, or '' if it does not say."""
    time: str
    title: str
    is_answered: bool


def entry(value: _Object) -> Entry:
    """Return what identifies an entry; raise UnsupportedItemError if it is not Gemini's."""
    products = [value.get("header"), *(items.as_list(value.get("products")) or ())]
    if not any(isinstance(one, str) and ("gemini" in (name := one.lower()) or "bard" in name) for one in products):
        raise items.UnsupportedItemError(OTHER_PRODUCT)
    urls = [
        value.get("titleUrl"),
        *((items.as_object(one) or {}).get("url") for one in items.as_list(value.get("details")) or ()),
    ]
    found = [match[1] for url in urls if isinstance(url, str) and (match := _THREAD.search(url))]
    time, title = value.get("time"), value.get("title")
    return Entry(
        found[-1] if found else "",
        time if isinstance(time, str) else "",
        title if isinstance(title, str) else "",
        bool(items.as_list(value.get("safeHtmlItem"))),
    )


class Prefix(NamedTuple):
    """What stands before and behind each prompt in the titles, in the language of the account."""

    before: str
    after: str

    @classmethod
    def of(cls, titles: Sequence[str]) -> Prefix:
        """Return what all titles of answered entries begin and end with, if there are enough to tell."""
        different = [*dict.fromkeys(titles)]
        if len(different) < 3 or any(title.startswith(_PREFIXES) for title in different):
            return cls("", "")
        before = _common(different)
        before = before[: max(before.rfind(mark) for mark in _BEFORE_PROMPT) + 1]
        after = _common([title[::-1] for title in different])[::-1]
        after = after[after.find("」") :] if "」" in after else ""
        return cls(before, after)

    def prompt_of(self, title: str) -> str | None:
        """Return the prompt in a title, or None if the title is not known to have one."""
        for before in _PREFIXES:
            if title.startswith(before):
                return title.removeprefix(before)
        if self.before and title.startswith(self.before):
            return title.removeprefix(self.before).removesuffix(self.after)
        return None


def conversation(entries: Sequence[tuple[_Object, trees.Encoded]], prefix: Prefix) -> Iterator[items.Item]:
    """Return the conversation of a thread's entries with their JSON, oldest first, or of one without a thread."""
    thread = entry(entries[0][0]).thread
    nodes: dict[str, trees.Node] = {}
    skipped: list[items.Skipped] = []
    title: str | None = None
    before: str | None = None
    for value, encoded in entries:
        known = entry(value)
        prompt = prefix.prompt_of(known.title)
        if prompt is None and not known.is_answered:
            place = f"entry of {known.time[:40]}"
            skipped.append(items.Skipped(NOT_A_PROMPT, messages=1, place=place))
            continue
        text = known.title if prompt is None else prompt
        title = title or text
        key = hashlib.sha256(json.dumps([known.time, known.title]).encode()).hexdigest()[:24]
        for name, pieces in ((key, (_prompt(value, text, encoded),)), (f"{key}#answer", _answer(value))):
            if pieces and name not in nodes:
                nodes[name] = trees.Node(before, items.time_of(known.time), name, pieces)
                before = name
    if not nodes:
        return iter(skipped)
    return _stream(trees.Conversation(
        "gemini:" if thread else "gemini:entry:",
        items.name_of(thread) if thread else next(iter(nodes)),
        nodes,
        before,
        " ".join((title or "").split())[: MAX_TITLE // 10] or None,
        skipped=tuple(skipped),
    ), is_alone=not thread)  # fmt: skip


def _stream(source: trees.Conversation, *, is_alone: bool) -> Iterator[items.Item]:
    at = next(iter(source.nodes.values())).sent_at
    yield from trees.stream(source)
    if is_alone:
        yield items.Changed(NO_THREAD, conversations=1, place=f"entry of {at}")


def _prompt(value: _Object, text: str, encoded: trees.Encoded) -> trees.Piece:
    attached = [*(items.as_list(value.get("attachedFiles")) or ()), value.get("imageFile")]
    named = [
        items.attached(one if isinstance(one, str) else (items.as_object(one) or {}).get("name"))
        for one in attached
        if one
    ]
    return trees.Piece("user", items.lines(text, *dict.fromkeys(named)), None, encoded)


def _answer(value: _Object) -> tuple[trees.Piece, ...]:
    listed = [items.as_object(one) or {} for one in items.as_list(value.get("safeHtmlItem")) or ()]
    texts = [html.text_of(one["html"]) for one in listed if isinstance(one.get("html"), str)]
    return (trees.Piece("assistant", "\n\n".join(texts), None, {"safeHtmlItem": listed}),) if texts else ()


def ai_studio(source: _Object) -> Iterator[items.Item]:
    """Return the conversation of a prompt saved by AI Studio; raise UnsupportedItemError if it has no messages."""
    prompt = items.as_object(source.get("chunkedPrompt")) or {}
    chunks = [items.as_object(one) or {} for one in items.as_list(prompt.get("chunks")) or ()]
    settings = items.as_object(source.get("runSettings")) or {}
    instruction = items.as_object(source.get("systemInstruction")) or {}
    found: list[tuple[trees.Piece, ...]] = []
    skipped: list[items.Skipped] = []
    texts = [instruction.get("text"), *_texts(instruction)]
    if system := items.lines(*(text for text in texts if isinstance(text, str))):
        found.append((trees.Piece("system", system, None, instruction),))
    times = [None] * len(found)
    for place, chunk in enumerate(chunks, 1):
        try:
            found.append(_chunk(chunk, settings.get("model")))
        except items.UnsupportedItemError as error:
            skipped.append(trees.skipped(error, place))
        else:
            times.append(chunk.get("createTime"))
    nodes = trees.chain(found, map(items.time_of, times))
    model = settings.get("model")
    return trees.stream(
        trees.Conversation(
            "gemini:ai-studio", "", nodes, str(len(nodes)), None, {"model": model}, skipped=tuple(skipped)
        )
    )


def _texts(value: _Object) -> Iterable[object]:
    return ((items.as_object(one) or {}).get("text") for one in items.as_list(value.get("parts")) or ())


def _chunk(chunk: _Object, model: object) -> tuple[trees.Piece, ...]:
    role = items.role(chunk.get("role"))
    text = chunk.get("text")
    text = text if isinstance(text, str) else items.lines(*(one for one in _texts(chunk) if isinstance(one, str)))
    kind = items.REASONING if chunk.get("isThought") is True else None
    named = [
        items.attached((items.as_object(chunk[name]) or {}).get("id"), name)
        for name in chunk
        if name.startswith(("drive", "inline", "youtube"))
    ]
    return blocks.pieces(
        role,
        [(blocks.Part(text, kind), None)],
        chunk,
        model=model if role == "assistant" else None,
        attachments="\n".join(named),
    )
