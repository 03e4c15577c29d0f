"""The common form of all formats: a flat stream of conversations with their messages, and skipped or changed items."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias, cast

from chatdb._core.validate import (
    MAX_CONTENT,
    MAX_DEPTH,
    MAX_NAME,
    MAX_PAYLOAD,
    check_metadata,
    check_payload,
    utf8_length,
)
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
    has_ids: bool = False
    """Whether its messages have the ids of an export as keys, by which a later export of it is merged."""
    is_archived: bool | None = None
    """Whether the source says that it is archived; None if it says neither."""
    is_pinned: bool | None = None
    beginnings: tuple[str, ...] = ()
    """
    If the end of its key is a hash of its messages, the hashes of its first 2, 3 and more messages. They find the
    stored one that an earlier, shorter export had.
    """

    def __repr__(self) -> str:
        return f"SourceConversation(last_seq={self.last_seq})"


class Skipped(NamedTuple):
    """A skipped item. The reason is one of a few fixed texts, so that reports can add up the counts."""

    reason: str
    conversations: int = 0
    messages: int = 0
    seq: int = 0
    """The `seq` of a skipped message, which stays unused in its conversation; 0 for anything else."""
    place: str = ""
    """Where it is: the conversation in the file, and the message in it."""
    files: int = 0
    """1 if a file was not read to its end."""

    def __repr__(self) -> str:  # without titles
        return f"Skipped({self.reason!r}, {self.conversations}, {self.messages})"


class Changed(NamedTuple):
    """A change to the preceding conversation, which chatdb could not store as it was."""

    reason: str
    conversations: int = 0
    messages: int = 0
    place: str = ""

    def __repr__(self) -> str:
        return f"Changed({self.reason!r}, {self.conversations}, {self.messages})"


class Opened(NamedTuple):
    """The start of a file, and its format, or '' if it is unknown yet. What follows comes from it."""

    name: str
    format: str


ParsedMessage: TypeAlias = tuple[str, str, str | None, object]
"""Role, text, the framework's message type if it is more specific, and the author's name."""

Item: TypeAlias = SourceConversation | SourceMessage | Skipped | Changed | Opened

UNKNOWN_TIME: Final = datetime.max.replace(tzinfo=UTC)
"""Stands for a time that the source does not have; the import then uses its own time."""

REPLACED = "NUL or lone surrogate replaced with U+FFFD, original kept in the payload"

CUT = "text longer than 4 MiB: the rest is only in the payload"
NOT_FINITE = "NaN, Infinity or a number too large to be read replaced with null in the original"
ORIGINAL_TOO_LARGE = "original larger than 16 MiB or nested deeper than 200 levels: only its text is stored"

REASONING: Final = "reasoning"
"""The `type` in the metadata of reasoning; the next two are those of a tool's call and its result."""

TOOL_CALL: Final = "tool_call"
TOOL_RESULT: Final = "tool_result"

_ASSISTANTS = ("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "bing", "bard", "claude", "gemini", "model", "bot", "ai")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys((*_ASSISTANTS, "llama", "mistral", "copilot", "grok", "deepseek", "qwen"), "assistant"),
    **dict.fromkeys(("thinking", REASONING, TOOL_CALL, "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", TOOL_RESULT), "tool"),
    "system": "system",
    "developer": "developer",
}
"""Role names used by the sources, in lower case."""

UNKNOWN_TYPE = "unknown type"

FINGERPRINT: Final = 16
"""Characters of a hash of messages, with which the key of a conversation without an id ends."""

_MAX_BEGINNINGS: Final = 10_000
_MAX_KEPT_ID: Final = 10_000
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ISO = re.compile(r"\d{4}-\d\d-\d\d")
_IMAGE = re.compile(r"image|\.(?:png|jpe?g|gif|webp|heic|svg|bmp|tiff?)$")
_MILLISECONDS: Final = 100_000_000_000
"""Above this, a number is a time in milliseconds: as seconds it would be after the year 5000."""
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class UnsupportedItemError(Exception):
    """A conversation or message cannot be imported and is skipped; the error text is the reason."""


class NotPlainError(Exception):
    """A message has more than a role and a text, so that its conversation cannot be read the short way."""


def role(word: object) -> str:
    """Return the role for a source's role name."""
    known = ROLES.get(word.strip().lower()) if isinstance(word, str) else None
    if known is None:
        named = json.dumps(word[:40]) if isinstance(word, str) else "none" if word is None else type(word).__name__
        raise UnsupportedItemError(f"unknown role: {named}")
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
    if text.isascii() and len(text) <= MAX_CONTENT and "\0" not in text:  # most texts
        return text
    return cut(replace_unstorable(text))


def short(value: object) -> str | None:
    """Return a str of 1 to 255 characters, such as an id or a name, or None for anything else."""
    return replace_unstorable(value) if isinstance(value, str) and 1 <= len(value) <= MAX_NAME else None


def original(value: object) -> tuple[str | None, str | None]:
    """Return a foreign item as payload, and what was changed to make it one; no payload if it is too large."""
    changed = None
    try:
        try:
            text = _encode(value)
        except ValueError:
            text, changed = _encode(_finite(value)), NOT_FINITE
        if not text.isascii() and _SURROGATE.search(text):
            text = json.dumps(json.loads(text))
        if text.count("[") + text.count("{") > MAX_DEPTH or len(text) * 4 > MAX_PAYLOAD:
            check_payload("payload", JsonText(text))
    except (InvalidInputError, RecursionError):
        return None, ORIGINAL_TOO_LARGE
    return text, changed


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if (fields := as_object(value)) is not None:
        return {name: _finite(each) for name, each in fields.items()}
    return value if (listed := as_list(value)) is None else [_finite(each) for each in listed]


def time_of(value: object) -> datetime | None:
    """Return a time from Unix seconds or milliseconds, ISO 8601 (UTC unless it says otherwise) or MongoDB's `$date`."""
    if isinstance(value, bool):
        return None
    try:
        if isinstance(value, int | float):
            seconds = value / 1000 if value > _MILLISECONDS else value
            return datetime.fromtimestamp(seconds, UTC) if seconds > 0 else None
        if isinstance(value, str) and _ISO.match(value):
            time = datetime.fromisoformat(value)
            return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
        if (date := as_object(value)) is not None:
            inner = date.get("$date", date.get("$numberLong"))
            return time_of(int(inner) if isinstance(inner, str) and inner.isdecimal() else inner)
    except (ValueError, OverflowError, OSError, RecursionError):
        pass
    return None


def attached(name: object, kind: object = None) -> str:
    """Return the line that names an attachment. `kind` is its media type or says `image` or `audio`."""
    text = name if isinstance(name, str) and name else "unnamed"
    lower = f"{kind} {text}".lower()
    what = "image" if _IMAGE.search(lower) else "audio" if "audio" in lower else "file"
    return f"[{what}: {text}]"


def link(title: object, url: object) -> str:
    """Return a link in Markdown, or the part of it that there is."""
    named = " ".join(title.split()) if isinstance(title, str) else ""
    if isinstance(url, str) and url:
        return f"[{named or url}]({url})"
    return f"[{named}]" if named else ""


def lines(*texts: str) -> str:
    """Return the texts that are not empty, one below the other."""
    return "\n".join(text for text in texts if text)


@lru_cache
def metadata_of(**named: str | bool | None) -> str | None:
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
    """Tell whether a framework shows a message of others as text: one that a person read, and not an empty one."""
    about = message.metadata or {}
    is_said = about.get("hidden") is not True and about.get("type") not in {REASONING, TOOL_CALL}
    return message.role != "tool" and message.content != "" and is_said


def fingerprint(messages: Iterable[tuple[str, str]]) -> str:
    """Return a hash of the roles and texts, which identifies a conversation."""
    return fingerprints(messages, 0)[0]


def fingerprints(messages: Iterable[tuple[str, str]], count: int) -> tuple[str, tuple[str, ...]]:
    """Return the hash of this number of messages, and those of the first 2, 3 and so on, unless there are too many."""
    digest = hashlib.sha256()
    beginnings: list[str] = []
    has_beginnings = 2 < count <= _MAX_BEGINNINGS
    for word, text in messages:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{word} {len(encoded)} ".encode())
        digest.update(encoded)
        if has_beginnings:
            beginnings.append(digest.hexdigest()[:FINGERPRINT])
    return digest.hexdigest()[:FINGERPRINT], tuple(beginnings[1:-1])


def plain_conversation(prefix: str, said: Iterable[tuple[str, str]], count: int) -> SourceConversation | None:
    """Return the conversation of these roles and texts, or None if reading them raises NotPlainError."""
    try:
        whole, beginnings = fingerprints(said, count)
    except NotPlainError:
        return None
    return SourceConversation(prefix + whole, None, None, count, None, None, beginnings=beginnings)


def flag(source: dict[str, Any], *names: str) -> bool | None:
    """Return whether one of these fields is true, or None if the source has none of them."""
    values = [source[name] for name in names if name in source]
    return any(value is True for value in values) if values else None


class Raw:
    """
    An object or array that is still JSON, which takes a fraction of its memory.

    A reader of files keeps the messages of a large conversation so. `as_object` and `as_list` parse it each time.
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text if text.isascii() else text.encode()  # one emoji makes each character of a str take four bytes

    def parsed(self) -> Any:  # noqa: ANN401 - any JSON value
        """Return the object or array."""
        return json.loads(self.text)


def taken(values: list[Any]) -> Iterator[Any]:
    """Yield each value of a list, and remove it, so that its memory is free as soon as nobody needs it."""
    for place, value in enumerate(values):
        values[place] = None
        yield value


def taken_items(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of an object, and remove the values."""
    for name, value in values.items():
        values[name] = None
        yield name, value


def as_object(value: object) -> dict[str, Any] | None:
    """Return the value if it is a JSON object, otherwise None."""
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    return as_object(value.parsed()) if isinstance(value, Raw) else None


def as_list(value: object) -> list[Any] | None:
    """Return the value if it is a JSON array, otherwise None."""
    if isinstance(value, Raw):
        value = value.parsed()
    return value if isinstance(value, list) else None  # pyright: ignore[reportUnknownVariableType]


def texts_of(value: object) -> Iterator[str]:
    """Yield the texts of a content, which is a str or a list of parts."""
    for part in [value] if isinstance(value, str) else as_list(value) or ():
        if isinstance(part, str):
            yield part
        elif (fields := as_object(part)) is not None:
            texts = map(fields.get, ("text", "refusal", "stdout", "stderr"))
            yield from (text for text in texts if isinstance(text, str))
