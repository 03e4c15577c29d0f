"""Run the code blocks of docs/operations/telemetry.md."""

from __future__ import annotations

import inspect
import logging
import re
from typing import Any

import pytest

import chatdb
from chatdb import telemetry
from tests.support.pages import python_blocks
from tests.support.paths import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.server_independent]


async def test_a_listener_that_logs(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """The first block logs each call with its fields."""
    scope: dict[str, Any] = {}
    exec(python_blocks("operations/telemetry.md")[0], scope)
    async with scope["open_pool"](dsn) as db:
        with caplog.at_level(logging.INFO, "service.chatdb"):
            await chatdb.create_conversation(db, user_id="alice", key="thread")
    [record] = [each for each in caplog.records if each.name == "service.chatdb"]
    assert record.getMessage() == "chatdb.create_conversation"
    fields = vars(record)
    assert (fields["rows"], fields["retries"], fields["error"], fields["wait"]) == (1, 0, None, 0)
    assert 0 < fields["duration"] < 10


async def test_the_instrumentation(dsn: str) -> None:
    """The block for OpenTelemetry instruments a pool."""
    scope: dict[str, Any] = {"chatdb": chatdb}
    exec(python_blocks("operations/telemetry.md")[1], scope)
    async with scope["open_instrumented_pool"](dsn) as db:
        assert db.call_listeners is not None
        assert await chatdb.list_pinned(db, user_id="alice") == []


def test_the_tables() -> None:
    """The page has each field of a call, and each metric and attribute that chatdb.telemetry reports."""
    page = (ROOT / "docs" / "operations" / "telemetry.md").read_text(encoding="utf-8")
    assert [name for name in chatdb.Call.__dataclass_fields__ if f"| `{name}` |" not in page] == []
    reported = set(re.findall(r'"((?:chatdb|db|server|error)\.[a-z_.]+)"', inspect.getsource(telemetry)))
    assert {name for name in reported if f"`{name}`" not in page} == {"db.client.connection.state"}
