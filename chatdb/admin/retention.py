"""
Deletes the conversations of all users that were last active long ago, for `chatdb prune`.

It deletes them in batches, each in a transaction of its own, so that a killed run can be repeated. It waits for no
writer, and pauses between the batches to leave the server to others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from chatdb.admin.all_users import check_server, statement
from chatdb.admin.connection import (
    connected,
    dict_row,
    errors,
    prepare_session,
    psycopg,
    refuse_distributed,
)
from chatdb.errors import SchemaError

BATCH_SIZE: Final = 1_000
"""
Messages in a transaction. A conversation with more has a transaction of its own, and is deleted whole. Batches of 200
took twice the time; batches of 5,000 saved nothing.
"""
PAGE_SIZE: Final = 10_000
"""
Conversations that a statement lists. Those of a user and a day are sorted by id, so a page that ends within a day reads
that day again.
"""


class OldConversations(NamedTuple):
    """The conversations that were last active before `inactive_since`. `messages` counts deleted messages too."""

    conversations: int
    messages: int
    users: int
    inactive_since: datetime


@dataclass
class PruneReport:
    """Numbers of deleted rows, of the users who owned them, and of conversations that were locked or active again."""

    conversations: int = 0
    messages: int = 0
    users: int = 0
    left_alone: int = 0


class _Old(NamedTuple):
    user_id: str
    id: int
    last_seq: int
    day: str


def count_old_conversations(dsn: str, *, older_than: timedelta, dry_run: bool = False) -> OldConversations:
    """
    Count the conversations of all users that were last active before `older_than`.

    Raises ConfigurationError if row-level security hides rows from the role or, except for a dry run, if the server is
    a standby, and SchemaError if the tables are missing.
    """
    with connected(dsn) as connection, _transaction(connection):
        refuse_distributed(
            connection, "chatdb prune", "delete old conversations user by user, with chatdb.delete_conversation"
        )
        try:
            [server] = _fetch(connection, "check_operator")
        except (errors.UndefinedTable, errors.InvalidSchemaName):
            raise SchemaError(
                "chatdb's tables are missing or older than this release needs: run chatdb migrate or yoyo apply"
            ) from None
        check_server(server, dry_run=dry_run)
        [row] = _fetch(connection, "count_old_conversations", older_than)
    return OldConversations(**row)


def prune_conversations(
    dsn: str, found: OldConversations, *, rate: float, progress: Callable[[int], object] = lambda _: None
) -> PruneReport:
    """
    Delete the conversations that `count_old_conversations` found, with at most `rate` messages a second.

    A conversation that another transaction locks, or that became active again, is left alone. `progress` is called with
    the number of messages that are done, of `found.messages`.
    """
    report = PruneReport()
    last_user = ""
    done = 0
    with connected(dsn) as connection:
        for batch in _batches(connection, found.inactive_since, max_size=max(1, min(BATCH_SIZE, int(rate)))):
            started = time.monotonic()
            for row in _prune(connection, found.inactive_since, batch):
                report.conversations += row["conversations"]
                report.messages += row["messages"]
                report.left_alone += row["existing"] - row["conversations"]
                if row["users"]:
                    report.users += len(row["users"]) - (row["users"][0] == last_user)
                    last_user = row["users"][-1]
            done += sum(conversation.last_seq for conversation in batch)
            progress(done)
            time.sleep(max(0.0, started + sum(map(_size, batch)) / rate - time.monotonic()))
    return report


def _batches(connection: psycopg.Connection, inactive_since: datetime, *, max_size: int) -> Generator[list[_Old]]:
    """Iterate over the old conversations, in order of users, in batches of about `max_size` messages."""
    batch: list[_Old] = []
    size = 0
    after = _Old("", 0, 0, "-infinity")
    while True:
        with _transaction(connection):
            rows = _fetch(
                connection, "list_old_conversations", inactive_since, after.user_id, after.day, after.id, PAGE_SIZE
            )
        page = [_Old(**row) for row in rows]
        for conversation in page:
            if batch and size + _size(conversation) > max_size:
                yield batch
                batch, size = [], 0
            batch.append(conversation)
            size += _size(conversation)
        if len(page) < PAGE_SIZE:
            break
        after = page[-1]
    if batch:
        yield batch


def _size(conversation: _Old) -> int:
    """Return the number of rows to delete, at most: the messages and the conversation."""
    return conversation.last_seq + 1


def _prune(connection: psycopg.Connection, inactive_since: datetime, batch: Sequence[_Old]) -> list[dict[str, Any]]:
    """Delete a batch in one transaction or, if it comes into conflict with another, each conversation in its own."""
    try:
        with _transaction(connection):
            users, ids = [old.user_id for old in batch], [old.id for old in batch]
            return _fetch(connection, "prune_conversations", inactive_since, users, ids)
    except (errors.LockNotAvailable, errors.DeadlockDetected, errors.SerializationFailure):
        if len(batch) == 1:
            return [{"conversations": 0, "messages": 0, "users": [], "existing": 1}]
    return [row for conversation in batch for row in _prune(connection, inactive_since, [conversation])]


@contextmanager
def _transaction(connection: psycopg.Connection) -> Generator[None]:
    with connection.transaction():
        prepare_session(connection, "local")
        connection.execute("set local lock_timeout = '1s'")
        yield


def _fetch(connection: psycopg.Connection, name: str, *arguments: object) -> list[dict[str, Any]]:
    # not prepared: a transaction pooler may give the next transaction to another server process
    cursor = psycopg.RawCursor(connection, row_factory=dict_row)
    return cursor.execute(statement(name).encode(), arguments or None, prepare=False).fetchall()
