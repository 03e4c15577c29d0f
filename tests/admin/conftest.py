"""Fixtures for the tests of the operator commands."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.databases import as_role, execute
from tests.support.paths import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a copy of the migrations."""
    return Path(shutil.copytree(ROOT / "migrations", tmp_path / "migrations"))


@pytest.fixture
def owner(empty_dsn: str) -> Iterator[str]:
    """Yield the DSN of a role that owns the database and is not a superuser."""
    name = f"owner_{os.getpid()}"
    execute(
        empty_dsn,
        f"create role {name} login password '{name}'",
        f"grant {name} to current_user",
        "do $$ begin execute format('alter database %I owner to " + name + "', current_database()); end $$",
        f"grant create, usage on schema public to {name}",
    )
    yield as_role(empty_dsn, name)
    execute(
        empty_dsn,
        "do $$ begin execute format('alter database %I owner to %I', current_database(), session_user); end $$",
        f"drop owned by {name}",
        f"drop role {name}",
    )
