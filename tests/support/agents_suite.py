"""
A pytest plugin that runs openai-agents' own session tests on ChatDBSession.

It takes the place of SQLiteSession before the tests are imported. Load it from its folder, because the tests are in a
package `tests` as well: `PYTHONPATH=tests/support pytest -p agents_suite <sdist>/tests/memory`.
"""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import agents
import agents.extensions.memory.encrypt_session  # keeps SQLiteSession, with which it has a private contract
import agents.memory
import agents.memory.sqlite_session
import asyncpg
import pytest

from chatdb._core.dsn import connect_arguments
from chatdb.adapters.openai_agents import ChatDBSession

DSN = "CHATDB_SUITE_DSN"

UNSUITABLE = re.compile(
    # files, threads, locks and broken rows of SQLite
    "test_sqlite_session_(close|failed_|file_lock|keeps_connections|post_commit|reaps_|rollback_)|corrupt"
    # the framework's private contract with its own stores: a pop that validates, a suffix that is replaced atomically
    "|test_encrypted_pop_(authentication_is|cancellation_waits|rechecks_|wrong_key)"
    "|test_encrypted_compaction_skips_unencrypted_stored"
    "|test_settled_(clear|pop)_failure|rollback_budget.True"
    "|test_(automatic_compaction_does_not_reload|backend_read_limit_cannot|expired_read_overhead)"
)
"""Names of tests that look into SQLiteSession instead of calling it."""

_started = ExitStack()


class SwappedSession(ChatDBSession):
    """A ChatDBSession with SQLiteSession's parameters. Each database file is a user, and each call a connection."""

    def __init__(self, session_id: str, db_path: str | Path = ":memory:", *_: str, **options: Any) -> None:
        user = uuid.uuid4().hex if str(db_path) == ":memory:" else str(db_path)
        for name in ("sessions_table", "messages_table"):
            options.pop(name, None)
        super().__init__(session_id, db=None, user_id=user, **options)  # type: ignore[arg-type]

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        connection = await asyncpg.connect(**connect_arguments(os.environ[DSN]))
        try:
            session = ChatDBSession(
                self.session_id, db=connection, user_id=self._user_id, session_settings=self.session_settings
            )
            return await getattr(session, method)(*arguments, **options)
        finally:
            await connection.close()

    async def get_items(self, *arguments: Any, **options: Any) -> Any:
        """Read on a connection of its own."""
        return await self._call("get_items", *arguments, **options)

    async def add_items(self, *arguments: Any, **options: Any) -> None:
        """Append on a connection of its own."""
        await self._call("add_items", *arguments, **options)

    async def pop_item(self, *arguments: Any, **options: Any) -> Any:
        """Pop on a connection of its own."""
        return await self._call("pop_item", *arguments, **options)

    async def clear_session(self, *arguments: Any, **options: Any) -> None:
        """Clear on a connection of its own."""
        await self._call("clear_session", *arguments, **options)

    def close(self) -> None:
        """Do nothing."""


def pytest_configure() -> None:
    """Start a server, which the processes of xdist share, and swap the class."""
    if DSN not in os.environ:
        from chatdb.admin.migrate import apply_migrations
        from chatdb.embedded import EmbeddedServer

        folder = Path(_started.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        folder.chmod(0o711)
        os.environ[DSN] = _started.enter_context(EmbeddedServer(folder / "server")).dsn
        apply_migrations(os.environ[DSN])
    for module in (agents, agents.memory, agents.memory.sqlite_session):
        module.SQLiteSession = SwappedSession  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that cannot pass."""
    config.hook.pytest_deselected(items=[item for item in items if UNSUITABLE.search(item.name)])
    items[:] = [item for item in items if not UNSUITABLE.search(item.name)]


def pytest_unconfigure() -> None:
    """Stop the server."""
    _started.close()
