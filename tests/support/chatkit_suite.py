"""
A pytest plugin that runs ChatKit's own tests of stores and servers on ChatDBStore.

ChatKit's sdist has these tests, but not the store in SQLite that they import. The plugin puts ChatDBStore in its place.
`nox -s frameworks` downloads the sdist and runs them in its folder, so this module imports none of chatdb's tests.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import pytest_asyncio
from pydantic import BaseModel

import chatdb
from chatdb.adapters.chatkit import ChatDBStore
from chatdb.admin.migrate import apply_migrations
from chatdb.embedded import EmbeddedServer


class RequestContext(BaseModel):
    """The context of a request in ChatKit's tests."""

    user_id: str


class Store(ChatDBStore[RequestContext]):
    """A store whose threads have the name of a database in their keys, because each test uses a database of its own."""

    pool: ClassVar[chatdb.Pool]

    def __init__(self, db_path: str | None = None) -> None:
        self.db_path = db_path or "default"
        super().__init__(self.pool, user_id=lambda context: context.user_id, prefix=f"{self.db_path}:")


def _module(name: str, **values: Any) -> None:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(values)


_module("helpers", __path__=[])
_module("helpers.mock_store", SQLiteStore=Store)
_module("tests", __path__=[str(Path("tests").resolve())])  # not chatdb's tests, which an editable install finds first
_module("tests._types", RequestContext=RequestContext)


@pytest.fixture(scope="session")
def migrated_dsn() -> Iterator[str]:
    """Yield the DSN of a migrated database on a server of its own."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        EmbeddedServer(f"{folder}/server") as server,
    ):
        apply_migrations(server.dsn)
        yield server.dsn


@pytest_asyncio.fixture(autouse=True)
async def pool(migrated_dsn: str) -> AsyncIterator[None]:
    """Open a pool for the event loop of each test."""
    async with chatdb.create_pool(migrated_dsn) as Store.pool:
        yield
