"""Checks arguments before anything is sent: the limits of the CHECKs, and values that PostgreSQL cannot store."""

from __future__ import annotations

import asyncio
import json
import math
import re
import struct
from base64 import urlsafe_b64decode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from difflib import get_close_matches
from itertools import accumulate, islice
from typing import Any, Final, NoReturn, TypeGuard, TypeVar, cast, get_args

from chatdb.errors import InvalidInputError
from chatdb.records import (
    CURSOR,
    EPOCH,
    ETAG,
    MATCH_CURSOR,
    NEW,
    UNSET,
    Conversation,
    JsonText,
    Match,
    NewMessage,
    Role,
    encode_token,
)

ROLES: Final = frozenset(get_args(Role))
MAX_LIMIT: Final = 10_000
MAX_NAME: Final = 255
MAX_TITLE: Final = 1_000
MAX_QUERY: Final = 1_000
MAX_CONTENT: Final = 4 * 1024 * 1024
MAX_METADATA: Final = 64 * 1024
"""Limit for a message; a conversation has its own."""
MAX_CONVERSATION_METADATA: Final = 1024 * 1024
MAX_PAYLOAD: Final = 16 * 1024 * 1024
MAX_DEPTH: Final = 200
MAX_BATCH: Final = 10_000
MAX_BATCH_BYTES: Final = 64 * 1024 * 1024
MAX_BIGINT: Final = 2**63 - 1
MAX_INT: Final = 2**31 - 1

_PAUSE_MESSAGES: Final = 500
_PAUSE_BYTES: Final = 1024 * 1024
"""A large batch yields to the event loop after this many messages or bytes."""

_NAMES: Final = dict.fromkeys(NewMessage.model_fields)
_REQUIRED: Final = {name for name, field in NewMessage.model_fields.items() if field.is_required()}

CheckedT = TypeVar("CheckedT")

MessageRow = tuple[str, str, str | None, str | None, int | None, str | None]
"""Role, content, payload, metadata, token count and key."""


def check_text(parameter: str, value: object, *, least: int, most: int) -> str:
    """Return a str of `least` to `most` characters that PostgreSQL can store."""
    if type(value) is str and value.isascii() and least <= len(value) <= most and "\0" not in value:
        return value  # nearly every text, without further calls
    value = check_str(parameter, value)
    if not least <= len(value) <= most:
        raise InvalidInputError(parameter, f"must be {least:,} to {most:,} characters long, not {len(value):,}")
    utf8_length(parameter, value)
    return value


def utf8_length(parameter: str, value: str) -> int:
    """Return the length in UTF-8; reject NUL and lone surrogates with their position."""
    nul = value.find("\0")
    if nul >= 0:
        raise InvalidInputError(parameter, f"contains a NUL character at position {nul}, which PostgreSQL cannot store")
    if value.isascii():
        return len(value)
    try:
        return len(value.encode())
    except UnicodeEncodeError as error:
        start = error.start
    raise InvalidInputError(parameter, f"contains a lone surrogate at position {start}, which UTF-8 cannot encode")


def if_given(check: Callable[[str, object], CheckedT], parameter: str, value: object) -> tuple[bool, CheckedT | None]:
    """Return whether an argument was given, and its checked value."""
    return (False, None) if value is UNSET else (True, check(parameter, value))


def check_str(parameter: str, value: object) -> str:
    """Return a plain str from a str or a subclass; reject imitations such as mocks."""
    if type(value) is str:
        return value
    if issubclass(type(value), str):
        return str.__str__(cast("str", value))
    raise InvalidInputError(parameter, f"must be a str, not {type_name(type(value))}")


def type_name(kind: type) -> str:
    """Return the name of a type for an error message; `numpy.bool` is not shown as `bool`."""
    name = kind.__name__
    return f"{kind.__module__}.{name}" if name in _BUILTINS and kind.__module__ != "builtins" else name


_BUILTINS: Final = frozenset(
    {"bool", "bytes", "complex", "dict", "float", "int", "list", "object", "set", "str", "tuple"}
)


def check_handle(db: object, method: str) -> None:
    """Raise InvalidInputError unless `db` has the method of a pool or connection."""
    if not callable(getattr(db, method, None)):
        raise InvalidInputError("db", f"must be a pool or an asyncpg connection, not {type_name(type(db))}")


def check_user_id(value: object) -> str:
    return check_text("user_id", value, least=1, most=MAX_NAME)


def check_key(parameter: str, value: object) -> str | None:
    return None if value is None else check_text(parameter, value, least=1, most=MAX_NAME)


def check_title(parameter: str, value: object) -> str | None:
    return None if value is None else check_text(parameter, value, least=0, most=MAX_TITLE)


def check_int(parameter: str, value: object, *, least: int, most: int = MAX_BIGINT) -> int:
    """Return an int from `least` to `most`; reject bool."""
    if type(value) is not int:
        if not issubclass(type(value), int) or type(value) is bool:
            raise InvalidInputError(parameter, f"must be an int, not {type_name(type(value))}")
        value = int.__int__(cast("int", value))
    if not least <= value <= most:
        raise InvalidInputError(parameter, f"must be between {least:,} and {most:,}")
    return value


def check_id(value: object, *, parameter: str = "conversation_id") -> int:
    """Return a conversation id: any bigint, because an adopted database may have ids below 1."""
    return check_int(parameter, value, least=-MAX_BIGINT - 1)


def check_seq(parameter: str, value: object) -> int:
    return check_int(parameter, value, least=0)


def check_limit(parameter: str, value: object) -> int:
    return check_int(parameter, value, least=1, most=MAX_LIMIT)


def check_role(parameter: str, value: object) -> str:
    if type(value) is not str:
        value = check_str(parameter, value)
    if value not in ROLES:
        raise InvalidInputError(parameter, "must be user, assistant, system, developer or tool")
    return value


def check_content(parameter: str, value: object) -> str:
    if type(value) is str and value.isascii() and len(value) <= MAX_CONTENT and "\0" not in value:
        return value
    value = check_str(parameter, value)
    if utf8_length(parameter, value) > MAX_CONTENT:
        raise InvalidInputError(parameter, "must be at most 4 MiB in UTF-8")
    return value


def check_conversation(conversation_id: object, conversation_key: object) -> tuple[int | None, str | None]:
    """Return the id or the key of a conversation; exactly one of them must be given."""
    if conversation_key is None:
        if conversation_id is None:
            raise InvalidInputError("conversation_id", "is required unless conversation_key is given")
        return check_int("conversation_id", conversation_id, least=-MAX_BIGINT - 1), None
    refuse_both("conversation_key", "conversation_id", conversation_id)
    return None, check_text("conversation_key", conversation_key, least=1, most=MAX_NAME)


def check_message(seq: object, key: object) -> tuple[int | None, str | None]:
    """Return the seq or the key of a message; exactly one of them must be given."""
    if key is None:
        if seq is None:
            raise InvalidInputError("seq", "is required unless key is given")
        return check_seq("seq", seq), None
    refuse_both("key", "seq", seq)
    return None, check_text("key", key, least=1, most=MAX_NAME)


def check_position(
    direction: str, seq: object, key: object, *, start: int | None = None
) -> tuple[int | None, str | None]:
    """Return the seq or the key after or before which a page starts; `start` is the default seq."""
    if key is None:
        if seq is None and start is not None:
            return start, None
        if seq is None:
            raise InvalidInputError(f"{direction}_seq", f"is required unless {direction}_key is given")
        return check_int(f"{direction}_seq", seq, least=0), None
    is_default = direction == "after" and type(seq) is int and seq == 0
    refuse_both(f"{direction}_key", f"{direction}_seq", None if is_default else seq)
    return None, check_text(f"{direction}_key", key, least=1, most=MAX_NAME)


def refuse_both(parameter: str, other: str, value: object) -> None:
    """Raise InvalidInputError if the other parameter has a value too."""
    if value is not None:
        raise InvalidInputError(parameter, f"must not be given together with {other}")


def check_expected(expected: object, *, may_be_new: bool = False) -> tuple[int | None, int | None]:
    """
    Return the expected id and revision of a conversation, or None for both if nothing is expected.

    `NEW` becomes the revision -1, which no conversation has.
    """
    if expected is None:
        return None, None
    if expected is NEW:
        if not may_be_new:
            raise InvalidInputError("expected", "can be NEW only with create=True, or in create_conversation")
        return 0, -1
    if issubclass(type(expected), Conversation):
        fields = vars(expected)
        return (
            check_int("expected", fields.get("id"), least=-MAX_BIGINT - 1),
            check_int("expected", fields.get("revision"), least=0),
        )
    if issubclass(type(expected), str):
        identifier, revision = _read_token("expected", cast("str", expected), ETAG, 2)
        return identifier, revision
    raise InvalidInputError("expected", f"must be a Conversation, its etag, or NEW, not {type_name(type(expected))}")


def check_after(after: object, order_by: str) -> tuple[datetime | None, int | None]:
    """Return the time and id of the conversation before the page, or None for both on the first page."""
    if after is None:
        return None, None
    if issubclass(type(after), Conversation):
        fields = vars(after)
        time = fields.get(order_by)
        if type(time) is not datetime or time.tzinfo is None:
            raise InvalidInputError(
                "after", f"must be a Conversation as chatdb returned it: its {order_by} has no time zone"
            )
        return time, check_id(fields.get("id"), parameter="after")
    if not issubclass(type(after), str):
        raise InvalidInputError(
            "after",
            f"must be the last Conversation of the previous page, or its cursor, not {type_name(type(after))}",
        )
    updated_at, created_at, identifier = _read_token("after", cast("str", after), CURSOR, 3)
    try:
        return EPOCH + timedelta(microseconds=updated_at if order_by == "updated_at" else created_at), identifier
    except OverflowError:
        raise InvalidInputError("after", "is not a cursor that chatdb made") from None


def _read_token(parameter: str, text: str, version: str, count: int) -> tuple[int, ...]:
    """Return the numbers that `encode_token` encoded."""
    text = check_str(parameter, text)
    kind, remedy = ("an etag", "read it again") if version == ETAG else ("a cursor", "start with the first page")
    if version != ETAG and text[:1] != version[0] and text[:2] in _CURSOR_SOURCES:
        raise InvalidInputError(parameter, f"is a cursor of {_CURSOR_SOURCES[text[:2]]}")
    if text[:2] != version and re.fullmatch(rf"{version[0]}[0-9]", text[:2]):
        raise InvalidInputError(parameter, f"is {kind} of another version of chatdb: {remedy}")
    try:
        numbers: tuple[int, ...] = struct.unpack(f">{count}q", urlsafe_b64decode(text[2:] + "=" * (-len(text[2:]) % 4)))
    except (ValueError, struct.error):
        numbers = ()
    if not numbers or encode_token(version, *numbers) != text:
        raise InvalidInputError(parameter, f"is not {kind} that chatdb made")
    return numbers


_CURSOR_SOURCES: Final = {CURSOR: "list_conversations", MATCH_CURSOR: "search_messages"}
"""The functions that make cursors, by their prefix."""


def check_after_match(after: object) -> tuple[datetime | None, int | None, int | None]:
    """Return the time, conversation and seq of the match before the page, or None for each on the first page."""
    if after is None:
        return None, None, None
    if issubclass(type(after), Match):
        fields = vars(after)
        time = fields.get("created_at")
        if type(time) is not datetime or time.tzinfo is None:
            raise InvalidInputError("after", "must be a Match as chatdb returned it: its created_at has no time zone")
        return time, check_id(fields.get("conversation_id"), parameter="after"), check_seq("after", fields.get("seq"))
    if not issubclass(type(after), str):
        raise InvalidInputError(
            "after", f"must be the last Match of the previous page, or its cursor, not {type_name(type(after))}"
        )
    created_at, conversation_id, seq = _read_token("after", cast("str", after), MATCH_CURSOR, 3)
    try:
        return EPOCH + timedelta(microseconds=created_at), conversation_id, seq
    except OverflowError:
        raise InvalidInputError("after", "is not a cursor that chatdb made") from None


def check_query(value: object) -> str:
    """Return the text to search for; one of white space only is refused."""
    text = check_text("query", value, least=1, most=MAX_QUERY)
    if text.isspace():
        raise InvalidInputError("query", "contains only white space")
    return text


def check_words(query: str) -> tuple[str, list[str]]:
    """
    Return a query as websearch_to_tsquery is to read it, and its words in order, without those that must not occur.

    The characters that create_search_index.sql replaces become blanks. What they join after a minus becomes a phrase,
    and an "or" among what they join a word.
    """
    parts = query.split('"')
    if len(parts) % 2 == 0:  # the last quote opens no phrase
        parts[-2:] = [" ".join(parts[-2:])]
    terms: list[str] = []
    words: list[str] = []
    minus = ""
    for position, part in enumerate(parts):
        if position % 2 == 1:
            phrase = part.translate(_NO_SEPARATORS)
            terms.append(f'{minus}"{phrase}"')
            words += [] if minus else _WORD.findall(phrase)
            continue
        chunks = part.split()
        minus = "-" if chunks and chunks[-1] == "-" and not part[-1].isspace() else ""
        for chunk in chunks:
            joined = chunk.translate(_NO_SEPARATORS).split()
            if _EXCLUDED.match(chunk):
                terms.append(f'-"{" ".join(joined)}"')
            elif len(joined) == 1:
                terms += joined
                words += _WORD.findall(joined[0])
            else:
                terms += [f'"{each}"' for each in joined]
                words += _WORD.findall(" ".join(joined))
    text = " ".join(terms)
    if text.isascii() and not any(map(str.isalnum, text)):
        raise InvalidInputError("query", NO_WORD)
    return text, [word for word in words if word.lower() != "or"]


NO_WORD: Final = "contains no word"
_NO_SEPARATORS: Final = dict.fromkeys(map(ord, "_-+./:@~&<"), " ")
_EXCLUDED: Final = re.compile(r"-[^-\s]*[^\W_]")
_WORD: Final = re.compile(r"\w+")


def check_patch(parameter: str, patch: object, *, most: int = MAX_METADATA) -> tuple[str, list[str]]:
    """Return the values that a patch sets, as JSON, and the keys that it removes."""
    if not issubclass(type(patch), dict):
        raise InvalidInputError(parameter, f"must be a dict, not {type_name(type(patch))}")
    check_metadata(parameter, patch, most=most)
    items = dict.items(cast("dict[str, Any]", patch))
    encoded = check_metadata(parameter, {name: value for name, value in items if value is not None}, most=most)
    return encoded or "{}", [str.__str__(name) for name, value in items if value is None]


def check_conversation_patch(parameter: str, patch: object) -> tuple[str, list[str]]:
    """Return the values that a patch of a conversation's metadata sets, and the keys that it removes."""
    return check_patch(parameter, patch, most=MAX_CONVERSATION_METADATA)


def check_bool(parameter: str, value: object) -> bool:
    """Return a bool; values that only compare equal to one are refused."""
    if type(value) is not bool:
        raise InvalidInputError(parameter, f"must be True or False, not {type_name(type(value))}")
    return value


def check_choice(parameter: str, value: object, *choices: str) -> str:
    """Return one of the allowed words."""
    text = check_str(parameter, value)
    if text not in choices:
        raise InvalidInputError(parameter, f"must be {' or '.join(choices)}")
    return text


def as_text_array(values: Iterable[object]) -> list[str | None]:
    """
    Return numbers or times as strings.

    asyncpg encodes text arrays itself. For other arrays it first queries the server's catalog, and a host's schemas may
    replace the functions and operators in that query.
    """
    return [None if value is None else str(value) for value in values]


def as_columns(batch: list[MessageRow]) -> list[list[Any] | None]:
    """
    Return the messages of a batch as the arrays that a statement takes.

    Payloads, metadata, token counts and keys are None if no message has one, because asyncpg encodes arrays slowly.
    """
    columns: list[list[Any] | None] = [list(column) for column in zip(*batch, strict=True)] if batch else [[]] * 6
    for index in range(2, 6):
        values = columns[index]
        if values is None or values.count(None) == len(values):
            columns[index] = None
        elif index == 4:
            columns[index] = as_text_array(values)
    return columns


def check_token_count(parameter: str, value: object) -> int | None:
    return None if value is None else check_int(parameter, value, least=0, most=MAX_INT)


def check_metadata(parameter: str, value: object, *, most: int = MAX_METADATA) -> str | None:
    if value is None:
        return None
    if not issubclass(type(value), dict):
        raise InvalidInputError(parameter, f"must be a dict or None, not {type_name(type(value))}")
    data, longer = _checked(parameter, value, for_jsonb=True, most=most)
    # same separators as jsonb's text form, which the CHECK measures
    encoded = _dumps(parameter, data, ascii_only=False)
    if utf8_length(parameter, encoded) + longer > most:
        raise InvalidInputError(parameter, _TOO_LONG[most])
    return encoded


def check_conversation_metadata(parameter: str, value: object) -> str | None:
    """Return a conversation's metadata as JSON text, with a higher limit than a message's."""
    return check_metadata(parameter, value, most=MAX_CONVERSATION_METADATA)


def check_payload(parameter: str, value: object) -> str | None:
    """Return a payload as JSON text, or None; a `JsonText` is returned unchanged."""
    if value is None:
        return None
    if issubclass(type(value), JsonText):
        encoded = str.__str__(cast("JsonText", value))
        length = utf8_length(parameter, encoded)
        if length > MAX_PAYLOAD:
            raise InvalidInputError(parameter, _TOO_LONG[MAX_PAYLOAD])
        _parse(parameter, encoded)
    else:
        value, _ = _checked(parameter, value, for_jsonb=False, most=MAX_PAYLOAD)
        encoded = _dumps(parameter, value, ascii_only=False)
        try:
            length = len(encoded.encode())
        except UnicodeEncodeError:  # the json type stores a lone surrogate as an escape
            encoded = _dumps(parameter, value, ascii_only=True)
            length = len(encoded)
    if length > MAX_PAYLOAD:
        raise InvalidInputError(parameter, _TOO_LONG[MAX_PAYLOAD])
    return encoded


async def check_messages(values: object) -> list[MessageRow]:
    """
    Return a batch of `NewMessage` or dict as rows with distinct keys.

    Iteration stops at the first message over the limit. A large batch is checked in slices, so that the event loop can
    run other tasks in between.
    """
    kind = type(values)
    if kind is not list and (issubclass(kind, str | bytes | Mapping | NewMessage) or not issubclass(kind, Iterable)):
        raise InvalidInputError("messages", f"must be a list of NewMessage or dict, not {type_name(kind)}")
    rows: list[MessageRow] = []
    size, pause_at = 0, _PAUSE_BYTES
    for index, value in enumerate(_read(cast("Iterable[object]", values))):
        if index == MAX_BATCH:
            raise InvalidInputError("messages", f"must have at most {MAX_BATCH:,} items: split the batch")
        if size > pause_at or index % _PAUSE_MESSAGES == _PAUSE_MESSAGES - 1:
            pause_at = size + _PAUSE_BYTES
            await asyncio.sleep(0)
        at = f"messages[{index}]"
        of_role, of_content, of_payload, of_metadata, of_token_count, of_key = _fields(at, value)
        row = (
            check_role(f"{at}.role", of_role),
            check_content(f"{at}.content", of_content),
            None if of_payload is None else check_payload(f"{at}.payload", of_payload),
            None if of_metadata is None else check_metadata(f"{at}.metadata", of_metadata),
            None if of_token_count is None else check_token_count(f"{at}.token_count", of_token_count),
            None if of_key is None else check_key(f"{at}.key", of_key),
        )
        rows.append(row)
        for text in (row[1], row[2], row[3], row[5]):
            if text is not None:
                size += len(text) if text.isascii() else len(text.encode())
        if size > MAX_BATCH_BYTES:
            raise InvalidInputError("messages", "must be at most 64 MiB in total: split the batch")
    keys = [row[5] for row in rows if row[5] is not None]
    if len(set(keys)) < len(keys):
        raise InvalidInputError("messages", "must have distinct keys")
    return rows


def check_timeout(value: object) -> float | None:
    """Return a timeout in seconds, or None for the pool's default."""
    if value is None:
        return None
    number = number_of(value)
    if number > 0:
        return float(number)
    raise InvalidInputError("timeout", f"must be None or a positive number of seconds, at most {MAX_INT:,}")


def check_seconds(parameter: str, value: object, *, least: float, most: float) -> float:
    number = number_of(value)
    if not least <= number <= most:
        raise InvalidInputError(parameter, f"must be a number of seconds between {least:g} and {most:,g}")
    return float(number)


def check_interval(parameter: str, value: object) -> timedelta:
    """Return a timedelta from zero to 10,000 days."""
    if not issubclass(type(value), timedelta):
        raise InvalidInputError(parameter, f"must be a timedelta, not {type_name(type(value))}")
    interval = cast("timedelta", value)
    if not timedelta(0) <= interval <= timedelta(days=10_000):
        raise InvalidInputError(parameter, "must be between 0 and 10,000 days")
    return interval


def number_of(value: object) -> float:
    """Return a finite number that a timer accepts, otherwise NaN."""
    kind = type(value)
    number: float = math.nan
    if issubclass(kind, float):
        number = float.__float__(cast("float", value))
    elif issubclass(kind, int) and kind is not bool:
        number = int.__int__(cast("int", value))  # stays an int, because errors quote it
    return number if abs(number) <= MAX_INT else math.nan


def _read(values: Iterable[object]) -> Iterator[object]:
    """Iterate over a caller's values; raise the iterable's own errors as InvalidInputError."""
    try:
        yield from values
    except Exception as error:
        raise InvalidInputError("messages", f"iterating over them raised {type(error).__name__}") from error


def _fields(parameter: str, value: object) -> tuple[Any, ...]:
    """Return the fields of a `NewMessage`, a subclass, or a dict with no other fields."""
    kind = type(value)
    if kind is dict:
        fields = cast("dict[str, Any]", value)
    elif issubclass(kind, NewMessage):
        fields = vars(value)
    elif issubclass(kind, Mapping):
        try:
            fields = dict(cast("Mapping[str, Any]", value))
        except Exception as error:
            raise InvalidInputError(parameter, f"reading it raised {type(error).__name__}") from error
    else:
        raise InvalidInputError(parameter, f"must be a NewMessage or a dict, not {type_name(kind)}")
    try:
        is_complete = fields.keys() >= _REQUIRED
        is_known = issubclass(kind, NewMessage) or fields.keys() <= _NAMES.keys()
    except Exception as error:  # raised by a key
        raise InvalidInputError(parameter, f"reading its keys raised {type(error).__name__}") from error
    if not is_complete:
        raise InvalidInputError(f"{parameter}.{min(_REQUIRED - fields.keys())}", "is required")
    if not is_known:
        _refuse_field(parameter, fields)
    return tuple(map(fields.get, _NAMES))


def _refuse_field(parameter: str, fields: Mapping[Any, object]) -> NoReturn:
    name: object = next(name for name in fields if type(name) is not str or name not in _NAMES)
    shown = f".{name}" if type(name) is int or _is_plain_name(name) else "[...]"
    near = get_close_matches(name, _NAMES, 1) if _is_plain_name(name) else []
    hint = f": did you mean {near[0]}?" if near else f"; the fields are {', '.join(_NAMES)}"
    raise InvalidInputError(f"{parameter}{shown}", f"is not a field of a message{hint}")


def _parse(parameter: str, encoded: str) -> None:
    """Reject text that is not valid JSON or that Python could not parse back."""
    try:
        json.loads(encoded, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        problem = "must be valid JSON without NaN, Infinity, numbers over 4,300 digits or nesting over 200 levels"
    else:
        if _depth(encoded) <= MAX_DEPTH:
            return
        problem = _TOO_DEEP
    raise InvalidInputError(parameter, problem)


def _depth(encoded: str) -> int:
    """Return the nesting depth of valid JSON text, without a slow walk through its values."""
    if encoded.count("[") + encoded.count("{") <= MAX_DEPTH:
        return 0
    unescaped = encoded.encode().replace(rb"\\", b"").replace(rb"\"", b"")
    texts = unescaped.translate(None, _NO_STRUCTURE).split(b'"')
    return max(accumulate(map(_STEPS.__getitem__, b"".join(texts[::2]))), default=0)


_STEPS: Final = dict(zip(b"[{]}", (1, 1, -1, -1), strict=True))
_NO_STRUCTURE: Final = bytes({*range(256)} - {*b'[{]}"'})


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


_TOO_LONG: Final = {
    most: f"must be at most {text} as JSON"
    for most, text in ((MAX_METADATA, "64 KiB"), (MAX_CONVERSATION_METADATA, "1 MiB"), (MAX_PAYLOAD, "16 MiB"))
}
_TOO_DEEP: Final = f"must not be nested deeper than {MAX_DEPTH} levels"


# The values below come from callers and may have any type.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUnknownMemberType=false


def _dumps(parameter: str, value: object, *, ascii_only: bool) -> str:
    try:
        return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        where = _fault(parameter, value)
    raise InvalidInputError(parameter, f"{_NO_JSON}: {where}" if where else _NO_JSON)


_NO_JSON: Final = "must be a JSON value (dict, list, str, finite number, bool, None)"


def _fault(parameter: str, value: object) -> str | None:
    """Return the path and type of the first value that JSON cannot represent."""
    seen: set[int] = set()
    todo: list[Iterator[tuple[str, Any]]] = [iter([(parameter, value)])]
    while todo:
        step = next(todo[-1], None)
        if step is None:
            todo.pop()
            continue
        path, item = step
        kind: Any = type(item)
        if issubclass(kind, dict | list | tuple):
            if issubclass(kind, dict):
                for name in dict.keys(item):
                    if not issubclass(type(name), str):
                        return f"{path} has a key of type {type_name(type(name))}"
            if id(item) not in seen:
                seen.add(id(item))
                todo.append(_steps(path, item))
        elif issubclass(kind, float):
            if not math.isfinite(item):
                return f"{path} is not finite"
        elif issubclass(kind, int):
            try:
                int.__repr__(item)
            except ValueError:  # more than sys.get_int_max_str_digits() allows
                return f"{path} is an int with too many digits"
        elif item is not None and not issubclass(kind, str):
            return f"{path} is of type {type_name(kind)}"
    return None


def _steps(path: str, container: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a dict, list or tuple
    if issubclass(type(container), dict):
        for name, item in dict.items(container):
            yield f"{path}.{name}" if _is_plain_name(name) else f"{path}[...]", item
    else:
        for index, item in enumerate(container):
            yield f"{path}[{index}]", item


_PLAIN_NAME: Final = re.compile(r"[a-z_]+(?:[A-Z]{1,3}[a-z_]*)*[0-9]{0,3}")
"""A snake_case or camelCase key. Error messages hide other keys, which may hold user text or a secret."""


def _is_plain_name(name: object) -> TypeGuard[str]:
    return type(name) is str and len(name) <= 40 and _PLAIN_NAME.fullmatch(name) is not None


class _OverriddenError(Exception):
    """A dict, list or tuple subclass overrides how it is read."""


def _checked(parameter: str, value: object, *, for_jsonb: bool, most: int) -> tuple[object, int]:
    """Return the value (a plain copy if a class overrides how it is read) and the result of `_walk`."""
    longer = _quick_walk(parameter, value, for_jsonb=for_jsonb, most=most)
    if longer is not None:
        return value, longer
    try:
        return value, _walk(parameter, value, for_jsonb=for_jsonb, most=most)
    except _OverriddenError:
        pass
    try:
        value = _copy_containers(value, MAX_DEPTH, {})
    except RecursionError:
        problem = _TOO_DEEP
    except Exception as error:  # noqa: BLE001 - the caller's class may raise anything
        problem = f"must be a JSON value: reading a dict, list or tuple in it raised {type(error).__name__}"
    else:
        return value, _walk(parameter, value, for_jsonb=for_jsonb, most=most)
    raise InvalidInputError(parameter, problem)


def _quick_walk(parameter: str, value: Any, *, for_jsonb: bool, most: int) -> int | None:  # noqa: ANN401 - any value
    """
    Do the work of `_walk` for plain JSON types if the value is small or repeats no container within a level.

    Return None for other values; `_walk`, which is ten times slower, decides those.
    """
    level = [value]
    longer = characters = 0
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str:
                characters += len(item)
                if for_jsonb:
                    utf8_length(parameter, item)
            elif kind is dict or kind is list or kind is tuple:
                inner.append(item)
            elif kind is float:
                if for_jsonb and "e" in repr(item):
                    longer += len(f"{Decimal(repr(item)):f}") - len(repr(item))
            elif kind is int:
                if not -MAX_BIGINT <= item <= MAX_BIGINT:
                    characters += _least_digits(item)
            elif kind is not bool and item is not None:
                return None
        if characters > most:
            return None
        if not inner:
            return longer
        characters += 3 * len(level) - len(inner)
        level = []
        is_shared = len(inner) > 1 and len(set(map(id, inner))) < len(inner)
        for item in inner:
            if type(item) is dict:
                for name in item:
                    if type(name) is not str:
                        return None
                    characters += len(name)
                    if for_jsonb:
                        utf8_length(parameter, name)
                level += item.values()
            else:
                level += item
            if len(level) > _QUICK_ITEMS and (is_shared or 2 * len(level) + characters > most):
                return None
    return None


def _least_digits(number: int) -> int:
    """Return a lower bound for an int's number of digits, without converting it to text."""
    return number.bit_length() * 3 // 10


def _copy_containers(value: Any, levels: int, known: dict[int, tuple[Any, Any]]) -> Any:  # noqa: ANN401 - any value
    """Copy dicts, lists and tuples, each once, using their own iteration methods."""
    kind: Any = type(value)
    if not issubclass(kind, dict | list | tuple):
        return value
    if id(value) in known:
        return known[id(value)][1]
    if levels == 0:
        raise RecursionError
    # stops an endless iterator; no valid value has this many items
    if issubclass(kind, dict):
        pairs = islice(value.items(), MAX_PAYLOAD)
        copy: Any = {name: _copy_containers(item, levels - 1, known) for name, item in pairs}
    else:
        copy = [_copy_containers(item, levels - 1, known) for item in islice(value, MAX_PAYLOAD)]
    known[id(value)] = (value, copy)  # keeps the value alive, so that its id stays unique
    return copy


_QUICK_ITEMS: Final = 4_096
"""Maximum items per level that `_quick_walk` visits even if containers are shared."""

_ITEMS: Final[tuple[Any, ...]] = (dict.items, OrderedDict.items)
_ITERATIONS: Final[tuple[Any, ...]] = (list.__iter__, tuple.__iter__)


def _walk(parameter: str, value: object, *, for_jsonb: bool, most: int) -> int:
    """
    Reject nesting deeper than 200 levels, keys that are not str and, for jsonb, strings that it cannot store.

    A container referenced several times within a level is visited once and counted each time. Counting stops as soon as
    the JSON must be too long, which json.dumps would only notice after writing it. Return how many characters longer
    jsonb's text is than Python's, because jsonb writes 1e22 with all its zeros.
    """
    level: dict[int, tuple[Any, int]] = {0: ((value,), 1)}
    size, longer = -1, 0
    for _ in range(MAX_DEPTH + 1):
        inner: dict[int, tuple[Any, int]] = {}
        for container, times in level.values():
            kind: Any = type(container)
            names: Iterable[Any] = ()
            if kind is dict:
                names, members = container, container.values()
            elif kind is list or kind is tuple:
                members = container
            elif issubclass(kind, dict):
                if kind.items not in _ITEMS:
                    raise _OverriddenError
                names, members = dict.keys(container), dict.values(container)
            elif kind.__iter__ not in _ITERATIONS:
                raise _OverriddenError
            else:
                members = tuple(container)
            characters = max(3 * len(members) - 1, 1)  # brackets, separators and at least one character per member
            if size + times * characters > most:
                raise InvalidInputError(parameter, _TOO_LONG[most])
            for name in names:
                if not issubclass(type(name), str):
                    raise InvalidInputError(parameter, f"must have only str keys: {_fault(parameter, value)}")
                characters += str.__len__(name) + 4
                if for_jsonb:
                    utf8_length(parameter, str.__str__(name))
            for item in members:
                kind = type(item)
                if kind is str:
                    characters += len(item)
                    if for_jsonb:
                        utf8_length(parameter, item)
                elif kind is dict or kind is list or issubclass(kind, dict | list | tuple):
                    known = inner.get(id(item))
                    inner[id(item)] = (item, times if known is None else known[1] + times)
                elif kind is int:
                    if not -MAX_BIGINT <= item <= MAX_BIGINT:
                        characters += _least_digits(item)
                elif kind is bool or item is None:
                    pass
                elif issubclass(kind, str):
                    characters += str.__len__(item)
                    if for_jsonb:
                        utf8_length(parameter, str.__str__(item))
                elif for_jsonb and issubclass(kind, float):
                    written = float.__repr__(item)
                    if "e" in written:
                        longer += times * (len(f"{Decimal(written):f}") - len(written))
            size += times * characters
            if size > most:
                raise InvalidInputError(parameter, _TOO_LONG[most])
        if not inner:
            return longer
        level = inner
    raise InvalidInputError(parameter, _TOO_DEEP)
