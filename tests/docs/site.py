"""
Build and check the documentation site: `nox -s docs`, or `python -m tests.docs.site FOLDER`.

The pages are those of the repository, at the same relative paths, so the same links work on the site and in a checkout.
docs/README.md is the navigation. The build adds what is generated: the signatures and docstrings, the command line, and
the statements with their plans.

Decision: docs/decisions/0024-the-site-is-built-with-zensical.md
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psycopg
import typer.main
from psycopg import sql
from pydantic import BaseModel

import chatdb
from chatdb._core.query import data_folder, statement_files
from chatdb.admin.migrate import apply_migrations
from chatdb.cli.app import app
from chatdb.embedded.server import EmbeddedServer
from tests.support.catalog import DATA, SEARCH_INDEX
from tests.support.paths import ROOT

PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/*/README.md")
INDEX = ROOT / "docs" / "README.md"
UNSEARCHED = (ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "reference" / "statements.md")
"""Pages that name everything, and answer no question of a user."""
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; worker-src 'self' blob:"
)
"""Browsers load nothing from another host. The theme's script could, for features that no page uses."""
HEAD = f"""{{% extends "base.html" %}}
{{% block extrahead %}}<meta http-equiv="Content-Security-Policy" content="{POLICY}">{{% endblock %}}
"""
STYLE = """\
.md-typeset h4.doc-heading { display: none; }
.md-typeset .doc-signature { margin-top: 0; }
.md-typeset table:not([class]) { font-size: .7rem; }
.md-typeset table:not([class]) :is(td, th) { min-width: 0; padding: .5em .8em; }
.md-typeset :is(td, th):first-child code { white-space: nowrap; }
"""
STOP_WORDS = (
    "a an and are be between can could did difference do does for from happen happens how i if in is it its me mean my "
    "of on or our s see several should that the there this to use we what when where which who why will with would you "
    "your"
)
SEPARATOR = r"""[\s\-_,:!=\[\]()\\"'`/?]+|\.(?!\d)|\b(?:{})\b""".format(
    "|".join(f"[{word[0].upper()}{word[0]}]{word[1:]}" for word in STOP_WORDS.split())
)
"""The search finds sections with all words, so words that only make a question are separators, like spaces."""
SETTINGS: dict[str, Any] = {
    "site_name": "chatdb",
    "site_description": "Stores chatbot conversations and messages in PostgreSQL for asyncio services.",
    "docs_dir": "pages",
    "extra_css": ["site.css"],
    "theme": {
        "name": "material",
        "font": False,
        "custom_dir": "theme",
        "features": ["content.code.copy", "navigation.tabs", "navigation.top", "search.highlight", "toc.follow"],
        "palette": [
            {
                "media": f"(prefers-color-scheme: {name})",
                "scheme": scheme,
                "toggle": {"icon": f"lucide/{icon}", "name": f"Use the {other} theme"},
            }
            for name, scheme, icon, other in (("light", "default", "sun", "dark"), ("dark", "slate", "moon", "light"))
        ],
    },
    "plugins": [
        {"search": {"separator": SEPARATOR}},
        {
            "mkdocstrings": {
                "handlers": {
                    "python": {
                        "paths": [str(ROOT)],
                        "options": {
                            "docstring_style": None,
                            "formatter": "ruff",
                            "heading_level": 4,
                            "line_length": 88,
                            "separate_signature": True,
                            "show_bases": False,
                            "show_root_full_path": False,
                            "show_root_heading": True,
                            "show_root_toc_entry": False,
                            "show_signature_annotations": True,
                            "show_source": False,
                        },
                    }
                }
            }
        },
    ],
    "markdown_extensions": [
        "admonition",
        "attr_list",
        "pymdownx.details",
        "pymdownx.highlight",
        "pymdownx.superfences",
        {"toc": {"permalink": True, "toc_depth": 3}},
    ],
}


def pages() -> list[Path]:
    """Return the pages of the site."""
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


def sections() -> dict[str, list[tuple[str, str, Path]]]:
    """Return the groups (or ""), titles and pages that docs/README.md lists, by section."""
    text = INDEX.read_text(encoding="utf-8")
    found: dict[str, list[tuple[str, str, Path]]] = {}
    for name, body in re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", text, re.MULTILINE):
        found[name] = []
        for part in re.split(r"^### ", f"\n{body}", flags=re.MULTILINE):
            group, _, lines = part.partition("\n")
            links = re.findall(r"^- \[([^\]]+)\]\(([^)#:]+\.md)\)", lines, re.MULTILINE)
            found[name] += [(group, title, (INDEX.parent / target).resolve()) for title, target in links]
    return found


def navigation() -> list[dict[str, object]]:
    """Return the tree of pages. A page that is a README.md brings the others in its folder."""
    nav: list[dict[str, object]] = [{"Home": "README.md"}]
    for name, listed in sections().items():
        groups: dict[str, list[object]] = {"": [{"Overview": "docs/README.md"}] if len(nav) == 1 else []}
        for group, title, path in listed:
            inside = [each for each in sorted(path.parent.glob("*.md")) if each != path] * (path.name == "README.md")
            entry: object = str(path.relative_to(ROOT))
            if inside:
                entry = [entry, *(str(each.relative_to(ROOT)) for each in inside)]
            groups.setdefault(group, []).append({title: entry})
        nav.append({name: groups.pop("") + [{group: items} for group, items in groups.items()]})
    return nav


def build(folder: Path) -> Path:
    """Write the pages into a folder, build the site there, and return the site's folder."""
    source = folder / "pages"
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if path.is_relative_to(ROOT / "docs" / "reference"):
            text = with_docstrings(text)
        for generated, write in GENERATED.items():
            if (marker := f"<!-- generated: {generated} -->") in text:
                text = text.replace(marker, write())
        if path in UNSEARCHED:
            text = f"---\nsearch:\n  exclude: true\n---\n\n{text}"
        _write(source / path.relative_to(ROOT), text)
        for target in filter(None, LINK.findall(text)):
            linked = (path.parent / unquote(target)).resolve()
            if linked.is_file() and linked.suffix != ".md":
                copy = source / linked.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(linked, copy)
    _write(source / "site.css", STYLE)
    _write(folder / "theme" / "main.html", HEAD)
    _write(folder / "mkdocs.yml", json.dumps(SETTINGS | {"nav": navigation()}))  # JSON is YAML
    subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")],
        check=True,
        cwd=folder,
    )
    return folder / "site"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def with_docstrings(text: str) -> str:
    """Add signature, docstring and fields below each heading that is a public name."""

    def add(heading: re.Match[str]) -> str:
        name = heading[1]
        if name not in chatdb.__all__:
            return heading[0]
        found = getattr(chatdb, name)
        rows = ""
        if isinstance(found, type) and issubclass(found, BaseModel):
            rows = "\n\n| field | type | |\n|---|---|---|"
            for field, described in found.model_fields.items():
                kind = re.sub(r"^SkipValidation\[(.*)\]$", r"\1", str(found.__annotations__[field]))
                rows += f"\n| `{field}` | `{kind}` | {_cell(described.description or '')} |"
        return f"{heading[0]}\n\n::: chatdb.{name}{rows}"

    return re.sub(r"^## (\w+)$", add, text, flags=re.MULTILINE)


def command_line() -> str:
    """Return a section for each command, with its help and its options."""
    group: Any = typer.main.get_command(app)
    parts = [_command_section(group, "chatdb")]
    parts += [_command_section(command, f"chatdb {name}") for name, command in group.commands.items()]
    return "\n".join(parts)


def _command_section(command: Any, name: str) -> str:
    context = command.context_class(command, info_name=name)
    help_ = re.sub(r"^ +", "", command.help or "", flags=re.MULTILINE).strip()
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        words, text = record or (parameter.make_metavar(context), getattr(parameter, "help", None) or "")
        if words != "--help" and text != "Show this message and exit.":
            words = " ".join(words.split())
            option, _, kind = words.removesuffix(">").partition(" <")
            choices = ", ".join(f"`{each}`" for each in kind.split("|")) if "|" in kind else ""
            one_of = f" One of {choices}." if choices else ""
            rows.append(f"| `{option if choices else words}` | {_cell(text)}{one_of} |\n")
    usage = " ".join(command.collect_usage_pieces(context))
    table = "| argument or option | meaning |\n|---|---|\n" + "".join(rows) if rows else ""
    return f"## {name}\n\n```text\n{name} {usage}\n```\n\n{help_}\n\n{table}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def statements() -> str:
    """Return each statement with the generic plan that PostgreSQL makes for it on a table with rows."""
    parts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="chatdb-docs-") as home, EmbeddedServer(Path(home) / "a" / "b") as server:
        apply_migrations(server.dsn)
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            for statement in (*DATA.split(";\n"), "create extension btree_gin", SEARCH_INDEX):
                connection.execute(sql.SQL(statement))
            for path in statement_files():
                text = path.read_text(encoding="utf-8").strip()
                header, _, body = text.partition("\n\n")
                described = "\n".join(line.removeprefix("--").strip() for line in header.splitlines()[1:])
                explain = sql.SQL("explain (generic_plan, costs off) " + body)
                plan = "\n".join(row[0] for row in connection.execute(explain))
                prose, _, rest = described.partition("\n\n")
                name = path.relative_to(data_folder("sql")).with_suffix("")
                parts.append(
                    f"## {name}\n\n{prose}\n\n```text\n{rest}\n```\n\n"
                    + _details("Statement", "sql", body)
                    + _details("Plan", "text", plan)
                )
    return "\n".join(parts)


def _details(title: str, language: str, text: str) -> str:
    block = f"```{language}\n{text}\n```"
    return f'??? note "{title}"\n\n' + "".join(f"    {line}\n" if line else "\n" for line in block.splitlines()) + "\n"


GENERATED: dict[str, Callable[[], str]] = {"command line": command_line, "statements": statements}
"""What replaces the comment `<!-- generated: NAME -->` in a page."""


class Page(HTMLParser):
    """A built page: its anchors, links, and what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.policies: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort the addresses of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "meta" and values.get("http-equiv") == "Content-Security-Policy":
            self.policies.append(values["content"])
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif tag != "use" and tag != "a":
            self.loads |= {values[name] for name in ("src", "href", "poster", "data") if values.get(name)}
            self.loads |= {each.split()[0] for each in values.get("srcset", "").split(",") if each.strip()}


def problems(site: Path) -> Iterator[str]:
    """Yield what is wrong in a built site: dead links and anchors, and what would be loaded from another host."""

    @cache
    def parsed(path: Path) -> Page:
        return Page(path.read_text(encoding="utf-8"))

    for path in sorted(site.rglob("*.html")):
        page, name = parsed(path), path.relative_to(site)
        if path.name == "404.html" or name == Path("docs/explanation/benchmarks.html"):
            continue  # addressed from any folder; a report, not of this theme
        if page.policies != [POLICY]:
            yield f"{name}: no Content-Security-Policy"
        for address in sorted(page.links | page.loads):
            parts = urlsplit(address)
            if parts.scheme in {"data", "mailto"}:
                continue
            if parts.scheme or parts.netloc:
                if address in page.loads:
                    yield f"{name}: loads {address}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_relative_to(site.resolve()) or not target.is_file():
                yield f"{name}: no file {address}"
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in parsed(target).anchors:
                yield f"{name}: no anchor {address}"
    for path in site.rglob("*.css"):
        for address in re.findall(r"(?:url\(|@import )\s*['\"]?([^'\")]+)", path.read_text(encoding="utf-8")):
            if urlsplit(address).netloc:
                yield f"{path.relative_to(site)}: loads {address}"
    for name in ("search.json", "objects.inv"):
        if not (site / name).is_file():
            yield f"no {name}"


def main() -> None:
    """Build the site into the folder of the first argument, and report what is wrong."""
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="chatdb-site-") as folder:
        site = build(Path(folder))
        found = list(problems(site))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(site, target)
    if found:
        sys.exit("\n".join(found))
    print(f"{len(list(target.rglob('*.html')))} pages in {target}")


if __name__ == "__main__":
    main()
