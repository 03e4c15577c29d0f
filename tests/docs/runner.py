"""
Run the code blocks of a page one after another, as a reader would.

Python blocks share their variables and may await, as in `python -m asyncio`. A block of text after one is what it
prints. One that begins with a comment that names a file is saved there. SQL blocks run in the same database, shell
blocks in one folder, and `uvicorn` until the end of the page. YAML, JSON, TOML, INI and Dockerfile blocks are parsed. A
paragraph that says "The tests do not run this block, because", or "only parse", is about the next block.
"""

from __future__ import annotations

import ast
import asyncio
import configparser
import contextlib
import inspect
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Generator, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import httpx
import psycopg
import yaml

import chatdb
from tests.support.paths import ROOT

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (add to )?([\w/]+\.py)\n")
ADDRESS = "http://127.0.0.1:8000"
EXCUSE = re.compile(r"\bThe\s+tests\s+(?:do\s+not\s+run|only\s+parse)\s+this\s+block,\s+because\b")
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


class Runner:
    """Runs the blocks of pages in one folder and one database."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder
        self.scope: dict[str, Any] = {}
        self.address = ADDRESS

    async def run(self, page: Path) -> None:
        """Run the blocks of a page, whose first has an open pool `db`."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.close_clients)
            pool = await stack.enter_async_context(chatdb.create_pool())
            self.scope |= {"__name__": "page", "asyncio": asyncio, "chatdb": chatdb, "db": pool}
            printed: str | None = None
            for block in blocks(page):
                if block.language == "text":
                    assert printed in {None, block.code}, (page.name, printed)
                elif file := FILE.match(block.code):
                    compile(block.code, page.name, "exec")
                    with (self.folder / file[2]).open("a" if file[1] else "w", encoding="utf-8") as written:
                        written.write(block.code)
                elif block.code.startswith("uvicorn "):
                    stack.enter_context(self.service(block.code))
                elif block.language == "python":
                    printed = await self.python(block, page.name)
                elif block.language in {"sh", "sql"}:
                    if not block.is_excused:
                        {"sh": self.shell, "sql": self.sql}[block.language](block.code)
                elif block.language != "powershell" or not block.is_excused:
                    parse(block)

    async def python(self, block: Block, name: str) -> str | None:
        """Run a block as `python -m asyncio` would, and return what it prints."""
        text = block.code.replace(ADDRESS, self.address)
        code = compile(text, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if block.is_excused:
            return None
        with contextlib.redirect_stdout(io.StringIO()) as output:
            result = eval(code, self.scope)
            if inspect.iscoroutine(result):
                await result
        return output.getvalue()

    async def close_clients(self) -> None:
        """Close what a reader's interpreter closes at its end."""
        for value in self.scope.values():
            if isinstance(value, httpx.AsyncClient):
                await value.aclose()

    def sql(self, script: str) -> None:
        """Run statements, each in a transaction of its own."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            for statement in filter(str.strip, script.split(";\n")):
                connection.execute(statement.encode())

    def shell(self, script: str) -> None:
        """Run a script with the environment's programs on the path."""
        command = ["bash", "-euc", script]
        done = subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    @contextlib.contextmanager
    def service(self, command: str) -> Generator[None]:
        """Run a service on a free port, and stop it at the end of the page."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        arguments = [*command.split(), "--port", str(port), "--log-level", "warning"]
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=self.folder, env=self.environment())
        try:
            for _ in range(1200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None, "the service has ended"
                time.sleep(0.05)
            else:
                raise AssertionError("the service does not start")
            yield
        finally:
            process.terminate()
            process.wait()

    def environment(self) -> dict[str, str]:
        """Return the variables for programs."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "DATABASE_URL": self.dsn, "CHATDB_HOME": str(self.folder / "home")}


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


def single_pages() -> list[Path]:
    """Return the pages that run alone. The security page, whose SQL creates roles, is in tests/docs/test_pages.py."""
    folders = ("howto", "reference", "explanation")
    return sorted(
        path for folder in folders for path in (ROOT / "docs" / folder).glob("*.md") if path.stem != "security"
    )
