"""The page of examples/fastapi names the files, variables and commands that exist, and README shows its pictures."""

from __future__ import annotations

import ast
import asyncio
import io
import re
import struct
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import chatdb
from tests.support.paths import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.server_independent]

FOLDER = ROOT / "examples" / "fastapi"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
CODE = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
"""The tokens that are no code."""
IMAGES = ROOT / "docs" / "images"


def test_the_map() -> None:
    """The page lists every file."""
    (block,) = re.findall(r"^## Where things are\n\n```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    listed = [line.split()[0] for line in block.splitlines()]
    caches = re.compile(r"\.|__pycache__")
    files = {path.name + "/" * path.is_dir() for path in FOLDER.iterdir() if not caches.match(path.name)}
    assert sorted(listed) == sorted(files - {"README.md"})


def test_the_names() -> None:
    """Each name that the page places in a file is there."""
    placed = re.findall(r"`(\w+)`\s+in\s+`(\w+\.py)`", PAGE)
    assert len(placed) >= 5
    assert [(name, file) for name, file in placed if not re.search(rf"\b{name}\b", CODE[file])] == []


def lines_of_code(text: str) -> int:
    """Count the lines of a module that are neither blank nor only a comment or a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def test_the_length() -> None:
    """The example has at most 500 lines of code."""
    assert lines_of_code('"""A docstring."""\n\n# comment\nx = (\n    1\n)  # comment\n') == 3
    assert sum(map(lines_of_code, CODE.values())) <= 500


def test_the_variables() -> None:
    """The page lists every environment variable that the code reads."""
    code = "".join(CODE.values())
    read = set(re.findall(r'(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\()"(\w+)"', code))
    (table,) = re.findall(r"^## Environment variables\n\n(.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])}
    assert listed == read | {"OPENAI_API_KEY"}, "openai reads OPENAI_API_KEY itself"


def test_your_own_server(empty_dsn: str) -> None:
    """The commands for a server of one's own create the tables, and then start the example."""
    (block,) = re.findall(r"^```sh\n(export DATABASE_URL.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    export, migrate, start = block.splitlines()
    assert start == ".venv/bin/python examples/fastapi"
    install, command = migrate.split(" && ")
    assert install == ".venv/bin/pip install -q -e '.[cli]'"
    script = f"{export}; {command}".replace("postgresql://localhost/chat", f"'{empty_dsn}'")
    script = script.replace(".venv/bin", str(Path(sys.executable).parent))
    subprocess.run(["bash", "-euc", script], check=True, cwd=ROOT, capture_output=True)
    asyncio.run(check_schema(empty_dsn))


async def check_schema(dsn: str) -> None:
    """Check the database as the example does."""
    async with chatdb.create_pool(dsn) as db:
        await chatdb.check_schema(db)


def test_the_command() -> None:
    """The command that starts the example is one line, and README has the same one."""
    (command,) = (line for line in PAGE.splitlines() if line.startswith("python3 -m venv"))
    assert command.endswith("&& .venv/bin/python examples/fastapi")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_pictures() -> None:
    """Every picture is small and shown, and each page's pictures exist."""
    pages = [ROOT / "README.md", FOLDER / "README.md"]
    shown = {
        (page.parent / target).resolve()
        for page in pages
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    files = set(IMAGES.glob("*.png"))
    assert files == {path for path in shown if path.parent == IMAGES}
    for file in files:
        data = file.read_bytes()
        assert len(data) < 150_000, file.name
        assert struct.unpack(">BB", data[24:26]) == (8, 3), f"{file.name} has no palette"
