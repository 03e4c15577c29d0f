"""The command line `chatdb`."""

from __future__ import annotations

import sys

try:
    import typer
except ImportError:
    sys.exit("chatdb: the command line is not installed: pip install 'chatdb[cli]'")

import asyncio
import io
import logging
import os
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

from chatdb.cli import admin, data
from chatdb.cli.console import err, fail, out
from chatdb.cli.database import DatabaseOption, EmbeddedOption, on_a_database, read_env_file, set_database_options
from chatdb.cli.signals import SIGNALS, ignore_signals, is_of_an_interrupt, raise_interrupt
from chatdb.errors import ChatDBError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
    Conversations and messages on PostgreSQL.

    A command works on the database that --database names, or --embedded for the embedded server; else on the one that
    DATABASE_URL names, in the environment or in the file .env of the working directory; else on an embedded PostgreSQL
    that chatdb starts and stops, with its data in CHATDB_HOME or the user's data folder. It says which one that is. A
    setting that is empty, or PGHOST and the like without DATABASE_URL, is an error.

    From .env only DATABASE_URL, CHATDB_MIGRATE_URL and CHATDB_HOME are taken, and the environment goes first. A file
    that another user can write is refused.

    migrate, rollback, protect, check, adopt and link-users take CHATDB_MIGRATE_URL first: they need a direct
    connection. demo works on the embedded server, unless --database is given.

    Exit status: 0 done, 1 an error, which is said on standard error, 2 wrong usage, 130 interrupted.
    """,
)

_COMMANDS: tuple[Callable[..., None], ...] = (
    *(data.demo, data.import_, data.export, data.list_, data.show, data.delete_user),
    *(admin.migrate, admin.rollback, admin.check, admin.link_users, admin.adopt, admin.protect),
)
for _command in _COMMANDS:
    app.command(_command.__name__.rstrip("_").replace("_", "-"))(on_a_database(_command))


def main() -> None:
    """Run the command line; what chatdb refuses is said in one sentence, without a traceback."""
    try:
        _main()
    except (KeyboardInterrupt, asyncio.CancelledError):
        _end_interrupted()
    except SystemExit as end:
        if end.code == 130:  # typer's for an interrupt
            _end_interrupted()
        ignore_signals()
        raise


def _main() -> None:
    # what psycopg could not undo on a connection that an interrupt has ended is said nowhere else than here
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    for number in SIGNALS:  # so that the embedded server is stopped
        if number != signal.SIGINT:
            signal.signal(number, raise_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a closed one is None
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except ChatDBError as error:
        if is_of_an_interrupt(error):
            raise KeyboardInterrupt from None
        fail(str(error))
    except BrokenPipeError:  # the reader, like head, has had enough
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
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    env_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the settings from this file instead of .env.")
    ] = None,
    database: DatabaseOption = None,
    embedded: EmbeddedOption = False,
) -> None:
    set_database_options(database, embedded=embedded, anew=True)
    read_env_file(env_file)
