"""
Read files of conversations as flat, lazy streams of items, in bounded memory and without a database.

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
"""Maximum expansion ratio. Conversations compress to a fifth or a tenth; a higher ratio means a zip bomb."""

MAX_EXPANDED: Final = 16 * 1024**3
"""Maximum bytes of all conversations in an archive: years of daily use amount to one or two GiB."""

_RATIO_FROM: Final = 16 * 1024 * 1024

_MEMBER = re.compile(r"(?:.*/)?conversations(-\d+)?\.json")


class Part(NamedTuple):
    """A file to read, and its size in bytes as `file.tell()` counts them."""

    name: str
    file: BinaryIO
    size: int


def read(file: BinaryIO, format: str) -> Iterator[Item]:  # noqa: A002 - the option's name
    """
    Yield each conversation, its messages, and then what was changed or left out.

    Skips a whole conversation if any of it, except other branches than the current one, cannot be imported. Yields
    everything before a fault in the file, then raises; before an invalid byte, the items in the same megabyte are lost.

    Raises InvalidInputError, with the position but no text, if the file does not have the format.
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
    Return the format of a seekable file from its first object, and restore the position.

    Raises InvalidInputError if the format is unknown.
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
    raise InvalidInputError("file", "does not begin with a conversation in a known format: pass --format")


@contextmanager
def opened(path: Path) -> Generator[list[Part]]:
    """
    Open a file, or the numbered conversation files in a zip archive such as a ChatGPT export.

    Raises InvalidInputError for a pipe, and for an archive that cannot be read or has no conversations.
    """
    with ExitStack() as stack:
        if path.exists() and not path.is_file():  # opening a named pipe would block
            raise InvalidInputError(
                "file", "must be a regular file, not a folder, pipe or device: save the data to a file"
            )
        file = stack.enter_context(path.open("rb"))
        if not file.seekable():
            raise InvalidInputError("file", "must be a file, not a pipe: save the data to a file")
        is_archive = file.peek(2).startswith(b"PK")
        yield _members(file, stack) if is_archive else [Part(path.name, file, path.stat().st_size)]


def _members(file: BinaryIO, stack: ExitStack) -> list[Part]:
    with _damage_named():
        archive = stack.enter_context(_directory(file))
        members = [member for member in archive.infolist() if _MEMBER.fullmatch(member.filename)]
        if not members:
            is_nested = any(name.lower().endswith(".zip") for name in archive.namelist())
            problem = "; chatdb does not read archives inside it: unpack them first" if is_nested else ""
            raise InvalidInputError("file", f"is a zip archive without a conversations.json{problem}")
        if any(member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} for member in members):
            raise NotImplementedError
        if any(member.flag_bits & 1 for member in members):
            raise InvalidInputError("file", "is a password-protected zip archive: unpack it first")
        if len(members) > MAX_MEMBERS:
            raise InvalidInputError(
                "file", f"is a zip archive of over {MAX_MEMBERS:,} conversation files: unpack it first"
            )
        for member in members:
            # zipfile never reads beyond the declared size
            if member.file_size > max(_RATIO_FROM, MAX_RATIO * member.compress_size):
                problem = f"{member.filename!r} in the zip archive expands to over {MAX_RATIO} times its size"
                raise InvalidInputError("file", f"{problem}: if you trust it, unpack it and import the file")
        # check the sum too, because members can share the same bytes of the archive
        size, expanded = file.seek(0, SEEK_END), sum(member.file_size for member in members)
        if expanded > min(MAX_EXPANDED, max(_RATIO_FROM, MAX_RATIO * size)):
            problem = f"expands to {expanded:,} bytes of conversations, over {MAX_RATIO} times its size or 16 GiB"
            raise InvalidInputError("file", f"is a zip archive that {problem}: if you trust it, unpack it first")
        members.sort(key=lambda member: (len(member.filename), member.filename))
        parts: list[Part] = []
        for member in members:
            try:
                opened_member = stack.enter_context(archive.open(member))
            except (OSError, ValueError) as error:  # an offset before the archive, or a name that is not UTF-8
                raise zipfile.BadZipFile from error
            parts.append(Part(member.filename, cast("BinaryIO", opened_member), member.file_size))
        return parts


def _directory(file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (OSError, ValueError, OverflowError, struct.error) as error:  # other errors of a damaged directory
        raise zipfile.BadZipFile from error


@contextmanager
def _damage_named() -> Generator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InvalidInputError("file", "is a damaged, truncated or unsupported zip archive") from error


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
        del value, items  # free the memory before reading the next
