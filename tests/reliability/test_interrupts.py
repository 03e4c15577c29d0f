"""Commands and programs on the embedded server, interrupted at random moments, leave no server running."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.chaos import figure, sized
from tests.support.command import PROGRAM, environment
from tests.support.embedded import lock_is_free, new_place, postmaster

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3_600)]

# This program opens, uses and closes the server. A signal, as sent to services, or a time limit cancels it.
PROGRAM_OF_A_USER = """
import asyncio, chatdb, signal, sys

async def main():
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    begun = loop.time()
    async with asyncio.timeout(float(sys.argv[1])):
        async with chatdb.open_embedded() as db:
            for _ in range(100):
                await chatdb.list_conversations(db, user_id="alice")
    print(loop.time() - begun)

try:
    asyncio.run(main())
except (TimeoutError, asyncio.CancelledError, KeyboardInterrupt):
    sys.exit(130)
"""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Work(NamedTuple):
    """A command that starts the embedded server, and its exit status when not interrupted."""

    command: tuple[str | Path, ...]
    status: int = 0
    needs_data: bool = False


def works(file: Path, out: Path) -> dict[str, Work]:
    """Return each command that works on the embedded server, and a program that opens it."""
    return {
        "list": Work((PROGRAM, "list", "--user", "alice")),
        "show": Work((PROGRAM, "show", "1", "--user", "alice"), needs_data=True),
        "export": Work((PROGRAM, "export", "--user", "alice", "--output", out), needs_data=True),
        "import": Work((PROGRAM, "import", file, "--user", "alice")),
        "demo": Work((PROGRAM, "demo", "--file", file)),
        "migrate": Work((PROGRAM, "migrate")),
        "rollback": Work((PROGRAM, "rollback", "--dry-run"), needs_data=True),
        "check": Work((PROGRAM, "check"), needs_data=True),
        "protect": Work((PROGRAM, "protect", "--dry-run"), needs_data=True),
        "link-users": Work((PROGRAM, "link-users", "--table", "public.users"), status=1),
        "adopt": Work((PROGRAM, "adopt", "--dry-run"), status=1),
        "open_embedded": Work((sys.executable, "-c", PROGRAM_OF_A_USER, "1e6")),
        "a time limit": Work((sys.executable, "-c", PROGRAM_OF_A_USER, "1e6")),
    }


def test_an_interrupt_leaves_no_server(request: pytest.FixtureRequest) -> None:
    """
    A signal or time limit at any moment leaves no server running, in new and in existing folders.

    Only real interruptions count: the process was running at the signal and did not end with its normal status.
    Most signals are sent after the process has started work on the server's folder, the others at any time from its
    start.
    """
    wanted = sized(request, 200, 12)
    dice = random.Random(13)
    left = tries = interrupted = beside_server = 0
    outcomes, quarters, signals = Counter[str](), Counter[int](), Counter[str]()
    for place in new_place():
        file = place / "talk.json"
        file.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}] * 100}]))
        home, old = place / "home", place / "old"
        todo = works(file, place / "out.jsonl")
        prepared = _start(todo["import"].command, old)
        assert prepared.communicate()[1].count("\n") == 1
        assert prepared.returncode == 0
        lengths: dict[tuple[str, bool], tuple[float, float]] = {}
        while interrupted < wanted and tries < 4 * wanted:
            name = [*todo][tries % len(todo)]
            work = todo[name]
            tries += 1
            is_new = not work.needs_data and dice.random() < 0.3
            shutil.rmtree(home, ignore_errors=True)
            if not is_new:
                shutil.copytree(old, home, symlinks=True, ignore=_left_out)
            if (name, is_new) not in lengths:
                copy = place / "measured"
                if not is_new:
                    shutil.copytree(home, copy, symlinks=True)
                lengths[name, is_new] = _measured(name, work, copy)
                shutil.rmtree(copy)
            is_early = dice.random() < 0.1
            begun, length = lengths[name, is_new]
            length = length if is_early else length - begun
            moment = dice.uniform(0, length)
            if name == "a time limit":
                command, numbers = (*work.command[:-1], str(moment)), []
            else:
                command, numbers = work.command, [SIGNALS[tries % 3]] * dice.choice([1, 1, 2])
            sent, has_server, said, status = _interrupted(
                command, home, numbers, [moment, dice.uniform(0, 0.3)], is_early=is_early
            )
            if "Traceback" in said:
                print(f"{name} {numbers}: {said}")
            else:
                assert status in {work.status, 130, *(-number for number in SIGNALS)}, said
            if (sent or not numbers) and status != work.status:
                interrupted += 1
                beside_server += has_server
                outcomes[f"{name} {status}"] += 1
                quarters[int(4 * moment / length)] += 1
                signals["+".join(number.name for number in numbers[:sent]) or name] += 1
            if "chatdb: interrupted" in said:
                assert "Traceback" not in said
                assert "never retrieved" not in said
            if (home / "server.lock").exists() and not lock_is_free(home):
                left += 1
                print(f"left by {name} {numbers} after {moment:.3f} s of {length:.3f}, status {status}: {said}")
                subprocess.run(["kill", "-INT", str(postmaster(home))], check=True)
                while not lock_is_free(home):
                    time.sleep(0.01)
    print({f"{name}, {'new' if is_new else 'old'}": each for (name, is_new), each in lengths.items()})
    for counted in (outcomes, quarters, signals):
        print(dict(sorted(counted.items())))
    assert left == 0
    assert interrupted == wanted
    figure(
        f"servers left by {interrupted} interrupts of running commands and programs: {left}; {beside_server} of the "
        f"signals found a server, {tries - interrupted} more came too late; by quarters of the length "
        f"{[quarters[each] for each in range(4)]}"
    )


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Exclude sockets, and the lock file whose creation shows that work on the folder has begun."""
    return [name for name in names if name == "users.lock" or Path(folder, name).is_socket()]


def _start(command: tuple[str | Path, ...], home: Path, *, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment({"CHATDB_HOME": str(home)}),
        cwd=home.parent,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_begin(process: subprocess.Popen[str], home: Path) -> None:
    """Wait until the process starts work on the folder, or ends."""
    while not (home / "users.lock").exists() and process.poll() is None:
        time.sleep(0.001)


def _measured(name: str, work: Work, home: Path) -> tuple[float, float]:
    """Return when the uninterrupted command starts work on the folder, and when it ends."""
    start = time.monotonic()
    process = _start(work.command, home, stdout=subprocess.PIPE)
    _wait_for_begin(process, home)
    begun = time.monotonic() - start
    told, said = process.communicate()
    length = time.monotonic() - start
    assert process.returncode == work.status, said
    if name == "a time limit":  # the time limit runs from the opening
        return 0, float(told)
    return round(begun, 3), round(length, 3)


def _interrupted(
    command: tuple[str | Path, ...],
    home: Path,
    numbers: list[signal.Signals],
    waits: list[float],
    *,
    is_early: bool,
) -> tuple[int, bool, str, int]:
    """
    Run a command and send it signals.

    Returns how many signals reached it, whether a server was running then, its stderr, and its exit status.
    """
    process = _start(command, home)
    if not is_early:
        _wait_for_begin(process, home)
    sent, has_server = 0, False
    for number, wait in zip(numbers, waits, strict=False):
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            has_server = has_server or (home / "data/postmaster.pid").exists()
            process.send_signal(number)
            sent += 1
    _, said = process.communicate(timeout=60)
    return sent, has_server, said, process.returncode
