"""Finds, reads and runs the files under `sql/`, one statement each, and returns their rows as records."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import asyncpg
from pydantic import BaseModel

from chatdb._core.asyncpg_private import FUNCTIONS, STATEMENTS, PoolBase, fetch_rows, listeners_of
from chatdb._core.calls import running_call
from chatdb._core.decode import conversations_of, decoder, messages_of
from chatdb._core.driver_errors import ROW_SUPPRESSED, as_chatdb_error
from chatdb._core.hints import add_hint
from chatdb._core.retry import RetryPolicy
from chatdb._core.validate import NO_WORD
from chatdb.errors import (
    ChatDBError,
    CommandTimeoutError,
    ConfigurationError,
    ConflictError,
    ConversationNotFoundError,
    InvalidInputError,
    MessageNotFoundError,
    StaleError,
    UnavailableError,
)
from chatdb.records import Conversation, Message

if TYPE_CHECKING:
    from chatdb._core.validate import MessageRow

RecordT = TypeVar("RecordT", bound=BaseModel)


_FIRST_WORD: Final = re.compile(r"\A(?:--.*\n)*(?:\w+|\()")
"""The statement's first word, with any comments before it."""

_FUNCTION: Final = re.compile(r"\bfrom chatdb\.(\w+)\(")
"""The function that a statement in `sql/distributed/` calls."""

_NO_FUNCTIONS: Final[set[str]] = set()

_UNPLANNED: Final = (asyncpg.FeatureNotSupportedError, asyncpg.PostgresSyntaxError)
"""What Citus raises for a statement that it cannot plan."""

_SEQ: Final = itemgetter("seq")

_NO_MESSAGE: Final = "the conversation has no such message: check seq or key"

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


def operation_of(statement: str) -> str:
    """Return the function of a statement: the shortest beginning of its name that is a file in `sql/`."""
    words = statement.split("_")
    names = ("_".join(words[:count]) for count in range(1, len(words)))
    return next((name for name in names if (data_folder("sql") / f"{name}.sql").is_file()), statement)


class RunAgainError(UnavailableError):
    """Another write to the conversation committed while the statement waited for the lock. It wrote nothing."""


class Query(Generic[RecordT]):
    """
    The statement of one SQL file and the record type of its rows.

    An *existence row*, whose first column is null, means that the conversation exists but the message does not, or that
    no messages are left. No row means that the user has no such conversation. A *refusal* is a row whose last column,
    `refusal`, says why the statement wrote nothing.

    Decisions: docs/decisions/0008-existence-row.md, 0009-one-statement-per-operation.md
    """

    def __init__(
        self,
        name: str,
        record: type[RecordT],
        *,
        from_arguments: tuple[str, ...] = (),
        from_messages: tuple[str, ...] = (),
        has_refusal: bool = False,
        idempotent: bool = False,
        hint: str | None = None,
    ) -> None:
        """
        Read `sql/<name>.sql`; the name may include a folder, as in `transfer/count_user`.

        The rows omit fields that the caller has: `from_arguments` are the first arguments, `from_messages` fields of
        the messages sent. `has_refusal` tells that the statement can refuse. `idempotent` allows a retry after a lost
        connection because repeating the statement changes nothing more. `hint` names the column with the conversation
        that watchers should look at.
        """
        self.name = name.rpartition("/")[2]
        self.record = record
        self.from_arguments = from_arguments
        self.from_messages = from_messages
        self.has_refusal = has_refusal
        self.idempotent = idempotent
        self.hint = hint
        self.sql = self._read(data_folder("sql") / f"{name}.sql")
        # replaces a statement that Citus would split, where the database has the functions for it
        distributed = data_folder("sql") / "distributed" / f"{name}.sql"
        self.distributed_sql = self._read(distributed) if distributed.exists() else None
        called = _FUNCTION.search(self.distributed_sql or "")
        self.function = called[1] if called else None
        if self.function is not None:
            FUNCTIONS.add(self.function)
        self._decode = decoder(
            record, from_arguments=from_arguments, from_messages=from_messages, has_refusal=has_refusal
        )

    @cached_property
    def operation(self) -> str:
        """The function that the statement belongs to."""
        return operation_of(self.name)

    def _read(self, file: Path) -> str:
        _, _, body = file.read_text(encoding="utf-8").partition("\n\n")
        # OpenTelemetry names a span after the first word, without a leading /* comment */, hence no space after "--".
        # pg_stat_statements drops everything before the statement's first word, hence the second comment.
        sql = f"--chatdb.{self.name}\n" + _FIRST_WORD.sub(rf"\g<0> /* chatdb.{self.name} */", body.strip())
        STATEMENTS.add(sql)
        return sql

    async def fetch_all(self, db: Database, *args: object, idempotent: bool = False) -> list[RecordT]:
        """Return one record per row; `idempotent` marks this call as safe to repeat."""
        return self._decode(await self._rows(db, args, None, idempotent), args, ())

    async def fetch_one(
        self,
        db: Database,
        *args: object,
        messages: Sequence[object] = (),
        timeout: float | None = None,
        idempotent: bool = False,
    ) -> RecordT:
        """Return the record; raise ConversationNotFoundError if there is no row."""
        return self._decode(_found(await self._rows(db, args, timeout, idempotent)), args, messages)[0]

    async def fetch_optional(self, db: Database, *args: object) -> RecordT | None:
        """Return the record, or None for an existence row; raise ConversationNotFoundError if there is no row."""
        page = await self.fetch_page(db, *args)
        return page[0] if page else None

    async def fetch_message(self, db: Database, *args: object) -> RecordT:
        """Return the record; raise MessageNotFoundError for an existence row."""
        record = await self.fetch_optional(db, *args)
        if record is None:
            raise MessageNotFoundError(_NO_MESSAGE)
        return record

    async def fetch_page(self, db: Database, *args: object) -> list[RecordT]:
        """Return one record per row, without the existence row; raise ConversationNotFoundError if there is no row."""
        return self._decode(_without_existence_row(_found(await self._rows(db, args))), args, ())

    async def _rows(
        self, db: Database, args: tuple[object, ...], timeout: float | None = None, idempotent: bool = False
    ) -> list[Any]:
        retries: int | None = getattr(db, "retries", None)  # only chatdb's pool has this attribute
        listeners = listeners_of(db)
        running = None if listeners is None else running_call()
        if listeners is not None and running is None:
            return await listeners.tell(self.operation, self.name, self._rows(db, args, timeout, idempotent))
        sql, functions = self.sql, _NO_FUNCTIONS
        if self.distributed_sql is not None:
            functions = getattr(db, "functions", functions)  # the pool's connections have it too
            if functions and (self.function is None or self.function in functions):
                sql = self.distributed_sql
        delays: Iterator[float] | None = None
        maybe_sent = False
        while True:
            if running is not None:
                running.attempts += 1
            try:
                if retries is not None:
                    rows: list[Any] = await db.fetch(sql, *args, timeout=timeout)
                else:
                    rows = await fetch_rows(db, sql, args, timeout)
            except Exception as error:
                if sql is not self.sql and isinstance(error, asyncpg.UndefinedFunctionError):
                    # rolled back with its migration
                    functions.discard(str(self.function))
                    sql = self.sql
                    if retries is not None:
                        continue
                elif self.distributed_sql is not None and isinstance(error, _UNPLANNED) and isinstance(db, PoolBase):
                    # Citus planned nothing, so nothing was written: distributed since the pool was opened
                    functions = await db.look_for_functions()
                    if sql is self.sql and self.function in functions:
                        sql = self.distributed_sql
                        continue
                ours = as_chatdb_error(error)
                if ours is None and self.distributed_sql is not None and sql is self.sql:
                    ours = _unplanned(error)
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
            else:
                if self.has_refusal and rows and rows[-1]["refusal"] is not None:
                    raise _refusal(rows[-1], self.name)
                if self.hint is not None and rows:
                    add_hint(db, rows[0][self.hint])
                if running is not None:
                    running.rows = len(rows) - (rows[-1][0] is None) if rows else 0
                return rows
            await asyncio.sleep(delay)


class AppendQuery(Query[Message]):
    """A statement that appends messages and returns the columns that the caller does not have."""

    async def fetch_appended(
        self, db: Database, *args: object, messages: Sequence[MessageRow], idempotent: bool = False
    ) -> list[Message]:
        """Return one record per stored message, in the order of `messages`; skipped messages have none."""
        rows = _without_existence_row(_found(await self._rows(db, args, None, idempotent)))
        rows.sort(key=_SEQ)
        if "key" in self.from_messages:
            return self._decode(rows, args, messages)
        # earlier messages can be stored in another order; messages without a key are always new
        by_key = {row["key"]: row for row in rows}
        unkeyed = (row for row in rows if row["key"] is None)
        found = ((next(unkeyed, None) if each[-1] is None else by_key.get(each[-1]), each) for each in messages)
        pairs = [(row, each) for row, each in found if row is not None]
        return self._decode(type(rows)(row for row, _ in pairs), args, [each for _, each in pairs])


class HistoryQuery(Query[Message]):
    """
    A statement that returns a page of messages of one conversation.

    In its existence row, `seq` is the id of the conversation. If the page begins at a message that must be stored,
    `key` is null unless it is.
    """

    def __init__(self, name: str, *, first: str | None = None) -> None:
        """Read `sql/<name>.sql`; `first` names the parameter of the message at which a page begins."""
        # a page of 100 takes an eighth less time under load without the user and the conversation in each row
        super().__init__(name, Message, from_arguments=("user_id", "conversation_id"), idempotent=True)
        self._first = first

    async def fetch_history(
        self, db: Database, user_id: str, conversation_id: int | None, key: str | None, *page: int | str | None
    ) -> list[Message]:
        """Return the messages of a page, in the order of the rows."""
        rows = _found(await self._rows(db, (user_id, conversation_id, key, *page)))
        last = rows[-1]
        if last["id"] is None:
            rows.pop()
            if conversation_id is None:
                conversation_id = last["seq"]
            if not rows and self._first is not None and last["key"] is None:
                raise MessageNotFoundError(f"the conversation has no message with this {self._first}")
        return self._decode(rows, (user_id, conversation_id), ())


class JoinedQuery(Query[Conversation]):
    """A statement whose rows have the columns of a conversation, followed by those of a message."""

    async def fetch_with_messages(
        self, db: Database, user_id: str, *args: object
    ) -> tuple[Conversation, list[Message]]:
        """Return the conversation of the first row and the messages of the others."""
        rows = _found(await self._rows(db, (user_id, *args)))
        [conversation] = conversations_of(type(rows)(rows[:1]))
        return conversation, messages_of(type(rows)(rows[1:]), user_id, conversation.id)

    async def fetch_pairs(self, db: Database, user_id: str, *args: object) -> list[tuple[Conversation, Message | None]]:
        """Return the conversation and the message or None of each row, without the existence row."""
        rows = _without_existence_row(_found(await self._rows(db, (user_id, *args))))
        messages = iter(messages_of(type(rows)(row for row in rows if row["message_id"] is not None), user_id))
        pairs = zip(conversations_of(rows), rows, strict=True)
        return [(each, None if row["message_id"] is None else next(messages)) for each, row in pairs]


def _unplanned(error: Exception) -> ChatDBError | None:
    """Return the error for a statement that Citus cannot plan, on a handle that does not know chatdb's functions."""
    if not isinstance(error, _UNPLANNED):
        return None
    ours = ConfigurationError(
        f"the server cannot plan this statement (SQLSTATE {error.sqlstate}), probably because Citus distributes "
        "chatdb's tables: use a pool of chatdb.create_pool, and run chatdb distribute again if it did not finish"
    )
    ours.__cause__ = error
    return ours


def _refusal(row: Any, name: str) -> ChatDBError:  # noqa: ANN401 - asyncpg's record
    match row["refusal"]:
        case "stale":
            return StaleError(
                "another caller has written to the conversation since expected was read, so nothing was written: read "
                "it again, and repeat the call if it still applies"
            )
        case "conflict" if name == "fork_conversation":
            return ConflictError("the user already has a conversation with new_key: use another one")
        case "conflict" if name == "start_message":
            return ConflictError("a message with this key but another role already exists: use a new key")
        case "conflict" if name == "append_message_conditional":
            return ConflictError(
                "a message with this key but a different body already exists: use a new key for a new message"
            )
        case "conflict":
            return ConflictError(
                "only some keys of the batch are stored, or a stored message has a different body, so nothing was "
                "written: use new keys for new messages"
            )
        case "missing" if name.startswith(("append", "start")):
            return MessageNotFoundError("the conversation has no message with this parent_seq")
        case "missing":
            return MessageNotFoundError(_NO_MESSAGE)
        case "finished":
            return ConflictError("the message is not streaming: it is finished or aborted, or was never started")
        case "offset":
            return ConflictError(
                f"offset must be {row['length']:,}, the length of the text so far, or the start of the last part"
            )
        case "length":
            return InvalidInputError("text", "would make the message longer than 4 MiB in UTF-8: nothing was stored")
        case "streaming":
            return ConflictError("the message is streaming: finish_message sets its text")
        case "index":
            return ConfigurationError("mode words needs the search index: run chatdb search-index create")
        case "words":
            return InvalidInputError("query", NO_WORD)
        case "protected":
            return ConfigurationError(
                "row-level security (chatdb protect) keeps a role to the rows of one user: move_user needs a superuser "
                "or a role with BYPASSRLS"
            )
        case "again" if name == "move_user":
            return RunAgainError("the user's conversations are written all the time: try again", sent=True)
        case "again":
            return RunAgainError("other callers keep writing to this conversation: try again", sent=True)
        case _:
            return ConfigurationError(ROW_SUPPRESSED.format("messages"))


def _found(rows: list[Any]) -> list[Any]:
    if not rows:
        raise ConversationNotFoundError(
            "the user has no such conversation: check user_id and the conversation id or key"
        )
    return rows


def _without_existence_row(rows: list[Any]) -> list[Any]:
    if rows[-1][0] is None:
        rows.pop()
    return rows


def _class_names(error: ChatDBError) -> str:
    """Return the class names of an error and its cause, whose messages may quote values."""
    cause = error.__cause__
    return type(error).__name__ + (f" ({type(cause).__name__})" if cause else "")
