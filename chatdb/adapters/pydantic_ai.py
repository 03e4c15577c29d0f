"""
Stores the conversations of pydantic-ai: `load` and `save` for messages alone, ChatDBConversationStore for all of it.

Each ModelRequest and ModelResponse is one message: `content` is its text, `payload` the JSON of pydantic-ai's
ModelMessagesTypeAdapter, and `key` the id of its entry. The record is JSON in the metadata of the conversation, because
`branch` moves its head to any entry, and chatdb's own head is the last message that was appended. Messages that other
programs stored are read as text.

Docs: docs/adapters/pydantic-ai.md
"""

from __future__ import annotations

import secrets
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING, Any

from chatdb.adapters._settled import settled
from chatdb.conversations import create_conversation, delete_conversation, load_conversation
from chatdb.errors import ConfigurationError, ConversationNotFoundError, NotFoundError, StaleError, UnavailableError
from chatdb.formats.pydantic_ai import KEY_PREFIX, conversation_of
from chatdb.messages import append_messages
from chatdb.records import NEW

try:
    from pydantic_ai._conversation_marks import stored_boundary
    from pydantic_ai.conversation import Conversation
    from pydantic_ai.conversation_store import (
        ConversationConflict,
        ConversationEntry,
        ConversationRecord,
        ConversationStore,
    )
    from pydantic_ai.messages import ModelMessage
    from pydantic_ai.run import AgentRunResult

    from chatdb.adapters._pydantic_ai_conversation import (
        StoredConversation,
        list_stored,
        metadata_of,
        new_message,
        page_size,
    )
except ImportError:
    raise ConfigurationError("the extra is not installed: run pip install 'chatdb[pydantic-ai]'") from None

if TYPE_CHECKING:
    from chatdb import Database

__all__ = ["ChatDBConversationStore", "load", "save"]


async def load(
    db: Database, *, user_id: str, conversation_key: str, limit: int | None = None, prefix: str = KEY_PREFIX
) -> list[ModelMessage]:
    """
    Return the messages of a conversation, oldest first, or an empty list if there is none yet.

    `limit` returns only the newest ones. It takes one round trip for 10,000 messages.

    Raises InvalidInputError.
    """
    loaded = await ChatDBConversationStore(db, user_id=user_id, prefix=prefix).load(conversation_key, limit=limit)
    return [] if loaded is None else loaded.messages


async def save(
    db: Database, *, user_id: str, conversation_key: str, messages: Sequence[ModelMessage], prefix: str = KEY_PREFIX
) -> None:
    """
    Append messages, such as `result.new_messages()`, to a conversation, which is created if it is missing.

    They are stored once, even if the connection is lost. It takes one round trip.

    Raises InvalidInputError.
    """
    key, patch = conversation_of(conversation_key, prefix)
    batch = [new_message(message, secrets.token_hex(16)) for message in messages]
    if batch:
        change = append_messages(
            db, user_id=user_id, conversation_key=key, messages=batch, create=True, conversation_metadata_patch=patch
        )
        await settled(change)


class ChatDBConversationStore(ConversationStore):
    """
    A ConversationStore on PostgreSQL.

    `load` and `load_entries` take one round trip; `save`, `branch`, `fork` and `delete` two, because the base class
    reads before it writes. Each change is one statement, refused if the conversation changed since it was read: of
    concurrent writers one succeeds, and the others get ConversationConflict. To archive, pin or rename a conversation
    is no conflict.

    A fork is a copy, of at most 10,000 messages and 64 MiB. `delete` deletes the messages of all branches, and no fork.
    `list_conversations` reads all conversations of the user.

    What cannot be stored, such as a record of more than 1 MiB, raises InvalidInputError before anything is written.
    """

    def __init__(self, db: Database, *, user_id: str, prefix: str = KEY_PREFIX) -> None:
        """Use the conversations of `user_id` whose keys are `prefix` + conversation_id."""
        self._db, self._user, self._prefix = db, user_id, prefix
        self._limit: int | None = 0
        self._last_read: StoredConversation | None = None

    async def save(
        self, conversation: Conversation | AgentRunResult[Any], *, scope: str | None = None
    ) -> list[ConversationEntry]:
        """Save a conversation; messages that the base class compares are read together with the record."""
        saved = conversation.conversation if isinstance(conversation, AgentRunResult) else conversation
        store = self._reading(saved.new_message_index if stored_boundary(saved) is None else 0)
        return await super(ChatDBConversationStore, store).save(conversation, scope=scope)

    async def _read(
        self, conversation_id: str, *, limit: int | None = None, scope: str | None = None
    ) -> tuple[ConversationRecord, list[ConversationEntry]] | None:
        store = self._reading(limit)
        read = await super(ChatDBConversationStore, store)._read(conversation_id, limit=limit, scope=scope)
        self._last_read = store._last_read
        return read

    def _reading(self, limit: int | None) -> ChatDBConversationStore:
        """Return a store whose `read_record` reads the history as well, so that `read_history` takes no round trip."""
        store = copy(self)
        store._limit = limit
        return store

    async def read_record(self, conversation_id: str) -> ConversationRecord | None:
        """Return the record of a conversation, in one round trip."""
        stored = await self._find(conversation_id, self._limit)
        return None if stored is None else stored.record

    async def read_records(self, *, scope: str | None = None, limit: int | None = None) -> Sequence[ConversationRecord]:
        """Return the records of the user, in one round trip for 10,000 conversations."""
        records = [stored.record for stored in await list_stored(self._db, self._user, self._prefix)]
        records = [record for record in records if scope in {None, record.scope}]
        return sorted(records, key=lambda record: record.updated_at, reverse=True)[:limit]

    async def read_history(self, head_id: str | None, *, limit: int | None = None) -> list[ConversationEntry]:
        """Return the entries up to one of the conversation that was read last, or else of any other of the user."""
        if head_id is None or limit == 0:
            return []
        if self._last_read is not None:
            with suppress(NotFoundError):
                return await self._last_read.read_history(head_id, limit)
        for stored in await list_stored(self._db, self._user, self._prefix):
            with suppress(NotFoundError):
                return await stored.read_history(head_id, limit)
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
        await self._change(record.conversation_id, expected_revision, record, list(new_entries))

    async def delete_record(self, conversation_id: str, *, expected_revision: str) -> None:
        """Delete a conversation with the messages of all its branches."""
        await self._change(conversation_id, expected_revision, None, [])

    async def _change(
        self,
        conversation_id: str,
        expected_revision: str | None,
        record: ConversationRecord | None,
        new_entries: list[ConversationEntry],
    ) -> None:
        """
        Write or delete a record, and again if the conversation was only renamed, pinned or archived since it was read.

        If the answer is lost, the stored revision tells whether the change was made.
        """
        stored, expected = self._last_read, (conversation_id, expected_revision)
        if expected_revision is None:
            stored = None
        elif stored is None or stored.version != expected:
            stored = await self._find(conversation_id)
            if stored is None or stored.version != expected:
                raise ConversationConflict(conversation_id)
        try:
            await settled(await self._prepare_change(conversation_id, stored, record, new_entries))
        except UnavailableError:
            with suppress(UnavailableError):
                stored = await self._find(conversation_id)
                if (stored and stored.record.revision) == (record and record.revision):
                    return
            raise
        except (StaleError, NotFoundError, LookupError) as error:
            if stored is None or not isinstance(error, StaleError):
                raise ConversationConflict(conversation_id) from None
            self._last_read = None
            await self._change(conversation_id, expected_revision, record, new_entries)

    async def _prepare_change(
        self,
        conversation_id: str,
        stored: StoredConversation | None,
        record: ConversationRecord | None,
        new_entries: list[ConversationEntry],
    ) -> Coroutine[Any, Any, object]:
        """Return the call that changes what is stored: a deletion without a record."""
        where = self._where(conversation_id)
        if record is None:
            return delete_conversation(self._db, **where, expected=None if stored is None else stored.conversation)
        parent_id = new_entries[0].parent_id if new_entries else record.head_id
        if stored is None:
            entries = [*await self.read_history(parent_id), *new_entries]
            new: dict[str, Any] = {"key": where["conversation_key"], "metadata": metadata_of(record, entries, None)}
            batch = [new_message(entry.message, entry.id) for entry in entries]
            return create_conversation(self._db, user_id=self._user, **new, messages=batch, expected=NEW)
        where |= {"parent_seq": await stored.seq_of(parent_id), "expected": stored.conversation}
        where["conversation_metadata_patch"] = metadata_of(record, new_entries, stored)
        batch = [new_message(entry.message, entry.id) for entry in new_entries]
        return append_messages(self._db, **where, messages=batch)

    async def _find(self, conversation_id: str, limit: int | None = 0) -> StoredConversation | None:
        """Read a conversation and the newest messages of chatdb's current line, at least one."""
        try:
            loaded = await load_conversation(self._db, **self._where(conversation_id), limit=page_size(limit))
            self._last_read = StoredConversation(self._db, self._prefix, *loaded, limit)
        except ConversationNotFoundError:
            self._last_read = None
        return self._last_read

    def _where(self, conversation_id: str) -> dict[str, Any]:
        return {"user_id": self._user, "conversation_key": conversation_of(conversation_id, self._prefix)[0]}
