"""What the commands share: where they print, and which database they work on."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

out = Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, emoji=False, markup=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def fail(sentence: str) -> NoReturn:
    """Say why a command could not do its work, and end with status 1."""
    err.print(f"chatdb: {sentence}", style="red")
    sys.exit(1)


def confirm(question: str, *, yes: bool) -> None:
    """Go on if the user says so, on a terminal or by --yes beforehand."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail(f"{question} Say so with --yes")
    if not typer.confirm(question, err=True):
        fail("nothing was changed")


def progress(what: str) -> Progress:
    """Make a progress bar, which shows nothing where standard error is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn(what + " {task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=False),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def say_embedded(path: Path) -> None:
    """Say that the data are not where a service would have them."""
    err.print(f"no DATABASE_URL: embedded PostgreSQL, data in {path}", style="dim")


@contextmanager
def operators_dsn() -> Generator[str]:
    """Give the DSN for what changes tables: CHATDB_MIGRATE_URL, else DATABASE_URL, else that of an embedded server."""
    dsn = os.environ.get("CHATDB_MIGRATE_URL") or os.environ.get("DATABASE_URL")
    if dsn:
        yield dsn
        return
    from chatdb.embedded import EmbeddedServer

    with EmbeddedServer() as server:
        say_embedded(server.path)
        yield server.dsn
