"""Finds, reads and runs the files under `sql/`, one statement each, and returns their rows as records."""

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
"""The statement's first word, with any comments before it."""

_log = logging.getLogger("chatdb")


class Database(Protocol):
    """The first argument of every function: chatdb's pool, an asyncpg pool or an asyncpg connection."""

    async def fetch(self, query: str, /, *args: Any, timeout: float | None = None) -> list[Any]:  # noqa: ANN401
        """Run a statement and return its rows."""
        ...


def data_folder(name: str) -> Path:
    """Return the `sql` or `migrations` folder, inside the installed package or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def statement_files() -> list[Path]:
    """Return the SQL files that a service's role runs: functions, import and export."""
    folder = data_folder("sql")
    return sorted([*folder.glob("*.sql"), *folder.glob("transfer/*.sql")], key=lambda path: path.name)


class Query(Generic[RecordT]):
    """
    The statement of one SQL file and the record type of its rows.

    An *existence row*, whose columns are all null, means that the conversation exists but the message does not, or that
    no messages are left. No row means that the user has no such conversation.

    Decisions: docs/decisions/0008-existence-row.md, 0009-one-statement-per-operation.md
    """

    def __init__(
        self, name: str, record: type[RecordT], *, fields_from_args: tuple[str, ...] = (), idempotent: bool = False
    ) -> None:
        """
        Read `sql/<name>.sql`; the name may include a folder, as in `transfer/count_user`.

        `fields_from_args` are the fields whose values are the first arguments, so the rows omit them. `idempotent`
        allows a retry after a lost connection because repeating the statement changes nothing more.
        """
        self.name = name.rpartition("/")[2]
        self.record = record
        self.fields_from_args = fields_from_args
        self.idempotent = idempotent
        _, _, body = (data_folder("sql") / f"{name}.sql").read_text(encoding="utf-8").partition("\n\n")
        # OpenTelemetry names a span by the first word and cuts off a leading /* comment */, hence "--" without a space.
        # pg_stat_statements drops everything before the statement's first word, hence the second comment.
        self.sql = f"--chatdb.{self.name}\n" + _FIRST_WORD.sub(rf"\g<0> /* chatdb.{self.name} */", body.strip())
        STATEMENTS.add(self.sql)
        self._decode = decoder(record, fields_from_args)

    async def fetch_all(self, db: Database, *args: object) -> list[RecordT]:
        """Return one record per row."""
        return self._decode(await self._rows(db, args), args)

    async def fetch_one(self, db: Database, *args: object, timeout: float | None = None) -> RecordT:
        """Return the record; raise ConversationNotFoundError if there is no row."""
        rows = await self._rows(db, args, timeout)
        if not rows:
            raise _not_found()
        return self._decode(rows, args)[0]

    async def fetch_optional(self, db: Database, *args: object) -> RecordT | None:
        """Return the record, or None for an existence row; raise ConversationNotFoundError if there is no row."""
        page = await self.fetch_page(db, *args)
        return page[0] if page else None

    async def fetch_page(self, db: Database, *args: object, idempotent: bool = False) -> list[RecordT]:
        """
        Return one record per row, without the existence row; raise ConversationNotFoundError if there is no row.

        `idempotent` marks this call as safe to repeat, whatever the statement's default.
        """
        rows = await self._rows(db, args, None, idempotent)
        if not rows:
            raise _not_found()
        if rows[-1]["id"] is None:
            rows.pop()
        return self._decode(rows, args)

    async def iterate(self, connection: Connection, *args: object) -> AsyncGenerator[RecordT, None]:
        """Iterate over the records with a cursor in the connection's transaction, 100 rows per fetch."""
        with mapped_driver_errors():
            cursor = await connection.cursor(self.sql, *args)
            while rows := await cursor.fetch(100):
                for record in self._decode(rows, args):
                    yield record

    async def _rows(
        self, db: Database, args: tuple[object, ...], timeout: float | None = None, idempotent: bool = False
    ) -> list[Any]:
        retries: int | None = getattr(db, "retries", None)  # only chatdb's pool has this attribute
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
                    ours.sent = None  # another pool may have timed out while connecting
                if isinstance(ours, UnavailableError):
                    if maybe_sent and ours.sent is False:
                        ours.sent = None  # an earlier attempt may have been sent
                    maybe_sent = ours.sent is not False
                policy = RetryPolicy(retries or 0)
                delays = delays or policy.backoff_delays()
                may_retry = policy.may_retry(ours, idempotent=idempotent or self.idempotent)
                delay = next(delays, None) if may_retry else None
                if delay is None:
                    raise ours from ours.__cause__
                _log.warning("retrying %s in %.0f ms: %s", self.name, 1000 * delay, _class_names(ours))
            await asyncio.sleep(delay)


def _not_found() -> ConversationNotFoundError:
    return ConversationNotFoundError("the user has no such conversation: check user_id and the conversation id or key")


def _class_names(error: ChatDBError) -> str:
    """Return the class names of an error and its cause, whose messages may quote values."""
    cause = error.__cause__
    return type(error).__name__ + (f" ({type(cause).__name__})" if cause else "")
