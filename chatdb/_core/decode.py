"""
Rows to records.

A history of 100 messages is mostly rows made into objects: validating them again costs four times as much as filling
the records. What may be filled unvalidated are the rows of chatdb's own statements, because `tests/test_drift.py`
proves of each that its columns are the record's fields in name, order, type and nullability, and of the functions here
that they take them in that order.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import product, repeat
from operator import itemgetter
from types import NoneType
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from chatdb.errors import ConfigurationError
from chatdb.records import Conversation, JsonText, Message

RecordT = TypeVar("RecordT", bound=BaseModel)

Rows = Sequence[Any]

_new: Final = object.__new__
_fill: Final[Callable[[BaseModel, dict[str, Any]], None]] = BaseModel.__dict__["__dict__"].__set__


def decoder(record: type[RecordT], given: tuple[str, ...] = ()) -> Callable[[Rows, Sequence[Any]], list[RecordT]]:
    """Return the function that makes a record of each row and of the fields that a statement's first arguments give."""
    adapter: TypeAdapter[list[RecordT]] = TypeAdapter(list[record])  # type: ignore[valid-type]

    def validate(rows: Rows, args: Sequence[Any]) -> list[RecordT]:
        known = dict(zip(given, args, strict=False))
        try:
            return adapter.validate_python([known | dict(row) for row in rows])
        except ValidationError as error:
            fields = sorted({str(each["loc"][1]) for each in error.errors() if len(each["loc"]) > 1})
        # outside, because pydantic's error quotes the values
        raise ConfigurationError(
            f"a codec of this connection returns values that do not fit {record.__name__} ({', '.join(fields)}): "
            "remove it, or give chatdb a connection without it; the statement was carried out"
        )

    if (record, given) not in _FILLED:
        return validate
    fields_of, telling = _FILLED[record, given]
    columns = [name for name in record.model_fields if name not in given]
    plain, tell, count = _plain(record, given), itemgetter(columns.index(telling)), len(given)

    def decode(rows: Rows, args: Sequence[Any]) -> list[RecordT]:
        known = args[:count]
        # a codec that the caller has set on his connection gives other types, in each row that has a value there, and
        # what he gives may be of a type of his own
        if not rows or (*map(type, known), *map(type, rows[0])) not in plain:
            return validate(rows, known)
        told = next((row for row in rows if tell(row) is not None), None) if tell(rows[0]) is None else None
        if told is not None and (*map(type, known), *map(type, told)) not in plain:
            return validate(rows, known)
        records = [*map(_new, repeat(record, len(rows)))]
        deque(map(_fill, records, fields_of(rows, *known)), 0)  # as a loop, but in C
        return records

    return decode


def _plain(record: type[BaseModel], given: tuple[str, ...] = ()) -> frozenset[tuple[type, ...]]:
    """Return the types that what is given and a row's values may have, if the driver decodes them by itself."""
    drivers: dict[Any, type] = {int: int, datetime: datetime, NoneType: NoneType}  # all else is text
    fields = record.model_fields
    order = [*given, *(name for name in fields if name not in given)]
    kinds = [get_args(fields[name].annotation) or [fields[name].annotation] for name in order]
    return frozenset(product(*({drivers.get(kind, str) for kind in each} for each in kinds)))


def _conversations(rows: Rows) -> list[dict[str, Any]]:
    return [
        {
            "id": id_,
            "user_id": user_id,
            "key": key,
            "title": title,
            "metadata": None if metadata is None else json.loads(metadata),
            "last_seq": last_seq,
            "created_at": created_at,
            "updated_at": updated_at,
        }
        for id_, user_id, key, title, metadata, last_seq, created_at, updated_at in rows
    ]


def _messages(rows: Rows) -> list[dict[str, Any]]:
    return [
        {
            "id": id_,
            "conversation_id": conversation_id,
            "user_id": user_id,
            "seq": seq,
            "role": role,
            "content": content,
            "payload": None if payload is None else JsonText(payload),
            "metadata": None if metadata is None else json.loads(metadata),
            "token_count": token_count,
            "key": key,
            "created_at": created_at,
        }
        for (
            id_, conversation_id, user_id, seq, role, content, payload, metadata, token_count, key, created_at
        ) in rows
    ]  # fmt: skip


def _messages_of(rows: Rows, user_id: str, conversation_id: int) -> list[dict[str, Any]]:
    return [
        {
            "id": id_,
            "conversation_id": conversation_id,
            "user_id": user_id,
            "seq": seq,
            "role": role,
            "content": content,
            "payload": None if payload is None else JsonText(payload),
            "metadata": None if metadata is None else json.loads(metadata),
            "token_count": token_count,
            "key": key,
            "created_at": created_at,
        }
        for id_, seq, role, content, payload, metadata, token_count, key, created_at in rows
    ]


_FILLED: Final[dict[tuple[type[BaseModel], tuple[str, ...]], tuple[Callable[..., list[dict[str, Any]]], str]]] = {
    (Conversation, ()): (_conversations, "id"),
    (Message, ()): (_messages, "token_count"),
    (Message, ("user_id", "conversation_id")): (_messages_of, "id"),
}
"""
The records that are filled, with the fields that arguments give; each with what makes a row's fields, and with the
column to tell codecs by.

That is the one whose type no column that is NOT NULL has; where there is none, any that is NOT NULL.
"""
