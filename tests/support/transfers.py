"""Exports, and the id of a session in another framework."""

from __future__ import annotations

import json
from typing import Any

import chatdb
from chatdb.pool import Pool
from chatdb.transfer import jsonlines
from chatdb.transfer.exporter import export_conversations

SESSION = "0190b1c0-0000-7000-8000-000000000001"


async def exported(db: Pool, user: str = "alice") -> bytes:
    """Return the output of `chatdb export`."""
    lines = [jsonlines.header()]
    conversations = messages = 0
    async for record in export_conversations(db, user_id=user):
        if isinstance(record, chatdb.Conversation):
            conversations += 1
            lines.append(jsonlines.conversation_line(record))
        else:
            messages += 1
            lines.append(jsonlines.message_line(record))
    return b"".join([*lines, jsonlines.end_line(conversations, messages)])


_OWN = {"id", "user_id", "revision"}


def portable(text: bytes) -> list[dict[str, Any]]:
    """Return exported lines without the fields that differ between databases and users."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if name not in _OWN} for line in lines]
