"""Exports in other programs' formats, read back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import chatdb
from chatdb.cli.app import app
from chatdb.pool import Pool
from chatdb.transfer import files, writers
from chatdb.transfer.exporter import export_conversations
from chatdb.transfer.importer import import_conversations
from tests.support.samples import CHATGPT, SAMPLES


async def load(db: Pool, data: bytes, user: str = "alice") -> None:
    """Import a file."""
    file = io.BytesIO(data)
    await import_conversations(db, user_id=user, items=files.read(file, files.detect(file)))


async def written(db: Pool, name: str, user: str = "alice") -> str:
    """Return the export of a user."""
    found: list[tuple[chatdb.Conversation, list[chatdb.Message]]] = []
    async for record in export_conversations(db, user_id=user):
        if isinstance(record, chatdb.Conversation):
            found.append((record, []))
        else:
            found[-1][1].append(record)
    writer = writers.WRITERS[name]
    texts = [text for text, _ in (writer.write(*each) for each in found) if text]
    return writer.start + writer.between.join(texts) + writer.end


async def tree(db: Pool, user: str) -> list[Any]:
    """Return the conversations of a user with all that a ChatGPT export holds."""
    found: list[Any] = []
    async for record in export_conversations(db, user_id=user):
        if isinstance(record, chatdb.Conversation):
            flags = (record.archived_at is not None, record.pinned_at is not None)
            found.append([record.title, record.head_seq, record.created_at, flags])
        else:
            about = {key: (record.metadata or {}).get(key) for key in ("type", "hidden", "model", "name")}
            found[-1].append([record.seq, record.parent_seq, record.role, record.content, about, record.state])
    return found


@pytest.mark.parametrize("name", SAMPLES)
async def test_a_chatgpt_export_is_read_back(db: Pool, name: str) -> None:
    """Each product's conversations, with their branches, labels and texts, become a ChatGPT export."""
    await load(db, json.dumps(SAMPLES[name][1]).encode())
    await load(db, (await written(db, "chatgpt")).encode(), "bob")
    assert await tree(db, "bob") == await tree(db, "alice")


async def test_an_imported_chatgpt_message_is_exported_as_it_was(db: Pool) -> None:
    """Unless its text was edited since."""
    await load(db, json.dumps(CHATGPT).encode())
    (conversation,) = await chatdb.list_conversations(db, user_id="alice", archived=None)
    at: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
    await chatdb.update_message(db, **at, key="n4", content="Edited")
    (value,) = json.loads(await written(db, "chatgpt"))
    before = {name: node["message"] for name, node in CHATGPT[0]["mapping"].items() if node["message"]}
    after = {name: node["message"] for name, node in value["mapping"].items() if node["message"]}
    assert after.pop("n4")["content"]["parts"] == ["Edited"]
    assert after == {name: message for name, message in before.items() if name != "n4"}


@pytest.mark.parametrize("name", ["chatgpt", "claude", "messages", "open-webui"])
async def test_fine_tuning_messages_are_read_back(db: Pool, name: str) -> None:
    """They are the texts of the current line, without tools, reasoning and what the user did not see."""
    await load(db, json.dumps(SAMPLES[name][1]).encode())
    text = await written(db, "messages")
    said = [(each["role"], each["content"]) for each in json.loads(text)["messages"]]
    await load(db, text.encode(), "bob")
    (conversation,) = await chatdb.list_conversations(db, user_id="bob")
    history = await chatdb.get_history(db, user_id="bob", conversation_id=conversation.id)
    assert [(message.role, message.content) for message in history] == said
    expected = {
        "chatgpt": ["user", "assistant"],
        "claude": ["user", "assistant"],
        "messages": ["system", "user", "assistant"],
        "open-webui": ["user", "assistant"],
    }
    assert [role for role, _ in said] == expected[name]


async def test_markdown_has_what_was_seen(db: Pool) -> None:
    """Authors are headings; reasoning and tools are labelled quotes."""
    await load(db, json.dumps(CHATGPT).encode())
    assert await written(db, "markdown") == (
        "# Bread\n\n*2023-11-14 22:13 UTC*\n\n"
        "## User\n\n[image: loaf.png]\nWhich flour?\n[file: recipe.pdf]\n\n"
        '## Assistant (tool call): web.run\n\n> {"q": "flour"}\n\n'
        "## Tool (tool result): web.run\n\n> Two pages\n\n"
        "## Assistant (reasoning)\n\n> Weighing\n> Rye?\n\n"
        "## Assistant\n\nRye [Flours](https://example.invalid/flours), or spelt. Page 3[recipe.pdf] agrees.\n"
    )


def test_the_command(dsn: str, tmp_path: Path, arguments_of: Callable[[str], dict[str, Any]]) -> None:
    """It writes all conversations or one, imports several sources, and names the formats."""
    runner = CliRunner()
    options = ["--user", "alice", "--database", arguments_of(dsn)["dsn"]]
    for name in ("claude", "librechat"):
        (tmp_path / f"{name}.json").write_text(json.dumps(SAMPLES[name][1]))
    (tmp_path / "notes.json").write_text('[{"a": 1}]')
    (tmp_path / "a.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    sources = [str(tmp_path / "claude.json"), str(tmp_path)]
    done = runner.invoke(app, ["import", *sources, "--json", *options])
    assert done.exit_code == 3, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["conversations"], report["stored_conversations"]) == (2, 1)
    assert {each["name"].rpartition("/")[2]: each["format"] for each in report["files"]} == {
        "claude.json": "claude",
        "librechat.json": "librechat",
    }
    damaged, skipped = report["skipped"]
    assert damaged["places"] == [f"{tmp_path.name}/a.zip"]
    assert skipped["places"] == [f"{tmp_path.name}/notes.json"]
    assert 'a list of objects with the fields "a"' in skipped["reason"]
    for name, part in (
        ("jsonl", '"type":"end"'),
        ("chatgpt", '"mapping"'),
        ("messages", '{"messages"'),
        ("markdown", "# "),
    ):
        done = runner.invoke(app, ["export", "--format", name, *options])
        assert (done.exit_code, part in done.stdout) == (0, True), done.output
    done = runner.invoke(app, ["export", "--format", "markdown", "--conversation", "1", *options])
    assert done.stdout.count("# Tides") == 1
    assert "# Hello" not in done.stdout
    for url, hint in (("https://x.invalid/a.json", "download"), ("file:///a.json", "without file://")):
        done = runner.invoke(app, ["import", url, *options])
        assert hint in str(done.exception)
    assert "Settings > Data controls > Export data" in runner.invoke(app, ["formats"]).stdout


async def test_a_lone_surrogate_is_written_as_an_escape(db: Pool) -> None:
    """A kept item with a lone surrogate makes a file in UTF-8, which is read back."""
    sample = json.loads(json.dumps(CHATGPT))
    sample[0]["mapping"]["n4"]["message"]["author"]["name"] = "bad \ud800"
    await load(db, json.dumps(sample).encode())
    text = await written(db, "chatgpt")
    text.encode()
    await load(db, text.encode(), "bob")
    assert await tree(db, "bob") == await tree(db, "alice")
