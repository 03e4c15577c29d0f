"""The pages of the documentation site run, and the reference has every public name."""

from __future__ import annotations

import asyncio
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

import chatdb
from chatdb.cli.app import app
from tests.docs import runner, site
from tests.support.paths import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.server_independent, pytest.mark.owner]

EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
PAGES = {
    "tutorial": sorted((ROOT / "docs" / "tutorial").glob("*.md")),
    **{str(path.relative_to(ROOT / "docs").with_suffix("")): [path] for path in runner.single_pages()},
}
"""The pages that run in one folder and one database: those of the tutorial build on each other."""


@pytest.mark.parametrize("name", PAGES)
async def test_the_blocks_of_a_page_run(name: str, dsn: str, monkeypatch, tmp_path: Path) -> None:
    """Each block runs and prints what the page shows, or is parsed, or the page says why not."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.chdir(tmp_path)
    run = runner.Runner(dsn, tmp_path)
    for page in PAGES[name]:
        async with asyncio.timeout(120):
            await run.run(page)


def test_the_reference_is_complete() -> None:
    """Each public name has one section, with an example that uses it."""
    found: list[str] = []
    for page in REFERENCE:
        for heading, blocks in runner.examples(page):
            if heading in chatdb.__all__:
                found.append(heading)
                python = "".join(block.code for block in blocks if block.language == "python")
                assert re.search(rf"chatdb\.{heading}\b", python), f"{page.name}: {heading} has no example"
    assert sorted(found) == sorted(chatdb.__all__), "add a section to a page in docs/reference/"


def test_the_site_adds_signatures() -> None:
    """The site has the signature and docstring of each public name."""
    text = "".join(site.with_docstrings(page.read_text(encoding="utf-8")) for page in REFERENCE)
    assert sorted(re.findall(r"^::: chatdb\.(\w+)$", text, re.MULTILINE)) == sorted(chatdb.__all__)


def test_the_navigation_has_every_page() -> None:
    """docs/README.md lists every page, or the page of its folder does."""
    listed = [path for pages in site.sections().values() for *_, path in pages]
    assert [path for path in listed if not path.is_file()] == []
    folders = {path.parent for path in listed if path.name == "README.md"}
    missing = [
        str(path.relative_to(ROOT))
        for path in site.pages()
        if path not in {*listed, site.INDEX, ROOT / "README.md"} and path.parent not in folders
    ]
    assert missing == [], "list the page in docs/README.md"


def test_every_command_in_the_pages_parses() -> None:
    """Each command in a shell block, also of pages that others test, has a name and options that exist."""
    group: Any = typer.main.get_command(app)
    found = 0
    for page in site.pages():
        scripts = [block.code for block in runner.blocks(page) if block.language == "sh"]
        for line in "".join(scripts).replace("\\\n", " ").splitlines():
            for extras in re.findall(r"chatdb\[([\w,-]+)\]", line):
                assert set(extras.split(",")) <= EXTRAS, (page.name, line)
            if line.startswith("chatdb "):
                name, *arguments = shlex.split(line, comments=True)[1:]
                group.commands[name].make_context(name, arguments)  # exits if an option is unknown
                found += 1
    assert found > 25


def test_every_block_that_is_not_run_parses() -> None:
    """Each block of YAML, JSON, TOML, INI or a Dockerfile is valid, also on pages that others test."""
    run = {"python", "sh", "sql", "powershell", "text", ""}
    found = [(page, block) for page in site.pages() for block in runner.blocks(page) if block.language not in run]
    for page, block in found:
        try:
            runner.parse(block)
        except Exception as error:
            raise AssertionError(f"{page.name}: {error}") from error
    assert {block.language for _, block in found} >= {"yaml", "ini", "dockerfile"}


def test_the_command_line_page() -> None:
    """The generated page has each command with its options."""
    text = site.command_line()
    for command in ("migrate", "import", "export", "prune", "search-index"):
        assert f"\n## chatdb {command}\n" in text
    assert "| `-y, --yes` | " in text


def test_a_dead_link_and_a_foreign_host_are_found(tmp_path: Path) -> None:
    """The check of the built site reports dead links and anchors, and what would come from another host."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{site.POLICY}">'
    good = f'{policy}<h1 id="a"></h1><a href="#a"></a><a href="https://example.com/"></a>'
    (tmp_path / "index.html").write_text(good, encoding="utf-8")
    (tmp_path / "search.json").touch()
    (tmp_path / "objects.inv").touch()
    assert list(site.problems(tmp_path)) == []
    bad = '<a href="b.html"></a><a href="#b"></a><script src="https://example.com/a.js"></script>'
    (tmp_path / "index.html").write_text(good + bad, encoding="utf-8")
    (tmp_path / "bare.html").write_text("<p>", encoding="utf-8")
    (tmp_path / "a.css").write_text("a { background: url(https://example.com/a.png) }", encoding="utf-8")
    assert sorted(site.problems(tmp_path)) == [
        "a.css: loads https://example.com/a.png",
        "bare.html: no Content-Security-Policy",
        "index.html: loads https://example.com/a.js",
        "index.html: no anchor #b",
        "index.html: no file b.html",
    ]
