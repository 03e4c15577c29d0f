"""Make a conversation with its messages of the rows and texts of a session."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from chatdb._core.validate import MAX_CONTENT, MAX_PAYLOAD, check_payload
from chatdb.errors import InvalidInputError
from chatdb.formats import items
from chatdb.records import JsonText
from chatdb.transfer.tables.source import Row, Source


def conversation_items(source: Source, messages: Iterable[tuple[Row, str | None]]) -> Iterator[items.Item]:
    """Yield a session's conversation, then its messages; a message that cannot be imported leaves a gap in `seq`."""
    head: items.SourceConversation | None = None
    begun = False
    for seq, (row, text) in enumerate(messages, 1):
        try:
            head = head or _conversation(source, row)
        except items.UnsupportedItemError as error:
            yield items.Skipped(str(error), 1, row.messages)
            return
        if source.keeps_empty and not begun:
            yield head
            begun = True
        if row.messages == 0:
            return
        try:
            message, is_replaced = _message(source, seq, row, text)
        except items.UnsupportedItemError as error:
            yield items.Skipped(str(error), messages=1, seq=seq if begun else 0)
            continue
        if not begun:
            yield head
            begun = True
        yield message
        if is_replaced:
            yield items.Changed(items.REPLACED, messages=1)
    if not begun:
        yield items.Skipped("no messages that can be imported", conversations=1)


def _conversation(source: Source, row: Row) -> items.SourceConversation:
    if row.messages == 0 and not source.keeps_empty:
        raise items.UnsupportedItemError("no messages")
    if not source.session_id(row.session):
        raise items.UnsupportedItemError("session without an ID")
    key, title, metadata = source.head(row)
    return items.SourceConversation(key, title, metadata, row.messages, _utc(row.began_at), _utc(row.ended_at))


def _message(source: Source, seq: int, row: Row, text: str | None) -> tuple[items.SourceMessage, bool]:
    """Return a message, and whether characters of its text were replaced."""
    if (row.size or 0) > MAX_PAYLOAD:
        raise items.UnsupportedItemError("larger than 16 MiB as JSON")
    try:
        payload = check_payload("payload", JsonText(text or ""))
    except InvalidInputError:
        payload = None
    if payload is None:
        raise items.UnsupportedItemError(
            "invalid JSON, or JSON with NaN, numbers of over 4,300 digits or nesting deeper than 200 levels"
        )
    item = items.as_object(json.loads(payload))
    if item is None:
        raise items.UnsupportedItemError("not a JSON object")
    author, said, kind, name = source.parse(item)
    content = items.replace_unstorable(said)
    is_replaced = content != said
    if source.framework:
        content = items.cut(content)
    elif len(content.encode()) > MAX_CONTENT:
        raise items.UnsupportedItemError("text longer than 4 MiB")
    metadata = items.metadata_of(framework=source.framework, type=items.short(kind), name=items.short(name))
    key, written_at = source.key(row, item), _utc(row.written_at)
    return items.SourceMessage(seq, author, content, payload, metadata, None, key, written_at), is_replaced


def _utc(time: datetime | None) -> datetime | None:
    return None if time is None else time.replace(tzinfo=UTC)
