"""How a command ends when it is interrupted: what it has begun is cleaned up, and nothing is printed but one line."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
_Result = TypeVar("_Result")


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """
    Run a coroutine, and cancel it at the first SIGINT, SIGTERM or SIGHUP; a second one raises KeyboardInterrupt.

    What comes while the event loop is made or closed, where an exception would leave half of it, waits until after.
    """

    async def interruptible() -> _Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        loop.set_exception_handler(_ignore_interrupts)
        is_first = True

        def cancel(*_: object) -> None:
            nonlocal is_first
            if not is_first or task is None:
                raise KeyboardInterrupt
            is_first = False
            task.cancel()
            loop.call_soon_threadsafe(lambda: None)  # wakes it up

        for number in before:
            signal.signal(number, cancel)
        _block_signals(False)
        try:
            return await work
        finally:
            _block_signals(True)

    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    _block_signals(True)
    try:
        return asyncio.run(interruptible())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _block_signals(False)


def _block_signals(wanted: bool) -> None:
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK if wanted else signal.SIG_UNBLOCK, SIGNALS)


def _ignore_interrupts(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


def raise_interrupts() -> None:
    """
    Have Ctrl-C raise KeyboardInterrupt from here on, because there is something to be cleaned up.

    Until then it ends the process at once, see _chatdb_entry.py: raised during an import it can be lost.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_of_an_interrupt(error: BaseException) -> bool:
    """Whether an error came up in cleaning up after an interrupt, as in a transaction whose statement was cancelled."""
    context = error.__context__
    return context is not None and (isinstance(context, KeyboardInterrupt) or is_of_an_interrupt(context))


def raise_interrupt(*_: object) -> None:
    """Handle a signal as Ctrl-C is handled."""
    raise KeyboardInterrupt


def ignore_signals() -> None:
    """Let no signal interrupt the little that is left to do."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
