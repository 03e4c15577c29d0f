"""What the commands share: where they print, and which database they work on."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from dotenv.parser import parse_stream
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from chatdb.errors import ConfigurationError

if sys.platform != "win32":
    import grp
    import pwd

SETTINGS = ("DATABASE_URL", "CHATDB_MIGRATE_URL", "CHATDB_HOME")
"""The variables that chatdb takes from the environment and from a file .env."""

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


def drop_libpq_variables() -> None:
    """Forget the variables of another PostgreSQL, which would lead the drivers past the embedded server."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


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

    drop_libpq_variables()
    with EmbeddedServer() as server:
        say_embedded(server.path)
        yield server.dsn
