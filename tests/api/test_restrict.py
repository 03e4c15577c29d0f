"""A host's constraint that prevents a deletion; PostgreSQL 18 uses another SQLSTATE for it than earlier versions."""

from __future__ import annotations

from typing import Any

import pytest

import chatdb
from chatdb import ConfigurationError
from tests.support.databases import execute


@pytest.mark.owner
@pytest.mark.parametrize("action", ["restrict", "no action"])
async def test_a_reference_of_the_hosts_keeps_a_conversation(dsn: str, db: Any, action: str) -> None:
    """The error names the constraint and its table, not an argument."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    execute(
        dsn,
        "create table public.pins (u text, c bigint, constraint pinned foreign key (u, c) "
        f"references chatdb.conversations (user_id, id) on delete {action})",
        f"insert into public.pins values ('alice', {conversation.id})",
    )
    with pytest.raises(ConfigurationError, match=r"constraint pinned on table public\.pins"):
        await chatdb.delete_conversation(db, user_id="alice", conversation_id=conversation.id)
