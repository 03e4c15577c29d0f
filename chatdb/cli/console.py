"""Where the commands print and ask, and the options that many of them have."""

from __future__ import annotations

import io
import json
import sys
from typing import IO, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

_BLANKS = {ord("\n"): " ", ord("\t"): " "}
# what a terminal would obey: a name must not move the cursor, set the title or turn the direction of writing
_RANGES = ((0x00, 0x20), (0x7F, 0xA0), (0x061C, 0x061D), (0x200E, 0x2010), (0x2028, 0x202F), (0x2066, 0x206A))
_CONTROLS = {code for first, end in _RANGES for code in range(first, end)} - {*_BLANKS}
_REPLACED = dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}")
_IN_A_LINE = _REPLACED | _BLANKS
_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROLS}


def printable(text: str) -> str:
    """Return a text without what a terminal would obey."""
    return text.translate(_REPLACED)


def printable_line(text: str) -> str:
    """Return a name without what a terminal would obey, and without line breaks and tabs."""
    return text.translate(_IN_A_LINE)


class _Console(Console):
    """A console that shows texts as they are: no markup, no emoji codes, no control characters."""

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401 - rich's own
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)


out = _Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
err = _Console(stderr=True, highlight=False, emoji=False, markup=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def print_result(value: object, text: str, *, as_json: bool) -> None:
    """Print what a command has done, or would do, as JSON, or as text where there is something to say."""
    if as_json:
        print_json(value)
    elif text:
        out.print(text)


def print_json(value: object) -> None:
    """Print a value as a line of JSON; on a terminal with what that would obey escaped."""
    text = json.dumps(value, ensure_ascii=False)
    print(text.translate(_ESCAPED) if _is_terminal() else text)


class _EscapingFile(io.RawIOBase):
    """Standard output as a binary file of JSON lines, with what a terminal would obey escaped."""

    def write(self, data: Any, /) -> int:  # noqa: ANN401 - any buffer
        sys.stdout.buffer.write(bytes(data).decode().translate(_ESCAPED).encode())
        return len(data)

    def flush(self) -> None:
        sys.stdout.buffer.flush()


def json_lines() -> IO[bytes]:
    """Return standard output for JSON lines: byte by byte, except on a terminal."""
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison] - where it was closed
        fail("standard output is closed")
    return cast("IO[bytes]", _EscapingFile()) if _is_terminal() else sys.stdout.buffer


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # pyright: ignore[reportUnnecessaryComparison]


def fail(sentence: str) -> NoReturn:
    """Say why a command could not do its work, and end with status 1."""
    err.print(f"chatdb: {sentence}", style="red")
    sys.exit(1)


def ask(question: str) -> bool:
    """Whether the person at the terminal says yes."""
    err.print(f"{question} [y/N]: ", end="")
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def confirm(question: str, *, yes: bool) -> None:
    """Go on if the user says so, on a terminal or by --yes beforehand."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail(f"{question} Say so with --yes")
    if not ask(question):
        fail("nothing was changed")


def progress(what: str) -> Progress:
    """Make a progress bar, which shows nothing where standard error is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn(what + " {task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(show_speed=False),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
