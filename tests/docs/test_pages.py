"""Run the Python code blocks of docs/guide.md, docs/explanation/security.md and docs/operations/replicas.md."""

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

pytestmark = pytest.mark.server_independent


async def run(page: str, **names: Any) -> dict[str, Any]:
    """Run the Python blocks of a page that are no programs one after another, and return their variables."""
    code = "".join(block for block in python_blocks(page) if "asyncio.run(" not in block)
    scope = names | {"chatdb": chatdb}
    exec(f"async def program():\n{indent(code, '    ')}\n    return locals()", scope)
    found: dict[str, Any] = await scope["program"]()
    await found["db"].close()
    return found


@pytest.mark.owner
async def test_the_guides_code(dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The guide's blocks run, nothing in them is stale, and the last one catches an error."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    found = await run("guide.md")
    printed = capsys.readouterr().out
    assert "another request was faster" not in printed
    assert "user: And at night? (2 of 2)\nassistant: Walk to the Trevi. (1 of 1)\n" in printed
    assert [message.seq for message in found["line"]] == [1, 2, 6, 7]
    assert (found["versions"], found["trip"].head_seq, found["deleted"].messages) == ({6: [3, 6]}, 5, 2)
    assert [message.seq for message in found["window"]] == [1, 2, 3, 5, 8, 9]
    assert [message.content for message in found["context"]][-2:] == ["Where can we eat?", "In Trastevere."]
    assert [text for *_, text in found["snippets"]] == ["In Trastevere."]
    assert (found["older"], found["in_trip"]) == ([], found["matches"])
    assert [match.snippet for match in found["by_words"]] == ["Where can we eat?"]
    assert (found["status"], found["pinned"][0].title) == (200, None)
    assert [message["content"] for message in found["body"]] == ["Answer briefly.", "Hello"]
    assert [each.seq for each in (*found["earlier"], *found["later"])] == []
    assert (found["oldest"][0].key, found["next_page"]) == ("support-1", [])
    assert [message.seq for message in found["replaced"]] == [3]
    assert (found["rome"].content, found["rome"].state, found["rome"].token_count) == ("Take the night train.", None, 4)
    assert (found["started"].state, found["length"]) == ("streaming", 18)
    assert (found["tail"].text, found["tail"].offset, found["tail"].state) == ("is slower.", 18, "streaming")
    assert (found["done"].content, found["done"].state) == ("The bus is slower.", None)
    assert printed.endswith("2 None Take the night train.\n3 None The bus is slower.\n")
    assert found["answer"] == chatdb.ConversationNotFoundError.public


def test_the_guides_program(dsn: str) -> None:
    """The guide's program streams, resumes, stops, shows a second tab and shuts down, with the output that it shows."""
    (program,) = (block for block in python_blocks("guide.md") if "asyncio.run(" in block)
    (output,) = re.findall(r"^```text\n(.*?)^```", (ROOT / "docs" / "guide.md").read_text("utf-8"), re.M | re.S)
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
