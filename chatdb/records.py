"""
The records: what chatdb returns, field by field as the SQL files name them, and what it takes.

Their `repr` has no text, title, key, payload or metadata, so that a log of a record tells none.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SkipValidation,
    ValidationError,
)
from pydantic_core import CoreSchema, core_schema

from chatdb.errors import InvalidInputError

Role = Literal["user", "assistant", "system", "developer", "tool"]
"""Who speaks. The same set as the CHECK `ck_messages_role`."""


class JsonText(str):
    """
    JSON as its text, kept byte for byte: the order of keys, the writing of numbers and escapes, the white space.

    A `str` in every respect, so it can be passed on to a model provider or an HTTP response as it is.

    Decision: docs/decisions/0004-payload-is-json.md
    """

    __slots__ = ()

    def parsed(self) -> Any:  # noqa: ANN401 - any JSON value
        """Return the value that the text stands for."""
        return json.loads(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


class Unset:
    """The type of `UNSET`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()
"""Stands for an argument that was not given, where `None` has a meaning of its own: it clears the value."""


def _metadata_from_text(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


Metadata = Annotated[dict[str, Any], BeforeValidator(_metadata_from_text)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401 - as pydantic declares it
        # pydantic gives a frozen model a hash, which then fails on the dict in metadata, for some rows only
        cls.__hash__ = None  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # a record that was filled from a row has none of pydantic's own slots until one is asked for
            if name == "__pydantic_fields_set__":
                return set(type(self).model_fields)
            if name in {"__pydantic_extra__", "__pydantic_private__"}:
                return None
            return super().__getattr__(name)


class Conversation(_Record):
    """
    A conversation of a user, as it is stored.

    `last_seq` is the `seq` of the newest message ever appended, 0 if there was none. `updated_at` is the time of the
    last append, or of creation. Times are aware, in UTC.
    """

    id: int
    user_id: str
    key: str | None = Field(repr=False)
    title: str | None = Field(repr=False)
    metadata: Metadata | None = Field(repr=False)
    last_seq: int
    created_at: datetime
    updated_at: datetime


class Message(_Record):
    """
    A message, as it is stored.

    `seq` is its place in the conversation: from 1, in commit order. `id` is a global handle and no order.
    """

    id: int
    conversation_id: int
    user_id: str
    seq: int
    role: Role
    content: str = Field(repr=False)
    payload: JsonText | None = Field(repr=False)
    metadata: Metadata | None = Field(repr=False)
    token_count: int | None
    key: str | None = Field(repr=False)
    created_at: datetime


class NewMessage(_Record):
    """
    A message to be appended; a dict of the same fields will do.

    `content` is the readable text. `payload` is any JSON value, or `JsonText` to be kept byte for byte. Values are
    checked by the function that appends the message, which raises `InvalidInputError`. So does making one without
    `role` or `content`, or with a field that a message does not have.
    """

    role: SkipValidation[Role]
    content: SkipValidation[str] = Field(repr=False)
    payload: SkipValidation[Any] = Field(default=None, repr=False)
    metadata: SkipValidation[dict[str, Any] | None] = Field(default=None, repr=False)
    token_count: SkipValidation[int | None] = None
    key: SkipValidation[str | None] = Field(default=None, repr=False)

    if not TYPE_CHECKING:

        def __init__(self, /, *args: object, **fields: object) -> None:
            if args:
                raise InvalidInputError("NewMessage", "takes its fields by name: NewMessage(role=..., content=...)")
            try:
                super().__init__(**fields)
            except ValidationError:
                if type(self) is not NewMessage:  # its own fields and their checks are the caller's
                    raise
            else:
                return
            unknown = fields.keys() - NewMessage.model_fields.keys()
            name = min(unknown or {"role", "content"} - fields.keys())
            if not unknown:
                raise InvalidInputError(f"NewMessage.{name}", "is required")
            # a name that is no identifier may be a text of a user's
            shown = f".{name}" if name.isidentifier() else "[...]"
            known = ", ".join(NewMessage.model_fields)
            raise InvalidInputError(f"NewMessage{shown}", f"is no field of a message, which are {known}")


class Deleted(_Record):
    """How many rows a deletion took."""

    conversations: int
    messages: int


class SchemaPart(_Record):
    """A column, a constraint or an index that a database has; `definition` is the server's own."""

    relation: str
    name: str
    definition: str


class ImportedConversation(_Record):
    """A conversation that an import has stored or extended."""

    id: int


class ImportedMessages(_Record):
    """How many messages an import has stored."""

    messages: int


class StoredConversation(_Record):
    """What is stored of the conversation at `ordinality` in the arrays, with its last message in the file's range."""

    ordinality: int
    id: int
    last_seq: int
    created_at: datetime
    final_seq: int | None
    final_key: str | None = Field(repr=False)
    final_created_at: datetime | None
