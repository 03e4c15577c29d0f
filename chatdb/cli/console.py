"""What the commands share: where they print, and which database they work on."""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple, NoReturn, cast

import typer
from dotenv.parser import parse_stream
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from chatdb._core.dsn import database_of
from chatdb.errors import ConfigurationError

if sys.platform != "win32":
    import grp
    import pwd

SETTINGS = ("DATABASE_URL", "CHATDB_MIGRATE_URL", "CHATDB_HOME")
"""The variables that chatdb takes from the environment and from a file .env."""

_LIBPQ = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE", "PGUSER", "PGPASSWORD")
_CHOOSE = "or choose with --database or --embedded"

# what a terminal would obey: a name must not move the cursor, set the title or turn the direction of writing
_CONTROLS = {
    *range(0x20),
    *range(0x7F, 0xA0),
    0x061C,
    *range(0x200E, 0x2010),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
} - {ord("\n"), ord("\t")}
_REPLACED = dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}")
_IN_A_LINE = _REPLACED | {ord("\n"): " ", ord("\t"): " "}
_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROLS}


def printable(text: str) -> str:
    """Return a text without what a terminal would obey."""
    return text.translate(_REPLACED)


def in_a_line(text: str) -> str:
    """Return a name without what a terminal would obey, and without line breaks and tabs."""
    return text.translate(_IN_A_LINE)


class _Console(Console):
    """A console that shows texts as they are: no markup, no emoji codes, no control characters."""

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401 - rich's own
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)


out = _Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
err = _Console(stderr=True, highlight=False, emoji=False, markup=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="DSN",
        help="Work on this database, whatever the settings say. Other users of the machine can see a command's "
        "arguments: leave a password to PGPASSWORD or ~/.pgpass.",
    ),
]
EmbeddedOption = Annotated[
    bool, typer.Option("--embedded", help="Work on the embedded server, whatever the settings say.")
]


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


def raise_interrupts() -> None:
    """
    Have Ctrl-C raise KeyboardInterrupt from here on, because there is something to be cleaned up.

    Until then it ends the process at once, see _chatdb_entry.py: raised during an import it can be lost.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class _Choice:
    """What the command line says of the database."""

    database: str | None = None
    embedded: bool = False


_choice = _Choice()


def choose(database: str | None, *, embedded: bool, anew: bool = False) -> None:
    """Take the options --database and --embedded, which stand before the command or after it."""
    if anew:
        _choice.database, _choice.embedded = None, False
    if database is not None:
        if _choice.database not in {None, database}:
            raise typer.BadParameter("names two databases", param_hint="--database")
        _choice.database = database
    _choice.embedded |= embedded
    if _choice.embedded and _choice.database is not None:
        raise typer.BadParameter("give --database or --embedded, not both", param_hint="--database")


def on_a_database(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options --database and --embedded."""

    @functools.wraps(command)
    def chosen(*, database: str | None, embedded: bool, **options: object) -> None:
        choose(database, embedded=embedded)
        command(**options)

    own = [
        inspect.Parameter("database", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=DatabaseOption),
        inspect.Parameter("embedded", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=EmbeddedOption),
    ]
    signature = inspect.signature(command, eval_str=True)
    vars(chosen)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *own])
    chosen.__annotations__ = {each.name: each.annotation for each in (*signature.parameters.values(), *own)}
    return chosen


class Target(NamedTuple):
    """The database that a command works on: its DSN, None for the embedded server, and what it is called."""

    dsn: str | None
    name: str


def target(*names: str) -> Target:
    """
    Return the database that the command line names, else the first of these settings, else the embedded server.

    Raises ConfigurationError for a setting that is empty or cannot be a DSN, and where others than these are set.
    """
    if _choice.database is not None:
        dsn = _readable("--database", _choice.database)
    elif _choice.embedded or not names:
        return _embedded()
    elif named := next((name for name in names if name in os.environ), None):
        dsn = _readable(named, os.environ[named])
    else:
        _refuse_partial(names)
        return _embedded()
    return Target(dsn, database_of(dsn))


def _embedded() -> Target:
    from chatdb.embedded.server import EmbeddedServer

    return Target(None, f"embedded PostgreSQL, data in {EmbeddedServer().path}")


def _readable(name: str, value: str) -> str:
    what = name if name.startswith("--") else f"the setting {name}"
    unset = _CHOOSE if name in SETTINGS else "or leave it out"
    if not value.strip():
        raise ConfigurationError(f"{what} is empty: give it a DSN (postgresql://...), {unset}")
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ConfigurationError(f"{what} has a line break or a control character: is a quote open?")
    if "${" in value:
        raise ConfigurationError(f"{what} has a ${{...}} in it, which chatdb does not replace: write the DSN out")
    return value


def _refuse_partial(names: tuple[str, ...]) -> None:
    """Refuse settings that say where the data are, but are not those that this command goes by."""
    if "CHATDB_MIGRATE_URL" in os.environ:
        raise ConfigurationError(
            f"CHATDB_MIGRATE_URL is set, and DATABASE_URL, by which this command goes, is not: set it, {_CHOOSE}"
        )
    found = [name for name in _LIBPQ if name in os.environ]
    if found:
        raise ConfigurationError(
            f"{', '.join(found)} {'are' if len(found) > 1 else 'is'} set, and {names[-1]} is not: to go where "
            f"{'they lead' if len(found) > 1 else 'it leads'} set DATABASE_URL=postgresql://, {_CHOOSE}"
        )


def say_target(name: str) -> None:
    """Say which database a command works on."""
    err.print(f"database: {name}", style="dim")


def drop_libpq_variables() -> None:
    """Forget the variables of another PostgreSQL, which would lead the drivers past the embedded server."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


@contextmanager
def operators_database() -> Generator[tuple[str, str]]:
    """Give the DSN for what changes tables, and the database's name: by CHATDB_MIGRATE_URL, else as other commands."""
    dsn, name = target("CHATDB_MIGRATE_URL", "DATABASE_URL")
    say_target(name)
    if dsn is not None:
        raise_interrupts()
        yield dsn, name
        return
    from chatdb.embedded.server import EmbeddedServer

    drop_libpq_variables()
    raise_interrupts()
    with EmbeddedServer() as server:
        yield server.dsn, name


def read_env_file(named: Path | None) -> None:
    """
    Take chatdb's settings that the environment lacks from the file `named`, else from .env in the working directory.

    Raises ConfigurationError if another user can write the file, or if it cannot be read to its end.
    """
    path = Path.cwd() / (named or ".env")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a FIFO is to be refused, not waited for
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        if named is None and not path.is_symlink():
            return
        raise ConfigurationError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the file {path} cannot be read ({error})") from None
    try:
        _refuse_foreign(path, os.fstat(fd))
        with open(fd, encoding="utf-8", closefd=False) as file:
            text = file.read()
    except UnicodeDecodeError:
        raise ConfigurationError(f"the file {path} is not UTF-8") from None
    finally:
        os.close(fd)
    taken: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            raise ConfigurationError(f"the file {path} cannot be read from line {binding.original.line}: mend the line")
        if binding.key in SETTINGS:
            if not binding.value:
                raise ConfigurationError(f"the file {path} sets {binding.key} to nothing: give a value or remove it")
            taken[binding.key] = binding.value
    taken = {name: value for name, value in taken.items() if name not in os.environ}
    os.environ.update(taken)
    err.print(f"read {path}: {', '.join(sorted(taken)) or 'no setting'} taken", style="dim")


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    """Refuse a file that another user has made or can write, by its link and its folder too."""
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(f"{path} is not a plain file")
    if sys.platform == "win32":
        return
    target = path.resolve()
    for what, found in (
        (path, path.lstat()),
        (target, status),
        (path.parent, path.parent.stat()),
        (target.parent, target.parent.stat()),
    ):
        if found.st_uid not in {0, os.geteuid()}:
            problem = f"{what} is another user's"
        elif stat.S_ISLNK(found.st_mode) or (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
            continue  # in a sticky folder only the file's owner can replace it
        elif found.st_mode & 0o002 or (found.st_mode & 0o020 and not _is_own_group(found.st_gid)):
            problem = f"another user can write {what}"
        else:
            continue
        raise ConfigurationError(
            f"the file {path} is not obeyed, because {problem}: change the owner or the mode (chmod go-w), or set "
            "DATABASE_URL in the environment and run this in another folder"
        )


def _is_own_group(gid: int) -> bool:
    """Tell whether a group is the one that many systems make for each user, with no other member."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and {*group.gr_mem} <= {user.pw_name}
