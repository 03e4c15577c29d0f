"""Follow a conversation for `chatdb show --follow`: new messages, and the text of those that are streamed."""

from __future__ import annotations

import asyncio
from typing import IO, Final, Protocol

import chatdb
from chatdb._core.driver_errors import mapped_driver_errors
from chatdb.cli.console import out, printable
from chatdb.errors import MessageNotFoundError
from chatdb.formats.items import REASONING, TOOL_CALL, TOOL_RESULT
from chatdb.pool import Pool
from chatdb.records import Message
from chatdb.transfer import jsonlines

_POLL: Final = 0.5
"""Seconds between two looks for new messages that no hint announced."""

_GROWTH: Final = 0.25
"""Seconds between two reads of the text that is streamed: `extend_message` sends no hints."""


class Printer(Protocol):
    """Prints messages at their start, while they grow, and at their end."""

    def start(self, message: Message) -> None:
        """Print a new message, with the text so far if it is streaming."""

    def grow(self, message: Message, text: str) -> None:
        """Print more text of a message."""

    def finish(self, message: Message, printed: str) -> None:
        """Print the rest of a message's text, or all of it if `printed` is not its start, and how it ended."""

    def delete(self, message: Message) -> None:
        """Print that a message was deleted before its end."""


class TextPrinter:
    """Prints messages as text. If several grow at the same time, a title says whose text goes on."""

    def __init__(self, previous: int | None) -> None:
        """Take the seq of the message before the first one, or None if it is unknown."""
        self._previous = previous
        self._growing: int | None = None

    def start(self, message: Message) -> None:
        """Print a message's title and its text, whose line stays open if it grows."""
        self.end_line()
        print_title(message, message_title(message, self._previous))
        self._previous = message.seq
        if message.state == "streaming":
            self._growing = message.seq
            _write(message.content)
        else:
            out.print(message.content)

    def grow(self, message: Message, text: str) -> None:
        """Print more text of a message."""
        if self._growing != message.seq:
            self.end_line()
            print_title(message, "continues")
            self._growing = message.seq
        _write(text)

    def finish(self, message: Message, printed: str) -> None:
        """Print the rest of the text and how it ended, or all of it if what is printed is not its start."""
        end = message.state or "finished"
        if not message.content.startswith(printed):
            self.end_line()
            print_title(message, f"{end}, with this text instead")
            out.print(message.content)
            return
        if len(message.content) > len(printed):
            self.grow(message, message.content[len(printed) :])
        self.end_line()
        out.print(f"#{message.seq} {end}", style="dim")

    def delete(self, message: Message) -> None:
        """Print that a message was deleted before its end."""
        self.end_line()
        out.print(f"#{message.seq} deleted", style="dim")

    def end_line(self) -> None:
        """End the line of a text that may grow."""
        if self._growing is not None:
            _write("\n")
            self._growing = None


class JsonPrinter:
    """Prints a JSON line for each message at its start, and another one at its end if it was streaming."""

    def __init__(self, lines: IO[bytes]) -> None:
        self._lines = lines

    def start(self, message: Message) -> None:
        """Print the line of a message."""
        self._lines.write(jsonlines.message_line(message))
        self._lines.flush()

    def grow(self, message: Message, text: str) -> None:
        """Print nothing: the text comes at the end."""

    def finish(self, message: Message, printed: str) -> None:  # noqa: ARG002 - the whole line comes again
        """Print the line of a message again."""
        self.start(message)

    def delete(self, message: Message) -> None:
        """Print nothing: there is no such line in an export."""


def print_title(message: Message, title: str) -> None:
    """Print the line above a message's text."""
    out.print(f"\n#{message.seq} {message.role} {title}", style="bold cyan")


def message_title(message: Message, previous: int | None, *, is_line: bool = False) -> str:
    """Return what the title says besides seq and role; in the log, also what the message follows."""
    title = f"{message.created_at:%Y-%m-%d %H:%M:%S}"
    if message.state is not None:
        title += f" {message.state}"
    about = message.metadata or {}
    if about.get("type") in {REASONING, TOOL_CALL, TOOL_RESULT}:
        title += f" {str(about['type']).replace('_', ' ')}" + (f": {about['name']}" if about.get("name") else "")
    if about.get("hidden") is True:
        title += " hidden"
    if not is_line and message.parent_seq not in {None, previous}:
        title += f" after #{message.parent_seq}" if message.parent_seq else " first message"
    return title


async def follow(
    pool: Pool, user: str, conversation: int, *, after_seq: int, streaming: list[Message], dsn: str | None, to: Printer
) -> None:
    """
    Print the messages after a position as they come, and the text of the `streaming` ones before it, until cancelled.

    `dsn` is that of the pool, or None. Raises as `Watcher.watch` and `read_message` do.
    """
    growing = {message.seq: (message, message.content) for message in streaming}
    listen_dsn = dsn if dsn is not None and await _is_direct(pool) else None
    loop = asyncio.get_running_loop()
    async with chatdb.Watcher(pool, listen_dsn=listen_dsn, poll=_POLL) as watcher:
        messages = watcher.watch(user_id=user, conversation_id=conversation, after_seq=after_seq)
        upcoming = asyncio.create_task(messages.__anext__())
        look_at = loop.time()
        try:
            while True:
                await asyncio.wait([upcoming], timeout=max(0, look_at - loop.time()) if growing else None)
                if upcoming.done():
                    message = upcoming.result()
                    upcoming = asyncio.create_task(messages.__anext__())
                    if message.seq > after_seq:
                        after_seq = message.seq
                        to.start(message)
                        if message.state == "streaming":
                            growing[message.seq] = message, message.content
                    elif message.seq in growing and message.state != "streaming":
                        to.finish(message, growing.pop(message.seq)[1])
                if growing and loop.time() >= look_at:
                    await _print_growth(pool, growing, to)
                    look_at = loop.time() + _GROWTH
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
            await messages.aclose()


async def _print_growth(pool: Pool, growing: dict[int, tuple[Message, str]], to: Printer) -> None:
    for seq, (message, printed) in [*growing.items()]:
        user, conversation = message.user_id, message.conversation_id
        try:
            tail = await chatdb.read_message(
                pool, user_id=user, conversation_id=conversation, seq=seq, offset=len(printed)
            )
            if tail.state == "streaming":
                growing[seq] = message, printed + tail.text
                if tail.text:
                    to.grow(message, tail.text)
                continue
            finished = await chatdb.get_message(pool, user_id=user, conversation_id=conversation, seq=seq)
        except MessageNotFoundError:
            to.delete(message)
        else:
            to.finish(finished, printed)
        del growing[seq]


async def _is_direct(pool: Pool) -> bool:
    """Return whether the server's process is the one that the connection was told: a pooler reports its own."""
    with mapped_driver_errors():
        async with pool.acquire() as connection:
            process = await connection.fetchval("select pg_catalog.pg_backend_pid()")
            return bool(process == connection.get_server_pid())


def _write(text: str) -> None:
    print(printable(text), end="", flush=True)
