"""Read the objects of a JSON file of any size one by one, with memory for only the largest object."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, cast

from chatdb.errors import InvalidInputError
from chatdb.formats.items import Raw, Skipped, as_object
from chatdb.formats.messages import LISTS

MAX_OBJECT: Final = 40 * 1024 * 1024
"""Maximum bytes of one object, which is enough for a text of 4 MiB even if each character is a six-character escape."""

SKETCH: Final = 1024 * 1024
"""Bytes from which `sketch` sees what a file has."""

_SKETCH_DEPTH: Final = 20
_CHUNK = 1024 * 1024
_WINDOW = 2 * _CHUNK
"""Characters of an object that are parsed at once. A larger one is parsed member by member, without its whole text."""

_SHORT = 1_000
_MAX_DEPTH = 200
"""Levels down to which an object above the window is read; a payload has no more."""
_SPACE = re.compile(r"[ \t\n\r]*")
_BEGUN = re.compile(r"[-+.0-9A-Za-z]{0,8}")  # the start of a word, a number or an escape, up to "-Infinit"
_NO_BRACKETS = re.compile(r'[^"\[\]{}]*+')
_LISTS: Final = frozenset(("mapping", "chat_messages", "responses", "messagesTree", "children", "chunks", *LISTS))
"""The fields that have the messages of a conversation, in all formats."""

_STARTS: Final = frozenset('{["-0123456789tfnNI')
"""What a value begins with."""

_NUMBER_GOES_ON = re.compile(r"[eE.]?[-+]?")
_REST_OF_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_decode = json.JSONDecoder().raw_decode


def _with_shared_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Return an object whose fields' names are those of all others: they would take most of a large one's memory."""
    return {sys.intern(name): value for name, value in fields.items()}


def _int_of(digits: str) -> float:
    """Return a number, or infinity for one that Python refuses to read, which an import stores as null."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


_decode_member = json.JSONDecoder(object_hook=_with_shared_names).raw_decode
_decode_long_numbers = json.JSONDecoder(object_hook=_with_shared_names, parse_int=_int_of).raw_decode


def objects(file: BinaryIO, inside: tuple[str | None, ...] = ()) -> Iterator[Any]:
    """
    Yield the objects of an array or a sequence, and a Skipped for each that cannot be read.

    That is one that is too large, nested too deeply or truncated, what is no object in an array, and a line that is
    invalid JSON. An array inside the outer array is yielded like an object. With `inside`, yields the elements of the
    array to which these names of members lead, or with None for the last name, all objects there.

    Raises InvalidInputError, with the position, if the file is not UTF-8 or JSON, or contains anything but objects.
    """
    return _Reader(file).objects(inside)


def wholes(file: BinaryIO) -> Iterator[Any]:
    """Yield each outer value of a file, such as a list of messages, like `objects`."""
    return _Reader(file).wholes()


def sketch(file: BinaryIO) -> Any:  # noqa: ANN401 - any JSON value
    """
    Return the file's first value from its first mebibyte, without what is cut off; keep the position.

    Returns None if there is none, or if it is no array or object.
    """
    start, data = file.tell(), b""
    while len(data) < SKETCH and (more := file.read(SKETCH - len(data))):
        data += more
    file.seek(start)
    text = codecs.getincrementaldecoder("utf-8-sig")(errors="ignore").decode(data)
    reader = _Reader(file, sketched=text)
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


class _TooDeepError(Exception):
    """A value is nested too deeply to be read; `depth` is the number of brackets that are open before it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth


class _Reader:
    def __init__(self, file: BinaryIO, *, sketched: str | None = None) -> None:
        self._file = file
        self._file_start = file.tell()
        self._is_sketch = sketched is not None
        self._chunks = _decoded(file) if sketched is None else iter([sketched])
        self._text = ""
        self._offset = 0
        self._start = 0
        self._dropped = 0
        self._dropped_lines: int | None = None
        """None before the first error, because counting takes 5 % of the time."""
        self._size = 0
        """Bytes of the current object before the window."""
        self._is_over = False
        """Whether the object is too large, so that its values are not kept."""
        self._broken_at = 0
        """Where the last error is in the text."""
        self._has_long_number = False
        self._has_read = False
        """Whether a whole object was read."""
        self._is_cut = False
        """Whether the file ended inside an object."""

    def objects(self, inside: tuple[str | None, ...]) -> Iterator[Any]:
        first = mark = self.mark()
        if not first:
            raise InvalidInputError("file", "is empty")
        if first == "[" and not inside:
            self._offset += 1
            yield from self._elements()
            mark = "" if self._is_cut else self.mark()
        elif first == "{":
            while mark == "{":
                yield from self._inside(inside) if inside else self._line()
                mark = "" if self._is_cut else self.mark()
        if mark:
            raise self._broken("is invalid JSON, or contains something other than objects,", self._offset)

    def wholes(self) -> Iterator[Any]:
        while (mark := self.mark()) and mark in "[{":
            yield from self._line()
            if self._is_cut:
                return
        if self.mark():
            raise self._broken("is invalid JSON, or contains something other than objects,", self._offset)

    def _line(self) -> Iterator[Any]:
        """Yield the next object or array of a sequence, or a Skipped for a line that is invalid JSON."""
        start = self._dropped + self._offset
        try:
            value = self._element()
        except InvalidInputError:
            start -= self._dropped
            line = self._line_number(start)
            if not self._has_read or start < 0 or not self._skip_line(start):
                raise
            value = Skipped("line of invalid JSON", conversations=1, place=f"line {line:,}")
        self._has_read = True
        yield value

    def _skip_line(self, start: int) -> bool:
        """
        Go behind the line with the last error, and tell whether the file can be read on from there.

        It cannot if the object that begins at `start` has several lines, because then no line stands alone.
        """
        if "\n" in self._text[start : self._broken_at].rstrip():
            return False
        self._offset = start
        while (end := self._text.find("\n", self._offset)) < 0:
            self._offset = len(self._text)
            if not self._more():
                return True
        self._offset = end
        return self.mark() in {"{", "[", ""}

    def _elements(self) -> Iterator[Any]:
        """Yield the elements of an array, and go behind its closing bracket."""
        mark = self.mark()
        if mark == "]":
            self._offset += 1
            return
        while mark:
            if mark not in _STARTS:
                raise self._broken("is invalid JSON, or contains something other than objects,", self._offset)
            value = self._element()
            yield value if mark in {"{", "["} or self._is_cut else Skipped("not a JSON object", conversations=1)
            if self._is_cut:
                return
            del value  # free the memory before reading the next
            mark = self.mark()
            if mark == "]":
                self._offset += 1
                return
            if mark:
                self._take(",")
                mark = self.mark()
        self._is_cut = True
        yield Skipped("the file is truncated: its closing bracket is missing", files=1)

    def _inside(self, names: tuple[str | None, ...]) -> Iterator[Any]:
        """Yield what these names lead to in the object at the offset, and go behind the object."""
        name, *rest = names
        try:
            self._take("{")
            while self.mark() == '"':
                key = self.value()
                self._take(":")
                mark = self.mark()
                if name is None and mark == "{":
                    yield self._element()
                elif key == name and rest and mark == "{":
                    yield from self._inside((*rest,))
                elif key == name and not rest and mark == "[":
                    self._offset += 1
                    yield from self._elements()
                else:
                    self._pass_over()
                if self._is_cut:
                    return
                if self.mark() == "}":
                    break
                self._take(",")
            self._take("}")
        except _CutError:
            self._is_cut = True
            yield Skipped("the file is truncated: its closing bracket is missing", files=1)

    def _pass_over(self) -> None:
        """Go behind a value of which nothing is needed."""
        self._begin()
        self._is_over = True
        try:
            self.value()
        except _TooDeepError as error:
            self._skip_rest(error.depth)

    def _element(self) -> Any:  # noqa: ANN401 - any JSON value
        """Return the next object or array, or a Skipped if it is too large or cut off."""
        self._begin()
        try:
            try:
                value = self.value(is_list=self.mark() == "[")
            except _TooDeepError as error:
                self._skip_rest(error.depth)
                return Skipped("conversation nested too deeply", conversations=1)
        except _CutError:
            self._is_cut = True
            return Skipped("the file is truncated inside its last conversation", conversations=1, files=1)
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

    def value(self, depth: int = 0, *, is_message: bool = False, is_list: bool = False) -> Any:  # noqa: ANN401 - any JSON value
        """
        Return the value at the offset and go behind it; raise _CutError if the file ends inside it.

        One of the messages of a conversation stays JSON; `is_list` is for the value that has them.
        """
        while True:
            start = self._offset
            decoded = self._decoded_value(depth)
            left = len(self._text) - start
            if decoded is not None:
                value, end = decoded
                size = end - start
                # a number can go on behind the window; looking for more moves the value to the start of the text
                if self._text[start] in '{["' or not _NUMBER_GOES_ON.fullmatch(self._text, end) or not self._more():
                    self._check_size(size)
                    start, end = self._offset, self._offset + size
                    self._offset = end
                    is_kept = is_message and not self._is_sketch and not self._has_long_number
                    if is_kept and self._text[start] in "{[":
                        return Raw(self._text[start:end])
                    return value
            elif left < _WINDOW or (self._text[start] == '"' and not self._is_over):
                self._check_size(left)
                if not self._more(left):
                    if self._is_sketch and self._text[self._offset] in "{[":
                        return self._members(depth, is_list=is_list)
                    if self._is_sketch and self._text[self._offset] == '"':
                        self._offset = len(self._text)
                        return ""
                    raise _CutError
            elif self._text[start] == '"':
                return self._skip_string()
            else:
                return self._members(depth, is_list=is_list)

    def _members(self, depth: int, *, is_list: bool) -> Any:  # noqa: ANN401 - any JSON value
        """Return an object or array that is larger than the window, or what the sketch has of it."""
        if self._is_sketch and depth > _SKETCH_DEPTH:
            self._skip_rest(0)
            return None
        if depth > _MAX_DEPTH:
            raise _TooDeepError(depth)
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
                value = self.value(depth + 1, is_message=is_list, is_list=key in _LISTS)
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

    def _skip_rest(self, depth: int) -> None:
        """Go behind a value and as many closing brackets as are open before it, without nested calls."""
        is_begun = False
        while depth or not is_begun:
            self._offset = cast("re.Match[str]", _NO_BRACKETS.match(self._text, self._offset)).end()
            mark = self._text[self._offset : self._offset + 1]
            if not mark:
                if not self._more():
                    raise _CutError
            elif mark == '"':
                self._skip_string()
            else:
                is_begun = True
                depth += 1 if mark in "[{" else -1
                self._offset += 1

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
        if self._dropped_lines is not None:
            self._dropped_lines += self._text.count("\n", 0, self._offset)
        self._text, self._offset, self._start = self._text[self._offset :], 0, 0

    def _more(self, least: int = 0) -> bool:
        """Append at least as many characters as asked for, or to the end; return whether there were any."""
        self._drop()  # before reading, so that its memory is used again
        size = len(self._text)
        enough = size + max(1, min(least, _WINDOW))
        while len(self._text) < enough and (chunk := next(self._chunks, "")):
            self._text += chunk
        return len(self._text) > size

    def _take(self, mark: str) -> None:
        if self.mark() != mark:
            self._require()
            raise self._broken("is invalid JSON", self._offset)
        self._offset += 1

    def _require(self) -> None:
        if self._offset == len(self._text):
            raise _CutError

    def _decoded_value(self, depth: int) -> tuple[Any, int] | None:
        """Return the value at the offset and its end, or None if the text ends before it."""
        text, decode = self._text, _decode_member if depth else _decode
        self._has_long_number = False
        try:
            try:
                return decode(text, self._offset)
            except json.JSONDecodeError:
                raise
            except ValueError:  # a number of more digits than Python reads
                self._has_long_number = True
                return _decode_long_numbers(text, self._offset)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string") or bool(_BEGUN.fullmatch(text, error.pos))
            position = error.pos
        except RecursionError:
            if self._is_sketch:
                return None
            raise _TooDeepError(depth) from None
        if unfinished or self._is_sketch:
            return None
        raise self._broken("is invalid JSON", position)

    def _broken(self, problem: str, position: int) -> InvalidInputError:
        self._broken_at = position
        line = self._line_number(position)
        where = f" in line {line:,}" if line > 1 else ""
        return InvalidInputError("file", f"{problem}{where} at character {self._dropped + position:,}")

    def _line_number(self, position: int) -> int:
        if self._dropped_lines is None:
            self._dropped_lines = _lines_in(self._file, self._file_start, self._dropped)
        return 1 + self._dropped_lines + self._text.count("\n", 0, position)


def _lines_in(file: BinaryIO, start: int, characters: int) -> int:
    """Return the number of line breaks in this many characters from `start`, and keep the position."""
    position, lines = file.tell(), 0
    file.seek(start)
    for text in _decoded(file):
        lines += text.count("\n", 0, characters)
        characters -= len(text)
        if characters <= 0:
            break
    file.seek(position)
    return lines


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
