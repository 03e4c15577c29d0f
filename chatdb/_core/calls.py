"""
Tells a pool's listeners about each call.

Decision: docs/decisions/0023-listeners-hear-of-a-call-when-it-ends.md
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from time import perf_counter
from typing import Final, TypeVar

from chatdb.errors import ChatDBError, InvalidInputError, NotFoundError
from chatdb.records import Call

ResultT = TypeVar("ResultT")
CallListener = Callable[[Call], object]

SLOW: Final = 0.01
"""Seconds after which a listener is reported as slow."""

_log = logging.getLogger("chatdb")


class RunningCall:
    """What is known of a call before it ends."""

    __slots__ = ("attempts", "has_ended", "rows", "wait")

    def __init__(self) -> None:
        self.attempts = 0
        self.rows = 0
        self.wait = 0.0
        self.has_ended = False


_running: Final[ContextVar[RunningCall | None]] = ContextVar("chatdb_call", default=None)


def running_call() -> RunningCall | None:
    """Return the call that this code is part of; a task that a call has started may outlive it."""
    running = _running.get()
    return None if running is None or running.has_ended else running


class CallListeners:
    """The listeners of one pool. Whatever they do, the call's own result or error reaches its caller."""

    def __init__(self) -> None:
        self._listeners: tuple[CallListener, ...] = ()
        self._guard = Guard()

    def add(self, listener: CallListener) -> None:
        """Add a listener. Raises InvalidInputError if it is not a plain function."""
        if not callable(listener):
            raise InvalidInputError("listener", "must be a function that takes a chatdb.Call")
        if inspect.iscoroutinefunction(listener) or inspect.iscoroutinefunction(getattr(listener, "__call__", None)):  # noqa: B004
            raise InvalidInputError("listener", "must be a plain function, not a coroutine function")
        self._listeners += (listener,)

    async def tell(self, operation: str, statement: str, call: Awaitable[ResultT]) -> ResultT:
        """Wait for a call and tell the listeners about it. What it runs belongs to it and is no call of its own."""
        running = RunningCall()
        _running.set(running)
        error: BaseException | None = None
        begin = perf_counter()
        try:
            return await call
        except BaseException as raised:
            error = raised
            raise
        finally:
            duration = perf_counter() - begin
            running.has_ended = True
            _running.set(None)
            ended = Call(
                operation=operation,
                statement=statement,
                duration=duration,
                wait=running.wait,
                rows=running.rows,
                retries=max(0, running.attempts - 1),
                error=_error_name(error),
                sqlstate=_sqlstate(error),
            )
            for listener in self._listeners:
                self._guard.call(listener, ended)

    async def measure_wait(self, acquiring: Awaitable[ResultT]) -> ResultT:
        """Wait for a connection, and add the time to the call that needs it."""
        begin = perf_counter()
        try:
            return await acquiring
        finally:
            running = running_call()
            if running is not None:
                running.wait += perf_counter() - begin


class Guard:
    """Calls functions of listeners: what they raise is logged once per class and not passed on, slowness once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function."""
        begin = perf_counter()
        try:
            function(*args)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it must not reach the caller
            self._log_once(type(error).__name__, "a listener of calls raised %s", type(error).__name__)
        if (seconds := perf_counter() - begin) > SLOW:
            self._log_once(
                "",
                "a listener of calls took %.0f ms: it runs in the event loop and delays every task, so hand its work "
                "to a queue or a thread",
                1000 * seconds,
            )

    def _log_once(self, reason: str, message: str, *args: object) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning(f"{message}; this is logged once", *args)


def _error_name(error: BaseException | None) -> str | None:
    """Return the name of the error's class, of a private class the public one that it extends."""
    if error is None or isinstance(error, NotFoundError):
        return None
    classes = type(error).__mro__
    public = classes if not isinstance(error, ChatDBError) else [each for each in classes if _is_public(each)]
    return public[0].__name__


def _is_public(error_class: type) -> bool:
    return error_class.__module__ == ChatDBError.__module__


def _sqlstate(error: BaseException | None) -> str | None:
    cause = error.__cause__ if isinstance(error, ChatDBError) else error
    state = getattr(cause, "sqlstate", None)
    return state if isinstance(state, str) else None
