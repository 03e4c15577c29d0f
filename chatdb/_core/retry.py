"""The retry policy: which errors are retried, how often, and with what delays."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from chatdb._core.sqlstate import Kind, classify
from chatdb.errors import AcquireTimeoutError, ChatDBError, CommandTimeoutError, PoolClosedError, UnavailableError

BACKOFF: Final = (0.01, 0.1)
"""Minimum and maximum delay before a retry, in seconds."""

RETRY_WINDOW: Final = 1.0
"""Seconds after the first error within which a statement may be retried."""


@dataclass(frozen=True)
class RetryPolicy:
    """Allows up to `retries` retries, with random delays so that callers do not retry in step."""

    retries: int
    window: float = RETRY_WINDOW

    def may_retry(self, error: ChatDBError, *, idempotent: bool) -> bool:
        """Return whether a retry is safe: the server rolled back, or the connection was lost in an idempotent call."""
        if not isinstance(error, UnavailableError):
            return False
        if classify(error.__cause__) in {Kind.SERIALIZATION, Kind.DEADLOCK}:
            return True
        is_lost = not isinstance(error, AcquireTimeoutError | CommandTimeoutError | PoolClosedError) and not error.sent
        return idempotent and is_lost

    def backoff_delays(self) -> Iterator[float]:
        """Iterate over the delays before each retry, until no retries are left or the window has passed."""
        end = time.monotonic() + self.window
        for _ in range(self.retries):
            if time.monotonic() > end:
                return
            yield random.uniform(*BACKOFF)  # noqa: S311 - not for cryptography
