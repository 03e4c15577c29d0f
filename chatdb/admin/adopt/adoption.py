"""
Adopts the conversations and messages of an older system that lie in `public`, into chatdb's own tables.

The originals are read and never changed. What has been adopted, and what does not fit and is kept aside, stands in the
schema `chatdb_adopt`, so that the older system can go on writing, and a run that was killed is taken up by the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar

from chatdb._core.query import data_folder
from chatdb.admin.connection import advisory_lock, fetch_value
from chatdb.errors import ChatDBError, ConfigurationError, SchemaError

try:
    import psycopg
    import psycopg.sql
except ImportError:
    raise ConfigurationError("the drivers for migrations are not installed: pip install 'chatdb[migrate]'") from None

WAIT = 60.0
"""How long by default, in seconds, another operator's command may be at it, and rows may be locked."""

BATCH = 20_000
"""About how many messages are adopted in one transaction."""

_T = TypeVar("_T")

Progress = Callable[[int, int], None]
"""What is called with the numbers of rows that are done and that were found."""

_IDS = ("integer", "bigint")
_TEXTS = ("character varying", "text")
_TIMES = ("timestamp without time zone", "timestamp with time zone")
_EXPECTED = {
    "conversations": {
        "id": _IDS,
        "user_id": (*_TEXTS, "uuid", *_IDS),
        "created_at": _TIMES,
        "updated_at": _TIMES,
    },
    "messages": {
        "id": _IDS,
        "conversation_id": _IDS,
        "user_id": (*_TEXTS, "uuid", *_IDS),
        "role": _TEXTS,
        "content": _TEXTS,
        "created_at": _TIMES,
    },
}

# what a run of its own needs, whatever the role's or the server's settings are
_SETTINGS = (
    "set timezone to 'UTC'",
    "set row_security to off",  # rows that a policy hides are an error
    "set statement_timeout to 0",
    "set idle_in_transaction_session_timeout to 0",
    "set idle_session_timeout to 0",
    "set jit to off",
    "set work_mem to '64MB'",
    "set temp_buffers to '64MB'",  # in which a batch fits
)

_TRIES = 5
_LOCK_TABLE = "lock table chatdb.conversations in share row exclusive mode"
_AGAIN = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,  # a conversation of the same user and id was created at this moment
)


class Counts(NamedTuple):
    """How many conversations and messages."""

    conversations: int
    messages: int

    def plus(self, more: Counts) -> Counts:
        """Return the sum."""
        return Counts(self.conversations + more.conversations, self.messages + more.messages)

    def __str__(self) -> str:
        return f"{self.conversations:,} conversations, {self.messages:,} messages"


_NONE = Counts(0, 0)


@dataclass
class AdoptReport:
    """
    What became of the originals, in numbers of conversations and messages.

    In a dry run `adopted` and `aside` are what would be adopted and kept aside.
    """

    dry_run: bool = False
    missing: list[str] = field(default_factory=list[str])
    """The originals' table that is not there."""
    originals: Counts = _NONE
    """What the older system has, after the run."""
    adopted: Counts = _NONE
    """What this run has adopted."""
    adopted_before: Counts = _NONE
    aside: dict[str, Counts] = field(default_factory=dict[str, Counts])
    """What is kept aside, by the reason; also from runs before."""
    late: int = 0
    """Messages that stand behind others, before which they belong by their time."""
    renumbered: int = 0
    """Messages that have another seq than before, because others came between them."""
    gone: Counts = _NONE
    """What was adopted and is not among the originals any more."""
    deleted: Counts = _NONE
    """What of it was deleted from chatdb, because that was asked for."""
    deleted_in_chatdb: Counts = _NONE
    """What was adopted and is not in chatdb any more."""
    changed_users: int = 0
    """Conversations that have another user than when they were adopted."""
    extra_columns: dict[str, int] = field(default_factory=dict[str, int])
    """Columns that are not brought over, with how many rows have a value there."""
    remaining: Counts = _NONE
    """What was written since: the next run adopts it."""
    writers: int = 0
    """Transactions that have written to the originals and not ended: what they wrote could not be seen."""
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether every original is adopted or kept aside, and nobody is about to add one."""
        return not self.dry_run and not any(self.remaining) and not self.writers

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers and reasons as JSON has them."""
        found = {name: value._asdict() if isinstance(value, Counts) else value for name, value in vars(self).items()}
        reasons = [{"reason": reason, **counts._asdict()} for reason, counts in self.aside.items()]
        return found | {"aside": reasons, "seconds": round(self.seconds, 3), "complete": self.is_complete}

    def described(self) -> str:
        """Return the numbers and reasons in lines for a person."""
        adopts, keeps = ("would adopt", "would keep aside") if self.dry_run else ("adopted", "kept aside")
        speed = f" ({self.adopted.messages / self.seconds:,.0f} messages/s)" if self.adopted.messages else ""
        lines = [f"{table} is not there" for table in self.missing]
        lines.append(f"{adopts} {self.adopted}" + ("" if self.dry_run else f" in {self.seconds:.1f} s{speed}"))
        if any(self.adopted_before):
            lines.append(f"adopted before: {self.adopted_before}")
        lines += [f"{keeps} {counts}: {reason}" for reason, counts in self.aside.items()]
        if self.renumbered:
            lines.append(f"renumbered {self.renumbered:,} messages, because others came between them")
        if self.late:
            lines.append(f"late: {self.late:,} messages stand behind others, before which they belong by their time")
        if any(self.gone):
            lines.append(f"gone from the originals since they were adopted: {self.gone}")
        if any(self.deleted):
            lines.append(f"deleted of these: {self.deleted}")
        if any(self.deleted_in_chatdb):
            lines.append(f"deleted in chatdb since they were adopted: {self.deleted_in_chatdb}")
        if self.changed_users:
            lines.append(f"adopted under another user than they have now: {self.changed_users:,} conversations")
        lines += [
            f"not brought over: the column {name}, which has a value in {rows:,} rows"
            for name, rows in self.extra_columns.items()
        ]
        if any(self.remaining):
            lines.append(f"written since: {self.remaining}; run this again")
        if self.writers:
            lines.append(f"{self.writers:,} transactions that write to the originals have not ended; run this again")
        if self.is_complete:
            lines.append(f"nothing is left: the originals' {self.originals} are all adopted or kept aside")
        return "\n".join(lines)


def adopt(
    dsn: str,
    *,
    dry_run: bool = False,
    delete_gone: Callable[[Counts], bool] | None = None,
    wait: float = WAIT,
    progress: Progress | None = None,
    batch: int = BATCH,
) -> AdoptReport:
    """
    Adopt what chatdb does not have yet of `public.conversations` and `public.messages`, and report what became of it.

    Blocks. Each batch is a transaction, so a killed run is taken up by the next; a `dry_run` is one that is taken back.
    What was adopted and is gone from the originals is deleted from chatdb where `delete_gone`, called with how many
    there are, says so, and if the conversation has no message that was not adopted.

    Raises SchemaError if chatdb's tables or those to be adopted are missing or others than expected, and
    UnavailableError when another process or transaction was not done after `wait` seconds.
    """
    start = time.monotonic()
    with advisory_lock(dsn, wait=wait) as connection:
        for setting in _SETTINGS:
            connection.execute(setting.encode())
        connection.execute(f"set lock_timeout to {round(wait * 1000) or 1}".encode())
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.prepare_threshold = None  # a plan is made for what a batch has
        run = _Run(connection, AdoptReport(dry_run=dry_run))
        run.look()
        if dry_run:
            run.try_out(batch, progress)
        else:
            run.adopt(batch, progress)
            run.verify()
            if delete_gone is not None and any(run.report.gone):
                run.delete_gone(delete_gone)
        run.report.seconds = time.monotonic() - start
        return run.report


class _Done(NamedTuple):
    """What became of a batch."""

    adopted: Counts
    late: int
    renumbered: int
    rows: int


class _Run:
    """One run, on a connection that holds the operators' lock."""

    def __init__(self, connection: psycopg.Connection, report: AdoptReport) -> None:
        self.report = report
        self._connection = connection

    def look(self) -> None:
        """Compare the tables with what is expected, and make the views and tables that the run works with."""
        for table in ("chatdb.conversations", "chatdb.messages"):
            if not self._one("select pg_catalog.to_regclass(%s) is not null", table):
                raise SchemaError(f"the database lacks the table {table}: run chatdb migrate first")
        differences: list[str] = []
        extra: dict[str, list[str]] = {}
        for name, expected in _EXPECTED.items():
            table = f"public.{name}"
            kind = self._one("select relkind from pg_catalog.pg_class where oid = pg_catalog.to_regclass(%s)", table)
            if kind is None:
                self.report.missing.append(table)
                continue
            if kind not in ("r", "p"):
                differences.append(f"{table} is no table")
            types: dict[str, str] = {}
            has_key = False
            for column, of_type, is_key in self._run("find_columns", table):
                types[column] = of_type
                has_key |= is_key and column == "id"
            for column, taken in expected.items():
                if column not in types:
                    differences.append(f"{table} has no column {column}")
                elif types[column] not in taken:
                    differences.append(f"{table}.{column} is {types[column]}, not {' or '.join(taken)}")
            extra[table] = [column for column in types if column not in expected]
            if not differences and not has_key:
                differences += self._doubtful_ids(table)
        if len(self.report.missing) == len(_EXPECTED):
            raise SchemaError(f"there is nothing to adopt: looked for the tables {' and '.join(self.report.missing)}")
        if differences:
            raise SchemaError(f"these are not the tables that chatdb can adopt: {'; '.join(differences)}")
        for name in _EXPECTED:
            self._run(f"view_no_{name}" if f"public.{name}" in self.report.missing else f"view_{name}")
        self._run("create_work")
        for table, columns in extra.items():
            self._count_values(table, columns)

    def try_out(self, batch: int, progress: Progress | None) -> None:
        """Find out what would be adopted, in a transaction that is taken back."""

        def try_batch() -> _Done:
            done = self._classify()
            for reason, counts in self._reasons("count_batch_aside").items():
                self.report.aside[reason] = self.report.aside.get(reason, _NONE).plus(counts)
            for table in ("batch_conversations", "batch_messages", "batch_places", "batch_moves"):
                self._connection.execute(f"truncate pg_temp.{table}".encode())
            return done

        with self._connection.transaction(force_rollback=True):
            self._work_off(batch, progress, try_batch)
            if self._find_orphans():
                self.report.aside |= self._reasons("count_batch_aside")
            self.report.aside = dict(sorted(self.report.aside.items()))
            self._verify()
            self.report.remaining = _NONE

    def adopt(self, batch: int, progress: Progress | None) -> None:
        """Adopt what is new, batch by batch."""
        with self._connection.transaction():
            self._run("create_state")
        self._run("move_identities")
        self._work_off(batch, progress, lambda: self._insistently(self._adopt_batch))
        self._insistently(lambda: self._find_orphans() and self._run("keep_messages"))
        self._run("move_identities")
        if self.report.adopted.messages > BATCH:  # so that the first queries have plans that fit
            self._connection.execute("analyze chatdb.conversations, chatdb.messages")

    def verify(self) -> None:
        """Count what there is now, in one snapshot."""
        self.report.writers = int(str(self._row("count_writers")[0]))
        with self._connection.transaction():
            self.report.aside = self._reasons("count_aside")
            self._verify()

    def delete_gone(self, agrees: Callable[[Counts], bool]) -> None:
        """Delete from chatdb what is gone from the originals, where nobody appended to the conversation since."""
        gone = [
            0 if f"public.{name}" in self.report.missing else self._run(f"find_gone_{name}").rowcount
            for name in _EXPECTED
        ]
        self.report.gone = Counts(*gone)
        if agrees(self.report.gone):
            self.report.deleted = self._insistently(self._delete_gone)

    def _work_off(self, batch: int, progress: Progress | None, work: Callable[[], _Done]) -> None:
        """Find what is new, and work it off."""
        report = self.report
        if report.dry_run:
            self._run("create_state")
        report.adopted_before = Counts(*self._row("count_adopted"))
        if report.adopted_before.messages and not self._one("select exists (select from chatdb.messages)"):
            raise SchemaError(
                f"chatdb's tables are empty, though {report.adopted_before} were adopted: they were made anew since. "
                "To adopt all again: chatdb rollback --to 0001, chatdb migrate, drop schema chatdb_adopt cascade"
            )
        self._run("find_todo", batch)
        self._analyze("todo")
        statement = "select coalesce(pg_catalog.sum(messages), 0)::int8 from pg_temp.todo where batch is not null"
        total = int(str(self._one(statement)))
        rows = 0
        while self._one("select exists (select from pg_temp.todo where batch is not null)"):
            done = work()
            report.adopted = report.adopted.plus(done.adopted)
            report.late += done.late
            report.renumbered += done.renumbered
            rows += done.rows
            if progress is not None:
                progress(rows, max(rows, total))

    def _classify(self) -> _Done:
        """Take the next batch, and find out what fits and which seq it gets."""
        self._run("take_batch")
        self._analyze("batch_conversations")
        if not self.report.dry_run:
            self._run("lock_conversations")
        self._run("take_messages")
        self._analyze("batch_messages (id, conversation_id, reason)")  # the texts would take long
        conversations, messages, without_time, rows = self._row("count_batch")
        if without_time:
            self._run("time_messages")
        renumbered = 0
        if self._run("mark_renumbered").rowcount:
            self._run("find_moves")
            self._analyze("batch_moves")
            self._run("place_moved")
            renumbered = int(str(self._one("select pg_catalog.count(*) from pg_temp.batch_moves where old_seq <> seq")))
        self._run("place_messages")
        self._analyze("batch_places")
        late = int(str(self._one("select pg_catalog.count(*) from pg_temp.batch_places where is_late")))
        return _Done(Counts(conversations, messages), late, renumbered, rows)

    def _adopt_batch(self) -> _Done:
        done = self._classify()
        if done.renumbered:
            for step in ("move_away", "move_back", "record_moves"):
                self._run(step)
        for step in ("add_conversations", "extend_conversations", "add_messages"):
            self._run(step)
        for step in ("record_conversations", "record_messages"):
            self._run(step)
        for step in ("keep_conversations", "keep_messages", "release_conversations", "release_messages"):
            self._run(step)
        return done

    def _find_orphans(self) -> bool:
        """Take the messages whose conversation is missing; return whether there are any."""
        if not self._one("select exists (select from pg_temp.todo where batch is null)"):
            return False
        self._run("take_orphans")
        return True

    def _delete_gone(self) -> Counts:
        self._run("lock_gone")
        for step in ("spare_gone_messages", "spare_gone_conversations"):
            self._run(step)
        for step in ("delete_gone_conversations", "delete_gone_messages"):
            self._run(step)
        messages = self._run("forget_gone_messages").rowcount
        return Counts(self._run("forget_gone_conversations").rowcount, messages)

    def _verify(self) -> None:
        """Compare the originals with the state, and the state with chatdb."""
        report = self.report
        conversations = self._compared("conversations")
        messages = self._compared("messages")
        report.originals = Counts(conversations[0], messages[0])
        report.remaining = Counts(conversations[1], messages[1])
        report.changed_users = conversations[3]
        report.deleted_in_chatdb = Counts(*self._row("verify_chatdb"))
        adopted = self._row("count_adopted")
        report.gone = Counts(
            *(
                0 if f"public.{name}" in report.missing else int(total) - matched
                for name, total, matched in zip(_EXPECTED, adopted, (conversations[2], messages[2]), strict=True)
            )
        )

    def _compared(self, name: str) -> tuple[int, int, int, int]:
        originals, adopted, aside, remaining, *changed = self._row(f"verify_{name}")
        if adopted + aside + remaining != originals:
            raise ChatDBError(
                f"of public.{name} {adopted + aside + remaining - originals:,} rows are both adopted and kept aside: "
                "has something else written to the schema chatdb_adopt?"
            )
        return originals, remaining, adopted, sum(changed)

    def _doubtful_ids(self, table: str) -> list[str]:
        statement = f"select pg_catalog.count(*) - pg_catalog.count(distinct id) from {table}"  # noqa: S608 - of _EXPECTED
        found = int(str(self._one(statement)))
        return [f"{table} has no primary key, and {found:,} rows whose id is null or another row's"] if found else []

    def _count_values(self, table: str, columns: list[str]) -> None:
        if not columns:
            return
        identifiers = psycopg.sql.SQL(", ").join(
            psycopg.sql.SQL("pg_catalog.count({})").format(psycopg.sql.Identifier(column)) for column in columns
        )
        source = psycopg.sql.Identifier(*table.split("."))
        counts = self._connection.execute(psycopg.sql.SQL("select {} from {}").format(identifiers, source)).fetchone()
        names = (f"{table}.{column}" for column in columns)
        self.report.extra_columns |= dict(zip(names, counts or (), strict=True))

    def _reasons(self, name: str) -> dict[str, Counts]:
        return {reason: Counts(*counts) for reason, *counts in self._run(name)}

    def _insistently(self, work: Callable[[], _T]) -> _T:
        """Do something in a transaction, again if others wrote to its conversations, at last by keeping them out."""
        tries = 0
        while True:
            try:
                with self._connection.transaction():
                    if tries == _TRIES:
                        self._connection.execute(_LOCK_TABLE)
                    return work()
            except _AGAIN:
                if tries == _TRIES:
                    raise
                tries += 1
                time.sleep(0.05 * tries)

    def _run(self, name: str, *arguments: object) -> psycopg.Cursor[Any]:
        """Run the statement of the file `sql/adopt/<name>.sql`."""
        cursor = psycopg.RawCursor[Any](self._connection)
        return cursor.execute(_statement(name), arguments or None)

    def _row(self, name: str) -> tuple[Any, ...]:
        (row,) = self._run(name)
        return tuple(row)

    def _one(self, statement: str, *arguments: object) -> object:
        return fetch_value(self._connection, statement, *arguments)

    def _analyze(self, table: str) -> None:
        self._connection.execute(f"analyze pg_temp.{table}".encode())


@cache
def _statement(name: str) -> bytes:
    return (data_folder("sql") / "adopt" / f"{name}.sql").read_bytes()
