"""A conversation for tests of the public functions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import asyncpg
import pytest

import chatdb
from tests.support.talk import Talk


@pytest.fixture
async def talk(tx: asyncpg.Connection) -> Talk:
    """Give an empty conversation of alice that was created an hour ago, to be used inside a transaction."""
    created = await chatdb.create_conversation(tx, user_id="alice", title="Talk")
    hour_ago = created.created_at - timedelta(hours=1)
    await tx.execute("update chatdb.conversations set created_at = $1, updated_at = $1", hour_ago)
    return Talk(tx, await chatdb.get_conversation(tx, user_id="alice", conversation_id=created.id))


@pytest.fixture
async def committed(db: Any) -> Talk:
    """Give an empty conversation of alice, to be used through the pool."""
    return Talk(db, await chatdb.create_conversation(db, user_id="alice", title="Talk"))
