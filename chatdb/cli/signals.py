"""Interrupt handling: a command cleans up and prints one line."""

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
    Run a coroutine. The first SIGINT, SIGTERM or SIGHUP cancels it; a second one raises KeyboardInterrupt.

    Signals are blocked while the event loop is created or closed, because an exception would leave it inconsistent.
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
            loop.call_soon_threadsafe(lambda: None)  # wakes the loop

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
    Make Ctrl-C raise KeyboardInterrupt from now on, because there is something to clean up.

    Until then _chatdb_entry.py exits at once: a KeyboardInterrupt during an import can get lost.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_of_an_interrupt(error: BaseException) -> bool:
    """Return whether an error arose in the cleanup after an interrupt."""
    context = error.__context__
    return context is not None and (isinstance(context, KeyboardInterrupt) or is_of_an_interrupt(context))


def raise_interrupt(*_: object) -> None:
    """Handle a signal like Ctrl-C."""
    raise KeyboardInterrupt


def ignore_signals() -> None:
    """Ignore further signals while the process exits."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
