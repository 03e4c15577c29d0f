"""
Four clients that do the same work: chatdb through its pool, and three alternatives.

All have the same methods. `lane` is the number of the calling task; clients without a pool keep a connection for each.
They return what a program would receive: records from chatdb and SQLModel, rows from the drivers.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import asyncpg
import psycopg
from psycopg.rows import tuple_row

import chatdb
from benchmarks import original
from benchmarks.workload import ROLES, Place
from chatdb._core.dsn import connect_arguments, libpq_dsn
from chatdb.pool import Pool

MESSAGE = (
    "id, conversation_id, user_id, seq, parent_seq, role, content, payload::text as payload, "
    "metadata::text as metadata, token_count, key, state, created_at"
)
CONVERSATION = (
    "id, user_id, key, title, metadata::text as metadata, last_seq, "
    "case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision, "
    "created_at, updated_at, archived_at, pinned_at"
)

# Minimal statements with the same effects, as a careful engineer would write them for these tables: the best index for
# a read; the counter, the list's time and the parent of another line's message for a write. A read returns all columns
# of the records, as chatdb does, with json as text, which the program parses. A write returns what the caller cannot
# know without asking: the id, the seq, the parent and the time that the server chose. It does not send back the text.
# chatdb's appends also return the conversation's id, because the caller may have given its key, and the metadata,
# because jsonb changes its text. Both return the state, as a record has it.
HISTORY = (
    f"select {MESSAGE} from chatdb.messages where user_id = $1 and conversation_id = $2 and seq < $3 "
    "order by seq desc limit $4"
)
WHOLE = f"select {MESSAGE} from chatdb.messages where user_id = $1 and conversation_id = $2 order by seq"
LIST = (
    f"select {CONVERSATION} from chatdb.conversations where user_id = $1 and archived_at is null "
    "order by active_on desc, updated_at desc, id desc limit $2"
)
APPENDED = "id, seq, parent_seq, state, created_at"
PARENT = "case when head_last_seq = last_seq - {} and not head_is_newest then head_seq end as parent_seq"
APPEND = (
    "with c as (update chatdb.conversations set last_seq = last_seq + 1, updated_at = now() "
    f"where user_id = $1 and id = $2 returning last_seq, updated_at, {PARENT.format(1)}) "
    "insert into chatdb.messages (user_id, conversation_id, seq, parent_seq, role, content, key, created_at) "
    f"select $1, $2, last_seq, parent_seq, $3, $4, $5, updated_at from c returning {APPENDED}"
)
TURN = (
    "with c as (update chatdb.conversations set last_seq = last_seq + 2, updated_at = now() "
    f"where user_id = $1 and id = $2 returning last_seq, updated_at, {PARENT.format(2)}) "
    "insert into chatdb.messages (user_id, conversation_id, seq, parent_seq, role, content, created_at) "
    "select $1, $2, last_seq - 2 + n, case when n = 1 then parent_seq end, role, content, updated_at from c "
    f"cross join (values (1, $3::text, $4::text), (2, $5, $6)) as m (n, role, content) returning {APPENDED}"
)
BY_KEY = f"select {MESSAGE} from chatdb.messages where user_id = $1 and conversation_id = $2 and key = $3"
CREATE = "insert into chatdb.conversations (user_id, key) values ($1, $2) returning id, created_at"
CREATE_FIRST = (
    "with c as (insert into chatdb.conversations (user_id, last_seq) values ($1, 1) "
    "returning user_id, id, created_at), "
    "m as (insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
    "select user_id, id, 1, $2, $3, created_at from c) select id, created_at from c"
)
GET_BY_KEY = f"select {CONVERSATION} from chatdb.conversations where user_id = $1 and key = $2"
DELETE = "delete from chatdb.conversations where user_id = $1 and id = $2"

NEWEST = 2**63 - 1


class Contender(ABC):
    """A client with one connection for each task that uses it."""

    name: ClassVar[str]

    def __init__(self, dsn: str, connections: int = 1) -> None:
        self.dsn = dsn
        self.connections = connections

    async def __aenter__(self) -> Contender:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @abstractmethod
    async def open(self) -> None:
        """Connect."""

    @abstractmethod
    async def close(self) -> None:
        """Disconnect."""

    @abstractmethod
    async def history(self, at: Place, limit: int, *, before: int = NEWEST, lane: int = 0) -> list[Any]:
        """Read the newest messages before a seq."""

    @abstractmethod
    async def whole(self, at: Place) -> int:
        """Read a whole conversation and return the number of messages."""

    @abstractmethod
    async def append(self, at: Place, text: str, *, lane: int = 0) -> object:
        """Append a message."""

    @abstractmethod
    async def turn(self, at: Place, text: str, reply: str) -> object:
        """Append a message and the answer to it."""

    @abstractmethod
    async def list(self, user_id: str) -> list[Any]:
        """Read a user's latest 20 conversations."""

    @abstractmethod
    async def create(self, user_id: str) -> object:
        """Create a conversation."""

    @abstractmethod
    async def create_first(self, user_id: str, text: str) -> object:
        """Create a conversation with its first message."""

    @abstractmethod
    async def delete(self, at: Place) -> object:
        """Delete a conversation and its messages."""


class Keyed(Contender):
    """A client that can repeat a write with its key."""

    @abstractmethod
    async def append_keyed(self, at: Place, text: str, key: str) -> object:
        """Append a message with a new key."""

    @abstractmethod
    async def append_again(self, at: Place, text: str, key: str) -> object:
        """Append a message with a stored key, and return the stored message."""

    @abstractmethod
    async def get_or_create(self, user_id: str, key: str) -> object:
        """Return the conversation with a stored key."""


class RawAsyncpg(Keyed):
    """asyncpg on bare connections, with the statements above."""

    name = "raw asyncpg"

    async def open(self) -> None:
        """Connect."""
        arguments = connect_arguments(self.dsn)
        self.bare = [await asyncpg.connect(**arguments) for _ in range(self.connections)]

    async def close(self) -> None:
        """Disconnect."""
        for connection in self.bare:
            await connection.close()

    async def history(self, at: Place, limit: int, *, before: int = NEWEST, lane: int = 0) -> list[Any]:
        """Read the newest messages before a seq."""
        return await self.bare[lane].fetch(HISTORY, at.user_id, at.id, before, limit)

    async def whole(self, at: Place) -> int:
        """Read a whole conversation at once."""
        return len(await self.bare[0].fetch(WHOLE, at.user_id, at.id))

    async def append(self, at: Place, text: str, *, lane: int = 0) -> object:
        """Append a message."""
        return await self.bare[lane].fetchrow(APPEND, at.user_id, at.id, ROLES[0], text, None)

    async def turn(self, at: Place, text: str, reply: str) -> object:
        """Append a message and the answer to it."""
        return await self.bare[0].fetch(TURN, at.user_id, at.id, ROLES[0], text, ROLES[1], reply)

    async def append_keyed(self, at: Place, text: str, key: str) -> object:
        """Append a message with a key, without handling repetition."""
        return await self.bare[0].fetchrow(APPEND, at.user_id, at.id, ROLES[0], text, key)

    async def append_again(self, at: Place, text: str, key: str) -> object:
        """Read a message by its key."""
        return await self.bare[0].fetchrow(BY_KEY, at.user_id, at.id, key)

    async def list(self, user_id: str) -> list[Any]:
        """Read a user's latest 20 conversations."""
        return await self.bare[0].fetch(LIST, user_id, 20)

    async def create(self, user_id: str) -> object:
        """Create a conversation."""
        return await self.bare[0].fetchrow(CREATE, user_id, None)

    async def create_first(self, user_id: str, text: str) -> object:
        """Create a conversation with its first message in one statement."""
        return await self.bare[0].fetchrow(CREATE_FIRST, user_id, ROLES[0], text)

    async def get_or_create(self, user_id: str, key: str) -> object:
        """Read a conversation by its key."""
        return await self.bare[0].fetchrow(GET_BY_KEY, user_id, key)

    async def delete(self, at: Place) -> object:
        """Delete a conversation. The cascade deletes its messages."""
        return await self.bare[0].execute(DELETE, at.user_id, at.id)


class Chatdb(Keyed):
    """chatdb through its pool."""

    name = "chatdb"

    async def open(self) -> None:
        """Connect."""
        self.pool: Pool = await chatdb.create_pool(self.dsn, max_size=self.connections)

    async def close(self) -> None:
        """Disconnect."""
        await self.pool.close()

    async def history(self, at: Place, limit: int, *, before: int = NEWEST, lane: int = 0) -> list[Any]:
        """Read the newest messages before a seq."""
        return await chatdb.get_history(
            self.pool, user_id=at.user_id, conversation_id=at.id, limit=limit, before_seq=before
        )

    async def whole(self, at: Place) -> int:
        """Read a whole conversation as a stream, in bounded memory."""
        count = 0
        async for _ in chatdb.iter_messages(self.pool, user_id=at.user_id, conversation_id=at.id):
            count += 1
        return count

    async def append(self, at: Place, text: str, *, lane: int = 0) -> object:
        """Append a message."""
        return await chatdb.append_message(
            self.pool, user_id=at.user_id, conversation_id=at.id, role="user", content=text
        )

    async def turn(self, at: Place, text: str, reply: str) -> object:
        """Append a message and the answer to it."""
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        return await chatdb.append_messages(self.pool, user_id=at.user_id, conversation_id=at.id, messages=messages)

    async def append_keyed(self, at: Place, text: str, key: str) -> object:
        """Append a message with a key."""
        return await chatdb.append_message(
            self.pool, user_id=at.user_id, conversation_id=at.id, role="user", content=text, key=key
        )

    async def append_again(self, at: Place, text: str, key: str) -> object:
        """Append the same message again."""
        return await self.append_keyed(at, text, key)

    async def list(self, user_id: str) -> list[Any]:
        """Read a user's latest 20 conversations."""
        return await chatdb.list_conversations(self.pool, user_id=user_id)

    async def create(self, user_id: str) -> object:
        """Create a conversation."""
        return await chatdb.create_conversation(self.pool, user_id=user_id)

    async def create_first(self, user_id: str, text: str) -> object:
        """Create a conversation with its first message."""
        messages = [{"role": "user", "content": text}]
        return await chatdb.create_conversation(self.pool, user_id=user_id, messages=messages)

    async def get_or_create(self, user_id: str, key: str) -> object:
        """Get or create a conversation by its key."""
        return await chatdb.create_conversation(self.pool, user_id=user_id, key=key)

    async def delete(self, at: Place) -> object:
        """Delete a conversation and return the counts."""
        return await chatdb.delete_conversation(self.pool, user_id=at.user_id, conversation_id=at.id)


class Psycopg(Contender):
    """psycopg 3 on bare connections in autocommit, binary and prepared, with the statements of raw asyncpg."""

    name = "psycopg 3"

    async def open(self) -> None:
        """Connect."""
        dsn = libpq_dsn(self.dsn, scheme="postgresql")
        self.bare = [
            await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=0, row_factory=tuple_row)
            for _ in range(self.connections)
        ]

    async def close(self) -> None:
        """Disconnect."""
        for connection in self.bare:
            await connection.close()

    async def _run(self, lane: int, statement: str, *arguments: object) -> list[Any]:
        # the raw cursor accepts $1, as asyncpg does
        async with psycopg.AsyncRawCursor(self.bare[lane]) as cursor:
            await cursor.execute(statement.encode(), arguments, binary=True)
            return await cursor.fetchall() if cursor.description else []

    async def history(self, at: Place, limit: int, *, before: int = NEWEST, lane: int = 0) -> list[Any]:
        """Read the newest messages before a seq."""
        return await self._run(lane, HISTORY, at.user_id, at.id, before, limit)

    async def whole(self, at: Place) -> int:
        """Read a whole conversation at once."""
        return len(await self._run(0, WHOLE, at.user_id, at.id))

    async def append(self, at: Place, text: str, *, lane: int = 0) -> object:
        """Append a message."""
        return await self._run(lane, APPEND, at.user_id, at.id, ROLES[0], text, None)

    async def turn(self, at: Place, text: str, reply: str) -> object:
        """Append a message and the answer to it."""
        return await self._run(0, TURN, at.user_id, at.id, ROLES[0], text, ROLES[1], reply)

    async def list(self, user_id: str) -> list[Any]:
        """Read a user's latest 20 conversations."""
        return await self._run(0, LIST, user_id, 20)

    async def create(self, user_id: str) -> object:
        """Create a conversation."""
        return await self._run(0, CREATE, user_id, None)

    async def create_first(self, user_id: str, text: str) -> object:
        """Create a conversation with its first message in one statement."""
        return await self._run(0, CREATE_FIRST, user_id, ROLES[0], text)

    async def delete(self, at: Place) -> object:
        """Delete a conversation. The cascade deletes its messages."""
        return await self._run(0, DELETE, at.user_id, at.id)


class Original(Contender):
    """The original documents' code on its own tables, with the same rows."""

    name = "SQLModel"

    async def open(self) -> None:
        """Create the engine and open its connections."""
        self.engine = original.engine(self.dsn, self.connections)
        self.session = original.sessions(self.engine)
        await asyncio.gather(*(self._connect() for _ in range(self.connections)))

    async def _connect(self) -> None:
        async with self.engine.connect():
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Disconnect."""
        await self.engine.dispose()

    async def history(self, at: Place, limit: int, *, before: int = NEWEST, lane: int = 0) -> list[Any]:
        """Read the newest messages. This layer has no other pages."""
        async with self.session() as session:
            return await original.history(session, at.user_id, at.id, limit)

    async def whole(self, at: Place) -> int:
        """Read a whole conversation at once."""
        return len(await self.history(at, 2**31 - 1))

    async def append(self, at: Place, text: str, *, lane: int = 0) -> object:
        """Append a message."""
        async with self.session() as session:
            return await original.add_message(session, at.user_id, at.id, ROLES[0], text)

    async def turn(self, at: Place, text: str, reply: str) -> object:
        """Append a message and the answer to it in two calls, as the service does."""
        await self.append(at, text)
        async with self.session() as session:
            return await original.add_message(session, at.user_id, at.id, ROLES[1], reply)

    async def list(self, user_id: str) -> list[Any]:
        """Read a user's latest 20 conversations."""
        async with self.session() as session:
            return await original.list_conversations(session, user_id, 20)

    async def create(self, user_id: str) -> object:
        """Create a conversation."""
        async with self.session() as session:
            return await original.create_conversation(session, user_id)

    async def create_first(self, user_id: str, text: str) -> object:
        """Create a conversation and append its first message in two calls, as the service does."""
        async with self.session() as session:
            made = await original.create_conversation(session, user_id)
            return await original.add_message(session, user_id, made.id, ROLES[0], text)

    async def delete(self, at: Place) -> object:
        """Delete a conversation. The cascade deletes its messages."""
        async with self.session() as session:
            return await original.delete_conversation(session, at.user_id, at.id)
