"""A conversation of pydantic-ai as it was read: its record, the places of its entries, and their history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter
from pydantic_ai.conversation_store import ConversationEntry, ConversationRecord
from pydantic_ai.messages import ModelMessagesTypeAdapter

from chatdb.branches import get_branch
from chatdb.conversations import list_conversations
from chatdb.errors import InvalidInputError, NotFoundError
from chatdb.formats.pydantic_ai import (
    FRAMEWORK,
    dump_json,
    entry_id_of,
    foreign_id,
    id_of,
    item_of,
    parse_json,
    place_of,
)
from chatdb.messages import get_message
from chatdb.records import Conversation, Message

if TYPE_CHECKING:
    from chatdb import Database

_PAGE: Final = 10_000
_RECORDS: Final = TypeAdapter(ConversationRecord)


@dataclass
class StoredConversation:
    """A conversation as it was read."""

    db: Database
    conversation: Conversation
    record: ConversationRecord
    seqs: dict[str, int]
    """The seqs of the entries that are known: the head, the tips of the branches, and what was read since."""
    history: list[ConversationEntry] = field(default_factory=list[ConversationEntry])
    """The whole history that was read last."""

    @classmethod
    def of(cls, db: Database, conversation: Conversation, prefix: str) -> StoredConversation:
        """
        Read a conversation's metadata.

        If another program appended or deleted messages, or switched the branch, the head is that of the conversation,
        and the revision is a new one.
        """
        written: Any = (conversation.metadata or {}).get(FRAMEWORK) or {}
        stored: dict[str, Any] = {"record": None, "last_seq": 0, "head_seq": 0, "seqs": {}, **written}
        time, last, head = conversation.updated_at, conversation.last_seq, conversation.head_seq
        record = ConversationRecord(
            conversation_id=id_of(conversation, prefix), head_id=None, revision=str(conversation.id), updated_at=time
        )
        if stored["record"] is not None:
            record = parse_json(_RECORDS, stored["record"])
        seqs: dict[str, int] = dict(stored["seqs"])
        if (last, head) != (stored["last_seq"], stored["head_seq"]):
            record.head_id = foreign_id(conversation.id, head) if head else None
            if record.head_id is not None:
                seqs[record.head_id] = head
            record.revision += f".{last}.{head}"
            record.updated_at = max(record.updated_at, time)
        return cls(db, conversation, record, seqs)

    async def read_history(
        self, head_id: str | None, limit: int | None, page: list[Message] | None = None
    ) -> list[ConversationEntry]:
        """
        Return the last entries up to one of them, whose seq is known.

        `page` has the newest messages of chatdb's current line, if they were read already: one more than the limit.
        """
        if head_id is None:
            return []
        top, size = self.seqs[head_id], page_size(limit)
        if page is None or all(message.seq != top for message in page):
            page = await self._page(top, size)
        found = [message for message in page if message.seq <= top and item_of(message)]
        while len(page) == size and (limit is None or len(found) <= limit):
            page = await self._page(top, size, before_seq=page[0].seq)
            found[:0] = filter(item_of, page)
        entries: list[ConversationEntry] = []
        for message in found:
            said = parse_json(ModelMessagesTypeAdapter, f"[{item_of(message)}]")[0]
            parent_id = entries[-1].id if entries else None
            entries.append(ConversationEntry(id=entry_id_of(message), parent_id=parent_id, message=said))
            self.seqs[entries[-1].id] = message.seq
        if limit is None:
            self.history = entries
            return entries
        return entries[max(0, len(entries) - limit) :]

    async def _page(self, top: int, size: int, before_seq: int | None = None) -> list[Message]:
        where: dict[str, Any] = {"user_id": self.conversation.user_id, "conversation_id": self.conversation.id}
        return await get_branch(self.db, **where, limit=size, top_seq=top, before_seq=before_seq)

    async def copy_history(self, head_id: str) -> list[ConversationEntry]:
        """Return the whole history up to an entry, without a round trip if it was just read."""
        if all(entry.id != head_id for entry in self.history):
            await self.read_history(head_id, None)
        ids = [entry.id for entry in self.history]
        return self.history[: ids.index(head_id) + 1]

    async def has(self, entry_id: str) -> bool:
        """Return whether an entry is stored here, and note its seq."""
        if entry_id not in self.seqs:
            where: dict[str, Any] = {"user_id": self.conversation.user_id, "conversation_id": self.conversation.id}
            try:
                message = await get_message(self.db, **where, **place_of(entry_id, self.conversation.id))
            except (NotFoundError, InvalidInputError):
                return False
            self.seqs[entry_id] = message.seq
        return True


async def list_stored(db: Database, user_id: str, prefix: str) -> list[StoredConversation]:
    """Return all conversations of a user whose keys begin with the prefix."""
    found: list[Conversation] = []
    is_last = False
    while not is_last:
        after = found[-1] if found else None
        page = await list_conversations(db, user_id=user_id, limit=_PAGE, archived=None, after=after)
        found += page
        is_last = len(page) < _PAGE
    named = [each for each in found if each.key is not None and each.key.startswith(prefix)]
    return [StoredConversation.of(db, each, prefix) for each in named]


def metadata_of(
    record: ConversationRecord, entries: list[ConversationEntry], stored: StoredConversation | None
) -> dict[str, object]:
    """Return what a record that is written with new entries adds to the metadata of the conversation."""
    seqs, last, head = {}, 0, 0
    if stored is not None:
        seqs, last, head = stored.seqs, stored.conversation.last_seq, stored.conversation.head_seq
    if entries:
        seqs = seqs | {entry.id: seq for seq, entry in enumerate(entries, last + 1)}
        last = head = last + len(entries)
    tips = {name: seqs[name] for name in (record.head_id, *record.branches) if name in seqs}
    text = dump_json(_RECORDS, record)
    return {FRAMEWORK: {"record": text, "last_seq": last, "head_seq": head, "seqs": tips}}


def page_size(limit: int | None) -> int:
    """Return one more than the limit: the first entry names the one before it."""
    return _PAGE if limit is None else min(limit + 1, _PAGE)
