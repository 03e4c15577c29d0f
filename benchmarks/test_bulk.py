"""The write path of imports, with rows in memory, compared with psql's copy of the same rows."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import chatdb
from benchmarks.figures import Figures
from benchmarks.server import BenchServer
from benchmarks.workload import MESSAGES, ROLES, START, YEAR, real_texts
from chatdb.formats.items import SourceConversation, SourceMessage
from chatdb.transfer.importer import import_conversations

pytestmark = pytest.mark.full

CONVERSATIONS = 600
USER = "imported"
FIRST_ID = 1_000_000_000
"""Ids from here on are unused in the data."""


def _items(texts: list[str]) -> list[SourceConversation | SourceMessage]:
    items: list[SourceConversation | SourceMessage] = []
    for number in range(CONVERSATIONS):
        at = START + YEAR * (number / CONVERSATIONS)
        items.append(
            SourceConversation(
                key=f"bulk {number}", title=None, metadata=None, last_seq=MESSAGES, created_at=at, updated_at=at
            )
        )
        for seq in range(1, MESSAGES + 1):
            text = texts[number * MESSAGES + seq]
            items.append(
                SourceMessage(
                    seq=seq,
                    role=ROLES[(seq + 1) % 2],
                    content=text,
                    payload=None,
                    metadata=None,
                    token_count=None,
                    key=None,
                    created_at=at,
                )
            )
    return items


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def test_bulk(
    benchmark: Any, server: BenchServer, copy: str, plain: asyncio.Runner, tmp_path: Path, figures: Figures
) -> None:
    """Import 60,000 messages of 600 conversations, alternating with psql's copy from a file."""
    items = _items([text.replace("\0", "") for text in real_texts()])
    conversations, messages = tmp_path / "conversations", tmp_path / "messages"
    number = FIRST_ID
    with conversations.open("w") as first, messages.open("w") as second:
        for item in items:
            if isinstance(item, SourceConversation):
                number += 1
                print(number, USER, item.key, item.last_seq, item.created_at, item.updated_at, sep="\t", file=first)
            else:
                fields = (USER, number, item.seq, item.role, _escaped(item.content), item.created_at)
                print(*fields, sep="\t", file=second)
    script = (
        f"\\copy chatdb.conversations (id, user_id, key, last_seq, created_at, updated_at) from {conversations}\n"
        f"\\copy chatdb.messages (user_id, conversation_id, seq, role, content, created_at) from {messages}\n"
    )
    pool = plain.run(chatdb.create_pool(copy).__aenter__())
    rates: dict[str, list[float]] = {"import": [], "copy": []}
    total = CONVERSATIONS * MESSAGES

    def emptied() -> None:
        plain.run(chatdb.delete_user(pool, user_id=USER))
        with server.connect("bench_run") as connection:
            connection.execute("vacuum chatdb.conversations, chatdb.messages")
            connection.execute("checkpoint")

    def copied() -> None:
        emptied()
        start = time.perf_counter()
        subprocess.run(
            [server.programs / "psql", "-q", "-v", "ON_ERROR_STOP=1", copy], input=script, text=True, check=True
        )
        rates["copy"].append(total / (time.perf_counter() - start))
        emptied()

    def imported() -> None:
        start = time.perf_counter()
        report = plain.run(import_conversations(pool, user_id=USER, items=items))
        rates["import"].append(total / (time.perf_counter() - start))
        assert report.messages == total

    benchmark.pedantic(imported, setup=copied, rounds=5, warmup_rounds=1)
    plain.run(pool.close())
    # use the best rounds, which the disk and other load on the machine delay least
    figures.bulk(max(rates["import"]), max(rates["copy"]))
