"""What the reader of tables has to know of a framework: a description, which each framework's module fills in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from chatdb._core.validate import check_conversation_metadata
from chatdb.errors import InvalidInputError
from chatdb.formats.items import Item, ParsedMessage, UnsupportedItemError

if TYPE_CHECKING:
    from datetime import datetime
    from typing import LiteralString


class Row(NamedTuple):
    """A message without its text, or a session without messages: the columns of `Source.rows`."""

    session: str
    began_at: datetime | None
    ended_at: datetime | None
    messages: int
    """The number of messages of the session."""
    id: Any
    written_at: datetime | None
    size: int | None
    about: str | None = None
    """JSON text about the session, in its first row."""


class Head(NamedTuple):
    """What the conversation of a session has, apart from its messages and times; `metadata` is JSON text."""

    key: str
    title: str | None = None
    metadata: str | None = None


Execute: TypeAlias = "Callable[[LiteralString, Mapping[str, Any]], Iterable[tuple[Any, ...]]]"
"""Executes a statement in which `{name}` stands for a table."""


def _row_id(row: Row, _item: dict[str, Any]) -> str:
    return str(row.id)


@dataclass(frozen=True, kw_only=True)
class Source:
    """
    A framework's tables.

    `rows` selects the columns of `Row`, ordered by session and message, with the parameters `sessions` (an array, or
    null for all) and `user`. `texts` selects the id and the JSON text of the messages whose ids are its only parameter,
    so that the server sorts narrow rows and sends a bounded amount. In both, `{name}` stands for a table.
    """

    name: str
    tables: tuple[str, ...] = ()
    """The tables, all on the search_path."""
    find: LiteralString | None = None
    """Instead of `tables`, a query for the schema and name of each table, which is `{table}` in the statements."""
    label: str = ""
    """The table that stands for all when several frameworks' tables match."""
    looked_for: str
    rows: LiteralString
    texts: LiteralString
    head: Callable[[Row], Head]
    parse: Callable[[dict[str, Any]], ParsedMessage]
    framework: str | None = None
    """The mark of its messages in their metadata. A longer text than a message can have is cut if there is one."""
    key: Callable[[Row, dict[str, Any]], str] = _row_id
    """Returns a message's key for its row and item."""
    session_id: Callable[[str], str] = str
    """Returns the id, as in the option --session, of a row's session."""
    check_session: Callable[[str], str] = str
    """Returns a session's id as the tables have it, or raises InvalidInputError."""
    names_user: bool = False
    """Whether the tables name the user of each session, of whom only those sessions are read."""
    keeps_empty: bool = False
    """Whether a session without messages becomes a conversation."""
    before: Callable[[Execute, str | None, bool], Iterator[Item]] | None = None
    """Checks the tables, and yields what precedes the sessions of this user; the bool says that some are chosen."""


def checked_metadata(name: str, metadata: Mapping[str, object] | None) -> str | None:
    """Return metadata as JSON text, or raise UnsupportedItemError, which calls it `name`."""
    try:
        return check_conversation_metadata(name, metadata)
    except InvalidInputError:
        pass
    raise UnsupportedItemError(f"{name} larger than 1 MiB")
