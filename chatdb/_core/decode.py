"""
Converts rows to records.

Reading a history of 100 messages mostly means building objects, and validation would cost four times as much as filling
the records directly. Rows of chatdb's own statements skip validation if their values have the driver's default types
(`DefaultCodecRecord`): `tests/contract/test_drift.py` proves that each statement's columns match the record's fields in
name, order, type and nullability. Rows from any other handle are validated because a codec may have changed them.

Decision: docs/decisions/0005-rows-are-not-validated-again.md
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from chatdb._core.asyncpg_private import DefaultCodecRecord
from chatdb.errors import ConfigurationError
from chatdb.records import Conversation, JsonText, Message, Metadata

RecordT = TypeVar("RecordT", bound=BaseModel)

Rows = Sequence[Any]

FILLED: Final[tuple[type[BaseModel], ...]] = (Conversation, Message)
"""Records that are filled without validation, because a statement can return many of them."""

_CONVERTERS: Final[dict[object, str]] = {JsonText: "JsonText", Metadata: "loads"}
"""The function that converts the driver's text to a field, by the field's type."""

_new: Final = object.__new__
_fill: Final[Callable[[BaseModel, dict[str, Any]], None]] = BaseModel.__dict__["__dict__"].__set__


def decoder(
    record: type[RecordT], fields_from_args: tuple[str, ...] = ()
) -> Callable[[Rows, Sequence[Any]], list[RecordT]]:
    """Return a function that builds records from rows and, for `fields_from_args`, from the first arguments."""
    adapter: TypeAdapter[list[RecordT]] = TypeAdapter(list[record])  # type: ignore[valid-type]

    def validate(rows: Rows, args: Sequence[Any]) -> list[RecordT]:
        bound = dict(zip(fields_from_args, args, strict=False))
        try:
            return adapter.validate_python([bound | dict(row) for row in rows])
        except ValidationError as error:
            fields = sorted({str(each["loc"][1]) for each in error.errors() if len(each["loc"]) > 1})
        # raised outside the except block, because pydantic's error quotes the values
        raise ConfigurationError(
            f"a codec on this connection returns values that do not fit {record.__name__} ({', '.join(fields)}): "
            "remove the codec or use another connection; the statement was executed"
        )

    if record not in FILLED:
        return validate
    fields_of, count = filler(filler_source(record, fields_from_args)), len(fields_from_args)

    def decode(rows: Rows, args: Sequence[Any]) -> list[RecordT]:
        if not rows or type(rows[0]) is not DefaultCodecRecord:
            return validate(rows, args)
        records = [*map(_new, repeat(record, len(rows)))]
        deque(map(_fill, records, fields_of(rows, *args[:count])), 0)  # a loop that runs in C
        return records

    return decode


def filler_source(record: type[BaseModel], fields_from_args: tuple[str, ...] = ()) -> str:
    """
    Return the source of a function that maps rows and `fields_from_args` to the fields of records.

    For fields a, b and c, with a in `fields_from_args`: `lambda rows, a: [{'a': a, 'b': b, 'c': c} for b, c in rows]`.
    """
    columns = [name for name in record.model_fields if name not in fields_from_args]
    fields = {name: name for name in record.model_fields}
    for name, field in record.model_fields.items():
        for kind in _CONVERTERS.keys() & {field.annotation, *get_args(field.annotation)}:
            fields[name] = f"None if {name} is None else {_CONVERTERS[kind]}({name})"
    items = ", ".join(f"{name!r}: {value}" for name, value in fields.items())
    return f"lambda {', '.join(['rows', *fields_from_args])}: [{{{items}}} for {', '.join(columns)} in rows]"


def filler(source: str) -> Callable[..., list[dict[str, Any]]]:
    function: Callable[..., list[dict[str, Any]]] = eval(source, {"JsonText": JsonText, "loads": json.loads})  # noqa: S307
    return function
