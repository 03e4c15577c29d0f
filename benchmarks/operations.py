"""The benchmarked operations. Each is a call without arguments that does the next unit of work."""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable

from benchmarks.contenders import Contender, Keyed
from benchmarks.workload import KEYS, LONG, Place, Size

TEXT = "Could you tell me what to cook tonight with what is left: rice, two eggs, half a cabbage, soy sauce? " * 4
REPLY = "Fry the rice with the cabbage in a very hot pan, push it aside, scramble the eggs, season with soy. " * 8
"""The appended texts: a question of median length and an answer of mean length."""

HOT = 20
"""Number of conversations that the hot read repeats."""
_serial = itertools.count()
_deleted = itertools.count()


def call_of(operation: str, by: Contender, size: Size) -> Callable[[], Awaitable[object]]:
    """Return a client's call of an operation, on random conversations that are the same in each run."""
    chance = random.Random(f"{operation} {by.name}")
    used = _Places(size, chance)
    place = used.any
    user = lambda: place().user_id  # noqa: E731 - a table of calls
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "history_100": lambda: by.history(place(), 100),
        "history_100_hot": lambda: by.history(used.hot(), 100),
        "last_20": lambda: by.history(place(), 20),
        "page_middle": lambda: by.history(size.long, 100, before=chance.randrange(LONG // 5, LONG - LONG // 5)),
        "whole_10000": lambda: by.whole(size.long),
        "append": lambda: by.append(place(), TEXT),
        "turn": lambda: by.turn(place(), TEXT, REPLY),
        "list_20": lambda: by.list(user()),
        "list_20_spread": lambda: by.list(size.spread),
        "list_20_busy": lambda: by.list(size.busy),
        "create": lambda: by.create(user()),
        "delete": lambda: by.delete(size.place(size.conversations - 1 - next(_deleted))),
    }
    if isinstance(by, Keyed):
        calls |= {
            "append_keyed": lambda: by.append_keyed(place(), TEXT, f"{by.name} {next(_serial)}"),
            "append_again": _again(by, used),
            "get_or_create": lambda: by.get_or_create(size.keyed, f"key {chance.randrange(KEYS)}"),
        }
    return calls[operation]


def mixed_of(by: Contender, size: Size) -> Callable[[int, int], Awaitable[None]]:
    """Return a task of the mixed load: `times` calls, 80 % reads of a history and 20 % appends."""
    chance = random.Random(f"mixed {by.name}")
    place = _Places(size, chance).any

    async def work(lane: int, times: int) -> None:
        for _ in range(times):
            if chance.random() < 0.8:
                await by.history(place(), 100, lane=lane)
            else:
                await by.append(place(), TEXT, lane=lane)

    return work


def _again(by: Keyed, used: _Places) -> Callable[[], Awaitable[object]]:
    key = f"{by.name} again {next(_serial)}"
    kept: set[Place] = set()

    async def call() -> object:
        at = used.hot()
        if at not in kept:  # the first call, during the warm-up
            kept.add(at)
            return await by.append_keyed(at, TEXT, key)
        return await by.append_again(at, TEXT, key)

    return call


class _Places:
    """Random conversations from the first two thirds; the delete operation uses the rest."""

    def __init__(self, size: Size, chance: random.Random) -> None:
        self._size = size
        self._chance = chance
        self._hot = [self.any() for _ in range(HOT)]

    def any(self) -> Place:
        return self._size.place(self._chance.randrange(self._size.conversations * 2 // 3))

    def hot(self) -> Place:
        return self._chance.choice(self._hot)
