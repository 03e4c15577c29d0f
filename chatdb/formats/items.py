"""The common form of all formats: a flat stream of conversations with their messages, and skipped or changed items."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias, cast

from chatdb._core.validate import MAX_CONTENT, MAX_NAME, check_content, check_metadata, check_payload, utf8_length
from chatdb.errors import InvalidInputError
from chatdb.records import JsonText, Message, NewMessage


class SourceMessage(NamedTuple):
    """A message, with fields in the order of the COPY; `payload` and `metadata` are JSON text."""

    seq: int
    role: str
    content: str
    payload: str | None
    metadata: str | None
    token_count: int | None
    key: str | None
    created_at: datetime | None
    """None if the source has no times; the import then uses its own time."""
    parent_seq: int | None = None
    """The seq of the message that it follows, 0 for a first message, or None if it follows the message before it."""
    state: str | None = None
    """`aborted` if its text ends before the end, or None; never `streaming`, because nobody continues its stream."""

    def __repr__(self) -> str:  # without content, like the records'
        return f"SourceMessage(seq={self.seq})"


class SourceConversation(NamedTuple):
    """A conversation; its messages follow it in the stream."""

    key: str | None
    title: str | None
    metadata: str | None
    last_seq: int
    created_at: datetime | None
    updated_at: datetime | None
    archived_at: datetime | None = None
    """None if it is not archived, `UNKNOWN_TIME` if the source does not say when."""
    pinned_at: datetime | None = None
    """The same for pinned."""
    head_seq: int | None = None
    """The seq of the newest message of the current line, or None for `last_seq`."""

    def __repr__(self) -> str:
        return f"SourceConversation(last_seq={self.last_seq})"


class Skipped(NamedTuple):
    """A skipped item. The reason is one of a few fixed texts, so that reports can add up the counts."""

    reason: str
    conversations: int = 0
    messages: int = 0
    seq: int = 0
    """The `seq` of a skipped message, which stays unused in its conversation; 0 for anything else."""


class Changed(NamedTuple):
    """A change to the preceding conversation, which chatdb could not store as it was."""

    reason: str
    conversations: int = 0
    messages: int = 0


ParsedMessage: TypeAlias = tuple[str, str, str | None, object]
"""Role, text, the framework's message type if it is more specific, and the author's name."""

Item: TypeAlias = SourceConversation | SourceMessage | Skipped | Changed

UNKNOWN_TIME: Final = datetime.max.replace(tzinfo=UTC)
"""Stands for a time that the source does not have; the import then uses its own time."""

REPLACED = "NUL or lone surrogate replaced with U+FFFD, original kept in the payload"

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "gemini", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""Role names used by the sources, in lower case."""

UNKNOWN_TYPE = "unknown type"

_MAX_KEPT_ID: Final = 10_000
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class UnsupportedItemError(Exception):
    """A conversation or message cannot be imported and is skipped; the error text is the reason."""


def role(word: object) -> str:
    """Return the role for a source's role name."""
    known = ROLES.get(word.lower()) if isinstance(word, str) else None
    if known is None:
        raise UnsupportedItemError("unknown role")
    return known


def replace_unstorable(text: str) -> str:
    """Replace NUL and lone surrogates, which PostgreSQL cannot store, with U+FFFD."""
    try:
        utf8_length("text", text)
    except InvalidInputError:
        return _UNSTORABLE.sub("\ufffd", text)
    return text


def cut(content: str) -> str:
    """Return the first 4 MiB of a content."""
    return content if len(content) * 4 <= MAX_CONTENT else content.encode()[:MAX_CONTENT].decode(errors="ignore")


def readable(text: str) -> str:
    """Return a text as content: with U+FFFD for what PostgreSQL cannot store, and cut at 4 MiB."""
    return cut(replace_unstorable(text))


def short(value: object) -> str | None:
    """Return a str of 1 to 255 characters, such as an id or a name, or None for anything else."""
    return replace_unstorable(value) if isinstance(value, str) and 1 <= len(value) <= MAX_NAME else None


def body(text: str, original: object = None) -> tuple[str, str | None]:
    """Return the content for a text and, if that is not the whole message, the original as payload."""
    content = replace_unstorable(text)
    if original is None and content != text:
        original = {"content": text}
    try:
        return check_content("content", content), check_payload("payload", original)
    except InvalidInputError as error:
        parameter = error.parameter
    if parameter == "content":
        raise UnsupportedItemError("text longer than 4 MiB")
    raise UnsupportedItemError("original message larger than 16 MiB or nested deeper than 200 levels")


@lru_cache
def metadata_of(**named: str | None) -> str | None:
    """Return the non-empty arguments as metadata, or None if all are empty."""
    return check_metadata("metadata", {name: text for name, text in named.items() if text} or None)


def name_of(identifier: object) -> str:
    """Return a source's id for use in a key: a hash if it is long or not storable, '' if it is not a str or int."""
    name = str(identifier) if isinstance(identifier, str | int) else ""
    if len(name) > 200 or replace_unstorable(name) != name:
        return "sha256-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return name


def conversation_of(framework: str, identifier: str, prefix: str) -> tuple[str, dict[str, str] | None]:
    """
    Return the key of the conversation with a framework's id, and metadata with the id if the key has only a hash of it.

    The metadata has the first 10,000 characters as JSON, in which NUL and lone surrogates are escapes.
    """
    name = name_of(identifier)
    metadata = None if name == identifier else {f"{framework}-id": json.dumps(identifier[:_MAX_KEPT_ID])}
    return prefix + name, metadata


def json_text(parameter: str, value: object, *, allow_nan: bool = False) -> JsonText:
    """
    Return a value as JSON text, in which NUL and lone surrogates are escapes.

    Raises InvalidInputError, which names `parameter`, if JSON cannot hold the value.
    """
    try:
        return JsonText(json.dumps(value, separators=(",", ":"), allow_nan=allow_nan))
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"is not JSON ({type(error).__name__})"
    raise InvalidInputError(parameter, problem)


def new_message(framework: str, parsed: ParsedMessage, payload: JsonText, key: str) -> NewMessage:
    """Return the message for a framework's item, with the item itself as payload."""
    role, text, kind, name = parsed
    named = {"framework": framework, "type": short(kind), "name": short(name)}
    fields: dict[str, Any] = {"role": role, "content": readable(text), "payload": payload, "key": key}
    return NewMessage(**fields, metadata={field: value for field, value in named.items() if value})


def own_item(message: Message, framework: str) -> dict[str, Any] | None:
    """Return the item in a framework's own message, or None for a message of others."""
    if message.payload is None or (message.metadata or {}).get("framework") != framework:
        return None
    return as_object(message.payload.parsed())


def has_text(message: Message) -> bool:
    """Tell whether a framework shows a message of others, as text: not a tool's, and not an empty one."""
    return message.role != "tool" and message.content != ""


def fingerprint(messages: Iterable[tuple[str, str]]) -> str:
    """Return a hash of the roles and texts, which identifies a conversation."""
    digest = hashlib.sha256()
    for word, text in messages:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{word} {len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()[:16]


def as_object(value: object) -> dict[str, Any] | None:
    """Return the value if it is a JSON object, otherwise None."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def as_list(value: object) -> list[Any] | None:
    """Return the value if it is a JSON array, otherwise None."""
    return value if isinstance(value, list) else None  # pyright: ignore[reportUnknownVariableType]


def texts_of(value: object) -> Iterator[str]:
    """Yield the texts of a content, which is a str or a list of parts."""
    for part in [value] if isinstance(value, str) else as_list(value) or ():
        if isinstance(part, str):
            yield part
        elif (fields := as_object(part)) is not None:
            texts = map(fields.get, ("text", "refusal", "stdout", "stderr"))
            yield from (text for text in texts if isinstance(text, str))
