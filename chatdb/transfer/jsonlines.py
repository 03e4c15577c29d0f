"""
chatdb's JSON lines, version 1, which `chatdb export` writes and `chatdb import` restores without loss.

    {"type":"chatdb","version":1}
    {"type":"conversation","key":..,"title":..,"metadata":{..},"last_seq":2,"created_at":..,"updated_at":..,..}
    {"type":"message","seq":1,"role":..,"content":..,"payload":"{..}","metadata":{..},"token_count":..,"key":..,..}
    {"type":"message","seq":2,..}
    {"type":"end","conversations":1,"messages":2}

A conversation is followed by its messages in order of `seq`. `payload` is a JSON string, to keep it byte for byte. A
reader ignores a conversation's `id`, `user_id` and `revision` and all unknown fields. The first release did not write
`archived_at`, `pinned_at`, `head_seq`, `parent_seq` and `state`: without them, a conversation is not archived, not
pinned, and one line in order of `seq`, and its messages are complete. A message whose `state` is `streaming` has the
text so far; a reader takes it as `aborted`, because the rest never comes.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import count
from typing import Any, BinaryIO, Final

from chatdb._core.validate import (
    check_content,
    check_conversation_metadata,
    check_int,
    check_key,
    check_metadata,
    check_payload,
    check_role,
    check_seq,
    check_title,
    check_token_count,
)
from chatdb.errors import InvalidInputError
from chatdb.formats.items import Changed, Item, Skipped, SourceConversation, SourceMessage, as_object
from chatdb.records import Conversation, JsonText, Message

VERSION: Final = 1
MAX_LINE: Final = 128 * 1024 * 1024
"""Maximum bytes of a line: 20 MiB of content and payload, up to six times as long when escaped."""

WAS_STREAMING = "the message was streaming when it was exported, so its text is incomplete: stored as aborted"

MAX_LAST_SEQ: Final = 2**53
"""Maximum `last_seq` in a file; leaves room for more appends than anyone can make."""

_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=datetime.isoformat
).encode


def header() -> bytes:
    """Return the first line."""
    return _line(type="chatdb", version=VERSION)


def conversation_line(conversation: Conversation) -> bytes:
    """Return the line of a conversation. Its messages must follow in order of `seq`."""
    return _line(type="conversation", **conversation.model_dump())


def message_line(message: Message, **more: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """Return the line of a message, with more fields, which a reader ignores."""
    return _line(type="message", **message.model_dump(exclude={"id", "conversation_id", "user_id"}), **more)


def end_line(conversations: int, messages: int) -> bytes:
    """Return the last line, with the counts that show a reader that nothing is missing."""
    return _line(type="end", conversations=conversations, messages=messages)


def _line(**fields: Any) -> bytes:  # noqa: ANN401 - any JSON value
    return _encode(fields).encode() + b"\n"


def read(file: BinaryIO) -> Iterator[Item]:
    """
    Yield the conversations and messages, and a Skipped if lines are missing.

    A message that was streaming is aborted, and a Changed follows it.

    Raises InvalidInputError, with the line and the field, if a line is invalid.
    """
    lines = _lines(file)
    line, fields = next(lines, ("line 1", dict[str, Any]()))
    if fields.get("type") != "chatdb":
        raise InvalidInputError(line, "must be the header of a chatdb JSON lines file")
    if _taken(line, fields, {"version": _number})["version"] != VERSION:
        raise InvalidInputError(f"{line}, version", f"must be {VERSION}: upgrade chatdb to read a newer file")
    conversations = messages = 0
    seqs = _Seqs()
    for line, fields in lines:
        match fields.get("type"):
            case "conversation":
                seqs.check_head()
                conversation = SourceConversation(**_taken(line, _OPTIONAL | fields, _CONVERSATION))
                conversations += 1
                seqs = _Seqs(line, conversation)
                yield conversation
            case "message":
                fields.setdefault("parent_seq", None)
                fields.setdefault("state", None)
                message = SourceMessage(**_taken(line, fields, _MESSAGE))
                seqs.add(line, message)
                messages += 1
                if message.state == "streaming":
                    yield message._replace(state="aborted")
                    yield Changed(WAS_STREAMING, messages=1)
                else:
                    yield message
            case "end":
                seqs.check_head()
                said = _taken(line, fields, {"conversations": _number, "messages": _number})
                if file.read(1):
                    raise InvalidInputError(f"{line}, type", "may be end only on the last line")
                missing = (said["conversations"] - conversations, said["messages"] - messages)
                if missing != (0, 0):
                    reason = "the counts in the file's end line do not match its contents"
                    yield Skipped(reason, max(0, missing[0]), max(0, missing[1]))
                return
            case _:
                raise InvalidInputError(f"{line}, type", "must be conversation, message or end")
    if seqs.are_complete:
        seqs.check_head()
    # the import drops the head of a conversation that is not complete, because it lowers the conversation's last_seq
    yield Skipped("the file is truncated: its end line is missing", files=1)


class _Seqs:
    """The seqs of a conversation's messages, kept as ranges without holes: memory does not grow with the messages."""

    def __init__(self, line: str = "", conversation: SourceConversation | None = None) -> None:
        self._line = line
        self._last_seq = conversation.last_seq if conversation else 0
        self._head_seq = conversation.head_seq if conversation else None
        self._lows, self._highs = array("q", [0]), array("q", [0])

    @property
    def are_complete(self) -> bool:
        """Whether no message of the conversation can follow."""
        return self._highs[-1] == self._last_seq

    def add(self, line: str, message: SourceMessage) -> None:
        """Add the next message; raise InvalidInputError if its seq or its parent is wrong."""
        if not self._highs[-1] < message.seq <= self._last_seq:
            problem = "must be above the previous message's seq and at most the conversation's last_seq"
            raise InvalidInputError(f"{line}, seq", problem)
        if message.parent_seq is not None and not self._has(message.parent_seq):
            raise InvalidInputError(f"{line}, parent_seq", "must be null, 0 or the seq of an earlier message")
        if message.seq == self._highs[-1] + 1:
            self._highs[-1] = message.seq
        else:
            self._lows.append(message.seq)
            self._highs.append(message.seq)

    def check_head(self) -> None:
        """Raise InvalidInputError if the head is not one of the messages."""
        if self._head_seq is not None and self._head_seq != self._last_seq and not self._has(self._head_seq):
            problem = "must be null, 0, last_seq or the seq of a message of the conversation"
            raise InvalidInputError(f"{self._line}, head_seq", problem)

    def _has(self, seq: int) -> bool:
        return seq <= self._highs[bisect_right(self._lows, seq) - 1]


def _lines(file: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's name and fields, up to the end or the truncation."""
    for number in count(1):
        line = file.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise InvalidInputError(f"line {number}", f"must have at most {MAX_LINE:,} bytes")
        try:
            fields = as_object(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
        except (ValueError, RecursionError):
            fields = None
        if fields is not None:
            del line
            yield f"line {number}", fields
        elif line.endswith(b"\n"):
            raise InvalidInputError(f"line {number}", "must be a JSON object in UTF-8")
        else:
            return


def _taken(line: str, fields: dict[str, Any], checks: dict[str, Callable[[str, Any], Any]]) -> dict[str, Any]:
    """Check a line's fields and remove them, so that a large one does not outlive its message."""
    for field in checks:
        if field not in fields:
            raise InvalidInputError(f"{line}, {field}", "is missing")
    try:
        return {field: check(field, fields.pop(field)) for field, check in checks.items()}
    except InvalidInputError as error:
        field, problem = error.parameter, str(error).removeprefix(f"{error.parameter}: ")
    raise InvalidInputError(f"{line}, {field}", problem)


_number: Final = partial(check_int, least=0)


def _payload(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidInputError(name, "must be a string with JSON, or null")
    return None if value is None else check_payload(name, JsonText(value))


def _time(name: str, value: object) -> datetime:
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else None
        if time is not None and time.tzinfo is not None:
            return time.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise InvalidInputError(name, "must be an ISO 8601 time with a UTC offset")


def _optional_time(name: str, value: object) -> datetime | None:
    return None if value is None else _time(name, value)


def _optional_seq(name: str, value: object) -> int | None:
    return None if value is None else check_seq(name, value)


def _state(name: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and value in {"streaming", "aborted"}):
        return value
    raise InvalidInputError(name, "must be null, streaming or aborted")


_CONVERSATION: dict[str, Callable[[str, Any], Any]] = {
    "key": check_key,
    "title": check_title,
    "metadata": check_conversation_metadata,
    "last_seq": partial(check_int, least=0, most=MAX_LAST_SEQ),
    "created_at": _time,
    "updated_at": _time,
    "archived_at": _optional_time,
    "pinned_at": _optional_time,
    "head_seq": _optional_seq,
}
_OPTIONAL: Final = {"archived_at": None, "pinned_at": None, "head_seq": None}
_MESSAGE: dict[str, Callable[[str, Any], Any]] = {
    "seq": check_seq,
    "role": check_role,
    "content": check_content,
    "payload": _payload,
    "metadata": check_metadata,
    "token_count": check_token_count,
    "key": check_key,
    "created_at": _time,
    "parent_seq": _optional_seq,
    "state": _state,
}
