"""Run the code blocks of docs/telemetry.md."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import chatdb
from tests.support.pages import python_blocks

pytestmark = pytest.mark.server_independent


async def test_a_listener_that_logs(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first block logs each call with its fields."""
    scope: dict[str, Any] = {}
    exec(python_blocks("telemetry.md")[0], scope)
    async with scope["open_pool"](dsn) as db:
        with caplog.at_level(logging.INFO, "service.chatdb"):
            await chatdb.create_conversation(db, user_id="alice", key="thread")
    [record] = caplog.records
    assert record.getMessage() == "chatdb.create_conversation"
    fields = vars(record)
    assert (fields["rows"], fields["retries"], fields["error"], fields["wait"]) == (1, 0, None, 0)
    assert 0 < fields["duration"] < 10
