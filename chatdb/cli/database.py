"""Select the database of a command from options, environment variables and .env."""

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
"""The variables that chatdb reads from the environment and from .env."""

_LIBPQ = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE", "PGUSER", "PGPASSWORD")
_CHOOSE = "or pass --database or --embedded"

DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="DSN",
        help="Use this database instead of the one in the settings. Put the password in PGPASSWORD or ~/.pgpass: "
        "other users of the machine can see command-line arguments.",
    ),
]
EmbeddedOption = Annotated[
    bool, typer.Option("--embedded", help="Use the embedded server instead of the database in the settings.")
]


@dataclass
class _Choice:
    """The database options on the command line."""

    database: str | None = None
    embedded: bool = False


_choice = _Choice()


def set_database_options(database: str | None, *, embedded: bool, anew: bool = False) -> None:
    """Record --database and --embedded, given before or after the command name."""
    if anew:
        _choice.database, _choice.embedded = None, False
    if database is not None:
        if _choice.database not in {None, database}:
            raise typer.BadParameter("names two different databases", param_hint="--database")
        _choice.database = database
    _choice.embedded |= embedded
    if _choice.embedded and _choice.database is not None:
        raise typer.BadParameter("pass --database or --embedded, not both", param_hint="--database")


def on_a_database(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options --database and --embedded to a command."""

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
    """The database of a command: its DSN, or None for the embedded server, and its display name."""

    dsn: str | None
    name: str


def resolve_database(*names: str) -> Target:
    """
    Return the database from the command line, or else the first of these settings, or else the embedded server.

    Raises ConfigurationError if the setting is empty or not a DSN, or if none is set but other connection settings are.
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
        raise ConfigurationError(f"{what} is empty: set it to a DSN (postgresql://...), {unset}")
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ConfigurationError(f"{what} contains a line break or a control character: check for an unclosed quote")
    if "${" in value:
        raise ConfigurationError(f"{what} contains ${{...}}, which chatdb does not expand: write the full DSN")
    return value


def _refuse_partial(names: tuple[str, ...]) -> None:
    """Refuse connection settings that this command does not use, rather than start the embedded server."""
    if "CHATDB_MIGRATE_URL" in os.environ:
        raise ConfigurationError(
            f"CHATDB_MIGRATE_URL is set but DATABASE_URL, which this command uses, is not: set DATABASE_URL, {_CHOOSE}"
        )
    variables = [name for name in _LIBPQ if name in os.environ]
    if variables:
        are, them = ("are", "them") if len(variables) > 1 else ("is", "it")
        raise ConfigurationError(
            f"{', '.join(variables)} {are} set but {names[-1]} is not: to use {them}, set "
            f"DATABASE_URL=postgresql://, {_CHOOSE}"
        )


def say_target(name: str) -> None:
    """Print the database that a command uses."""
    err.print(f"database: {name}", style="dim")


def drop_libpq_variables() -> None:
    """Remove libpq's variables, which would lead the drivers to another server than the embedded one."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


@contextmanager
def operators_database() -> Generator[tuple[str, str]]:
    """Yield the DSN and name of the operator commands' database, preferring CHATDB_MIGRATE_URL to DATABASE_URL."""
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
    Read chatdb's settings that the environment lacks from `named`, or from .env in the working directory.

    Raises ConfigurationError if another user can write the file, or if it cannot be read or parsed.
    """
    path = Path.cwd() / (named or ".env")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # refuse a FIFO rather than wait for its writer
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        if named is None and not path.is_symlink():
            return
        raise ConfigurationError(f"the file {path} does not exist") from None
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
            raise ConfigurationError(f"the file {path} has a syntax error on line {binding.original.line}: fix it")
        if binding.key in SETTINGS:
            if not binding.value:
                raise ConfigurationError(f"the file {path} has no value for {binding.key}: add one or remove the line")
            taken[binding.key] = binding.value
    taken = {name: value for name, value in taken.items() if name not in os.environ}
    os.environ.update(taken)
    err.print(f"read {path}: using {', '.join(sorted(taken)) or 'none of its settings'}", style="dim")


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    """Refuse a file if another user owns or can write it, its folder, or its symbolic link."""
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(f"{path} is not a regular file")
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
            problem = f"{what} belongs to another user"
        elif stat.S_ISLNK(owned.st_mode) or (stat.S_ISDIR(owned.st_mode) and owned.st_mode & stat.S_ISVTX):
            continue  # in a sticky folder only its owner can replace a file
        elif owned.st_mode & 0o002 or (owned.st_mode & 0o020 and not _is_own_group(owned.st_gid)):
            problem = f"another user can write to {what}"
        else:
            continue
        raise ConfigurationError(
            f"the file {path} is not safe to use, because {problem}: change the owner or the mode (chmod go-w), or "
            "set DATABASE_URL in the environment and run chatdb in another folder"
        )


def _is_own_group(gid: int) -> bool:
    """Return whether this is the user's private group, without other members."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and {*group.gr_mem} <= {user.pw_name}
