"""Run the Python code blocks of docs/guide.md and docs/security.md."""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

import pytest

import chatdb
from tests.support.paths import ROOT

pytestmark = pytest.mark.server_independent


async def run(page: str, **names: Any) -> dict[str, Any]:
    """Run the Python blocks of a page one after another, as one program, and return its variables."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
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
    assert (found["status"], found["pinned"][0].title) == (200, None)
    assert [message["content"] for message in found["body"]] == ["Answer briefly.", "Hello"]
    assert [each.seq for each in (*found["earlier"], *found["later"])] == []
    assert (found["oldest"][0].key, found["next_page"]) == ("support-1", [])
    assert [message.seq for message in found["replaced"]] == [3]
    assert found["answer"] == chatdb.ConversationNotFoundError.public


async def test_the_security_pages_code(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The security page's blocks run for a user with a conversation."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    async with chatdb.create_pool() as db:
        made = await chatdb.create_conversation(db, user_id="alice")
        await run("security.md", user="alice", number=made.id)
        assert (await chatdb.get_conversation(db, user_id="alice", conversation_id=made.id)).last_seq == 1
