"""
The records that chatdb returns and accepts. Field names are the column names of the SQL files.

The `repr` of a record omits content, title, key, payload and metadata, so that logs do not expose them.
"""

from __future__ import annotations

import json
import math
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from struct import pack
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    SkipValidation,
    ValidationError,
)
from pydantic_core import CoreSchema, core_schema

from chatdb.errors import InvalidInputError

Role = Literal["user", "assistant", "system", "developer", "tool"]
"""Who speaks; the same set as in the constraint `ck_messages_role`."""


State = Literal["streaming", "aborted"]
"""The state of a message that is not complete; the same set as in the constraint `ck_messages_state`."""


class JsonText(str):
    """
    JSON text, stored byte for byte, with its key order, number format, escapes and white space.

    It is a `str`, so it can be sent unchanged to a model provider or in an HTTP response.

    Decision: docs/decisions/0004-payload-is-json.md
    """

    __slots__ = ()

    def parsed(self) -> JsonValue:
        """Return the parsed value: a dict, list, str, int, float, bool or None."""
        value: JsonValue = json.loads(self)
        return value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


class Unset:
    """The type of `UNSET`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNSET"

    def __reduce__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()
"""The default of arguments whose `None` clears the stored value: `UNSET` keeps it."""


class New:
    """The type of `NEW`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NEW"

    def __reduce__(self) -> str:
        return "NEW"


NEW: Final = New()
"""A value of `expected`: the conversation must not exist yet."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

CURSOR: Final = "c1"
"""Prefix of a version 1 cursor, which holds updated_at and created_at in microseconds since 1970, and the id."""

MATCH_CURSOR: Final = "s1"
"""Prefix of a version 1 cursor of a search, which holds created_at in microseconds since 1970, conversation and seq."""

ETAG: Final = "e1"
"""Prefix of a version 1 etag, which holds the id and the revision."""


def encode_token(version: str, *numbers: int) -> str:
    """Return 64-bit integers as an opaque, URL-safe string."""
    return version + urlsafe_b64encode(pack(f">{len(numbers)}q", *numbers)).decode().rstrip("=")


def _microseconds(time: datetime) -> int:
    return (time - EPOCH) // timedelta(microseconds=1)


def _metadata_from_text(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


if TYPE_CHECKING:
    Metadata = dict[str, JsonValue]
else:  # Any, because JsonValue would validate each nested value again.
    Metadata = Annotated[dict[str, Any], BeforeValidator(_metadata_from_text)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401 - as pydantic declares it
        # The hash that pydantic gives a frozen model fails for rows with metadata, because a dict is not hashable.
        cls.__hash__ = None  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # decode.py fills records without pydantic's slots; supply them on first access.
            if name == "__pydantic_fields_set__":
                return set(type(self).model_fields)
            if name in {"__pydantic_extra__", "__pydantic_private__"}:
                return None
            return super().__getattr__(name)


class Conversation(_Record):
    """
    A stored conversation.

    Times are timezone-aware, in UTC.
    """

    id: int = Field(description="Identifies the conversation in the database. A 64-bit integer.")
    user_id: str = Field(description="The user who owns the conversation. 1 to 255 characters.")
    key: str | None = Field(
        repr=False,
        description="The caller's own name for the conversation, unique per user. 1 to 255 characters; "
        "None if not set.",
    )
    title: str | None = Field(repr=False, description="The title, at most 1,000 characters; None if not set.")
    metadata: Metadata | None = Field(
        repr=False, description="The caller's own data: an object of at most 1 MiB as JSON; None if not set."
    )
    last_seq: int = Field(
        description="The seq of the newest message ever appended, even if it was deleted; 0 without messages."
    )
    head_seq: int = Field(
        description="The seq of the newest message of the current line, which the next append follows; 0 without "
        "messages."
    )
    revision: int = Field(
        description="Rises with every write to the conversation: by 1 for each appended message and for each edit."
    )
    created_at: datetime = Field(description="Time of creation, in UTC.")
    updated_at: datetime = Field(
        description="Time of the last append or, without messages, of creation, in UTC. Edits do not change it."
    )
    archived_at: datetime | None = Field(description="Time of archiving, in UTC; None if not archived.")
    pinned_at: datetime | None = Field(description="Time of pinning, in UTC; None if not pinned.")

    @property
    def cursor(self) -> str:
        """An opaque string; as `after` of `list_conversations` it continues the list after this conversation."""
        return encode_token(CURSOR, _microseconds(self.updated_at), _microseconds(self.created_at), self.id)

    @property
    def etag(self) -> str:
        """An opaque string for this revision of this conversation: an HTTP ETag, or `expected` of a write."""
        return encode_token(ETAG, self.id, self.revision)


class Message(_Record):
    """
    A stored message.

    Sort messages by `seq`, not by `id`. Times are timezone-aware, in UTC.
    """

    id: int = Field(description="Identifies the message in the database. A 64-bit integer; it implies no order.")
    conversation_id: int = Field(description="The id of the conversation that contains the message.")
    user_id: str = Field(description="The user who owns the conversation. 1 to 255 characters.")
    seq: int = Field(description="Position in the conversation: from 1, in commit order, and never reused.")
    parent_seq: int | None = Field(
        description="The seq of the message that this one follows, or 0 for a first message. None if it follows the "
        "stored message with the next lower seq, as it does in a conversation without branches."
    )
    role: Role = Field(description="The author's role.")
    content: str = Field(repr=False, description="The readable text, at most 4 MiB as UTF-8. It can be empty.")
    payload: JsonText | None = Field(
        repr=False,
        description="Any JSON value as text, at most 16 MiB; None if not set. JSON null is stored as the text null.",
    )
    metadata: Metadata | None = Field(
        repr=False, description="The caller's own data: an object of at most 64 KiB as JSON; None if not set."
    )
    token_count: int | None = Field(description="Number of tokens, 0 to 2,147,483,647; None if unknown.")
    key: str | None = Field(
        repr=False,
        description="The caller's own name for the message, unique in the conversation. 1 to 255 characters; "
        "None if not set.",
    )
    state: State | None = Field(
        description="None if it is complete, `streaming` while its text grows, `aborted` if its stream was given up."
    )
    created_at: datetime = Field(description="Time of the append, in UTC. All messages of a batch have the same time.")

    def public(self) -> dict[str, JsonValue]:
        r"""
        Return the message as a dict of plain JSON values for an HTTP response, without `user_id`.

        The payload is parsed, and the time is an ISO 8601 string. Values that JSON in UTF-8 cannot hold become text:
        lone surrogates, as in `\ud83d`, and numbers outside the range of a float.
        """
        payload = None if self.payload is None else json.loads(self.payload, parse_float=_finite)
        fields = {name: value for name, value in vars(self).items() if name != "user_id"}
        values = {"payload": payload, "metadata": self.metadata, "created_at": self.created_at.isoformat()}
        public: dict[str, JsonValue] = _writable(fields | values)
        return public


def _finite(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _writable(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        return str(value) if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        return {_writable(name): _writable(item) for name, item in members.items()}
    if isinstance(value, list):
        return [_writable(item) for item in cast("list[Any]", value)]  # type: ignore[redundant-cast]
    if isinstance(value, float) and not math.isfinite(value):  # such as 1e400, which jsonb holds
        return str(value)
    return value


class NewMessage(_Record):
    """
    A message to append. A dict with the same fields works too.

    The constructor raises `InvalidInputError` for a missing `role` or `content` and for an unknown field. Values are
    checked when the message is appended.
    """

    role: SkipValidation[Role] = Field(description="The author's role.")
    content: SkipValidation[str] = Field(
        repr=False, description="The readable text, at most 4 MiB as UTF-8. It can be empty."
    )
    payload: SkipValidation[object] = Field(
        default=None,
        repr=False,
        description="Any JSON value of at most 16 MiB, or JsonText to store it byte for byte; None for no payload.",
    )
    metadata: SkipValidation[Mapping[str, object] | None] = Field(
        default=None, repr=False, description="Your own data: a dict of at most 64 KiB as JSON; None for none."
    )
    token_count: SkipValidation[int | None] = Field(
        default=None, description="Number of tokens, 0 to 2,147,483,647; None if unknown."
    )
    key: SkipValidation[str | None] = Field(
        default=None,
        repr=False,
        description="A name unique in the conversation, which makes the append safe to repeat. 1 to 255 characters; "
        "None for none.",
    )

    if not TYPE_CHECKING:

        def __init__(self, /, *args: object, **fields: object) -> None:
            if args:
                raise InvalidInputError("NewMessage", "takes keyword arguments only: NewMessage(role=..., content=...)")
            try:
                super().__init__(**fields)
            except ValidationError:
                if type(self) is not NewMessage:  # a subclass has fields and validators of its own
                    raise
            else:
                return
            unknown = fields.keys() - NewMessage.model_fields.keys()
            name = min(unknown or {"role", "content"} - fields.keys())
            if not unknown:
                raise InvalidInputError(f"NewMessage.{name}", "is required")
            # A name that is not an identifier may be user data.
            shown = f".{name}" if name.isidentifier() else "[...]"
            known = ", ".join(NewMessage.model_fields)
            raise InvalidInputError(f"NewMessage{shown}", f"is not a field of a message; the fields are {known}")


class Deleted(_Record):
    """The number of rows that a call deleted."""

    conversations: int = Field(description="Number of deleted conversations.")
    messages: int = Field(description="Number of deleted messages.")


class Moved(_Record):
    """The number of rows that a call moved to another user."""

    conversations: int = Field(description="Number of moved conversations.")
    messages: int = Field(description="Number of moved messages.")


class MessageTail(_Record):
    """The text of a message from an offset on."""

    text: str = Field(
        repr=False, description="The text from the requested offset to the end, or to what is stored so far."
    )
    offset: int = Field(description="The length of the text so far, in code points: where the next read continues.")
    state: State | None = Field(
        description="None if the text is complete, `streaming` while it grows, `aborted` if its stream was given up."
    )


class Match(_Record):
    """A message that `search_messages` found."""

    conversation_id: int = Field(description="The id of the conversation that contains the message.")
    seq: int = Field(description="Position of the message in the conversation.")
    role: Role = Field(description="The author's role.")
    created_at: datetime = Field(description="Time of the append, in UTC.")
    snippet: str = Field(
        repr=False,
        description="About 200 characters of the text around the first place found, in one line, without control "
        "characters; `…` where it is cut.",
    )

    @property
    def cursor(self) -> str:
        """An opaque string; as `after` of `search_messages` it continues the search after this message."""
        return encode_token(MATCH_CURSOR, _microseconds(self.created_at), self.conversation_id, self.seq)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """
    A call of chatdb that has ended: what `Pool.add_call_listener` reports, without any text, key or user.

    - `operation` is the function, such as `get_history`, and `statement` the file in `sql/` and the name in
      `pg_stat_statements`, such as `get_history_by_key`.
    - `duration` is the time of the call in seconds: the wait for a connection, each attempt and the pauses between.
      `wait` is the time until the pool had a connection for it, or 0 if one was idle.
    - `rows` is the number of rows that the server returned, and `retries` how often the statement was sent again.
    - `error` is the name of the error's class, and `sqlstate` the server's code for it; both are None if the call
      succeeded, or found that what it looks for does not exist (NotFoundError).
    """

    operation: str
    statement: str
    duration: float
    wait: float
    rows: int
    retries: int
    error: str | None
    sqlstate: str | None


class FoundMessage(_Record):
    """A message that a search found: the length of its text, and a part of it from the character `start` on."""

    conversation_id: int
    seq: int
    role: Role
    created_at: datetime
    length: int
    start: int
    text: str = Field(repr=False)


class WatchedRevision(_Record):
    """The state of the conversation in array element `ordinality`; None if it is missing."""

    ordinality: int
    revision: int | None
    last_seq: int | None


class MessageLength(_Record):
    """The length of a message's text, in code points."""

    length: int


class MessageVersions(_Record):
    """A message and the seqs of all its versions, itself included."""

    seq: int
    seqs: list[int]


class SchemaPart(_Record):
    """A column, constraint or index of the database, with the server's definition of it."""

    relation: str
    name: str
    definition: str


class ImportedConversation(_Record):
    """A conversation that an import stored or extended."""

    id: int


class BegunConversation(_Record):
    """The stored conversation with the key that is array element `ordinality`."""

    ordinality: int
    id: int
    last_seq: int
    created_at: datetime


class ImportedMessages(_Record):
    """The number of messages that an import stored."""

    messages: int


class ImportedParent(_Record):
    """The stored message for array element `ordinality`, at or before that seq."""

    ordinality: int
    seq: int


class ImportedMessage(_Record):
    """A message of a conversation that a later export may extend, with the conversation; all None without messages."""

    id: int
    last_seq: int
    edits: int
    title: str | None = Field(repr=False)
    imported_title: str | None = Field(repr=False)
    archived_at: datetime | None
    pinned_at: datetime | None
    imported_archived: str | None
    imported_pinned: str | None
    head_seq: int
    seq: int | None
    key: str | None = Field(repr=False)
    state: str | None
    digest: str | None = Field(repr=False)


class ImportedContent(_Record):
    """The text and payload of the stored message for array element `ordinality`."""

    ordinality: int
    content: str = Field(repr=False)
    payload: str | None = Field(repr=False)


class StoredConversation(_Record):
    """The stored conversation for array element `ordinality`, with its last message in the file's range."""

    ordinality: int
    id: int
    last_seq: int
    created_at: datetime
    final_seq: int | None
    final_key: str | None = Field(repr=False)
    final_created_at: datetime | None
