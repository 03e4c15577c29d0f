"""Finds, reads and runs the files under `sql/`: one statement each, whose rows become records."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from pydantic import BaseModel

from chatdb._core.asyncpg_private import STATEMENTS, fetch_rows
from chatdb._core.decode import decoder
from chatdb._core.driver_errors import as_chatdb_error, mapped_driver_errors
from chatdb._core.retry import RetryPolicy
from chatdb.errors import ChatDBError, CommandTimeoutError, ConversationNotFoundError, UnavailableError

if TYPE_CHECKING:
    from chatdb._core.handles import Connection

RecordT = TypeVar("RecordT", bound=BaseModel)


_FIRST_WORD: Final = re.compile(r"\A(?:--.*\n)*(?:\w+|\()")
"""A statement's beginning, with the comments before it."""

_log = logging.getLogger("chatdb")


class Database(Protocol):
    """What a function needs of its first argument: chatdb's pool, an asyncpg pool, or an asyncpg connection."""

    async def fetch(self, query: str, /, *args: Any, timeout: float | None = None) -> list[Any]:  # noqa: ANN401
        """Run a statement and return its rows."""
        ...


def data_folder(name: str) -> Path:
    """Return the folder `sql` or `migrations`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def statement_files() -> list[Path]:
    """Return the files of the statements that a service's role runs: those of functions, of import and of export."""
    folder = data_folder("sql")
    return sorted([*folder.glob("*.sql"), *folder.glob("transfer/*.sql")], key=lambda path: path.name)


class Query(Generic[RecordT]):
    """
    The statement of one SQL file and the record that its rows become.

    An *existence row*, all null, is how a statement says that the conversation is there though the message is not, or
    though there are no more messages; no row at all says that the user has no such conversation.

    Decisions: docs/decisions/0008-existence-row.md, 0009-one-statement-per-operation.md
    """

    def __init__(
        self, name: str, record: type[RecordT], *, fields_from_args: tuple[str, ...] = (), idempotent: bool = False
    ) -> None:
        """
        Read `sql/<name>.sql`, where the name may begin with a folder: `transfer/count_user`.

        `fields_from_args` are fields that the first arguments give; the statement does not send them back in each row.
        `idempotent` statements may be sent again after a lost connection, because they do nothing more the second time.
        """
        self.name = name.rpartition("/")[2]
        self.record = record
        self.fields_from_args = fields_from_args
        self.idempotent = idempotent
        _, _, body = (data_folder("sql") / f"{name}.sql").read_text(encoding="utf-8").partition("\n\n")
        # OpenTelemetry names a span by the first word, so there is no space after the dashes; a leading /* comment */
        # would be cut off there. pg_stat_statements drops what stands before the statement's own first word.
        self.sql = f"--chatdb.{self.name}\n" + _FIRST_WORD.sub(rf"\g<0> /* chatdb.{self.name} */", body.strip())
        STATEMENTS.add(self.sql)
        self._decode = decoder(record, fields_from_args)

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

    async def fetch_page(self, db: Database, *args: object, idempotent: bool = False) -> list[RecordT]:
        """
        Return a record per row but for an existence row at the end; no row raises ConversationNotFoundError.

        `idempotent` says that the statement is so with these arguments.
        """
        rows = await self._rows(db, args, None, idempotent)
        if not rows:
            raise _not_found()
        if rows[-1]["id"] is None:
            rows.pop()
        return self._decode(rows, args)

    async def iterate(self, connection: Connection, *args: object) -> AsyncGenerator[RecordT, None]:
        """Iterate over a record per row, 100 fetched at a time by a cursor in the connection's transaction."""
        with mapped_driver_errors():
            cursor = await connection.cursor(self.sql, *args)
            while rows := await cursor.fetch(100):
                for record in self._decode(rows, args):
                    yield record

    async def _rows(
        self, db: Database, args: tuple[object, ...], timeout: float | None = None, idempotent: bool = False
    ) -> list[Any]:
        retries: int | None = getattr(db, "retries", None)  # only chatdb's pool has the word
        delays: Iterator[float] | None = None
        maybe_sent = False
        while True:
            try:
                if retries is not None:
                    return await db.fetch(self.sql, *args, timeout=timeout)
                return await fetch_rows(db, self.sql, args, timeout)
            except Exception as error:
                ours = as_chatdb_error(error)
                if ours is None:
                    raise
                if isinstance(ours, CommandTimeoutError) and retries is None and hasattr(db, "acquire"):
                    ours.sent = None  # another pool's time limit may have ended the connecting
                if isinstance(ours, UnavailableError):
                    if maybe_sent and ours.sent is False:
                        ours.sent = None  # not this time, but before
                    maybe_sent = ours.sent is not False
                policy = RetryPolicy(retries or 0)
                delays = delays or policy.backoff_delays()
                may_retry = policy.may_retry(ours, idempotent=idempotent or self.idempotent)
                delay = next(delays, None) if may_retry else None
                if delay is None:
                    raise ours from ours.__cause__
                _log.warning("%s is sent again in %.0f ms: %s", self.name, 1000 * delay, _class_names(ours))
            await asyncio.sleep(delay)


def _not_found() -> ConversationNotFoundError:
    return ConversationNotFoundError("the user has no such conversation: check user_id and the id or key")


def _class_names(error: ChatDBError) -> str:
    """Return the class of an error, and of the driver's below it; their messages may quote."""
    cause = error.__cause__
    return type(error).__name__ + (f" ({type(cause).__name__})" if cause else "")
