"""Output, confirmation prompts and shared options of the commands."""

from __future__ import annotations

import io
import json
import sys
from typing import IO, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

_BLANKS = {ord("\n"): " ", ord("\t"): " "}
# terminal controls: a name must not move the cursor, set the title or reverse the text direction
_RANGES = ((0x00, 0x20), (0x7F, 0xA0), (0x061C, 0x061D), (0x200E, 0x2010), (0x2028, 0x202F), (0x2066, 0x206A))
_CONTROLS = {code for first, end in _RANGES for code in range(first, end)} - {*_BLANKS}
_REPLACED = dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}")
_IN_A_LINE = _REPLACED | _BLANKS
_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROLS}


def printable(text: str) -> str:
    """Replace terminal control characters in a text."""
    return text.translate(_REPLACED)


def printable_line(text: str) -> str:
    """Replace terminal control characters, line breaks and tabs in a name."""
    return text.translate(_IN_A_LINE)


class _Console(Console):
    """A console that prints text verbatim, without markup or emoji codes, and replaces control characters."""

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401 - rich's own
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)


out = _Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
err = _Console(stderr=True, highlight=False, emoji=False, markup=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, without changing anything.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Wait = Annotated[
    float,
    typer.Option(
        min=0, max=86_400, metavar="SECONDS", help="Maximum wait for another operator command and for table locks."
    ),
]


def print_result(value: object, text: str, *, as_json: bool) -> None:
    """Print a result as JSON, or as text unless the text is empty."""
    if as_json:
        print_json(value)
    elif text:
        out.print(text)


def print_json(value: object) -> None:
    """Print a value as one line of JSON, with control characters escaped on a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    print(text.translate(_ESCAPED) if _is_terminal() else text)


class _EscapingFile(io.RawIOBase):
    """Standard output for JSON lines in binary, with control characters escaped."""

    def write(self, data: Any, /) -> int:  # noqa: ANN401 - any buffer
        sys.stdout.buffer.write(bytes(data).decode().translate(_ESCAPED).encode())
        return len(data)

    def flush(self) -> None:
        sys.stdout.buffer.flush()


def json_lines() -> IO[bytes]:
    """Return standard output in binary; on a terminal it escapes control characters."""
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison] - None if closed
        fail("standard output is closed")
    return cast("IO[bytes]", _EscapingFile()) if _is_terminal() else sys.stdout.buffer


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # pyright: ignore[reportUnnecessaryComparison]


def fail(sentence: str) -> NoReturn:
    """Print why the command failed and exit with status 1."""
    err.print(f"chatdb: {sentence}", style="red")
    sys.exit(1)


def ask(question: str) -> bool:
    """Return whether the user answers yes."""
    err.print(f"{question} [y/N]: ", end="")
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def confirm(question: str, *, yes: bool) -> None:
    """Exit with status 1 unless the user confirms, with --yes or on a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail(f"{question} Pass --yes to confirm")
    if not ask(question):
        fail("nothing was changed")


def progress(what: str) -> Progress:
    """Return a progress bar, hidden unless standard error is a terminal."""
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
