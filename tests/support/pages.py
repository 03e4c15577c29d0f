"""Runs the Python blocks of a page of docs/adapters."""

from __future__ import annotations

import ast
import re
from inspect import iscoroutine

from tests.support.paths import ROOT


async def run_blocks(page: str, names: dict[str, object]) -> None:
    """Run the blocks in order, with `names` in scope."""
    text = (ROOT / "docs" / "adapters" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        made = eval(compile(block, page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if iscoroutine(made):
            await made
