"""Finds, reads and runs the files under `sql/`: one statement each, whose rows become records."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from chatdb._decode import decoder
from chatdb.errors import (
    AcquireTimeoutError,
    ChatDBError,
    CommandTimeoutError,
    ConversationNotFoundError,
    UnavailableError,
    own,
    translating,
)

if TYPE_CHECKING:
    from chatdb.pool import Connection

RecordT = TypeVar("RecordT", bound=BaseModel)


class Database(Protocol):
    """What a function needs of its first argument: chatdb's pool, an asyncpg pool, or an asyncpg connection."""

    async def fetch(self, query: str, /, *args: Any, timeout: float | None = None) -> list[Any]:  # noqa: ANN401
        """Run a statement and return its rows."""
        ...


def data_folder(name: str) -> Path:
    """Return the folder `sql` or `migrations`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


class Query(Generic[RecordT]):
    """
    The statement of one SQL file and the record that its rows become.

    An *existence row*, all null, is how a statement says that the conversation is there though the message is not, or
    though there are no more messages; no row at all says that the user has no such conversation.
    """

    def __init__(
        self, name: str, record: type[RecordT], *, given: tuple[str, ...] = (), repeatable: bool = False
    ) -> None:
        """
        Read `sql/<name>.sql`.

        `given` are fields that the first arguments give, and the statement does not send back with every row.
        `repeatable` statements may be sent again by chatdb's pool after a lost connection.
        """
        self.name = name
        self.record = record
        self.given = given
        self.repeatable = repeatable
        header, _, body = (data_folder("sql") / f"{name}.sql").read_text(encoding="utf-8").partition("\n\n")
        # the server shows the first 1,023 bytes of a statement: its name and itself, not its description
        self.sql = f"{header.partition(chr(10))[0]}\n{body.strip()}"
        self._decode = decoder(record, given)

    async def fetch_all(self, db: Database, *args: object) -> list[RecordT]:
        """Return a record per row."""
        return self._decode(await self._rows(db, args), args)

    async def fetch_one(self, db: Database, *args: object, timeout: float | None = None) -> RecordT:
        """Return the one record; no row raises ConversationNotFoundError."""
        rows = await self._rows(db, args, timeout)
        if not rows:
            raise _not_found()
        return self._decode(rows, args)[0]

    async def fetch_optional(self, db: Database, *args: object) -> RecordT | None:
        """Return the one record, None for an existence row; no row raises ConversationNotFoundError."""
        page = await self.fetch_page(db, *args)
        return page[0] if page else None

    async def fetch_page(self, db: Database, *args: object) -> list[RecordT]:
        """Return a record per row but for an existence row at the end; no row raises ConversationNotFoundError."""
        rows = await self._rows(db, args)
        if not rows:
            raise _not_found()
        if rows[-1]["id"] is None:
            rows.pop()
        return self._decode(rows, args)

    async def iterate(self, connection: Connection, *args: object) -> AsyncGenerator[RecordT, None]:
        """Iterate over a record per row, 100 fetched at a time by a cursor in the connection's transaction."""
        with translating():
            cursor = await connection.cursor(self.sql, *args)
            while rows := await cursor.fetch(100):
                for record in self._decode(rows, args):
                    yield record

    async def _rows(
        self, db: Database, args: tuple[object, ...], timeout: float | None = None, *, again: bool = True
    ) -> list[Any]:
        try:
            return await db.fetch(self.sql, *args, timeout=timeout)
        except Exception as error:
            ours = own(error)
            if ours is None:
                raise
            if isinstance(ours, CommandTimeoutError) and not _is_chatdbs(db) and hasattr(db, "acquire"):
                ours.sent = None  # another pool's time limit may have ended the connecting
            if not (again and self.repeatable and _is_chatdbs(db) and _is_loss(ours)):
                raise ours from ours.__cause__
        return await self._rows(db, args, timeout, again=False)


def _not_found() -> ConversationNotFoundError:
    return ConversationNotFoundError("the user has no such conversation: check user_id and the id or key")


def _is_loss(error: ChatDBError) -> bool:
    """Whether a connection was lost, before or after the statement was sent, for all that is known."""
    timed_out = isinstance(error, AcquireTimeoutError | CommandTimeoutError)
    return isinstance(error, UnavailableError) and not timed_out and not error.sent


def _is_chatdbs(db: object) -> bool:
    return getattr(db, "retries_lost_connections", False)
