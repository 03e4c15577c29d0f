"""Searches chatdb's errors and all log records in every test for private values of the caller."""

from __future__ import annotations

import logging
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import unquote

import chatdb
from chatdb import ChatDBError, Conversation, Message, NewMessage
from chatdb._core.validate import ROLES

PACKAGE = str(Path(chatdb.__file__).parent)
PRIVATE = frozenset({"content", "payload", "metadata", "title", "key", "messages", "text", "items", "item"})
"""The names of local variables in chatdb that hold private values."""
PLANTED = frozenset({"XYZZY", "s3cr3t", "Ich heiße Ute"})
"""Private values that tests use."""
TEXTS = (str, dict, list, tuple, set, NewMessage, Message, Conversation)
"""Types that contain texts."""
MOST = 10_000
"""Maximum number of items to search in a list: some lists in tests have millions of items, or are infinite."""
TERMS = PRIVATE | set(NewMessage.model_fields) | ROLES | {"conversation", "conversations", "file", "message"}
"""Words that occur both in errors and in private values."""


def words(value: object, depth: int = 9) -> Iterator[str]:
    """Yield the texts in a private value, except those that are too short, too long or too common to search for."""
    with suppress(Exception):  # classes in tests may raise
        yield from _words(value, depth)


def _words(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        if 4 <= len(value) <= 200 and re.sub(r"^\W+|\W+$", "", value) not in TERMS:
            yield value
    elif isinstance(value, NewMessage | Message | Conversation) or (isinstance(value, dict) and "content" in value):
        yield from words([each for name, each in dict(value).items() if name in PRIVATE], depth)
    elif isinstance(value, dict):
        yield from words([*value, *value.values()], depth)
    elif isinstance(value, list | tuple | set) and depth:
        for each in islice(value, MOST):
            if isinstance(each, TEXTS):
                yield from words(each, depth - 1)


def passwords(dsn: object) -> Iterator[str]:
    """Yield the passwords in a DSN, except a password that equals the role's name."""
    told = ""
    with suppress(Exception):  # classes in tests may raise
        told = str(dsn)
    for user, password, option in re.findall(r"//([^:@/]*):([^@/]+)@|[?&\s]password=([^&\s]+)", told):
        yield from words([unquote(each) for each in (password, option) if each != user])


def said(frame: FrameType | None) -> Iterator[str]:
    """Yield the private values in the frames of chatdb on the stack."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            yield from words([value for name, value in frame.f_locals.items() if name in PRIVATE])
            yield from passwords(frame.f_locals.get("dsn"))
        frame = frame.f_back


class Leaks(logging.Handler):
    """Searches each error when it is created, and each log record as formatted."""

    def __init__(self) -> None:
        super().__init__()
        self.errors = self.records = 0
        self._found: list[str] = []
        self._said: deque[str] = deque(maxlen=100)

    def watch(self) -> None:
        """Start searching."""
        leaks = self

        def __init__(self: ChatDBError, *args: Any) -> None:  # noqa: N807 - replaces __init__
            super(ChatDBError, self).__init__(*args)
            leaks.errors += 1
            private = [*said(sys._getframe(1))]
            leaks._said.extend(private)
            leaks._search(type(self).__name__, " ".join(map(str, args)), private)

        ChatDBError.__init__ = __init__  # type: ignore[method-assign]
        logging.getLogger().addHandler(self)
        logging.getLogger("chatdb").setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        """Search a log record for recent private values: it may be written after the call."""
        self.records += 1
        self._said.extend(said(sys._getframe(1)))
        self._search(f"log of {record.name}", self.format(record), self._said)

    def _search(self, what: str, told: str, private: Iterable[str]) -> None:
        for word in {*private, *PLANTED}:
            if word in told and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", told):
                self._found.append(f"{what} tells {word!r}: {told[:300]}")

    def of_this_test(self) -> list[str]:
        """Return and reset the findings of a test."""
        found, self._found = self._found, []
        self._said.clear()
        return found


leaks = Leaks()
"""The findings of this run."""
