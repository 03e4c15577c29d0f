"""Read the objects of a JSON file of any size one by one, with memory for only the largest object."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final, cast

from chatdb.errors import InvalidInputError
from chatdb.formats.items import Skipped, as_object

MAX_OBJECT: Final = 40 * 1024 * 1024
"""Maximum bytes of one object, which is enough for a text of 4 MiB even if each character is a six-character escape."""

SKETCH: Final = 1024 * 1024
"""Bytes from which `sketch` sees what a file has."""

_SKETCH_DEPTH: Final = 20
_CHUNK = 1024 * 1024
_WINDOW = 2 * _CHUNK
"""Characters of an object that are parsed at once. A larger one is parsed member by member, without its whole text."""

_SHORT = 1_000
_SPACE = re.compile(r"[ \t\n\r]*")
_BEGUN = re.compile(r"[-+.0-9A-Za-z]{0,8}")  # the start of a word, a number or an escape, up to "-Infinit"
_REST_OF_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_decode = json.JSONDecoder().raw_decode


def _with_shared_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Return an object whose fields' names are those of all others: they would take most of a large one's memory."""
    return {sys.intern(name): value for name, value in fields.items()}


_decode_member = json.JSONDecoder(object_hook=_with_shared_names).raw_decode


def objects(file: BinaryIO, inside: str | None = None) -> Iterator[Any]:
    """
    Yield the objects of an array or a sequence, and a Skipped for each that is too large or truncated.

    An array inside the outer array is yielded like an object. With `inside`, yields the elements of the array in this
    member of the only object.

    Raises InvalidInputError, with the position, if the file is not UTF-8 or JSON, or contains anything but objects.
    """
    return _Reader(_decoded(file)).objects(inside)


def wholes(file: BinaryIO) -> Iterator[Any]:
    """Yield each outer value of a file, such as a list of messages, like `objects`."""
    return _Reader(_decoded(file)).wholes()


def sketch(file: BinaryIO) -> Any:  # noqa: ANN401 - any JSON value
    """
    Return the file's first value from its first mebibyte, without the members that are cut off; keep the position.

    Returns None if there is none, or if it is no array or object.
    """
    start, data = file.tell(), b""
    while len(data) < SKETCH and (more := file.read(SKETCH - len(data))):
        data += more
    file.seek(start)
    text = codecs.getincrementaldecoder("utf-8-sig")(errors="ignore").decode(data)
    reader = _Reader(iter([text]), is_sketch=True)
    try:
        return reader.value() if reader.mark() in {"{", "["} else None
    except (InvalidInputError, _CutError):
        return None


def title_of(value: object) -> str:
    """Return how a report names a conversation: its title or id in quotes, or '' if it has none."""
    fields = as_object(value) or {}
    inner = as_object(fields.get("conversation")) or fields
    for name in ("title", "name", "id", "conversation_id", "uuid", "conversationId"):
        if isinstance(title := inner.get(name), str) and title.strip():
            return json.dumps(title[:80], ensure_ascii=False)
    return ""


class _CutError(Exception):
    """The file ends inside a value."""


class _Reader:
    def __init__(self, chunks: Iterator[str], *, is_sketch: bool = False) -> None:
        self._chunks = chunks
        self._is_sketch = is_sketch
        self._text = ""
        self._offset = 0
        self._start = 0
        self._dropped = 0
        self._size = 0
        """Bytes of the current object before the window."""
        self._is_over = False
        """Whether the object is too large, so that its values are not kept."""
        self._is_cut = False
        """Whether the file ended inside an object."""

    def objects(self, inside: str | None) -> Iterator[Any]:
        expected, in_array = "[{", False
        if inside is not None:
            yield from self._inside(inside)
            return
        while True:
            mark = self.mark()
            if not mark:
                break
            if mark not in expected:
                raise self._broken("is invalid JSON, or contains something other than objects,", self._offset)
            if mark != "{" and not (mark == "[" and in_array):
                in_array = mark != "]"
                expected = {"[": "{[]", ",": "{[", "]": ""}[mark]
                self._offset += 1
                continue
            value = self._element()
            yield value
            if self._is_cut:
                return
            del value  # free the memory before reading the next
            expected = ",]" if in_array else "{"
        if expected == "[{":
            raise InvalidInputError("file", "is empty")
        if in_array:
            yield Skipped("the file is truncated: its closing bracket is missing")

    def wholes(self) -> Iterator[Any]:
        while (mark := self.mark()) in {"[", "{"} and mark:
            value = self._element()
            yield value
            if self._is_cut:
                return
            del value
        if self.mark():
            raise self._broken("is invalid JSON, or contains something other than objects,", self._offset)

    def _inside(self, name: str) -> Iterator[Any]:
        self.mark()
        self._offset += 1
        try:
            while self.mark() == '"':
                key = self.value()
                self._take(":")
                if self.mark() != "[" or key != name:
                    self._begin()
                    self._is_over = True  # nothing of it is needed
                    self.value()
                else:
                    self._offset += 1
                    while self.mark() in {"{", "["}:
                        value = self._element()
                        yield value
                        if self._is_cut:
                            return
                        del value
                        if self.mark() == "]":
                            break
                        self._take(",")
                    self._take("]")
                if self.mark() == "}":
                    self._offset += 1
                    return
                self._take(",")
            self._take("}")
        except _CutError:
            yield Skipped("the file is truncated: its closing bracket is missing")

    def _element(self) -> Any:  # noqa: ANN401 - any JSON value
        """Return the next object or array, or a Skipped if it is too large or cut off."""
        self._begin()
        try:
            value = self.value()
        except _CutError:
            self._is_cut = True
            return Skipped("the file is truncated inside its last conversation", conversations=1)
        if self._is_over:
            return Skipped(f"conversation larger than {MAX_OBJECT // 1024**2} MiB", 1, place=title_of(value))
        if self._offset > _CHUNK:
            self._drop()
        return value

    def mark(self) -> str:
        """Return the next character that is not white space, or '' at the end of the file."""
        while True:
            self._offset = cast("re.Match[str]", _SPACE.match(self._text, self._offset)).end()
            if self._offset < len(self._text):
                return self._text[self._offset]
            if not self._more():
                return ""

    def value(self, depth: int = 0) -> Any:  # noqa: ANN401 - any JSON value
        """Return the value at the offset and go behind it; raise _CutError if the file ends inside it."""
        while True:
            start = self._offset
            decoded = self._decoded_value(_decode_member if depth else _decode)
            left = len(self._text) - start
            if decoded is not None:
                value, end = decoded
                # more digits can follow a number at the end of the window
                if end < len(self._text) or self._text[start] in '{["' or not self._more():
                    self._check_size(end - self._offset)
                    self._offset = end - start + self._offset
                    return value
            elif left < _WINDOW or (self._text[start] == '"' and not self._is_over):
                self._check_size(left)
                if not self._more(left):
                    if self._is_sketch and self._text[start] in "{[":
                        return self._members(depth)
                    raise _CutError
            elif self._text[start] == '"':
                return self._skip_string()
            else:
                return self._members(depth)

    def _members(self, depth: int) -> Any:  # noqa: ANN401 - any JSON value
        """Return an object or array that is larger than the window, or what the sketch has of it."""
        if self._is_sketch and depth > _SKETCH_DEPTH:
            raise _CutError
        is_object = self._text[self._offset] == "{"
        end = "}" if is_object else "]"
        found: dict[str, Any] = {}
        listed: list[Any] = []
        self._offset += 1
        try:
            mark = self.mark()
            while mark != end:
                self._require()
                key = ""
                if is_object:
                    if mark != '"':
                        raise self._broken("is invalid JSON", self._offset)
                    key = self.value(depth + 1)
                    self._take(":")
                    self.mark()
                self._require()
                value = self.value(depth + 1)
                if not self._is_over:
                    if is_object:
                        found[key] = value
                    else:
                        listed.append(value)
                else:
                    listed.clear()
                    for name in [*found] if depth or len(found) > _SHORT else ():
                        del found[name]
                    if not depth and isinstance(value, str) and len(value) <= _SHORT:
                        found[key] = value
                del value
                mark = self.mark()
                if mark == ",":
                    self._offset += 1
                    mark = self.mark()
                    if mark == end:
                        raise self._broken("is invalid JSON", self._offset)
                elif mark != end:
                    self._require()
                    raise self._broken("is invalid JSON", self._offset)
            self._offset += 1
        except (_CutError, InvalidInputError):
            if not self._is_sketch:
                raise
        return found if is_object else listed

    def _skip_string(self) -> str:
        """Go behind a string that is too large to be kept."""
        self._offset += 1
        while True:
            self._offset = cast("re.Match[str]", _REST_OF_STRING.match(self._text, self._offset)).end()
            if self._text[self._offset : self._offset + 1] == '"':
                self._offset += 1
                return ""
            if not self._more(len(self._text) - self._offset):
                raise _CutError

    def _begin(self) -> None:
        self._size, self._is_over, self._start = 0, False, self._offset

    def _check_size(self, characters: int) -> None:
        """Note whether the current object is too large with this many characters more."""
        if not self._is_over and self._size + (self._offset - self._start + characters) * 4 > MAX_OBJECT:
            text = self._text[self._start : self._offset + characters]
            self._is_over = self._size + len(text.encode(errors="surrogatepass")) > MAX_OBJECT

    def _drop(self) -> None:
        """Free the text before the offset."""
        if self._size or self._start < self._offset:
            self._size += len(self._text[self._start : self._offset].encode(errors="surrogatepass"))
        self._dropped += self._offset
        self._text, self._offset, self._start = self._text[self._offset :], 0, 0

    def _more(self, least: int = 0) -> bool:
        """Append at least as many characters as asked for, or to the end; return whether there were any."""
        chunks = [chunk] if (chunk := next(self._chunks, "")) else []
        if not chunks:
            return False
        length = len(chunks[0])
        while length < min(least, _WINDOW) and (chunk := next(self._chunks, "")):
            chunks.append(chunk)
            length += len(chunk)
        self._drop()
        self._text = "".join((self._text, *chunks))
        return True

    def _take(self, mark: str) -> None:
        if self.mark() != mark:
            self._require()
            raise self._broken("is invalid JSON", self._offset)
        self._offset += 1

    def _require(self) -> None:
        if self._offset == len(self._text):
            raise _CutError

    def _decoded_value(self, decode: Callable[[str, int], tuple[Any, int]]) -> tuple[Any, int] | None:
        """Return the value at the offset and its end, or None if the text ends before it."""
        text = self._text
        try:
            return decode(text, self._offset)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string") or bool(_BEGUN.fullmatch(text, error.pos))
            problem, position = "is invalid JSON", error.pos
        except RecursionError:
            unfinished, problem, position = False, "is nested too deeply in the object", self._offset
        except ValueError:
            unfinished, problem, position = False, "has a number of over 4,300 digits in the object", self._offset
        if unfinished or self._is_sketch:
            return None
        raise self._broken(problem, position)

    def _broken(self, problem: str, position: int) -> InvalidInputError:
        return InvalidInputError("file", f"{problem} at character {self._dropped + position:,}")


def _decoded(file: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    size = 0
    while chunk := file.read(_CHUNK):
        size += len(chunk)
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            position = size - len(error.object) + error.start
        else:
            if text:
                yield text
            continue
        hint = ": it looks like UTF-16, save it as UTF-8" if chunk[:2] in {b"\xff\xfe", b"\xfe\xff"} else ""
        raise InvalidInputError("file", f"is not UTF-8 at byte {position:,}{hint}")
    if decoder.getstate()[0]:
        yield "\ufffd"  # ends inside a character: invalid JSON outside a string, truncated inside one
