"""Hints that a conversation was written to, which a pool gathers and sends to watchers after the commit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Generator
from typing import Final

CHANNEL: Final = "chatdb"
"""The channel of LISTEN and NOTIFY. A payload is a list of conversation ids, separated by spaces."""

GATHERED_FOR: Final = 0.05
"""Seconds between two notifications: a commit with NOTIFY holds a lock of the database until it is flushed."""

_FULL: Final = 7_900
"""Bytes from which a payload takes no further id; PostgreSQL refuses one of 8,000."""

_log = logging.getLogger("chatdb")


class Hints:
    """Gathers conversation ids, and sends them about 20 times a second. A failure loses them: watchers poll too."""

    def __init__(self, send: Callable[[list[str]], Awaitable[object]]) -> None:
        self._send = send
        self._ids: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, ids: set[int]) -> None:
        """Send these ids soon."""
        if ids and not self._ids:
            task = asyncio.create_task(self._send_soon())
            self._tasks.add(task)  # asyncio keeps only a weak reference
            task.add_done_callback(self._tasks.discard)
        self._ids |= ids

    async def close(self, timeout: float) -> None:
        """Wait until the gathered ids are sent."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)

    async def _send_soon(self) -> None:
        await asyncio.sleep(GATHERED_FOR)
        ids, self._ids = self._ids, set()
        try:
            await self._send(_payloads(ids))
        except Exception as error:  # noqa: BLE001 - asyncpg's, the driver's or the network's
            _log.debug("could not notify watchers: %s", type(error).__name__)


def _payloads(ids: set[int]) -> list[str]:
    payloads = [""]
    for identifier in ids:
        if len(payloads[-1]) > _FULL:
            payloads.append("")
        payloads[-1] += f" {identifier}"
    return payloads


_in_transactions: Final[dict[int, set[int]]] = {}
"""The conversations written to in each open transaction of a pool that sends hints, by the `id` of its connection."""


@contextlib.contextmanager
def gathered(connection: object, hints: Hints | None) -> Generator[None]:
    """Gather the hints of a transaction on this connection, and send them if the block does not raise."""
    if hints is None:
        yield
        return
    ids = _in_transactions[id(connection)] = set[int]()
    try:
        yield
    finally:
        del _in_transactions[id(connection)]
    hints.add(ids)


def add_hint(db: object, conversation_id: int | None) -> None:
    """Tell watchers, if `db` is a pool that sends hints or a connection in a transaction of one."""
    if conversation_id is None:
        return
    hints: Hints | None = getattr(db, "hints", None)
    if hints is not None:
        hints.add({conversation_id})
    elif (ids := _in_transactions.get(id(db))) is not None:
        ids.add(conversation_id)
