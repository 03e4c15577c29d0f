"""Reads and runs the Python blocks of the pages in docs/."""

from __future__ import annotations

import ast
import re
from inspect import iscoroutine

from tests.support.paths import ROOT


def python_blocks(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    return blocks


async def run_blocks(page: str, names: dict[str, object]) -> None:
    """Run the blocks of a page of docs/adapters in order, with `names` in scope."""
    for block in python_blocks(f"adapters/{page}.md"):
        made = eval(compile(block, page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if iscoroutine(made):
            await made


def without_delays(stderr: str) -> list[str]:
    """Return the lines that a program printed, without those on steps that a busy machine delayed by over 0.1 s."""
    return [line for line in stderr.splitlines() if not re.match(r"Executing <.* took [\d.]+ seconds", line)]
