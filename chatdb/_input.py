"""Checks what callers pass before anything is sent: the limits of the CHECKs, and what PostgreSQL cannot hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final, cast, get_args

from pydantic import ValidationError

from chatdb.errors import InvalidInputError
from chatdb.records import JsonText, NewMessage, Role

ROLES: Final = frozenset(get_args(Role))
MAX_LIMIT: Final = 10_000
MAX_NAME: Final = 255
MAX_TITLE: Final = 1_000
MAX_CONTENT: Final = 4 * 1024 * 1024
MAX_METADATA: Final = 64 * 1024
MAX_PAYLOAD: Final = 16 * 1024 * 1024
MAX_DEPTH: Final = 200
MAX_BIGINT: Final = 2**63 - 1
MAX_INT: Final = 2**31 - 1

_NAMES: Final = dict.fromkeys(NewMessage.model_fields)
_REQUIRED: Final = {name for name, field in NewMessage.model_fields.items() if field.is_required()}

MessageRow = tuple[str, str, str | None, str | None, int | None, str | None]
"""A message's role, content, payload, metadata, token count and key."""


def text(parameter: str, value: object, *, least: int, most: int) -> str:
    """Return a text of `least` to `most` characters that PostgreSQL can hold."""
    if not isinstance(value, str):
        raise InvalidInputError(parameter, f"must be a str, not {type(value).__name__}")
    if not least <= len(value) <= most:
        raise InvalidInputError(parameter, f"must have {least:,} to {most:,} characters, not {len(value):,}")
    utf8_length(parameter, value)
    return value


def utf8_length(parameter: str, value: str) -> int:
    """Return the bytes of a text as UTF-8; a NUL or a lone surrogate is refused by its position."""
    nul = value.find("\0")
    if nul >= 0:
        raise InvalidInputError(parameter, f"has a NUL character at position {nul}, which PostgreSQL cannot hold")
    if value.isascii():
        return len(value)
    try:
        return len(value.encode())
    except UnicodeEncodeError as error:
        start = error.start
    raise InvalidInputError(parameter, f"has a lone surrogate at position {start}, which UTF-8 cannot hold")


def user(value: object) -> str:
    """Return a `user_id`."""
    return text("user_id", value, least=1, most=MAX_NAME)


def key(parameter: str, value: object) -> str | None:
    """Return a key, or None for none."""
    return None if value is None else text(parameter, value, least=1, most=MAX_NAME)


def title(value: object) -> str | None:
    """Return a title, or None for none."""
    return None if value is None else text("title", value, least=0, most=MAX_TITLE)


def integer(parameter: str, value: object, *, least: int, most: int = MAX_BIGINT) -> int:
    """Return a whole number of a range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInputError(parameter, f"must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise InvalidInputError(parameter, f"must be {least:,} to {most:,}")
    return value


def identifier(value: object, *, parameter: str = "conversation_id") -> int:
    """Return a conversation's id: any bigint, for an adopted database may have ids below 1."""
    return integer(parameter, value, least=-MAX_BIGINT - 1)


def place(parameter: str, value: object) -> int:
    """Return a position in a conversation."""
    return integer(parameter, value, least=0)


def limit(parameter: str, value: object) -> int:
    """Return how many rows a page may have."""
    return integer(parameter, value, least=1, most=MAX_LIMIT)


def role(parameter: str, value: object) -> str:
    """Return a role."""
    if not isinstance(value, str) or value not in ROLES:
        raise InvalidInputError(parameter, "must be user, assistant, system, developer or tool")
    return value


def content(parameter: str, value: object) -> str:
    """Return a message's text, which may be empty."""
    if not isinstance(value, str):
        raise InvalidInputError(parameter, f"must be a str, not {type(value).__name__}")
    if utf8_length(parameter, value) > MAX_CONTENT:
        raise InvalidInputError(parameter, "must have at most 4 MiB as UTF-8")
    return value


def token_count(parameter: str, value: object) -> int | None:
    """Return a number of tokens, or None for unknown."""
    return None if value is None else integer(parameter, value, least=0, most=MAX_INT)


def metadata(parameter: str, value: object) -> str | None:
    """Return metadata as the JSON that jsonb takes, or None for none."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidInputError(parameter, f"must be a dict or None, not {type(value).__name__}")
    longer = _walk(parameter, cast("object", value), for_jsonb=True)
    # the separators are those of jsonb's own text, by which the CHECK measures
    encoded = _dumps(parameter, cast("object", value), ascii_only=False)
    if utf8_length(parameter, encoded) + longer > MAX_METADATA:
        raise InvalidInputError(parameter, "must have at most 64 KiB as JSON")
    return encoded


def payload(parameter: str, value: object) -> str | None:
    """Return a payload as JSON text: a `JsonText` as it is, any other value encoded, None for none."""
    if value is None:
        return None
    if isinstance(value, JsonText):
        encoded = str(value)
        length = utf8_length(parameter, encoded)
        _parse(parameter, encoded)
    else:
        _walk(parameter, value, for_jsonb=False)
        encoded = _dumps(parameter, value, ascii_only=False)
        try:
            length = len(encoded.encode())
        except UnicodeEncodeError:  # type json holds a lone surrogate as an escape
            encoded = _dumps(parameter, value, ascii_only=True)
            length = len(encoded)
    if length > MAX_PAYLOAD:
        raise InvalidInputError(parameter, "must have at most 16 MiB as JSON")
    return encoded


def messages(values: object) -> list[MessageRow]:
    """Return the messages of a batch, each a `NewMessage` or a dict of its fields, as rows; their keys are distinct."""
    if isinstance(values, str | bytes | Mapping | NewMessage) or not isinstance(values, Iterable):
        raise InvalidInputError("messages", "must be a list of NewMessage or dict")
    rows: list[MessageRow] = []
    for index, value in enumerate(values):  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
        at = f"messages[{index}]"
        of_role, of_content, of_payload, of_metadata, of_token_count, of_key = _fields(at, value)  # pyright: ignore[reportUnknownArgumentType]
        row = (
            role(f"{at}.role", of_role),
            content(f"{at}.content", of_content),
            None if of_payload is None else payload(f"{at}.payload", of_payload),
            None if of_metadata is None else metadata(f"{at}.metadata", of_metadata),
            None if of_token_count is None else token_count(f"{at}.token_count", of_token_count),
            None if of_key is None else key(f"{at}.key", of_key),
        )
        rows.append(row)
    keys = [row[-1] for row in rows if row[-1] is not None]
    if len(set(keys)) < len(keys):
        raise InvalidInputError("messages", "must have distinct keys")
    return rows


def timeout(value: object) -> float | None:
    """Return a time limit in seconds, or None for the pool's."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_INT:
        raise InvalidInputError("timeout", f"must be a number of seconds above 0, to {MAX_INT:,}, or None")
    return float(value)


def _fields(parameter: str, value: object) -> tuple[Any, ...]:
    """Return the fields of a `NewMessage`, or of a dict that has none but these."""
    if isinstance(value, dict) and _REQUIRED <= value.keys() <= _NAMES.keys():
        return tuple(map(cast("dict[str, Any]", value).get, _NAMES))
    if isinstance(value, NewMessage):
        return tuple(vars(value).values())
    if not isinstance(value, Mapping):
        raise InvalidInputError(parameter, f"must be a NewMessage or a dict, not {type(value).__name__}")
    try:
        return tuple(vars(NewMessage.model_validate(dict(value))).values())  # pyright: ignore[reportUnknownArgumentType]
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    raise InvalidInputError(f"{parameter}.{field}", str(problem["msg"]))


def _parse(parameter: str, encoded: str) -> None:
    """Refuse what is no JSON, or would not be read back."""
    try:
        value = json.loads(encoded, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        problem = "must be valid JSON, without NaN or Infinity, numbers of over 4,300 digits or nesting deeper than 200"
    else:
        if encoded.count("[") + encoded.count("{") > MAX_DEPTH:
            _walk(parameter, value, for_jsonb=False)
        return
    raise InvalidInputError(parameter, problem)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _dumps(parameter: str, value: object, *, ascii_only: bool) -> str:
    try:
        return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        problem = (
            f"must be a JSON value ({type(error).__name__}): dicts, lists, strings, finite numbers, booleans, None"
        )
    raise InvalidInputError(parameter, problem)


def _walk(parameter: str, value: object, *, for_jsonb: bool) -> int:
    """
    Refuse nesting deeper than 200, keys that are no strings, and in jsonb strings that it cannot hold.

    Returns how many characters jsonb's text has more than Python's: it writes 1e22 with all its zeros.
    """
    level: list[Any] = [value]
    longer = 0
    for depth in range(MAX_DEPTH + 1):
        if for_jsonb and len(level) > MAX_METADATA:  # a value takes a byte: so one that holds itself ends here
            raise InvalidInputError(parameter, "must have at most 64 KiB as JSON")
        inner: dict[int, Any] = {}
        for item in level:
            if isinstance(item, dict | list | tuple):
                # each counts in jsonb; else once, or a list that holds itself twice would double at each level
                inner[len(inner) if for_jsonb else id(item)] = item  # pyright: ignore[reportUnknownArgumentType]
            elif for_jsonb and isinstance(item, str):
                utf8_length(parameter, item)
            elif for_jsonb and isinstance(item, float) and "e" in repr(item):
                longer += len(f"{Decimal(repr(item)):f}") - len(repr(item))
        if not inner:
            return longer
        if depth == MAX_DEPTH:
            break
        level = []
        for item in inner.values():
            if isinstance(item, dict):
                for name in item:  # pyright: ignore[reportUnknownVariableType]
                    if not isinstance(name, str):
                        raise InvalidInputError(parameter, f"must have strings as keys, not {type(name).__name__}")  # pyright: ignore[reportUnknownArgumentType]
                    if for_jsonb:
                        utf8_length(parameter, name)
            level.extend(item.values() if isinstance(item, dict) else item)  # pyright: ignore[reportUnknownArgumentType]
    raise InvalidInputError(parameter, f"must not be nested deeper than {MAX_DEPTH} levels")
