"""Looks, in every test, whether an error of chatdb's or a log record tells what its caller said in private."""

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
"""The names under which the package's functions have what is private."""
PLANTED = frozenset({"XYZZY", "s3cr3t", "Ich heiße Ute"})
"""What tests say in private only."""
TEXTS = (str, dict, list, tuple, set, NewMessage, Message, Conversation)
"""What has texts."""
MOST = 10_000
"""How many items of a list are looked at: some tests' lists have millions of numbers, or no end."""
TERMS = PRIVATE | set(NewMessage.model_fields) | ROLES
"""Words of the errors themselves, which tests say in private too."""


def words(value: object, depth: int = 9) -> Iterator[str]:
    """Go through the texts in what is private, unless a sentence may have them by chance, or cannot have them."""
    with suppress(Exception):  # a test's class that raises
        yield from _words(value, depth)


def _words(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        if 4 <= len(value) <= 200 and value not in TERMS:
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
    """Go through the passwords in a DSN, but for a role's own name."""
    told = ""
    with suppress(Exception):  # a test's class that raises
        told = str(dsn)
    for user, password, option in re.findall(r"//([^:@/]*):([^@/]+)@|[?&\s]password=([^&\s]+)", told):
        yield from words([unquote(each) for each in (password, option) if each != user])


def said(frame: FrameType | None) -> Iterator[str]:
    """Go through what the package's functions that are under way were told in private."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            yield from words([value for name, value in frame.f_locals.items() if name in PRIVATE])
            yield from passwords(frame.f_locals.get("dsn"))
        frame = frame.f_back


class Leaks(logging.Handler):
    """Searches each error as it is made, and each log record as it would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.errors = self.records = 0
        self._found: list[str] = []
        self._said: deque[str] = deque(maxlen=100)

    def watch(self) -> None:
        """Search from now on."""
        leaks = self

        def __init__(self: ChatDBError, *args: Any) -> None:  # noqa: N807 - it takes the place of one
            super(ChatDBError, self).__init__(*args)
            leaks.errors += 1
            private = [*said(sys._getframe(1))]
            leaks._said.extend(private)
            leaks._search(type(self).__name__, " ".join(map(str, args)), private)

        ChatDBError.__init__ = __init__  # type: ignore[method-assign]
        logging.getLogger().addHandler(self)
        logging.getLogger("chatdb").setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        """Search a log record, which may come after the call, for what was said last."""
        self.records += 1
        self._said.extend(said(sys._getframe(1)))
        self._search(f"log of {record.name}", self.format(record), self._said)

    def _search(self, what: str, told: str, private: Iterable[str]) -> None:
        for word in {*private, *PLANTED}:
            if word in told and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", told):
                self._found.append(f"{what} tells {word!r}: {told[:300]}")

    def of_this_test(self) -> list[str]:
        """Return what was found since the last test, and forget what was said in it."""
        found, self._found = self._found, []
        self._said.clear()
        return found


leaks = Leaks()
"""Those of this run."""
