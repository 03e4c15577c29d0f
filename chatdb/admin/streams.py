"""
Aborts the messages of all users that a crash left streaming, for `chatdb abort-streams`.

Each message has a transaction of its own, so that a killed run can be repeated. It takes its locks in the same order as
every other write, and waits for none of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from chatdb._core.driver_errors import mapped_driver_errors
from chatdb.admin.all_users import check_server, statement
from chatdb.pool import Pool, transaction
from chatdb.streaming import finish_message

if TYPE_CHECKING:
    from chatdb.pool import Connection

BATCH_SIZE: Final = 500
_ATTEMPTS: Final = 10
_PAUSE: Final = 0.1
"""Seconds between two attempts to lock a message's conversation."""


class IdleStreams(NamedTuple):
    """The messages that are streaming and were not extended since `idle_since`, and the users who own them."""

    messages: int
    users: int
    idle_since: datetime


@dataclass
class AbortReport:
    """
    Numbers of messages by outcome, and of users with aborted ones.

    `left_alone` were extended, finished or deleted in the meantime; `locked` are in conversations that another
    transaction kept locked.
    """

    messages: int = 0
    users: int = 0
    left_alone: int = 0
    locked: int = 0


async def count_idle_streams(pool: Pool, *, older_than: timedelta, dry_run: bool = False) -> IdleStreams:
    """
    Count the messages of all users that are streaming and were not extended for `older_than`.

    Raises ConfigurationError if row-level security hides rows from the role or, except for a dry run, if the server is
    a standby.
    """
    async with transaction(pool) as connection:
        [server] = await _fetch(connection, "check_operator")
        check_server(server, dry_run=dry_run)
        [row] = await _fetch(connection, "count_idle_streams", older_than)
    return IdleStreams(**row)


async def abort_idle_streams(
    pool: Pool, found: IdleStreams, *, progress: Callable[[int], object] = lambda _: None
) -> AbortReport:
    """
    Finish the messages that `count_idle_streams` found as aborted, with the text that was stored.

    A message that is extended, finished or deleted meanwhile is left alone. `progress` is called with the number of
    messages that are done.
    """
    report = AbortReport()
    last_user: str | None = None
    after: tuple[str, int, int] = ("", 0, 0)
    done = 0
    while True:
        async with transaction(pool) as connection:
            streams = await _fetch(connection, "list_idle_streams", found.idle_since, *after, BATCH_SIZE)
        for user, conversation, seq, flushed_at in streams:
            is_aborted = await _abort(pool, user, conversation, seq, flushed_at)
            if is_aborted:
                report.messages += 1
                report.users += user != last_user
                last_user = user
            elif is_aborted is None:
                report.locked += 1
            after = (user, conversation, seq)
            done += 1
            progress(done)
        if len(streams) < BATCH_SIZE:
            report.left_alone = max(0, found.messages - report.messages - report.locked)
            return report


async def _abort(pool: Pool, user: str, conversation: int, seq: int, flushed_at: datetime) -> bool | None:
    """Abort a message. Return False if it was not idle any more, None if its conversation stayed locked."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            await asyncio.sleep(_PAUSE)
        async with transaction(pool) as connection:
            [stream] = await _fetch(connection, "lock_idle_stream", user, conversation, seq, flushed_at)
            if stream["locked"]:
                await finish_message(connection, user_id=user, conversation_id=conversation, seq=seq, aborted=True)
                return True
            if not stream["idle"]:
                return False
    return None


async def _fetch(connection: Connection, name: str, *arguments: object) -> list[Any]:
    with mapped_driver_errors():
        return await connection.fetch(statement(name), *arguments)
