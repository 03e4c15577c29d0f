"""
Read files of conversations as flat, lazy streams of items, in bounded memory and without a database.

    with opened(path) as parts:
        for part in parts:
            with part.opened() as file:
                for item in read(file, detect(file)): ...
"""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

from chatdb.errors import InvalidInputError
from chatdb.formats import exports, gemini
from chatdb.formats.items import (
    ORIGINAL_TOO_LARGE,
    Changed,
    Item,
    Skipped,
    UnsupportedItemError,
    as_list,
    as_object,
    original,
)
from chatdb.formats.trees import Encoded
from chatdb.transfer import json_objects, jsonlines

FORMATS: Final = (*exports.FORMATS, "chatdb")

NOTHING_IN_IT: Final = frozenset(("is empty", "has no conversations"))
"""The errors of a file without conversations, such as the last one of an export; nothing is lost with it."""

_WRAPPERS: Final = 2
"""Objects that may be around the conversations."""

MAX_MEMBERS: Final = 10_000
MAX_RATIO: Final = 100
"""Maximum expansion ratio. Conversations compress to a fifth or a tenth; a higher ratio means a zip bomb."""

MAX_EXPANDED: Final = 16 * 1024**3
"""Maximum bytes of all conversations in an archive: years of daily use amount to one or two GiB."""

_RATIO_FROM: Final = 16 * 1024 * 1024

_NUMBERED = re.compile(r"conversations[-_ ]?\d*\.jsonl?(?:\.gz)?", re.IGNORECASE)
_READABLE = re.compile(r".*\.(?:json|jsonl|ndjson)(?:\.gz)?", re.IGNORECASE)
_IN_FOLDERS = re.compile(r".*\.(?:(?:json|jsonl|ndjson)(?:\.gz)?|zip)", re.IGNORECASE)
_GZIP: Final = b"\x1f\x8b"
_LOOKS: Final = {
    b"<": "a web page: import conversations.json of the same export",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"PK": "a zip archive",
    b"Rar!": "a RAR archive: unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it first",
}


class Part(NamedTuple):
    """A file to read, and its size in bytes as `file.tell()` counts them, or None if that is not known."""

    name: str
    size: int | None
    open: Callable[[], BinaryIO]

    @contextmanager
    def opened(self) -> Generator[BinaryIO]:
        """Open the file, and close it at the end."""
        with _damage_named(), self.open() as file:
            yield file


def read(file: BinaryIO, format: str) -> Iterator[Item]:  # noqa: A002 - the option's name
    """
    Yield each conversation, its messages, and then what was changed or left out.

    Skips what cannot be imported, and says where it is. Yields everything before a fault in the file, then raises;
    before an invalid byte, the items in the same megabyte are lost.

    Raises InvalidInputError, with the position but no text, if the file does not have the format.
    """
    with _damage_named():
        if format == "chatdb":
            yield from jsonlines.read(file)
            return
        if format not in exports.FORMATS:
            raise InvalidInputError("format", f"must be one of {', '.join(FORMATS)}")
        values = _conversations(file, format)
        if format == "gemini":
            yield from _activities(values)
        else:
            yield from _converted(values, exports.FORMATS[format].conversation)


def detect(file: BinaryIO) -> str:
    """
    Return the format of a seekable file from its first mebibyte, and restore the position.

    Raises InvalidInputError, which says what the file looks like, if the format is unknown.
    """
    start = file.tell()
    with _damage_named():
        head = file.read(512)
        file.seek(start)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
            raise InvalidInputError("file", "is not UTF-8, it looks like UTF-16: save it as UTF-8")
        head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        for magic, looks in _LOOKS.items():
            if head.startswith(magic):
                raise InvalidInputError("file", f"is not JSON, it looks like {looks}")
        if head[257:262] == b"ustar":
            raise InvalidInputError("file", "is a tar archive: unpack it first")
        shown = json_objects.sketch(file)
        fields = as_object(shown)
        if fields is not None and fields.get("type") == "chatdb":
            return "chatdb"
        if (found := _found(shown)) is not None:
            return found.format
        try:
            next(json_objects.objects(file), None)  # tell a fault in the file from an unknown format
        finally:
            file.seek(start)
    if shown in (None, [], {}):
        raise InvalidInputError("file", "has no conversations")
    known = ", ".join(FORMATS)
    raise InvalidInputError(
        "file",
        f"is no export that chatdb knows: it has {exports.described(shown)}. chatdb reads {known}; "
        "`chatdb formats` explains them",
    )


class _Found(NamedTuple):
    """The format of a file, and the names of the members that lead to its conversations, as in `objects`."""

    format: str
    inside: tuple[str | None, ...]


def _found(shown: object) -> _Found | None:
    """Find what a file begins with: a conversation, a list of them, or one or two objects around these."""
    wrapped: list[tuple[tuple[str | None, ...], Any]] = [((), shown)]
    while wrapped:
        for inside, value in wrapped:
            if (name := exports.name_of(value)) is not None:
                return _Found(name, inside if as_list(value) or not inside else (*inside[:-1], None))
            if not inside and exports.is_message(value):
                return _Found("messages", inside)
            listed = as_list(value) or ()
            if name := next((name for one in listed[:100] if (name := exports.name_of(one))), None):
                return _Found(name, inside)
        wrapped = [
            ((*inside, name), value)
            for inside, outer in wrapped
            if len(inside) < _WRAPPERS and (fields := as_object(outer))
            for name, value in fields.items()
            if isinstance(value, dict | list)
        ]
    return None


def _conversations(file: BinaryIO, format: str) -> Iterator[Any]:  # noqa: A002
    """Yield the objects of a file's conversations, wherever they stand."""
    shown = json_objects.sketch(file)
    found = _found(shown)
    if format == "messages" and found is not None and not found.inside:
        if exports.is_message(shown):
            return _lines_of_messages(file)
        if exports.name_of(shown) == format and as_list(shown):
            return ({"messages": value} if as_list(value) else value for value in json_objects.wholes(file))
    if found is None or found.format != format:
        return json_objects.objects(file)
    values = json_objects.objects(file, found.inside)
    if None not in found.inside:
        return values
    return (value for value in values if isinstance(value, Skipped) or exports.name_of(value) == format)


def _lines_of_messages(file: BinaryIO) -> Iterator[Any]:
    """Yield the only conversation of a file that has a message on each line."""
    messages: list[Any] = []
    for value in json_objects.objects(file):
        if isinstance(value, Skipped):
            yield value._replace(conversations=0, messages=value.conversations)
            continue
        if file.tell() > json_objects.MAX_OBJECT:
            yield Skipped(f"conversation larger than {json_objects.MAX_OBJECT // 1024**2} MiB", conversations=1)
            return
        messages.append(value)
    yield {"messages": messages}


_REPORTED: Final = (Skipped, Changed)


def _converted(values: Iterable[Any], convert: Callable[[dict[str, Any]], Iterable[Item]]) -> Iterator[Item]:
    for number, value in enumerate(values, 1):
        if isinstance(value, Skipped):
            yield value._replace(place=_at(number, value.place) if value.conversations else "")
            continue
        fields = as_object(value)
        try:
            if fields is None:
                fields = {"messages": value}
            for item in convert(fields):
                if isinstance(item, _REPORTED):
                    title = json_objects.title_of(fields)
                    yield item._replace(place=", ".join(filter(None, (_at(number, title), item.place))))
                else:
                    yield item
        except UnsupportedItemError as error:
            yield Skipped(str(error), 1, place=_at(number, json_objects.title_of(fields)))
        del value, fields  # free the memory before reading the next


def _at(number: int, title: str) -> str:
    return f"conversation {number} {title}".rstrip()


def _activities(values: Iterable[Any]) -> Iterator[Item]:
    """
    Put the conversations of an activity's entries together, which are listed newest first.

    The entries wait in a temporary file, so that memory does not grow with them.
    """
    threads: defaultdict[str, list[tuple[str, int, int, str | None]]] = defaultdict(list)
    titles: list[str] = []
    with tempfile.TemporaryFile(prefix="chatdb-") as spool:
        for number, value in enumerate(values, 1):
            if isinstance(value, Skipped):
                yield value._replace(place=f"entry {number} {value.place}".rstrip() if value.conversations else "")
                continue
            fields = as_object(value) or {}
            if not exports.is_activity(fields):
                yield from _converted([fields], exports.FORMATS["gemini"].conversation)
                continue
            try:
                entry = gemini.entry(fields)
            except UnsupportedItemError as error:
                yield Skipped(str(error), messages=1, place=f"entry {number}")
                continue
            if entry.is_answered and len(titles) < 1_000:
                titles.append(entry.title)
            start = spool.tell()
            payload, problem = original(fields)
            spool.write((json.dumps(fields) if payload is None else payload).encode())
            threads[entry.thread or f" {number:09}"].append((entry.time, start, spool.tell(), problem))
        prefix = gemini.Prefix.of(titles)
        for thread in sorted(threads.values(), key=min):
            prompts: list[tuple[dict[str, Any], Encoded]] = []
            for _, start, end, problem in sorted(thread):
                spool.seek(start)
                text = spool.read(end - start).decode()
                payload = None if problem == ORIGINAL_TOO_LARGE else text
                prompts.append((json.loads(text), Encoded(payload, problem)))
            yield from gemini.conversation(prompts, prefix)


@contextmanager
def opened(path: Path) -> Generator[list[Part]]:
    """
    Open a file, those in a zip archive such as a ChatGPT export, or those in a folder and the archives in it.

    Raises InvalidInputError for a pipe, and for an archive or a folder that cannot be read or has no conversations.
    """
    with ExitStack() as stack:
        if not path.is_dir():
            yield _parts(path, path.name, stack)
            return
        parts: list[Part] = []
        for name in _selected([each.relative_to(path).as_posix() for each in _files_in(path)], _IN_FOLDERS):
            try:
                found = _parts(path / name, name, stack)
            except InvalidInputError as error:
                parts.append(unreadable(name, error))
                continue
            is_archive = name.lower().endswith(".zip")
            parts += [part._replace(name=f"{name}/{part.name}") for part in found] if is_archive else found
        if not parts:
            raise InvalidInputError("file", "is a folder without .json, .jsonl or .zip files")
        yield parts


def unreadable(name: str, error: InvalidInputError) -> Part:
    """Return a part that raises the error when it is opened, so that the others are read."""

    def refuse() -> BinaryIO:
        raise error

    return Part(name, None, refuse)


def _files_in(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if (path := Path(parent, name)).is_file():
                yield path


def _parts(path: Path, name: str, stack: ExitStack) -> list[Part]:
    if path.exists() and not path.is_file():  # opening a named pipe would block
        raise InvalidInputError(
            "file", "must be a regular file or a folder, not a pipe or device: save the data to a file"
        )
    with path.open("rb") as file:
        if not file.seekable():
            raise InvalidInputError("file", "must be a file, not a pipe: save the data to a file")
        start = file.peek(2)[:2]
    if start == b"PK":
        return _members(stack.enter_context(path.open("rb")), stack)
    size = path.stat().st_size
    if start == _GZIP:
        return [Part(name, None, lambda: cast("BinaryIO", _Gunzip(path.open("rb"), size)))]
    return [Part(name, size, lambda: path.open("rb"))]


def _selected(names: Iterable[str], readable: re.Pattern[str]) -> list[str]:
    """Return the names of the files to read: beside and below a conversations.json, only such files."""
    listed = [each.split("/") for each in names]
    listed = [each for each in listed if "__MACOSX" not in each and not any(map(_is_hidden, each))]
    homes = {tuple(folders) for *folders, name in listed if _NUMBERED.fullmatch(name)}
    found = [
        "/".join((*folders, name))
        for *folders, name in listed
        if _NUMBERED.fullmatch(name)
        or (readable.fullmatch(name) and not any(tuple(folders[:depth]) in homes for depth in range(len(folders) + 1)))
    ]
    return sorted(
        found, key=lambda name: [(int(each) if each.isdigit() else 0, each) for each in re.split(r"(\d+)", name)]
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name != ".."


class _Gunzip(gzip.GzipFile):
    """A compressed file that may not expand too far."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(fileobj=file)
        self._most = max(_RATIO_FROM, MAX_RATIO * size)
        self._source = file

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._checked(super().readline(-1 if size is None else size))

    def close(self) -> None:
        super().close()
        self._source.close()

    def _checked(self, data: bytes) -> bytes:
        if self.tell() > self._most:
            problem = f"expands to over {MAX_RATIO} times its size: if you trust it, unpack it and import the file"
            raise InvalidInputError("file", problem)
        return data


def _members(file: BinaryIO, stack: ExitStack) -> list[Part]:
    with _damage_named():
        archive = stack.enter_context(_directory(file))
        by_name: defaultdict[str, list[zipfile.ZipInfo]] = defaultdict(list)
        for member in archive.infolist():
            if not member.is_dir():
                by_name[member.filename].append(member)
        members = [member for name in _selected(by_name, _READABLE) for member in by_name[name]]
        if not members:
            is_nested = any(name.lower().endswith(".zip") for name in by_name)
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
        return [_member(archive, member) for member in members]


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Part:
    def open_member() -> BinaryIO:
        try:
            file = cast("BinaryIO", archive.open(member))
        except (OSError, ValueError) as error:  # an offset before the archive, or a name that is not UTF-8
            raise zipfile.BadZipFile from error
        if not member.filename.lower().endswith(".gz"):
            return file
        return cast("BinaryIO", _Gunzip(file, member.file_size))

    return Part(member.filename, None if member.filename.lower().endswith(".gz") else member.file_size, open_member)


def _directory(file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (OSError, ValueError, OverflowError, struct.error) as error:  # other errors of a damaged directory
        raise zipfile.BadZipFile from error


@contextmanager
def _damage_named() -> Generator[None]:
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InvalidInputError("file", "is a damaged, truncated or unsupported zip archive or .gz file") from error
