"""Time clients side by side in interleaved rounds, so that other load on the machine slows all of them."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

Call = Callable[[], Awaitable[object]]

WARMUP = 2
"""Uncounted rounds, which prepare statements and fill caches."""


def interleave(
    benchmark: Any,
    runner: asyncio.Runner,
    calls: dict[str, Call],
    *,
    rounds: int,
    each: int,
) -> dict[str, list[float]]:
    """
    Return each client's times in seconds, from `rounds` rounds of `each` sequential calls.

    pytest-benchmark times chatdb's part of a round. The others run before it, in an order that rotates.
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
    gc.freeze()  # keeps the garbage collector from scanning earlier suites' objects during this one
    benchmark.pedantic(lambda: runner.run(block("chatdb")), setup=before, rounds=rounds, warmup_rounds=WARMUP)
    gc.unfreeze()
    return {name: series[WARMUP * each :] for name, series in times.items()}
