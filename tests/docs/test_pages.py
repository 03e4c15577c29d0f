"""Run the code of docs/howto/streaming-program.md, docs/explanation/security.md and docs/operations/replicas.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from textwrap import indent
from typing import Any

import pytest

import chatdb
from tests.support.pages import python_blocks, without_delays
from tests.support.paths import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.server_independent]


async def run(page: str, **names: Any) -> dict[str, Any]:
    """Run the Python blocks of a page one after another, and return their variables."""
    code = "".join(python_blocks(page))
    scope = names | {"chatdb": chatdb}
    exec(f"async def program():\n{indent(code, '    ')}\n    return locals()", scope)
    found: dict[str, Any] = await scope["program"]()
    await found["db"].close()
    return found


def test_the_program_that_streams(dsn: str) -> None:
    """It streams, resumes, stops, shows a second tab and shuts down, with the output that the page shows."""
    (program,) = python_blocks("howto/streaming-program.md")
    page = (ROOT / "docs" / "howto" / "streaming-program.md").read_text(encoding="utf-8")
    (output,) = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", program]
    env = os.environ | {"DATABASE_URL": dsn}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, without_delays(done.stderr)) == (0, [])
    assert done.stdout == output


async def test_the_page_on_replicas(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks on replicas run, here with the primary in place of a replica."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setenv("REPLICA_URL", dsn)
    await run("operations/replicas.md")
    assert " primary False None is not in recovery" in capsys.readouterr().out


async def test_the_security_pages_code(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The security page's blocks run for a user with a conversation."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    async with chatdb.create_pool() as db:
        made = await chatdb.create_conversation(db, user_id="alice")
        await run("explanation/security.md", user="alice", number=made.id)
        assert (await chatdb.get_conversation(db, user_id="alice", conversation_id=made.id)).last_seq == 1
