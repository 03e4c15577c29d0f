"""The command line `chatdb`."""

from __future__ import annotations

import sys

try:
    import typer
except ImportError:
    sys.exit("chatdb: the command line is not installed: run pip install 'chatdb[cli]'")

import asyncio
import io
import logging
import os
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

from chatdb.cli import admin, data, maintenance
from chatdb.cli.console import err, fail, out
from chatdb.cli.database import DatabaseOption, EmbeddedOption, on_a_database, read_env_file, set_database_options
from chatdb.cli.signals import SIGNALS, ignore_signals, is_of_an_interrupt, raise_interrupt
from chatdb.errors import ChatDBError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
    Store and manage chat conversations in PostgreSQL.

    A command uses the database from --database or --embedded. Without them it
    uses DATABASE_URL, from the environment or from .env in the working
    directory. Without DATABASE_URL it starts an embedded PostgreSQL, with its
    data in CHATDB_HOME or your data folder, and stops it at the end. Each
    command prints which database it uses.

    migrate, rollback, check, adopt, link-users, protect, abort-streams, prune,
    search-index, repack and distribute prefer CHATDB_MIGRATE_URL to
    DATABASE_URL: set it to a direct connection if DATABASE_URL leads to a
    transaction pooler. demo uses the embedded server unless you pass
    --database.

    An empty setting is an error. So is PGHOST or a similar libpq variable
    without DATABASE_URL. From .env, chatdb reads only DATABASE_URL,
    CHATDB_MIGRATE_URL and CHATDB_HOME; the environment takes precedence. It
    refuses a .env file that another user can write.

    Exit status: 0 success, 1 error (the reason is on standard error), 2 usage
    error, 130 interrupted.
    """,
)

_COMMANDS: tuple[Callable[..., None], ...] = (
    *(data.demo, data.import_, data.formats, data.export, data.list_, data.show, data.delete_user),
    *(admin.migrate, admin.rollback, admin.check, admin.link_users, admin.adopt, admin.protect),
    *(
        maintenance.abort_streams,
        maintenance.prune,
        maintenance.search_index,
        maintenance.repack,
        maintenance.distribute,
    ),
)
for _command in _COMMANDS:
    app.command(_command.__name__.rstrip("_").replace("_", "-"))(on_a_database(_command))


def main() -> None:
    """Run the command line, and report chatdb's errors in one sentence without a traceback."""
    try:
        _main()
    except (KeyboardInterrupt, asyncio.CancelledError):
        _end_interrupted()
    except SystemExit as end:
        if end.code == 130:  # typer's status for an interrupt
            _end_interrupted()
        ignore_signals()
        raise


def _main() -> None:
    # psycopg warns on standard error when it cannot roll back on a connection that an interrupt closed
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    for number in SIGNALS:  # unwind, to stop the embedded server
        if number != signal.SIGINT:
            signal.signal(number, raise_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if closed
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except ChatDBError as error:
        if is_of_an_interrupt(error):
            raise KeyboardInterrupt from None
        fail(str(error))
    except BrokenPipeError:  # head and the like close the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error))


def _end_interrupted() -> NoReturn:
    ignore_signals()
    err.print("chatdb: interrupted")
    sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"chatdb {version('chatdb')}")
        raise typer.Exit


@app.callback()
def _environment(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    env_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read settings from this file instead of .env.")
    ] = None,
    database: DatabaseOption = None,
    embedded: EmbeddedOption = False,
) -> None:
    set_database_options(database, embedded=embedded, anew=True)
    read_env_file(env_file)
