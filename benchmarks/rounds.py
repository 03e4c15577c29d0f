"""Times clients side by side: round by round, each in its turn, so that what slows the machine slows them all."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

Call = Callable[[], Awaitable[object]]

WARMUP = 2
"""Rounds that are not counted: statements are prepared and caches filled."""


def interleave(
    benchmark: Any,
    runner: asyncio.Runner,
    calls: dict[str, Call],
    *,
    rounds: int,
    each: int,
) -> dict[str, list[float]]:
    """
    Return each client's times in seconds, of `rounds` rounds of `each` calls one after another.

    pytest-benchmark times chatdb's part of a round; the others' parts stand before it, in another order each time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    others = [name for name in calls if name != "chatdb"]
    number = count()

    async def block(name: str) -> None:
        call, series = calls[name], times[name]
        for _ in range(each):
            start = time.perf_counter()
            await call()
            series.append(time.perf_counter() - start)

    def before() -> None:
        turn = next(number) % max(1, len(others))
        for name in others[turn:] + others[:turn]:
            runner.run(block(name))

    gc.collect()
    gc.freeze()  # what the suites before have left is not collected again and again at this one's cost
    benchmark.pedantic(lambda: runner.run(block("chatdb")), setup=before, rounds=rounds, warmup_rounds=WARMUP)
    gc.unfreeze()
    return {name: series[WARMUP * each :] for name, series in times.items()}
