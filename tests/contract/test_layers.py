"""The import contracts that `nox -s lint` checks find every breach they forbid."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BREACHES = {
    "a layer above": ("admin/ownership.py", "import chatdb.cli.console", "Each layer imports only"),
    "a layer beside": (
        "formats/chatgpt.py",
        "import chatdb.admin.ownership",
        "Each layer imports only",
    ),
    "beside the core": (
        "_core/decode.py",
        "def f():\n    import chatdb.transfer.files",
        "The core imports no",
    ),
    "the testing kit": ("admin/migrate.py", "def f():\n    import chatdb.testing.servers", "Each layer imports only"),
    "an extra": ("users.py", "def f():\n    import psycopg", "The core imports no"),
    "at once": ("__init__.py", "import chatdb.transfer.files", "chatdb itself imports"),
    "a driver": ("formats/items.py", "import asyncpg", "The formats use no"),
    "a file": ("formats/openai.py", "import pathlib", "The formats use no"),
    "a private module": ("adapters/__init__.py", "import chatdb._core.query", "The adapters use only"),
    "a cycle": ("_core/decode.py", "import chatdb._core.query", "No modules import each other"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_found(breach: str, tmp_path: Path) -> None:
    """A forbidden import breaks its contract."""
    file, line, contract = BREACHES[breach]
    shutil.copytree(ROOT / "chatdb", tmp_path / "chatdb", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    path = tmp_path / "chatdb" / file
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert any(row.startswith(contract) and " BROKEN" in row for row in done.stdout.splitlines()), done.stdout
