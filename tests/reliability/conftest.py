"""Servers that tests can kill, and a record of chatdb's retries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count

import pytest

from chatdb.admin.migrate import apply_migrations
from chatdb.embedded.server import EmbeddedServer
from tests.support.databases import database_of, execute
from tests.support.embedded import temporary_server

_serial = count()


@pytest.fixture(scope="module")
def durable() -> Iterator[EmbeddedServer]:
    """Yield the module's own server, which flushes to disk as in production and can be killed."""
    with temporary_server() as server:
        apply_migrations(server.dsn)
        yield server


@pytest.fixture
def durable_dsn(durable: EmbeddedServer) -> Iterator[str]:
    """Yield the DSN of the test's own migrated database on that server."""
    name = f"chatdb_chaos_{next(_serial)}"
    execute(database_of(durable.dsn, "postgres"), f"create database {name} template chatdb")
    yield database_of(durable.dsn, name)
    execute(database_of(durable.dsn, "postgres"), f"drop database {name} with (force)")


@pytest.fixture
def repetitions() -> Iterator[list[str]]:
    """Collect chatdb's log messages about retries, and keep them out of the output."""
    found: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        found.append(record.getMessage())
        return False

    logger = logging.getLogger("chatdb")
    logger.addFilter(collect)
    yield found
    logger.removeFilter(collect)
