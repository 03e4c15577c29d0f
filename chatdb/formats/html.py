"""Turns HTML into readable text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Final

from chatdb.formats.items import attached, link

_BLOCKS: Final = re.compile(
    "address|article|aside|blockquote|body|div|dl|dt|dd|figure|footer|form|h[1-6r]|header|main|nav|ol|p|pre|section|"
    "table|tr|ul"
)
_SPACED: Final = re.compile("p|pre|table|ul|ol|blockquote|h[1-6]")
_UNSEEN: Final = frozenset(("script", "style", "head", "template", "title"))
_BLANKS: Final = re.compile(r"[\t\r\n\f][ \t\r\n\f]*| [ \t\r\n\f]+")
"""What is one space for a reader, except a space alone."""

_BEFORE_LINE: Final = re.compile(r" +\n")


def text_of(html: str) -> str:
    """Return the text of HTML: blocks on lines of their own, list items with a dash, links and images in brackets."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    text = "".join(parser.found)
    if " \n" in text:
        text = _BEFORE_LINE.sub("\n", text)
    return text.replace("\0", "\n").strip()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._unseen = self._pre = 0
        self._lists: list[int | None] = []
        self._links: list[tuple[str | None, int]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._unseen += tag in _UNSEEN
        self._pre += tag == "pre"
        if _BLOCKS.fullmatch(tag):
            self._break(2 if _SPACED.fullmatch(tag) and not self._lists else 1)
        match tag:
            case "br":
                self.found.append("\n")
            case "ul" | "ol":
                self._lists.append(1 if tag == "ol" else None)
            case "li":
                number = self._lists[-1] if self._lists else None
                if number is not None:
                    self._lists[-1] = number + 1
                self._break(1)
                self.found.append("  " * (len(self._lists) - 1) + ("- " if number is None else f"{number}. "))
            case "td" | "th":
                if self.found and not self.found[-1].endswith("\n"):
                    self.found.append(" | ")
            case "a":
                self._links.append((given.get("href"), len(self.found)))
            case "img":
                self.found.append(attached(given.get("alt") or given.get("src"), "image"))
            case _:
                pass

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNSEEN:
            self._unseen = max(0, self._unseen - 1)
        if tag == "pre":
            self._pre = max(0, self._pre - 1)
        if tag in {"ul", "ol"} and self._lists:
            self._lists.pop()
        if _BLOCKS.fullmatch(tag):
            self._break(2 if _SPACED.fullmatch(tag) and not self._lists else 1)
        if tag == "a" and self._links:
            href, start = self._links.pop()
            named = "".join(self.found[start:])
            if href and href != named.strip() and "\n" not in named:
                self.found[start:] = [link(named, href)]

    def handle_data(self, data: str) -> None:
        if self._unseen:
            return
        if self._pre:
            self.found.append(data.replace("\n", "\0"))
            return
        text = _BLANKS.sub(" ", data)
        self.found.append(text.lstrip() if not self.found or self.found[-1][-1:] in {"\n", " "} else text)

    def _break(self, lines: int) -> None:
        """End the line, and leave an empty one below it if `lines` is 2."""
        end = "".join(self.found[-3:]).rstrip(" ")
        missing = lines - (len(end) - len(end.rstrip("\n")))
        if self.found and missing > 0:
            self.found.append("\n" * missing)
