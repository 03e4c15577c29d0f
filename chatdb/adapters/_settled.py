"""Waits for a change that was sent, even if the caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


async def settled(change: Coroutine[Any, Any, ResultT]) -> ResultT:
    """
    Return the result of a change.

    A cancellation waits until the outcome of the change is known, and then goes on.
    """
    task = asyncio.ensure_future(change)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio would log it
        raise cancelled
    return task.result()
