"""Read the objects of a JSON file of any size one by one, with memory for only the largest object."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, cast

from chatdb.errors import InvalidInputError
from chatdb.formats.items import Skipped

MAX_OBJECT: Final = 26 * 1024 * 1024
"""Maximum characters of one object: enough for a text of 4 MiB, even if each character is a six-character escape."""

_CHUNK = 1024 * 1024
_SPACE = re.compile(r"[ \t\n\r]*")
_BEGUN = re.compile(r"[-+.0-9A-Za-z]{0,8}")  # the start of a word, a number or an escape, up to "-Infinit"
_decode = json.JSONDecoder().raw_decode


def objects(file: BinaryIO) -> Iterator[dict[str, Any] | Skipped]:
    """
    Yield the objects of an array or a sequence, and a Skipped if the file is truncated.

    Raises InvalidInputError, with the position, if the file is not UTF-8 or JSON, or contains anything but objects, or
    an object of over 26 Mi characters.
    """
    chunks = _decoded(file)
    text, offset, dropped = "", 0, 0
    expected, in_array = "[{", False
    while True:
        offset = cast("re.Match[str]", _SPACE.match(text, offset)).end()
        if offset == len(text):
            dropped += offset
            text, offset = next(chunks, ""), 0
            if text:
                continue
            break
        mark = text[offset]
        if mark not in expected:
            raise _broken("is invalid JSON, or contains something other than objects,", dropped + offset)
        if mark != "{":
            in_array = True
            expected = {"[": "{]", ",": "{", "]": ""}[mark]
            offset += 1
            continue
        while (decoded := _object(text, offset, dropped)) is None:
            dropped += offset
            text, offset = text[offset:], 0
            size = len(text)
            enough = min(2 * size, MAX_OBJECT + 1)  # doubling keeps the work linear
            while len(text) < enough and (more := next(chunks, "")):
                text += more
            if len(text) == size:
                yield Skipped("the file is truncated inside its last conversation", conversations=1)
                return
        value, offset = decoded
        expected = ",]" if in_array else "{"
        # free the text of a large object before yielding it, and the object before reading the next
        if offset > _CHUNK:
            dropped += offset
            text, offset = text[offset:], 0
        yield value
        del value, decoded
    if expected == "[{":
        raise InvalidInputError("file", "is empty")
    if in_array and expected:
        yield Skipped("the file is truncated: its closing bracket is missing")


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
        raise InvalidInputError("file", f"is not UTF-8 at byte {position:,}")
    if decoder.getstate()[0]:
        yield "\ufffd"  # ends inside a character: invalid JSON outside a string, truncated inside one


def _object(text: str, offset: int, dropped: int) -> tuple[dict[str, Any], int] | None:
    """Return the object at an offset and its end, or None if the text ends before the object."""
    try:
        value, end = _decode(text, offset)
    except json.JSONDecodeError as error:
        unfinished = error.msg.startswith("Unterminated string") or bool(_BEGUN.fullmatch(text, error.pos))
        problem, position = "is invalid JSON", error.pos
    except RecursionError:
        unfinished, problem, position = False, "is nested too deeply in the object", offset
    except ValueError:
        unfinished, problem, position = False, "has a number of over 4,300 digits in the object", offset
    else:
        if end - offset > MAX_OBJECT:
            raise _too_large(dropped + offset)
        return value, end
    if not unfinished:
        raise _broken(problem, dropped + position)
    if len(text) - offset > MAX_OBJECT:
        raise _too_large(dropped + offset)
    return None


def _broken(problem: str, position: int) -> InvalidInputError:
    return InvalidInputError("file", f"{problem} at character {position:,}")


def _too_large(position: int) -> InvalidInputError:
    return InvalidInputError("file", f"has an object of over {MAX_OBJECT:,} characters at character {position:,}")
