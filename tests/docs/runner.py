"""
Run the code blocks of a page one after another, as a reader would.

Python blocks share their variables and may await; SQL blocks run in the same database, shell blocks in one folder. A
block of text after a Python block is what it prints. A Python block that begins with a comment that names a file is
saved there. YAML, JSON, TOML, INI and Dockerfile blocks are parsed. A paragraph that says "The tests do not run" or
"The tests only parse", and why, is about the next block.
"""

from __future__ import annotations

import configparser
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, NamedTuple

import psycopg
import yaml

import chatdb
from tests.support.paths import ROOT

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
EXCUSE = re.compile(r"\bThe\s+tests\s+(?:do\s+not\s+run|only\s+(?:parse|compile))\b")
DOCKERFILE = re.compile(
    r"(FROM|RUN|COPY|ADD|ENV|ARG|WORKDIR|USER|EXPOSE|ENTRYPOINT|CMD|HEALTHCHECK|VOLUME|LABEL) \S[\s\S]*", re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block, and whether the paragraph before it says that the tests do not run it."""

    language: str
    code: str
    is_excused: bool


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()].rstrip().rpartition("\n\n")[2]
        is_excused = not before.endswith("```") and EXCUSE.search(before) is not None
        found.append(Block(fence["language"], dedent(fence["code"]), is_excused))
    return found


async def run_page(page: Path, dsn: str, folder: Path) -> dict[str, Any]:
    """Run the blocks of a page, and return the variables of its Python blocks."""
    os.chdir(folder)
    scope: dict[str, Any] = {"chatdb": chatdb, "__name__": "page"}
    async with contextlib.AsyncExitStack() as stack:
        scope["db"] = await stack.enter_async_context(chatdb.create_pool())
        printed: str | None = None
        for block in blocks(page):
            named = re.match(r"# ([\w/]+\.py)\n", block.code)
            if block.language == "text":
                assert printed in {None, block.code}, (page.name, printed)
                printed = None
            elif block.language == "python" and not named:
                compile(f"async def block():\n{indent(block.code, '    ')}", page.name, "exec")
                printed = None if block.is_excused else await _run_python(block.code, scope)
            else:
                printed = None
                if named:
                    compile(block.code, page.name, "exec")
                    (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
                    (folder / named[1]).write_text(block.code, encoding="utf-8")
                elif block.language == "sql" and not block.is_excused:
                    with psycopg.connect(dsn, autocommit=True) as connection:
                        for statement in filter(str.strip, block.code.split(";\n")):
                            connection.execute(statement.encode())
                elif block.language == "sh" and not block.is_excused:
                    printed = _run_shell(block.code, dsn, folder)
                elif block.language not in {"sql", "sh"}:
                    parse(block)
    return scope


async def _run_python(code: str, scope: dict[str, Any]) -> str:
    # a function whose variables become those of the scope, so that the next block has them
    wrapped = f"async def block():\n    try:\n{indent(code, '        ')}\n    finally:\n        keep(locals())"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(wrapped, scope | {"keep": scope.update}, made := {})
        await made["block"]()
    return output.getvalue()


def _run_shell(code: str, dsn: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "DATABASE_URL": dsn, "CHATDB_HOME": str(folder / "home")}
    done = subprocess.run(["bash", "-euc", code], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(block: Block) -> None:
    """Check that a block is valid in its language."""
    if block.language == "yaml":
        documents = list(yaml.safe_load_all(block.code))
        assert documents
        assert all(isinstance(each, dict) for each in documents)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "ini":
        configparser.ConfigParser(strict=False).read_string(block.code)
    elif block.language == "dockerfile":
        lines = [line for line in block.code.splitlines() if line.strip() and not line.startswith("#")]
        steps = "\n".join(lines).replace("\\\n", " ").splitlines()
        assert steps[0].startswith("FROM ")
        assert all(map(DOCKERFILE.fullmatch, steps)), steps
    else:
        raise AssertionError(f"a block of the unknown language {block.language!r}")


def examples(page: Path) -> Iterator[tuple[str, list[Block]]]:
    """Yield the heading of each section of a page, with its blocks."""
    text = page.read_text(encoding="utf-8")
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        yield heading, [Block(f["language"], f["code"], False) for f in FENCE.finditer(body)]


def new_pages() -> list[Path]:
    """Return the pages whose blocks this module runs."""
    folders = ("tutorial", "howto", "reference", "explanation")
    return sorted(path for folder in folders for path in (ROOT / "docs" / folder).glob("*.md"))
