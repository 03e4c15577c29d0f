"""
Search in the texts of messages. Each statement has a file in `sql/` that begins with `search_messages`.

Decision: docs/decisions/0018-two-search-modes.md
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final, Literal

from chatdb._core.query import Database, Query
from chatdb._core.validate import (
    check_after_match,
    check_choice,
    check_conversation,
    check_limit,
    check_query,
    check_user_id,
    check_words,
)
from chatdb.records import FoundMessage, Match

_search_messages = Query("search_messages", FoundMessage, idempotent=True)
_search_messages_conversation = Query("search_messages_conversation", FoundMessage, idempotent=True)
_search_messages_words = Query("search_messages_words", FoundMessage, has_refusal=True, idempotent=True)
_search_messages_words_conversation = Query(
    "search_messages_words_conversation", FoundMessage, has_refusal=True, idempotent=True
)


async def search_messages(
    db: Database,
    *,
    user_id: str,
    query: str,
    limit: int = 20,
    after: Match | str | None = None,
    conversation_id: int | None = None,
    conversation_key: str | None = None,
    mode: Literal["substring", "words"] = "substring",
) -> list[Match]:
    """
    Return the messages of a user, or of one conversation, whose content matches, newest first.

    `query` is 1 to 1,000 characters and `limit` 1 to 10,000. For the next page, pass the last match of this page, or
    its `cursor`, as `after`. Messages that are streaming are left out. The list is empty for an unknown user.

    `mode="substring"` finds the query as it is written, in any language and in any case, and reads all messages of the
    user or conversation. `mode="words"` finds messages in whose first 100,000 characters all words of the query occur
    as whole words, in any order: `"a phrase"`, `or` and `-word` have their usual meaning. It needs the index of
    `chatdb search-index create`.

    Raises ConversationNotFoundError, ConfigurationError in mode words without the index, or InvalidInputError, also in
    mode words if the query contains no word. SQL: `search_messages.sql`, or the file with the suffix `_conversation`,
    `_words` or `_words_conversation`.
    """
    user = check_user_id(user_id)
    text = check_query(query)
    page = (*check_after_match(after), check_limit("limit", limit))
    is_substring = check_choice("mode", mode, "substring", "words") == "substring"
    terms = (text,) if is_substring else check_words(text)
    if conversation_id is None and conversation_key is None:
        if is_substring:
            found = await _search_messages.fetch_all(db, user, *terms, *page)
        else:
            found = await _search_messages_words.fetch_page(db, user, *terms, *page)
    else:
        address = check_conversation(conversation_id, conversation_key)
        if is_substring:
            found = await _search_messages_conversation.fetch_page(db, user, *address, *terms, *page)
        else:
            found = await _search_messages_words_conversation.fetch_page(db, user, *address, *terms, *page)
    return [
        Match(
            conversation_id=each.conversation_id,
            seq=each.seq,
            role=each.role,
            created_at=each.created_at,
            snippet=_snippet(each),
        )
        for each in found
    ]


def _snippet(found: FoundMessage) -> str:
    """Return about 200 characters in one line, cut between two characters as a reader sees them."""
    text, begin, end = found.text, 0, _SNIPPET
    if found.start > 1:
        while begin < end and _is_joined(text, begin):
            begin += 1
    while end < len(text) and _is_joined(text, end):
        end += 1
    before = "…" if found.start > 1 else ""
    after = "…" if found.start - 1 + end < found.length else ""
    return f"{before}{_BLANKS.sub(' ', text[begin:end]).strip()}{after}"


def _is_joined(text: str, position: int) -> bool:
    """Tell whether a character belongs to the one before it: a mark, a skin tone, or what a joiner adds."""
    character = text[position : position + 1]
    return (
        unicodedata.category(character or " ").startswith("M")
        or character == _JOINER
        or "\N{EMOJI MODIFIER FITZPATRICK TYPE-1-2}" <= character <= "\N{EMOJI MODIFIER FITZPATRICK TYPE-6}"
        or text[max(0, position - 1) : position] == _JOINER
    )


_SNIPPET: Final = 200
_JOINER: Final = "\N{ZERO WIDTH JOINER}"
_BLANKS: Final = re.compile("[\x01-\x20\x7f-\xa0\u061c\u200e\u200f\u2028-\u202f\u2066-\u2069]+")
"""White space, control characters, and those that change the direction of the text."""
