"""A conversation of pydantic-ai as it is stored: its record, the seqs of its entries, and their history."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter
from pydantic_ai.conversation_store import ConversationEntry, ConversationRecord
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter

from chatdb.adapters._unreadable import texts_hidden
from chatdb.branches import get_branch
from chatdb.conversations import list_conversations
from chatdb.formats import pydantic_ai as mapping
from chatdb.formats.pydantic_ai import item_of
from chatdb.messages import get_message
from chatdb.records import Conversation, Message, NewMessage

if TYPE_CHECKING:
    from chatdb import Database

_PAGE: Final = 10_000
_RECORDS: Final = TypeAdapter(ConversationRecord)


class StoredConversation:
    """
    A conversation as it was read.

    `seqs` has the entries whose seq is known: the head, the tips of the branches, and what was read since. `page` has
    the newest messages of one line, as they were read for `limit` entries.
    """

    def __init__(
        self, db: Database, prefix: str, conversation: Conversation, page: Sequence[Message] = (), limit: int | None = 0
    ) -> None:
        """
        Read the record from the metadata of a conversation.

        If another program appended or deleted messages, or switched the branch, the head is that of the conversation,
        and the revision is a new one.
        """
        self.conversation, self.page, self.limit = conversation, page, limit
        where: dict[str, Any] = {"user_id": conversation.user_id, "conversation_id": conversation.id}
        self._get_branch = partial(get_branch, db, **where)
        self._get_message = partial(get_message, db, **where)
        written: Any = (conversation.metadata or {}).get(mapping.FRAMEWORK) or {}
        self.seqs: dict[str, int] = dict(written.get("seqs", {}))
        self.position = [conversation.last_seq, conversation.head_seq]
        name, revision, time = mapping.id_of(conversation, prefix), str(conversation.id), conversation.updated_at
        self.record = ConversationRecord(conversation_id=name, head_id=None, revision=revision, updated_at=time)
        if written:
            with texts_hidden("pydantic-ai", "a stored conversation"):
                self.record = mapping.parse_json(_RECORDS, written["record"])
        if self.position != written.get("position", [0, 0]):
            last_seq, head_seq = self.position
            self.record.head_id = mapping.foreign_id(conversation.id, head_seq) if head_seq else None
            self.record.revision += f".{last_seq}.{head_seq}"
            self.record.updated_at = max(self.record.updated_at, time)
        self.version = (self.record.conversation_id, self.record.revision)

    async def seq_of(self, entry_id: str | None) -> int:
        """Return the seq of an entry, 0 for None. Raises MessageNotFoundError."""
        if entry_id is None:
            return 0
        if entry_id not in self.seqs:
            seq = mapping.foreign_seq(entry_id, self.conversation.id)
            self.seqs[entry_id] = seq or (await self._get_message(key=entry_id)).seq
        return self.seqs[entry_id]

    async def read_history(self, head_id: str, limit: int | None) -> list[ConversationEntry]:
        """Return the last entries up to one of them. Raises MessageNotFoundError."""
        top, size = await self.seq_of(head_id), page_size(limit)
        if limit != self.limit or all(message.seq != top for message in self.page):
            self.page, self.limit = await self._get_branch(limit=size, top_seq=top), limit
        page = self.page
        readable = [message for message in page if message.seq <= top and item_of(message)]
        while len(page) == size and (limit is None or len(readable) <= limit):
            page = await self._get_branch(limit=size, top_seq=top, before_seq=page[0].seq)
            readable[:0] = filter(item_of, page)
        entries: list[ConversationEntry] = []
        for stored in readable:
            with texts_hidden("pydantic-ai", "a stored message"):
                (message,) = mapping.parse_json(ModelMessagesTypeAdapter, f"[{item_of(stored)}]")
            parent_id = entries[-1].id if entries else None
            entries.append(ConversationEntry(id=mapping.entry_id_of(stored), parent_id=parent_id, message=message))
            self.seqs[entries[-1].id] = stored.seq
        return entries if limit is None else entries[-limit:]


async def list_stored(db: Database, user_id: str, prefix: str) -> list[StoredConversation]:
    """Return all conversations of a user whose keys begin with the prefix."""
    list_page = partial(list_conversations, db, user_id=user_id, limit=_PAGE, archived=None)
    stored = page = await list_page()
    while len(page) == _PAGE:
        page = await list_page(after=page[-1])
        stored += page
    named = [conversation for conversation in stored if conversation.key and conversation.key.startswith(prefix)]
    return [StoredConversation(db, prefix, conversation) for conversation in named]


def new_message(message: ModelMessage, key: str) -> NewMessage:
    """Return the message that stores a ModelRequest or a ModelResponse."""
    return mapping.new_message(mapping.dump_json(ModelMessagesTypeAdapter, [message])[1:-1], key)


def metadata_of(
    record: ConversationRecord, entries: list[ConversationEntry], stored: StoredConversation | None
) -> dict[str, object]:
    """Return what a record that is written with new entries adds to the metadata of the conversation."""
    seqs, (last, head) = ({}, (0, 0)) if stored is None else (stored.seqs.copy(), stored.position)
    for entry in entries:
        last = head = seqs[entry.id] = last + 1
    tips = {tip: seqs[tip] for tip in (record.head_id, *record.branches) if tip in seqs}
    written = {"record": mapping.dump_json(_RECORDS, record), "position": [last, head], "seqs": tips}
    return {mapping.FRAMEWORK: written}


def page_size(limit: int | None) -> int:
    """Return one more than the limit: the first entry names the one before it."""
    return _PAGE if limit is None else min(limit + 1, _PAGE)
