"""The errors after which chatdb retries a statement; test_pool and test_causes show how often and on which handles."""

from __future__ import annotations

import asyncpg
import pytest

from chatdb import (
    AcquireTimeoutError,
    ChatDBError,
    CommandTimeoutError,
    ConflictError,
    PoolClosedError,
    UnavailableError,
)
from chatdb._core.retry import RetryPolicy


def caused(error: ChatDBError, cause: Exception) -> ChatDBError:
    """Return an error with a driver error as its cause."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "idempotent", "other"),
    [
        (UnavailableError("lost", sent=None), True, False),
        (UnavailableError("lost before", sent=False), True, False),
        (UnavailableError("the server's answer", sent=True), False, False),
        (AcquireTimeoutError("waited", sent=False), False, False),
        (CommandTimeoutError("waited", sent=None), False, False),
        (PoolClosedError("closed", sent=False), False, False),
        (caused(UnavailableError("undone", sent=True), asyncpg.SerializationError("")), True, True),
        (caused(UnavailableError("undone", sent=True), asyncpg.DeadlockDetectedError("")), True, True),
        (caused(UnavailableError("undone", sent=True), asyncpg.LockNotAvailableError("")), False, False),
        (caused(ConflictError("raised meanwhile"), asyncpg.SerializationError("")), False, False),
    ],
    ids=str,
)
def test_which_errors_are_retried(error: ChatDBError, idempotent: bool, other: bool) -> None:
    """A lost connection retries only idempotent statements; a serialization failure or deadlock retries all."""
    policy = RetryPolicy(2)
    assert policy.may_retry(error, idempotent=True) is idempotent
    assert policy.may_retry(error, idempotent=False) is other
