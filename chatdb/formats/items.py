"""What every format becomes: a flat stream of conversations, each followed by its messages, and what was left out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, cast

from chatdb._core.validate import MAX_NAME, check_content, check_metadata, check_payload, utf8_length
from chatdb.errors import InvalidInputError


class SourceMessage(NamedTuple):
    """A message, its fields in the order of the COPY; `payload` and `metadata` are JSON as text."""

    seq: int
    role: str
    content: str
    payload: str | None
    metadata: str | None
    token_count: int | None
    key: str | None
    created_at: datetime | None
    """None where the source has no times: that of the import."""

    def __repr__(self) -> str:  # as those of the records, without what was said
        return f"SourceMessage(seq={self.seq})"


class SourceConversation(NamedTuple):
    """A conversation, which is followed in the stream by its messages."""

    key: str | None
    title: str | None
    metadata: str | None
    last_seq: int
    created_at: datetime | None
    updated_at: datetime | None

    def __repr__(self) -> str:
        return f"SourceConversation(last_seq={self.last_seq})"


class Skipped(NamedTuple):
    """Something that was not taken. The reason is one of a few fixed sentences, so that they can be summed up."""

    reason: str
    conversations: int = 0
    messages: int = 0
    seq: int = 0
    """The place of a message in the conversation before it, which stays empty; 0 for anything else."""


class Changed(NamedTuple):
    """Something of the conversation before it that could not be taken as it is."""

    reason: str
    conversations: int = 0
    messages: int = 0


ParsedMessage: TypeAlias = tuple[str, str, str | None, object]
"""A message's role and text, what the framework calls its kind where that says more, and the author's name."""

Item: TypeAlias = SourceConversation | SourceMessage | Skipped | Changed

REPLACED = "NUL or a lone surrogate replaced by U+FFFD, the original kept in the payload"

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "gemini", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""What the sources call the roles, in lower case."""

UNKNOWN_TYPE = "it is of a type that chatdb does not know"

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class UnsupportedItemError(Exception):
    """A conversation cannot be taken, for the reason that is the message; it is skipped as a whole."""


def role(word: object) -> str:
    """Return the role that a source's word stands for."""
    known = ROLES.get(word.lower()) if isinstance(word, str) else None
    if known is None:
        raise UnsupportedItemError("it has a role that chatdb does not know")
    return known


def replace_unstorable(text: str) -> str:
    """Return the text with U+FFFD for each NUL and lone surrogate, which PostgreSQL cannot hold."""
    try:
        utf8_length("text", text)
    except InvalidInputError:
        return _UNSTORABLE.sub("\ufffd", text)
    return text


def short(value: object) -> str | None:
    """Return a short text such as an id or a name, or None."""
    return replace_unstorable(value) if isinstance(value, str) and 1 <= len(value) <= MAX_NAME else None


def body(text: str, original: object = None) -> tuple[str, str | None]:
    """Return the content and the payload that keep a text, and the original if there is more to it."""
    content = replace_unstorable(text)
    if original is None and content != text:
        original = {"content": text}
    try:
        return check_content("content", content), check_payload("payload", original)
    except InvalidInputError as error:
        parameter = error.parameter
    if parameter == "content":
        raise UnsupportedItemError("it has a text of over 4 MiB")
    raise UnsupportedItemError("it has a message whose original is over 16 MiB or nested deeper than 200 levels")


@lru_cache
def metadata_of(**named: str | None) -> str | None:
    """Return short texts by their names as metadata, without those that are none, or None for none at all."""
    return check_metadata("metadata", {name: text for name, text in named.items() if text} or None)


def name_of(identifier: object) -> str:
    """Return a source's id as a part of a key: a long or strange one by its hash, one that is no id as none."""
    name = str(identifier) if isinstance(identifier, str | int) else ""
    if len(name) > 200 or replace_unstorable(name) != name:
        return "sha256-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return name


def fingerprint(messages: Iterable[tuple[str, str]]) -> str:
    """Return what tells conversations apart: a hash of the roles and texts."""
    digest = hashlib.sha256()
    for word, text in messages:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{word} {len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()[:16]


def as_object(value: object) -> dict[str, Any] | None:
    """Return a JSON object, or None if the value is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def as_list(value: object) -> list[Any] | None:
    """Return a JSON array, or None if the value is none."""
    return value if isinstance(value, list) else None  # pyright: ignore[reportUnknownVariableType]


def texts_of(value: object) -> Iterator[str]:
    """Yield the texts of a content, which is one or a list of parts."""
    for part in [value] if isinstance(value, str) else as_list(value) or ():
        if isinstance(part, str):
            yield part
        elif (fields := as_object(part)) is not None:
            texts = map(fields.get, ("text", "refusal", "stdout", "stderr"))
            yield from (text for text in texts if isinstance(text, str))
