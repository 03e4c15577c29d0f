"""Run the code blocks of docs/guide.md."""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

import pytest

import chatdb
from tests.support.paths import ROOT

pytestmark = pytest.mark.server_independent


async def test_the_code(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run one after another, as one program."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    names: dict[str, Any] = {"chatdb": chatdb}
    exec(f"async def run():\n{indent(code, '    ')}\n    return locals()", names)
    found = await names["run"]()
    await found["db"].close()
    assert found["answer"] == chatdb.ConversationNotFoundError.public
