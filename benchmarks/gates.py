"""
The gates: what a run must reach, one line each. `nox -s bench` fails and names the gate that fell, and by how much.

A gate reads one figure that the suites have left; where a suite ran and left none, the gate falls. Ratios are those of
the medians of one run in which the rounds of all clients were interleaved, on asyncio's own loop. Those on uvloop stand
in the report: a bare connection is quicker there, and so the same Python a few percent more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["target", "counts", "ratios", "growth", "bulk"]


@dataclass(frozen=True)
class Gate:
    """A limit of a figure; `quick` gates are judged in every run, the others in the full one."""

    name: str
    title: str
    limit: float
    unit: str
    group: Group
    at_most: bool = True
    quick: bool = False

    def passes(self, value: float) -> bool:
        """Whether a value is within the limit."""
        return value <= self.limit if self.at_most else value >= self.limit

    def margin(self, value: float) -> float:
        """Return by which part of the limit a value is better, below 0 if worse."""
        better = self.limit - value if self.at_most else value - self.limit
        return better / self.limit if self.limit else better

    def judged(self, value: float) -> str:
        """Say what came of it in one line."""
        bound = "at most" if self.at_most else "at least"
        unit = f" {self.unit}" if self.unit else ""
        words = "better" if self.passes(value) else "worse"
        by = f"{abs(self.margin(value)):.0%}" if self.limit else f"{abs(value - self.limit):g}"
        return f"{self.title}: {value:,.4g}{unit}, {bound} {self.limit:,g}{unit}, {by} {words}"


def _at_most(name: str, title: str, limit: float, unit: str, group: Group, *, quick: bool = False) -> Gate:
    return Gate(name, title, limit, unit, group, quick=quick)


def _at_least(name: str, title: str, limit: float, unit: str, group: Group, *, quick: bool = False) -> Gate:
    return Gate(name, title, limit, unit, group, at_most=False, quick=quick)


OPERATIONS = {
    "history_100": "history of 100, random conversations",
    "history_100_hot": "history of 100, the same 20 again",
    "last_20": "last 20",
    "page_middle": "page of 100 in the middle of 10,000",
    "whole_10000": "whole conversation of 10,000",
    "append": "append one",
    "turn": "append a turn",
    "append_keyed": "append with a key, new",
    "append_again": "append with a key, repeated",
    "list_20": "list 20 of 10 conversations",
    "list_20_spread": "list 20 of 10,000, spread over a year",
    "list_20_busy": "list 20 of 10,000, all of one day",
    "create": "create a conversation",
    "get_or_create": "get or create",
    "delete": "delete a conversation of 100",
}
"""The operations that are timed and counted, and their names for people."""

COUNTED = [name for name in OPERATIONS if name not in {"history_100_hot", "whole_10000"}]
"""Those that are one statement and one round trip."""

GATES = [
    # the target, in milliseconds at p99
    _at_most("warm.p99", "history of 100, warm, p99", 100, "ms", "target", quick=True),
    _at_most("cold.p99", "history of 100, server restarted, caches dropped, p99", 100, "ms", "target", quick=True),
    _at_most("near.p99", "history of 100, 1 ms away, p99", 100, "ms", "target", quick=True),
    _at_most("far.p99", "history of 100, 10 ms away, p99", 100, "ms", "target", quick=True),
    _at_most("tasks.p99", "history of 100, 64 tasks on a pool of 16, p99", 100, "ms", "target", quick=True),
    _at_most("large.p99", "history of 100, 10 M messages, p99", 100, "ms", "target"),
    _at_most("large_cold.p99", "history of 100, 10 M messages, cold, p99", 100, "ms", "target"),
    _at_most("large_tasks.p99", "history of 100, 10 M messages, 64 tasks on 16, p99", 100, "ms", "target"),
    _at_most("large_far.p99", "history of 100, 10 M messages, 10 ms away, p99", 100, "ms", "target"),
    # counts, free of noise
    *(
        _at_most(f"{name}.{count}", f"{OPERATIONS[name]}: {count.replace('_', ' ')}", 1, "", "counts", quick=True)
        for count in ("statements", "round_trips")
        for name in COUNTED
    ),
    _at_most("history_100.buffers", "history of 100: buffers", 112, "", "counts", quick=True),
    _at_most("last_20.buffers", "last 20: buffers", 26, "", "counts", quick=True),
    _at_most("list_20_spread.buffers", "list 20 of 10,000 over a year: buffers", 60, "", "counts", quick=True),
    _at_most("list_20_busy.buffers", "list 20 of 10,000 of one day: buffers", 400, "", "counts", quick=True),
    _at_most("append.wal", "append one: WAL", 1_300, "bytes", "counts", quick=True),
    _at_least("hot.single", "HOT updates at 10 appends a day", 85, "%", "counts", quick=True),
    _at_least("hot.turns", "HOT updates at 5 turns a day", 75, "%", "counts", quick=True),
    _at_most("plans.unexpected", "plans with another index, a sort or a sequential scan", 0, "", "counts", quick=True),
    _at_most("whole_10000.memory", "whole conversation of 10,000: memory at its peak", 4, "MiB", "counts", quick=True),
    # against raw asyncpg on a bare connection, and against the original's SQLModel
    _at_most("history_100.to_raw", "history of 100, random: against raw asyncpg", 1.15, "x", "ratios"),
    _at_most("history_100_hot.to_raw", "history of 100, hot: against raw asyncpg", 1.35, "x", "ratios"),
    _at_most("last_20.to_raw", "last 20: against raw asyncpg", 1.3, "x", "ratios"),
    _at_most("whole_10000.to_raw", "whole conversation of 10,000: against raw asyncpg", 1.5, "x", "ratios"),
    _at_most("append.to_raw", "append one: against raw asyncpg", 1.25, "x", "ratios"),
    _at_most("turn.to_raw", "append a turn: against raw asyncpg", 1.25, "x", "ratios"),
    _at_most("list_20.to_raw", "list 20: against raw asyncpg", 2, "x", "ratios"),
    _at_least("mixed_16.of_raw", "16 tasks, 80/20: operations/s of raw asyncpg's", 0.85, "x", "ratios"),
    _at_least("history_100.faster", "history of 100, random: faster than SQLModel", 1.6, "x", "ratios"),
    _at_least("history_100_hot.faster", "history of 100, hot: faster than SQLModel", 2.2, "x", "ratios"),
    _at_least("last_20.faster", "last 20: faster than SQLModel", 3, "x", "ratios"),
    _at_least("whole_10000.faster", "whole conversation of 10,000: faster than SQLModel", 2, "x", "ratios"),
    _at_least("append.faster", "append one: faster than SQLModel", 3, "x", "ratios"),
    _at_least("turn.faster", "append a turn: faster than SQLModel", 4, "x", "ratios"),
    _at_least("append_far.faster", "append one, 1 ms away: faster than SQLModel", 6, "x", "ratios"),
    _at_least("turn_far.faster", "append a turn, 1 ms away: faster than SQLModel", 6, "x", "ratios"),
    _at_least("list_20.faster", "list 20: faster than SQLModel", 4, "x", "ratios"),
    _at_least("mixed_16.faster", "16 tasks, 80/20: operations/s against SQLModel's", 4, "x", "ratios"),
    # from 100 k to 10 M messages
    _at_most("growth.p50", "history of 100 at 10 M against 100 k: p50", 1.3, "x", "growth"),
    _at_most("growth.buffers", "history of 100 at 10 M against 100 k: buffers", 1.05, "x", "growth"),
    # the import's write path, rows in memory
    _at_least("bulk.rate", "bulk import, rows in memory", 40_000, "messages/s", "bulk"),
    _at_least("bulk.of_copy", "bulk import: part of \\copy's rate", 0.5, "x", "bulk"),
]  # fmt: skip
