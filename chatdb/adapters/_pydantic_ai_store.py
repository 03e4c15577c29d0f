"""
The ConversationStore of pydantic-ai on chatdb.

Entries are messages with the entry's id as `key`, and branches are lines. The record is JSON text in the conversation's
metadata, because `branch` moves its head to any entry, and chatdb's own head is the last message that was appended.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
)
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessagesTypeAdapter

from chatdb.adapters._pydantic_ai_conversation import StoredConversation, list_stored, metadata_of, page_size
from chatdb.adapters._settled import settled
from chatdb.conversations import create_conversation, delete_conversation, get_conversation, load_conversation
from chatdb.errors import ConversationNotFoundError, NotFoundError, StaleError, UnavailableError
from chatdb.formats.pydantic_ai import KEY_PREFIX, conversation_of, dump_json, new_message
from chatdb.messages import append_messages
from chatdb.records import NEW, Conversation

if TYPE_CHECKING:
    from chatdb import Database

_ATTEMPTS: Final = 5

Change: TypeAlias = Callable[[StoredConversation | None], Coroutine[Any, Any, object]]
"""A change of a conversation as it is now, or of one that does not exist."""


class ChatDBConversationStore(ConversationStore):
    """
    A ConversationStore on PostgreSQL.

    `load` and `load_entries` take one round trip; `save`, `branch`, `fork` and `delete` two, because the base class
    reads before it writes. A `save` that compares the messages with the stored ones takes a third. Each change is one
    statement, refused if the conversation changed since it was read: of concurrent writers one succeeds, and the others
    get ConversationConflict. To archive, pin or rename a conversation is no conflict.

    A fork is a copy, of at most 10,000 messages and 64 MiB. `delete` deletes the messages of all branches, and no fork.
    `list_conversations` reads all conversations of the user.

    What cannot be stored, such as a record of more than 1 MiB, raises InvalidInputError before anything is written.
    """

    def __init__(self, db: Database, *, user_id: str, prefix: str = KEY_PREFIX) -> None:
        """Use the conversations of `user_id` whose keys are `prefix` + conversation_id."""
        self._db, self._user, self._prefix = db, user_id, prefix

    async def _read(
        self, conversation_id: str, *, limit: int | None = None, scope: str | None = None
    ) -> tuple[ConversationRecord, list[ConversationEntry]] | None:
        """Return a record and its history in one round trip; those of the base class would be two."""
        if limit is not None and limit < 0:
            raise UserError("`limit` must not be negative.")
        try:
            loaded = await load_conversation(self._db, **self._where(conversation_id), limit=page_size(limit))
            read = self._note(loaded[0])
            if scope not in {None, read.record.scope}:
                return None
            return read.record, await read.read_history(read.record.head_id, limit, loaded[1])
        except ConversationNotFoundError:
            return None

    async def read_record(self, conversation_id: str) -> ConversationRecord | None:
        """Return the record of a conversation, in one round trip."""
        read = await self._find(conversation_id)
        return None if read is None else read.record

    async def read_records(self, *, scope: str | None = None, limit: int | None = None) -> Sequence[ConversationRecord]:
        """Return the records of the user, in one round trip for 10,000 conversations."""
        found = await list_stored(self._db, self._user, self._prefix)
        records = [each.record for each in found if scope in {None, each.record.scope}]
        return sorted(records, key=lambda record: record.updated_at, reverse=True)[:limit]

    async def read_history(self, head_id: str | None, *, limit: int | None = None) -> list[ConversationEntry]:
        """Return the entries up to one of the conversation that was read last, or else of any other of the user."""
        if head_id is None or limit == 0:
            return []
        with suppress(NotFoundError):
            if (read := await self._holding(head_id)) is not None:
                return await read.read_history(head_id, limit)
        raise LookupError("the entry is not stored")

    async def read_entry(self, entry_id: str) -> ConversationEntry:
        """Return an entry of the conversation that was read last, or else of any other of the user."""
        return (await self.read_history(entry_id, limit=1))[-1]

    async def write_record(
        self,
        record: ConversationRecord,
        *,
        new_entries: Sequence[ConversationEntry] = (),
        expected_revision: str | None,
    ) -> None:
        """Store a record and its new entries in one statement; the messages that a fork shares are copied."""
        read = None if expected_revision is None else await self._current(record.conversation_id, expected_revision)
        entries, parent = list(new_entries), 0
        base = entries[0].parent_id if entries else record.head_id
        if base is not None:
            source = await self._holding(base) if read is None else read
            if source is None or not await source.has(base):
                raise ConversationConflict(record.conversation_id)
            parent = source.seqs[base]
            if read is None:
                entries[:0] = await source.copy_history(base)
        batch = [new_message(dump_json(ModelMessagesTypeAdapter, [each.message])[1:-1], each.id) for each in entries]
        patch = metadata_of(record, entries, read)

        async def write(now: StoredConversation | None) -> None:
            where = self._where(record.conversation_id)
            if now is None:
                new: dict[str, Any] = {"user_id": self._user, "key": where["conversation_key"], "expected": NEW}
                await create_conversation(self._db, **new, messages=batch, metadata=patch)
            else:
                where |= {"parent_seq": parent, "expected": now.conversation}
                await append_messages(self._db, **where, messages=batch, conversation_metadata_patch=patch)

        await self._change(record.conversation_id, write, read, record.revision)

    async def delete_record(self, conversation_id: str, *, expected_revision: str) -> None:
        """Delete a conversation with the messages of all its branches."""

        async def delete(now: StoredConversation | None) -> None:
            expected = None if now is None else now.conversation
            await delete_conversation(self._db, **self._where(conversation_id), expected=expected)

        await self._change(conversation_id, delete, await self._current(conversation_id, expected_revision), None)

    async def _change(
        self, conversation_id: str, change: Change, read: StoredConversation | None, written: str | None
    ) -> None:
        """
        Make a change, and again if the conversation was only renamed, pinned or archived since it was read.

        If the answer is lost, the revision tells whether the change was made: `written`, or None after a deletion.
        """
        expected, is_lost = read and read.record.revision, False
        for _ in range(_ATTEMPTS):
            try:
                await settled(change(read))
            except UnavailableError as error:
                if error.sent is False:
                    raise
                is_lost = True
                try:
                    read = await self._find(conversation_id)
                except UnavailableError:
                    raise error from None
            except (StaleError, NotFoundError):
                read = await self._find(conversation_id)
            else:
                return
            revision = read and read.record.revision
            if is_lost and revision == written:
                return
            if revision != expected:
                break
        raise ConversationConflict(conversation_id)

    def _where(self, conversation_id: str) -> dict[str, Any]:
        return {"user_id": self._user, "conversation_key": conversation_of(conversation_id, self._prefix)[0]}

    def _note(self, conversation: Conversation) -> StoredConversation:
        """Keep what is known of a conversation for the next call of this task."""
        read = StoredConversation.of(self._db, conversation, self._prefix)
        _last_read.set((self, read))
        return read

    def _last(self) -> StoredConversation | None:
        store, read = _last_read.get()
        return read if store is self else None

    async def _find(self, conversation_id: str) -> StoredConversation | None:
        try:
            return self._note(await get_conversation(self._db, **self._where(conversation_id)))
        except ConversationNotFoundError:
            _last_read.set((None, None))
            return None

    async def _current(self, conversation_id: str, revision: str) -> StoredConversation:
        """Return the conversation as it was read last, or read it again; raise unless it has this revision."""
        read = self._last()
        if read is None or (read.record.conversation_id, read.record.revision) != (conversation_id, revision):
            read = await self._find(conversation_id)
        if read is None or read.record.revision != revision:
            raise ConversationConflict(conversation_id)
        return read

    async def _holding(self, entry_id: str) -> StoredConversation | None:
        """Return the conversation with an entry: the one that was read last, or another one of the user."""
        if (read := self._last()) is not None and await read.has(entry_id):
            return read
        for other in await list_stored(self._db, self._user, self._prefix):
            if await other.has(entry_id):
                return other
        return None


_last_read: ContextVar[tuple[ChatDBConversationStore | None, StoredConversation | None]] = ContextVar(
    "chatdb_pydantic_ai_last_read", default=(None, None)
)
