"""Commands and programs on the embedded server that are interrupted at random moments: none leaves a server behind."""

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

import pytest

from tests._chaos import figure, sized
from tests._command import PROGRAM, environment
from tests.test_embedded_server import lock_is_free, new_place, postmaster

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1_800)]

OPEN = """
import asyncio, chatdb, sys

async def main():
    async with asyncio.timeout(float(sys.argv[1])):
        async with chatdb.open_embedded() as db:
            while True:
                await chatdb.list_conversations(db, user_id="alice")

try:
    asyncio.run(main())
except TimeoutError:
    pass
"""


def test_an_interrupt_leaves_no_server(request: pytest.FixtureRequest) -> None:
    """Neither signals at any moment of a process nor a time limit leave one, in new folders and in old ones."""
    rounds = sized(request, 200, 12)
    dice = random.Random(13)
    left, outcomes = 0, Counter[str]()
    for place in new_place():
        file = place / "talk.json"
        file.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}] * 100}]))
        commands = {
            "list": ("list", "--user", "alice"),
            "show": ("show", "1", "--user", "alice"),
            "export": ("export", "--user", "alice", "--output", place / "out.jsonl"),
            "migrate": ("migrate",),
            "check": ("check",),
            "import": ("import", file, "--user", "alice"),
            "demo": ("demo", "--file", file),
            "protect": ("protect", "--dry-run"),
        }
        names = [*commands, "open_embedded"]
        home = place / "home"
        for number in range(rounds):
            name = names[number % len(names)]
            if dice.random() < 0.2:
                shutil.rmtree(home, ignore_errors=True)
            if name == "open_embedded":
                command = [sys.executable, "-c", OPEN, str(dice.uniform(0.05, 2.5))]
                numbers = dice.choice([[], [signal.SIGINT], [signal.SIGINT] * 2])
            else:
                command = [PROGRAM, *commands[name]]
                numbers = dice.choices([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], k=dice.choice([1, 1, 2]))
            said, code = _interrupted(command, home, numbers, dice)
            outcomes[f"{name} {code}"] += 1
            if name != "open_embedded" and "chatdb: interrupted" in said:
                assert "Traceback" not in said
                assert "never retrieved" not in said
            if home.exists() and not lock_is_free(home):
                left += 1
                print(f"left by {name}, {numbers}, status {code}: {said}")
                subprocess.run(["kill", "-INT", str(postmaster(home))], check=True)
                while not lock_is_free(home):
                    time.sleep(0.01)
    print(dict(outcomes))
    assert left == 0
    figure(f"servers left by {rounds} interrupted commands and programs: {left}")


def _interrupted(
    command: list[str | Path], home: Path, numbers: list[signal.Signals], dice: random.Random
) -> tuple[str, int]:
    """Run a command, send it signals, and return what it says on standard error, and its status."""
    process = subprocess.Popen(
        command,
        env=environment({"CHATDB_HOME": str(home)}),
        cwd=home.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for each, most in zip(numbers, (2.5, 0.3), strict=False):
        try:
            process.wait(dice.uniform(0, most))
        except subprocess.TimeoutExpired:
            process.send_signal(each)
    _, said = process.communicate(timeout=60)
    return said, process.returncode
