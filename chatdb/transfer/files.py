"""
Readers of files of conversations, each a lazy and flat stream of items, in bounded memory and without a database.

    with opened(path) as parts:
        for part in parts:
            for item in read(part.file, detect(part.file)): ...
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

from chatdb.errors import InvalidInputError
from chatdb.formats import chatgpt, sharegpt
from chatdb.formats.items import Item, Skipped, UnsupportedItemError
from chatdb.transfer import jsonlines
from chatdb.transfer.json_objects import objects

FORMATS: Final = ("sharegpt", "chatgpt", "chatdb")

MAX_MEMBERS: Final = 1_000
MAX_RATIO: Final = 100
"""Text of conversations compresses to a fifth or a tenth; beyond this an archive is made to fill memory and disks."""

MAX_EXPANDED: Final = 16 * 1024**3
"""The bytes of all conversations of an archive: those of years of daily use have one or two GiB."""

_RATIO_FROM: Final = 16 * 1024 * 1024

_MEMBER = re.compile(r"(?:.*/)?conversations(-\d+)?\.json")


class Part(NamedTuple):
    """A file to be read, and its size in bytes as `file.tell()` counts them."""

    name: str
    file: BinaryIO
    size: int


def read(file: BinaryIO, format: str) -> Iterator[Item]:  # noqa: A002 - as the command line's option is called
    """
    Yield each conversation, its messages, and after them what of it was changed or left out.

    A conversation that cannot be taken as a whole is skipped as a whole. All that stands before a fault in the file is
    yielded before the error is raised, save what shares its megabyte with a fault in the encoding.

    Raises InvalidInputError, which names the place but no text, when the file is not of the format.
    """
    with _damage_named():
        match format:
            case "sharegpt":
                yield from _converted(file, sharegpt.conversation)
            case "chatgpt":
                yield from _converted(file, chatgpt.conversation)
            case "chatdb":
                yield from jsonlines.read(file)
            case _:
                raise InvalidInputError("format", f"must be one of {', '.join(FORMATS)}")


def detect(file: BinaryIO) -> str:
    """
    Return the format of a file that can be rewound, by its first object.

    Raises InvalidInputError when that is of no known format.
    """
    start = file.tell()
    with _damage_named():
        first = next(objects(file), None)
        file.seek(start)
    if not isinstance(first, dict):
        raise InvalidInputError("file", "has no complete conversation")
    if first.get("type") == "chatdb":
        return "chatdb"
    if "mapping" in first:
        return "chatgpt"
    if "conversations" in first or "items" in first:
        return "sharegpt"
    raise InvalidInputError("file", "does not begin with a conversation of a known format: name it with --format")


@contextmanager
def opened(path: Path) -> Generator[list[Part]]:
    """
    Open a file, or of a zip archive, as ChatGPT's export is one, the files of conversations, by their numbers.

    Raises InvalidInputError for a pipe, and when the archive cannot be read or has no conversations.
    """
    with ExitStack() as stack:
        if path.exists() and not path.is_file():  # opening a named pipe waits for its other end
            raise InvalidInputError("file", "must be a regular file, not a folder, a pipe or a device: save it first")
        file = stack.enter_context(path.open("rb"))
        if not file.seekable():
            raise InvalidInputError("file", "must be a file and not a pipe: save it first")
        is_archive = file.peek(2).startswith(b"PK")
        yield _members(file, stack) if is_archive else [Part(path.name, file, path.stat().st_size)]


def _members(file: BinaryIO, stack: ExitStack) -> list[Part]:
    with _damage_named():
        archive = stack.enter_context(_directory(file))
        members = [member for member in archive.infolist() if _MEMBER.fullmatch(member.filename)]
        if not members:
            is_nested = any(name.lower().endswith(".zip") for name in archive.namelist())
            problem = "; an archive inside it is not read: unpack it first" if is_nested else ""
            raise InvalidInputError("file", f"is a zip archive without a conversations.json{problem}")
        if any(member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} for member in members):
            raise NotImplementedError
        if any(member.flag_bits & 1 for member in members):
            raise InvalidInputError("file", "is a zip archive with a password: unpack it first")
        if len(members) > MAX_MEMBERS:
            raise InvalidInputError("file", f"is a zip archive with over {MAX_MEMBERS:,} files of conversations")
        for member in members:
            # zipfile reads no more of a member than its declared size
            if member.file_size > max(_RATIO_FROM, MAX_RATIO * member.compress_size):
                problem = f"{member.filename!r} of the zip archive expands to over {MAX_RATIO} times its size"
                raise InvalidInputError("file", f"{problem}: if you trust it, unpack it and import the file")
        # together, because members may share the same bytes of the archive
        size, expanded = file.seek(0, SEEK_END), sum(member.file_size for member in members)
        if expanded > min(MAX_EXPANDED, max(_RATIO_FROM, MAX_RATIO * size)):
            problem = f"expands to {expanded:,} bytes of conversations, over {MAX_RATIO} times its size or 16 GiB"
            raise InvalidInputError("file", f"is a zip archive that {problem}: if you trust it, unpack it")
        members.sort(key=lambda member: (len(member.filename), member.filename))
        parts: list[Part] = []
        for member in members:
            try:
                opened_member = stack.enter_context(archive.open(member))
            except (OSError, ValueError) as error:  # it begins before the archive, or has a name that is no UTF-8
                raise zipfile.BadZipFile from error
            parts.append(Part(member.filename, cast("BinaryIO", opened_member), member.file_size))
        return parts


def _directory(file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (OSError, ValueError, OverflowError, struct.error) as error:  # what a damaged directory raises besides
        raise zipfile.BadZipFile from error


@contextmanager
def _damage_named() -> Generator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InvalidInputError("file", "is a zip archive that is damaged, cut off or of an unknown kind") from error


def _converted(file: BinaryIO, convert: Callable[[dict[str, Any]], list[Item]]) -> Iterator[Item]:
    for value in objects(file):
        if isinstance(value, Skipped):
            yield value
            return
        try:
            items = convert(value)
        except UnsupportedItemError as error:
            items = [Skipped(str(error), conversations=1)]
        yield from items
        del value, items  # before the next is read
