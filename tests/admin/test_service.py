"""chatdb.migrate, which a service awaits at its start."""

from __future__ import annotations

import asyncio

import pytest

import chatdb
from tests.support.migrations import NAMES


@pytest.mark.owner
async def test_migrate_applies_what_is_missing(empty_dsn: str) -> None:
    """The first call returns the names of all migrations, the next one an empty list."""
    assert await chatdb.migrate(empty_dsn) == NAMES
    assert await chatdb.migrate(empty_dsn) == []
    async with chatdb.create_pool(empty_dsn) as db:
        await chatdb.check_schema(db)


@pytest.mark.owner
async def test_many_migrate_at_once(empty_dsn: str) -> None:
    """Of several calls at the same time, one applies the migrations, and the others return an empty list."""
    assert sorted(await asyncio.gather(*(chatdb.migrate(empty_dsn) for _ in range(4)))) == [[], [], [], NAMES]


@pytest.mark.owner
@pytest.mark.parametrize("variable", ["DATABASE_URL", "CHATDB_MIGRATE_URL"])
async def test_the_database_of_the_environment(empty_dsn: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a DSN, CHATDB_MIGRATE_URL takes precedence over DATABASE_URL."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://localhost:1/nowhere")
    monkeypatch.setenv(variable, empty_dsn)
    assert await chatdb.migrate() == NAMES


async def test_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a DSN and without the variables, the error says what to set."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("CHATDB_MIGRATE_URL", raising=False)
    with pytest.raises(chatdb.ConfigurationError, match="pass dsn, or set DATABASE_URL"):
        await chatdb.migrate()


async def test_the_wait_is_checked(dsn: str) -> None:
    """A wait that is not a number of seconds is refused by name."""
    with pytest.raises(chatdb.InvalidInputError, match=r"^wait: "):
        await chatdb.migrate(dsn, wait=-1)
