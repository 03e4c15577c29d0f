"""If asyncpg lacks private names that the fast path uses, chatdb uses asyncpg's public API with the same results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import chatdb
from chatdb._core import asyncpg_private
from chatdb._core.asyncpg_private import NEEDED, DefaultCodecRows
from chatdb._core.dsn import connect_arguments
from chatdb.messages import _get_history
from tests.support.calls import conversation_with_a_message

pytestmark = pytest.mark.server_independent

PROGRAM = Path(__file__).with_name("without_a_name.py")

COMPILED = {"Protocol", "_cancel_current_command"}
"""Names that asyncpg's compiled part defines or calls, so a copy of its sources cannot rename them."""

NAMES = [(owner.__name__, name) for owner, names in NEEDED.items() for name in names]


def renamed(source: str, names: set[str]) -> str:
    """Return asyncpg's source with these names renamed, except `_queue` in the queue class, which is asyncio's."""
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    head, mark, rest = source.partition("class PoolConnectionProxyMeta")
    if mark:
        pattern_of_head = re.compile(rf"\b({'|'.join(names - {'_queue'} or {'_none'})})\b")
        return pattern_of_head.sub(r"\1_renamed", head) + mark + pattern.sub(r"\1_renamed", rest)
    return pattern.sub(r"\1_renamed", source)


def asyncpg_without(folder: Path, names: set[str]) -> Path:
    """Copy asyncpg to a folder with these names renamed, and return the folder."""
    original = Path(asyncpg.__file__).parent
    shutil.copytree(original, folder / "asyncpg", ignore=shutil.ignore_patterns("*.pyx", "*.pxd"))
    for path in (folder / "asyncpg").glob("*.py"):
        before = path.read_text("utf-8")
        if (after := renamed(before, names)) != before:  # the others keep their compiled bytecode
            path.write_text(after, "utf-8")
    return folder


def expected(missing: list[str]) -> dict[str, Any]:
    """Return the expected results. If private names prevent bypassing a custom codec, chatdb refuses it."""
    return EXPECTED | {"codec": "ConfigurationError" if "Connection._get_statement" in missing else "none"}


def outcome(dsn: str, folder: Path | str, *hidden: str) -> dict[str, Any]:
    """Return the program's results with the asyncpg in a folder, or with names hidden during chatdb's import."""
    command = [sys.executable, str(PROGRAM), dsn, str(folder), *hidden]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


EXPECTED = {
    "history": ["one", "two", "three"],
    "last": ["three"],
    "committed": True,
    "rolled back": True,
    "swallowed": "ChatDBError",
    "savepoint": True,
    "nested": True,
    "named user": True,
    "cancelled": "whole",
    "cancelled in a transaction": "whole",
    "begin cancelled": "whole",
    "too slow": "CommandTimeoutError",
    "order": True,
    "exhausted": "AcquireTimeoutError",
    "reset": True,
    "lost": True,
    "dropped statements": True,
    "another loop": ["ConfigurationError"] * 3,
    "another process": "ConfigurationError",
    "bare connection": ["one", "two", "three"],
    "asyncpg's pool": ["one", "two", "three"],
    "closed": "PoolClosedError",
}


@pytest.mark.chaos
@pytest.mark.parametrize(("owner", "name"), NAMES)
def test_each_name_can_be_missing(dsn: str, tmp_path: Path, owner: str, name: str) -> None:
    """Without any single private name, every use has its expected result, and one warning names what is missing."""
    if {owner, name} & COMPILED:
        found = outcome(dsn, "-", owner, name)
    else:
        found = outcome(dsn, asyncpg_without(tmp_path, {name}))
    missing = found.pop("missing")
    assert f"{owner}.{name}" in missing
    assert found.pop("warnings") == 1
    assert found == expected(missing)


def test_all_names_can_be_missing(dsn: str, tmp_path: Path) -> None:
    """Without all private names, every use has its expected result."""
    names = {name for owner, name in NAMES if not {owner, name} & COMPILED}
    found = outcome(dsn, asyncpg_without(tmp_path, names))
    missing = found.pop("missing")
    assert missing == [f"{owner}.{name}" for owner, name in NAMES if name in names]
    assert found.pop("warnings") == 1
    assert found == expected(missing)


def test_no_name_is_missing(dsn: str) -> None:
    """With the installed asyncpg, the program uses the fast path, logs no warning, and has the same results."""
    found = outcome(dsn, "-")
    assert (found.pop("missing"), found.pop("warnings")) == ([], 0)
    assert found == expected([])


@pytest.mark.parametrize("is_fast", [True, False], ids=["fast", "public"])
async def test_rows_with_the_drivers_own_types(dsn: str, is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chatdb pool never validates rows; other handles skip validation if the private names exist."""
    monkeypatch.setattr(asyncpg_private, "FAST", is_fast)
    async with (
        chatdb.create_pool(dsn) as db,
        asyncpg.create_pool(**connect_arguments(dsn)) as plain,
        db.acquire() as ours,
        plain.acquire() as theirs,
    ):
        conversation = await conversation_with_a_message(db)
        args = ("alice", conversation.id, 99, 99)
        for handle in (db, ours, plain, theirs, theirs._con):
            for _ in ("not prepared", "prepared"):
                rows = await _get_history._rows(handle, args)
                assert (len(rows), type(rows) is DefaultCodecRows) == (3, is_fast or handle in (db, ours))
        async with chatdb.transaction(db) as inside:
            async for row in inside.cursor(_get_history.sql, *args):
                assert type(row) is asyncpg.Record
        assert {type(row) for row in await db.fetch("select 1 union all select 2")} == {asyncpg.Record}
