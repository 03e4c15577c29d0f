"""Finds, reads and runs the files under `sql/`: one statement each, whose rows become records."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, TypeAdapter

from chatdb.errors import (
    AcquireTimeoutError,
    CommandTimeoutError,
    ConversationNotFoundError,
    UnavailableError,
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

    An *existence row*, all null, is how a statement says that the conversation is there but the message is not; no
    row at all says that the user has no such conversation.
    """

    def __init__(self, name: str, record: type[RecordT], *, repeatable: bool = False) -> None:
        """Read `sql/<name>.sql`; `repeatable` statements may be sent again by chatdb's pool after a lost connection."""
        self.name = name
        self.record = record
        self.repeatable = repeatable
        header, _, body = (data_folder("sql") / f"{name}.sql").read_text(encoding="utf-8").partition("\n\n")
        # the server shows the first 1,023 bytes of a statement: its name and itself, not its description
        self.sql = f"{header.partition(chr(10))[0]}\n{body.strip()}"
        self._records: TypeAdapter[list[RecordT]] = TypeAdapter(list[record])  # type: ignore[valid-type]

    async def fetch_all(self, db: Database, *args: object) -> list[RecordT]:
        """Return a record per row."""
        return self._decode(await self._rows(db, args, None))

    async def fetch_one(self, db: Database, *args: object, timeout: float | None = None) -> RecordT:
        """Return the one record; no row raises ConversationNotFoundError."""
        return self._decode(await self._found(db, args, timeout))[0]

    async def fetch_optional(self, db: Database, *args: object) -> RecordT | None:
        """Return the one record, None for an existence row; no row raises ConversationNotFoundError."""
        rows = await self._found(db, args, None)
        return None if _is_existence(rows) else self._decode(rows)[0]

    async def fetch_page(self, db: Database, *args: object) -> list[RecordT]:
        """Return a record per row, none for an existence row; no row raises ConversationNotFoundError."""
        rows = await self._found(db, args, None)
        return [] if _is_existence(rows) else self._decode(rows)

    async def iterate(self, connection: Connection, *args: object) -> AsyncGenerator[RecordT, None]:
        """Iterate over a record per row, 100 fetched at a time by a cursor in the connection's transaction."""
        with translating():
            cursor = await connection.cursor(self.sql, *args)
            while rows := await cursor.fetch(100):
                for record in self._decode(rows):
                    yield record

    def _decode(self, rows: list[Any]) -> list[RecordT]:
        return self._records.validate_python([dict(row) for row in rows])

    async def _found(self, db: Database, args: tuple[object, ...], timeout: float | None) -> list[Any]:
        rows = await self._rows(db, args, timeout)
        if not rows:
            raise ConversationNotFoundError("the user has no such conversation: check user_id and the id or key")
        return rows

    async def _rows(self, db: Database, args: tuple[object, ...], timeout: float | None) -> list[Any]:
        try:
            return await self._send(db, args, timeout)
        except UnavailableError as error:
            timed_out = isinstance(error, AcquireTimeoutError | CommandTimeoutError)
            if timed_out or error.sent or not self.repeatable or not _is_chatdbs(db):
                raise
        return await self._send(db, args, timeout)

    async def _send(self, db: Database, args: tuple[object, ...], timeout: float | None) -> list[Any]:
        try:
            with translating():
                if timeout is None:
                    return await db.fetch(self.sql, *args)
                return await db.fetch(self.sql, *args, timeout=timeout)
        except CommandTimeoutError as error:
            if not _is_chatdbs(db) and hasattr(db, "acquire"):
                error.sent = None  # another pool's time limit may have ended the connecting
            raise


def _is_chatdbs(db: object) -> bool:
    return getattr(db, "retries_lost_connections", False)


def _is_existence(rows: list[Any]) -> bool:
    return rows[0]["id"] is None
