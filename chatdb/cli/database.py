"""Which database a command works on: the options, the settings in the environment and in .env."""

from __future__ import annotations

import functools
import inspect
import io
import os
import re
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from dotenv.parser import parse_stream

from chatdb._core.dsn import database_of
from chatdb.cli.console import err
from chatdb.cli.signals import raise_interrupts
from chatdb.errors import ConfigurationError

if sys.platform != "win32":
    import grp
    import pwd

SETTINGS = ("DATABASE_URL", "CHATDB_MIGRATE_URL", "CHATDB_HOME")
"""The variables that chatdb takes from the environment and from a file .env."""

_LIBPQ = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE", "PGUSER", "PGPASSWORD")
_CHOOSE = "or choose with --database or --embedded"

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


@dataclass
class _Choice:
    """What the command line says of the database."""

    database: str | None = None
    embedded: bool = False


_choice = _Choice()


def set_database_options(database: str | None, *, embedded: bool, anew: bool = False) -> None:
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
        set_database_options(database, embedded=embedded)
        command(**options)

    choices = [
        inspect.Parameter("database", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=DatabaseOption),
        inspect.Parameter("embedded", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=EmbeddedOption),
    ]
    signature = inspect.signature(command, eval_str=True)
    parameters = [*signature.parameters.values(), *choices]
    vars(chosen)["__signature__"] = signature.replace(parameters=parameters)
    chosen.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return chosen


class Target(NamedTuple):
    """The database that a command works on: its DSN, None for the embedded server, and what it is called."""

    dsn: str | None
    name: str


def resolve_database(*names: str) -> Target:
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
    variables = [name for name in _LIBPQ if name in os.environ]
    if variables:
        are, they_lead = ("are", "they lead") if len(variables) > 1 else ("is", "it leads")
        raise ConfigurationError(
            f"{', '.join(variables)} {are} set, and {names[-1]} is not: to go where {they_lead} set "
            f"DATABASE_URL=postgresql://, {_CHOOSE}"
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
    dsn, name = resolve_database("CHATDB_MIGRATE_URL", "DATABASE_URL")
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
            raise ConfigurationError(f"the file {path} cannot be read from line {binding.original.line}: fix the line")
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
    for what, owned in (
        (path, path.lstat()),
        (target, status),
        (path.parent, path.parent.stat()),
        (target.parent, target.parent.stat()),
    ):
        if owned.st_uid not in {0, os.geteuid()}:
            problem = f"{what} is another user's"
        elif stat.S_ISLNK(owned.st_mode) or (stat.S_ISDIR(owned.st_mode) and owned.st_mode & stat.S_ISVTX):
            continue  # in a sticky folder only the file's owner can replace it
        elif owned.st_mode & 0o002 or (owned.st_mode & 0o020 and not _is_own_group(owned.st_gid)):
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
