"""When a statement is sent again after an error: how often, after which errors, and after what delays."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from chatdb._core.sqlstate import Kind, classify
from chatdb.errors import AcquireTimeoutError, ChatDBError, CommandTimeoutError, PoolClosedError, UnavailableError

BACKOFF: Final = (0.01, 0.1)
"""The shortest and the longest delay before a retry, in seconds."""

RETRY_WINDOW: Final = 1.0
"""Seconds after its first error in which a statement may be sent again."""


@dataclass(frozen=True)
class RetryPolicy:
    """Sends a statement again at most `retries` times, with random delays, so that callers do not retry in step."""

    retries: int
    backoff: tuple[float, float] = BACKOFF
    window: float = RETRY_WINDOW

    def may_retry(self, error: ChatDBError, *, idempotent: bool) -> bool:
        """Whether sending the statement again does nothing twice: the server rolled it back, or it is `idempotent`."""
        if not isinstance(error, UnavailableError):
            return False
        if classify(error.__cause__) in {Kind.SERIALIZATION, Kind.DEADLOCK}:
            return True
        is_lost = not isinstance(error, AcquireTimeoutError | CommandTimeoutError | PoolClosedError) and not error.sent
        return idempotent and is_lost

    def backoff_delays(self) -> Iterator[float]:
        """Iterate over the delays before each retry, until there are no retries left or the window is over."""
        end = time.monotonic() + self.window
        for _ in range(self.retries):
            if time.monotonic() > end:
                return
            yield random.uniform(*self.backoff)  # noqa: S311 - not for cryptography
