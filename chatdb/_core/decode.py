"""
Converts rows to records.

Reading a history of 100 messages mostly means building objects, and validation would cost four times as much as filling
the records directly. Rows of chatdb's own statements skip validation if their values have the driver's default types
(`DefaultCodecRows`): `tests/contract/test_drift.py` proves that each statement's columns match the record's fields in
name, order, type and nullability. Rows from any other handle are validated because a codec may have changed them.

Decision: docs/decisions/0005-rows-are-not-validated-again.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from chatdb._core.asyncpg_private import DefaultCodecRows
from chatdb.errors import ConfigurationError
from chatdb.records import Conversation, JsonText, Message, Metadata, NewMessage

RecordT = TypeVar("RecordT", bound=BaseModel)

Rows = Sequence[Any]

FILLED: Final[tuple[type[BaseModel], ...]] = (Conversation, Message)
"""Records that are filled without validation, because a statement can return many of them."""

MESSAGE_FIELDS: Final = tuple(NewMessage.model_fields)
"""The fields of a message to be appended, in order."""

_CONVERTERS: Final[dict[object, str]] = {JsonText: "JsonText", Metadata: "loads"}
"""The function that converts the driver's text to a field, by the field's type."""

_UNFROZEN: Final = {
    "__slots__": (),
    "__init__": object.__init__,
    "__setattr__": object.__setattr__,
    "__delattr__": object.__delattr__,  # otherwise setting an attribute is slow: both share a slot of the type
}
"""The methods of a subclass whose instances take any value and then become records."""

Arguments = Sequence[Any]


def decoder(
    record: type[RecordT],
    *,
    from_arguments: tuple[str, ...] = (),
    from_messages: tuple[str, ...] = (),
    has_refusal: bool = False,
) -> Callable[[Rows, Arguments, Rows], list[RecordT]]:
    """
    Return a function that builds records from rows, the statement's arguments and the messages sent.

    The rows omit the fields in `from_arguments`, which are the first arguments, and in `from_messages`, which are
    fields of the message at the row's position. With `has_refusal`, a row ends with a column that is not a field.
    """
    adapter: TypeAdapter[list[RecordT]] = TypeAdapter(list[record])  # type: ignore[valid-type]

    def validate(rows: Rows, args: Arguments, messages: Rows) -> list[RecordT]:
        given = dict(zip(from_arguments, args, strict=False))
        fields = [given | {name: value for name, value in row.items() if name != "refusal"} for row in rows]
        for row, message in zip(fields, messages if from_messages else (), strict=False):
            row |= {name: value for name, value in zip(MESSAGE_FIELDS, message, strict=True) if name in from_messages}
        return _validated(adapter, record, fields)

    if record not in FILLED:
        return validate
    columns = [name for name in record.model_fields if name not in from_arguments + from_messages]
    columns += ["_"] * has_refusal
    fill = filler(record, filler_source(record, columns, from_arguments, from_messages))
    count = len(from_arguments)

    def decode(rows: Rows, args: Arguments, messages: Rows) -> list[RecordT]:
        if type(rows) is not DefaultCodecRows:
            return validate(rows, args, messages)
        return fill(rows, messages, *args[:count])

    return decode


def conversations_of(rows: Rows) -> list[Conversation]:
    """Return the conversations of rows that have the columns of a conversation and a message."""
    if type(rows) is not DefaultCodecRows:
        fields = [{name: row[name] for name in Conversation.model_fields} for row in rows]
        return _validated(TypeAdapter(list[Conversation]), Conversation, fields)
    return _joined_conversations(rows, ())


def messages_of(rows: Rows, user_id: str, conversation_id: int | None = None) -> list[Message]:
    """Return the messages of such rows; `conversation_id` is given where the rows do not have it."""
    if type(rows) is not DefaultCodecRows:
        fields = [
            {"user_id": user_id, "conversation_id": row["id"] if conversation_id is None else conversation_id}
            | {name: row[f"message_{name}"] for name in JOINED_FIELDS}
            for row in rows
        ]
        return _validated(TypeAdapter(list[Message]), Message, fields)
    if conversation_id is None:
        return _joined_messages(rows, (), user_id)
    return _messages_of_one(rows, (), user_id, conversation_id)


def filler_source(
    record: type[BaseModel],
    columns: Sequence[str],
    from_arguments: tuple[str, ...] = (),
    from_messages: tuple[str, ...] = (),
    *,
    copies_dict: bool = sys.version_info >= (3, 13),
) -> str:
    """
    Return the source of a function that builds records from rows, messages and arguments.

    For fields a, b and c, with a in `from_arguments` and c optional:

        def fill(rows, messages, a):
            records = []
            for b, c in rows:
                record = Unfrozen()
                record.a = a
                record.b = b
                record.c = None if c is None else JsonText(c)
                record.__class__ = Record
                records.append(record)
            return records

    Up to Python 3.12, an instance stores its attributes without a dict. From 3.13 on, the instances of pydantic's
    models have a dict. Copying one costs less than filling it, and most optional fields of most rows are null, so the
    source with `copies_dict` has these lines instead:

            empty = {'a': a, 'b': None, 'c': None}
            ...
                record = Unfrozen()
                record.__dict__ = empty.copy()
                record.b = b
                if c is not None:
                    record.c = JsonText(c)

    A column `_` is ignored.
    """
    source = f"{', '.join(columns)} in rows"
    if from_messages:
        sent = ", ".join(name if name in from_messages else "_" for name in MESSAGE_FIELDS)
        source = f"({', '.join(columns)}), ({sent}) in zip(rows, messages)"
    empty = ", ".join(f"{name!r}: {name if name in from_arguments else None}" for name in record.model_fields)
    lines = [
        f"def fill({', '.join(['rows', 'messages', *from_arguments])}):",
        *[f"    empty = {{{empty}}}"] * copies_dict,
        "    records = []",
        f"    for {source}:",
        "        record = Unfrozen()",
        *["        record.__dict__ = empty.copy()"] * copies_dict,
    ]
    for name, field in record.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        value = next((f"{_CONVERTERS[kind]}({name})" for kind in _CONVERTERS if kind in kinds), name)
        if copies_dict and name in from_arguments:
            continue
        if copies_dict and NoneType in kinds:
            lines += [f"        if {name} is not None:", f"            record.{name} = {value}"]
        elif value != name and NoneType in kinds:
            lines.append(f"        record.{name} = None if {name} is None else {value}")
        else:
            lines.append(f"        record.{name} = {value}")
    lines += ["        record.__class__ = Record", "        records.append(record)", "    return records", ""]
    return "\n".join(lines)


def filler(record: type[RecordT], source: str) -> Callable[..., list[RecordT]]:
    """Return the function that the source defines."""
    # type's own __new__, because that of pydantic's metaclass would build a schema
    unfrozen: Any = type.__new__(type(BaseModel), f"Unfrozen{record.__name__}", (record,), dict(_UNFROZEN))
    names: dict[str, Any] = {"Record": record, "Unfrozen": unfrozen, "JsonText": JsonText, "loads": json.loads}
    exec(source, names)  # noqa: S102 - made above
    function: Callable[..., list[RecordT]] = names["fill"]
    return function


JOINED_FIELDS: Final = tuple(name for name in Message.model_fields if name not in {"conversation_id", "user_id"})
"""The fields of a message whose columns, prefixed with `message_`, follow those of its conversation."""

_own: Final = tuple(Conversation.model_fields)
_joined_conversations: Final = filler(Conversation, filler_source(Conversation, (*_own, *"_" * len(JOINED_FIELDS))))
_joined_messages: Final = filler(
    Message, filler_source(Message, ("conversation_id", *"_" * (len(_own) - 1), *JOINED_FIELDS), ("user_id",))
)
_messages_of_one: Final = filler(
    Message, filler_source(Message, (*"_" * len(_own), *JOINED_FIELDS), ("user_id", "conversation_id"))
)


def _validated(adapter: TypeAdapter[list[RecordT]], record: type[BaseModel], fields: list[Any]) -> list[RecordT]:
    try:
        return adapter.validate_python(fields)
    except ValidationError as error:
        names = sorted({str(each["loc"][1]) for each in error.errors() if len(each["loc"]) > 1})
    # raised outside the except block, because pydantic's error quotes the values
    raise ConfigurationError(
        f"a codec on this connection returns values that do not fit {record.__name__} ({', '.join(names)}): "
        "remove the codec or use another connection; the statement was executed"
    )
