"""Merge a later export into a conversation that the user already has: which messages are new, changed, or deleted."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from typing import Final

from chatdb.formats import blocks, exports, items
from chatdb.formats.items import SourceConversation, SourceMessage
from chatdb.records import ImportedContent, ImportedMessage

CHANGED: Final = "the export has another text: updated"
RENAMED: Final = "the export has another title: updated"
EDITED_IN_BOTH: Final = "edited both here and in the export: the text here stays"
FLAGGED: Final = "the export has it archived or pinned, or no longer: updated"
RENAMED_IN_BOTH: Final = "renamed both here and in the export: the title here stays"


class Merge:
    """
    A stored conversation, and where the file's messages are in it.

    A message of the file is the stored one with its key. Without one, it is new, unless the conversation has a hole at
    its place: then the user has deleted it since an earlier import.
    """

    def __init__(self, rows: Iterable[ImportedMessage], *, begun: int = 0) -> None:
        """
        Take what `import_conversations_stored` returned for it.

        `begun` is the number of messages of the file with which the conversation began when it was stored, if it is
        known by their texts.
        """
        self.begun = begun
        self._has_parted = False
        """Whether the file went on with other messages than the stored conversation."""
        self.head_in_file = False
        self.grew = False
        self._known: dict[str, ImportedMessage] = {}
        self._by_seq: dict[int, ImportedMessage] = {}
        self._places = {0: 0}
        """The stored seq for each seq of the file; that of the message before it if it was deleted."""
        for row in rows:
            self.id, self.last_seq, self.edits = row.id, row.last_seq, row.edits
            self.title, self.imported_title, self.head_seq = row.title, row.imported_title, row.head_seq
            self._archived = row.archived_at is not None, row.imported_archived == "true"
            self._pinned = row.pinned_at is not None, row.imported_pinned == "true"
            if row.seq is not None:
                self._by_seq[row.seq] = row
                if row.key is not None:
                    self._known[row.key] = row
        self._first_last_seq = self.last_seq
        self._newest = max(self._by_seq, default=0)

    def has_any(self, messages: Iterable[SourceMessage]) -> bool:
        """Tell whether a message of the file is stored."""
        return any(message.key in self._known for message in messages)

    def place(self, message: SourceMessage) -> SourceMessage | ImportedMessage | None:
        """Return a message to add, or the stored one, or None if it was deleted."""
        before = self._places.get(message.seq - 1 if message.parent_seq is None else message.parent_seq, 0)
        stored = self._stored(message)
        if stored is not None and stored.seq is not None:
            self._places[message.seq] = stored.seq
            self.head_in_file = self.head_in_file or stored.seq == self.head_seq
            return stored
        if not self._has_parted and message.seq <= self._first_last_seq and message.seq not in self._by_seq:
            self._places[message.seq] = before
            return None
        self.last_seq += 1
        self._places[message.seq] = self.last_seq
        follows = None if before == self._newest else before
        self._newest = self.last_seq
        return message._replace(seq=self.last_seq, parent_seq=follows)

    def _stored(self, message: SourceMessage) -> ImportedMessage | None:
        if message.key:
            return self._known.get(message.key)
        stored = None if self._has_parted else self._by_seq.get(message.seq)
        if stored is not None and 0 < self.begun < message.seq and differs(message, stored):
            self._has_parted = True
            return None
        return stored

    def set_head(self, source: SourceConversation) -> None:
        """Select the line of the file if the conversation grew, unless the user's own messages are selected."""
        if self.grew and self.head_in_file:
            self.head_seq = self._places[source.last_seq if source.head_seq is None else source.head_seq]

    def new_title(self, source: SourceConversation) -> tuple[str | None, bool]:
        """Return the title to set, if any, and whether the title was changed on both sides."""
        if source.title in {None, "", self.title, self.imported_title}:
            return None, False
        is_ours = self.title != self.imported_title
        return (None, True) if is_ours else (source.title, False)

    def new_flags(self, source: SourceConversation) -> tuple[dict[str, bool], dict[str, bool]]:
        """Return which flags the export has changed since it was imported, and which of them the user has not."""
        changed: dict[str, bool] = {}
        to_set: dict[str, bool] = {}
        for name, theirs, (ours, imported) in (
            ("archived", source.is_archived, self._archived),
            ("pinned", source.is_pinned, self._pinned),
        ):
            if theirs is not None and theirs != imported:
                changed[name] = theirs
                if ours != theirs:
                    to_set[name] = theirs
        return changed, to_set


def differs(message: SourceMessage, stored: ImportedMessage) -> bool:
    """Tell whether the text or the state of a message is not the stored one; one that is streaming is left alone."""
    if stored.state == "streaming":
        return False
    return message.state != stored.state or hashlib.sha256(message.content.encode()).hexdigest() != stored.digest


def is_imported(message: SourceMessage, stored: ImportedContent, *, key: str, state: str | None) -> bool | None:
    """
    Tell whether the stored text is what an earlier export had, so that the export's new text may replace it.

    None if the export has not changed the message, so that only the user did. `key` is that of the conversation.
    """
    if stored.payload is not None and stored.payload == message.payload:
        return None
    if state == "aborted" and message.content.startswith(stored.content):
        return True
    return stored.payload is not None and stored.content in _texts_of(stored.payload, key.partition(":")[0])


def _texts_of(payload: str, format: str) -> set[str]:  # noqa: A002 - as everywhere
    """Return the texts that an import makes of a foreign message, or of a part of one."""
    value = json.loads(payload)
    texts = [part.text for part, _ in blocks.parts([value])]
    parse = exports.FORMATS[format].message if format in exports.FORMATS else None
    if parse is not None and (fields := items.as_object(value)) is not None:
        with contextlib.suppress(items.UnsupportedItemError):
            texts += [piece.text for piece in parse(fields)]
    return {items.readable(text) for text in texts}
