"""Search, people and export, on 129,071 real messages of 98 users; a quick run has a tenth of them."""

from __future__ import annotations

import asyncio
import copy
import random
import re
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import psycopg
import pytest

import chatdb
from benchmarks import sabotage
from benchmarks.contenders import Chatdb
from benchmarks.figures import Figures
from benchmarks.plans import PLANS, nodes
from benchmarks.rounds import interleave
from benchmarks.server import BenchServer
from benchmarks.workload import FEW, MESSAGES, Place, person, real_conversations
from chatdb._core.query import Query
from chatdb.formats.items import SourceMessage
from chatdb.pool import transaction
from chatdb.transfer.exporter import export_conversations
from chatdb.users import _export_user, _export_user_messages
from tests.support.proxy import Proxy

WORDS = 6
"""Rare words to search for. Each is in 2 to 4 messages of the user."""
RARE = range(2, 5)

BATCHES, BATCH = 40, 8
"""Batches of appends with searches between them. Together they fill the pending list of the index twice."""

MOVED = 10
"""Conversations of 100 messages that are moved and exported."""


@dataclass(frozen=True)
class Side:
    """One of the two databases: chatdb with one connection through a proxy, and the server's counters."""

    proxy: Proxy
    client: Chatdb
    counter: psycopg.Connection

    @property
    def pool(self) -> chatdb.Pool:
        """The pool with one connection."""
        return self.client.pool

    def counted(
        self, runner: asyncio.Runner, call: Callable[[], Awaitable[object]]
    ) -> tuple[float, float, float, float]:
        """Return the statements, round trips, blocks and bytes of WAL of a call."""
        self.counter.execute("select pg_stat_statements_reset()")
        before = self.proxy.round_trips
        runner.run(_awaited(call))
        trips = self.proxy.round_trips - before
        statements, blocks, wal = self.counter.execute(
            "select sum(calls)::float8, sum(shared_blks_hit + shared_blks_read)::float8, sum(wal_bytes)::float8 "
            "from pg_stat_statements where dbid = (select oid from pg_database where datname = current_database()) "
            "and query not like '%pg_stat_statements%'"
        ).fetchone() or (0, 0, 0)
        return statements, trips, blocks, wal


async def _awaited(call: Callable[[], Awaitable[object]]) -> object:
    return await call()


@pytest.fixture(scope="module")
def conversations(figures: Figures) -> list[list[SourceMessage]]:
    """Return the messages of each real conversation."""
    return list(islice(real_conversations(), FEW if figures.quick else None))


@pytest.fixture(scope="module")
def real(conversations: list[list[SourceMessage]]) -> list[list[str]]:
    """Return the texts of each real conversation."""
    return [[message.content for message in messages] for messages in conversations]


@pytest.fixture(scope="module")
def names(
    server: BenchServer, conversations: list[list[SourceMessage]], pytestconfig: pytest.Config
) -> Iterator[tuple[str, str]]:
    """Yield the databases without and with the index. A sabotage changes the one with it."""
    chosen = pytestconfig.getoption("--sabotage")
    with server.searched(conversations) as (plain, indexed), sabotage.applied(chosen, server, indexed):
        yield plain, indexed


@pytest.fixture(scope="module")
def sides(server: BenchServer, names: tuple[str, str], plain: asyncio.Runner) -> Iterator[tuple[Side, Side]]:
    """Yield the databases without and with the index."""
    with ExitStack() as stack, server.setting("full_page_writes", "off"):
        made = []
        for name in names:
            proxy = Proxy(server.dsn(name))
            stack.callback(proxy.close)
            client = Chatdb(proxy.dsn)
            plain.run(client.open())
            stack.callback(lambda client=client: plain.run(client.close()))
            made.append(Side(proxy, client, stack.enter_context(server.connect(name))))
        yield made[0], made[1]


def _owner(texts: list[list[str]], user_id: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the conversations of a user, with their numbers."""
    return ((number, messages) for number, messages in enumerate(texts) if person(number) == user_id)


def _rare_words(texts: list[list[str]], user_id: str) -> list[str]:
    """Return words that occur in few messages of a user."""
    messages = (text for _, each in _owner(texts, user_id) for text in each)
    found = Counter(word for text in messages for word in set(re.findall(r"\b[a-z]{6,12}\b", text[:50_000].lower())))
    rare = sorted(word for word, times in found.items() if times in RARE)
    return random.Random(0).sample(rare, WORDS)


def _searches(side: Side, query: str, mode: Any, user_id: str = person(0)) -> Callable[[], Awaitable[Any]]:
    return lambda: chatdb.search_messages(side.pool, user_id=user_id, query=query, mode=mode)


def _own_blocks(side: Side, user_id: str) -> float:
    """Return the blocks of a plain statement that reads the texts of a user's messages through pk_messages."""
    with side.counter.transaction():
        side.counter.execute("set local enable_seqscan = off")
        (plan,) = side.counter.execute(
            "explain (analyze, buffers, format json) "
            "select sum(octet_length(lower(content))) from chatdb.messages where user_id = %s",
            [user_id],
        ).fetchone() or ([],)
    assert "pk_messages" in str(plan)
    return plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"]


def test_words(real: list[list[str]], sides: tuple[Side, Side], plain: asyncio.Runner, figures: Figures) -> None:
    """A rare word takes few blocks, with the index as `chatdb search-index create` makes it."""
    side = sides[1]
    words = _rare_words(real, person(0))
    for word in words:
        plain.run(_awaited(_searches(side, word, "words")))
    counts = [side.counted(plain, _searches(side, word, "words")) for word in words]
    figures.counted("search_words", *map(max, zip(*counts, strict=True)))


def test_appends(real: list[list[str]], sides: tuple[Side, Side], plain: asyncio.Runner, figures: Figures) -> None:
    """
    Appends with the index write a bounded multiple of the WAL, and searches between them read the list that they fill.

    The texts are those of the data, in their order, to conversations of one user. The most blocks of a word's searches
    are those with a full pending list.
    """
    without, side = sides
    texts = (text for messages in real for text in messages if text)
    words = _rare_words(real, person(0))
    places = [Place(person(6), number + 1) for number, _ in _owner(real, person(6))]
    own = _own_blocks(without, person(11))
    pending: dict[str, list[tuple[float, float, float, float]]] = {word: [] for word in words}
    reads: list[float] = []
    wal: dict[Side, list[tuple[float, ...]]] = {without: [], side: []}
    for text, place in zip(islice(texts, 10), places, strict=False):
        for each in sides:
            plain.run(each.client.append(place, text))
    for number in range(BATCHES):
        batch = list(islice(texts, BATCH))

        async def append(to: Side, batch: list[str] = batch, number: int = number) -> None:
            for text in batch:
                await to.client.append(places[number % len(places)], text)

        for each in sides:
            counts = each.counted(plain, lambda each=each, append=append: append(each))
            wal[each].append(tuple(value / BATCH for value in counts))
        for word in words:
            pending[word].append(side.counted(plain, _searches(side, word, "words")))
        if number % 4 == 1:
            reads.append(side.counted(plain, _searches(side, "zzqxj", "substring", person(11)))[2])
    most = [tuple(map(max, zip(*counts, strict=True))) for counts in pending.values()]
    figures.counted("search_words_pending", *map(statistics.median, zip(*most, strict=True)))
    figures.worst("search_words_pending.worst", max(blocks for _, _, blocks, _ in most))
    figures.worst("search_substring_pending.to_own", max(reads) / own)
    without_index, with_index = (tuple(map(statistics.mean, zip(*wal[each], strict=True))) for each in sides)
    figures.counted("append_indexed", *with_index)
    figures.worst("append_indexed.wal_to_plain", with_index[3] / without_index[3])


@pytest.mark.parametrize("is_indexed", [False, True])
def test_substring(is_indexed: bool, sides: tuple[Side, Side], plain: asyncio.Runner, figures: Figures) -> None:
    """A text that no message contains takes the blocks of the user's own messages, with the index and without."""
    side = sides[is_indexed]
    for _ in range(6):
        plain.run(_awaited(_searches(side, "zzqxj", "substring", person(1))))
    counts = {}
    for user in (person(0), person(11)):
        counts[user] = side.counted(plain, _searches(side, "zzqxj", "substring", user))
        figures.worst("search_substring.to_own", counts[user][2] / _own_blocks(sides[0], user))
    figures.counted("search_substring_indexed" if is_indexed else "search_substring", *counts[person(0)])


def test_plans(sides: tuple[Side, Side], figures: Figures) -> None:
    """The index, which begins with the user, changes no plan of a statement that a service calls often."""

    def planned(side: Side, query: Query[Any]) -> object:
        plan = psycopg.RawCursor(side.counter).execute(f"explain (generic_plan, format json) {query.sql}").fetchone()
        return plan and nodes(plan[0][0]["Plan"])

    changed = [query.name for query, _, _ in PLANS if planned(sides[0], query) != planned(sides[1], query)]
    if changed:
        print("changed by the index:", *changed)
    figures.worst("search_plans.changed", len(changed))


@pytest.mark.parametrize("is_indexed", [False, True])
def test_people(is_indexed: bool, sides: tuple[Side, Side], plain: asyncio.Runner, figures: Figures) -> None:
    """Moving and exporting 10 conversations with 1,000 messages takes few statements and bounded blocks and WAL."""
    side = sides[is_indexed]
    side.counter.execute(
        "with made as (insert into chatdb.conversations (user_id, last_seq) "
        "select 'guest', %(messages)s from generate_series(1, %(moved)s) returning id), "
        "numbered as (select id, row_number() over (order by id) as number from made) "
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
        "select 'guest', c.id, s, 'user', m.content, now() from generate_series(1, %(messages)s) as s, numbered as c, "
        "lateral (select content from chatdb.messages where user_id = %(person)s "
        "order by conversation_id, seq offset s limit 1) as m order by s, c.id",
        {"messages": MESSAGES, "moved": MOVED, "person": person(3)},
    )
    turns = count()

    def move() -> Awaitable[chatdb.Moved]:
        users = ("guest", "member") if next(turns) % 2 == 0 else ("member", "guest")
        return chatdb.move_user(side.pool, user_id=users[0], to_user_id=users[1])

    async def export() -> None:
        users = "guest" if next(turns) % 2 == 0 else "member"
        records = [record async for record in chatdb.export_user(side.pool, user_id=users)]
        assert len(records) in {0, MOVED * (1 + MESSAGES)}

    for _ in range(6):
        moved = plain.run(_awaited(move))
        assert (moved.conversations, moved.messages) == (MOVED, MOVED * MESSAGES)
    side.counter.execute("vacuum chatdb.messages, chatdb.conversations")
    counts = [side.counted(plain, move) for _ in range(4)]
    operation = "move_user_indexed" if is_indexed else "move_user"
    figures.counted(operation, *map(statistics.mean, zip(*counts, strict=True)))
    if is_indexed:
        return
    for _ in range(3):
        plain.run(export())
    side.counter.execute("vacuum chatdb.messages, chatdb.conversations")
    turns = count()
    statements, trips, blocks, _ = side.counted(plain, export)
    figures.counted("export_user", statements, trips, blocks, None)


@pytest.mark.full
def test_append_time(
    benchmark: Any,
    server: BenchServer,
    names: tuple[str, str],
    real: list[list[str]],
    plain: asyncio.Runner,
    figures: Figures,
) -> None:
    """Time an append with the index beside one without. Waiting for the disk would hide what the index costs."""
    clients = {name: Chatdb(server.dsn(name)) for name in names}
    texts = {name: (text for messages in reversed(real) for text in messages if text) for name in names}
    numbers = [number for number, _ in _owner(real, person(7))]
    chance = random.Random(0)

    def call(name: str) -> Callable[[], Awaitable[object]]:
        place = lambda: Place(person(7), chance.choice(numbers) + 1)  # noqa: E731
        return lambda: clients[name].append(place(), next(texts[name]))

    with server.setting("synchronous_commit", "off"):
        for client in clients.values():
            plain.run(client.open())
        calls = {"without": call(names[0]), "chatdb": call(names[1])}
        times = interleave(benchmark, plain, calls, rounds=80, each=25)
    for client in clients.values():
        plain.run(client.close())
    figures.worst("append_indexed.to_plain", statistics.median(times["chatdb"]) / statistics.median(times["without"]))
    figures.worst("append_indexed.mean_to_plain", statistics.mean(times["chatdb"]) / statistics.mean(times["without"]))


@pytest.mark.full
def test_export_time(
    benchmark: Any, server: BenchServer, names: tuple[str, str], plain: asyncio.Runner, figures: Figures
) -> None:
    """Time an export of 26,000 messages beside two server-side cursors in one transaction."""
    pool = plain.run(chatdb.create_pool(server.dsn(names[0])).__aenter__())
    cursors = []
    for query, table, order in (
        (_export_user, "page", "id"),
        (_export_user_messages, "summed", "conversation_id, seq"),
    ):
        cursor = copy.copy(query)
        cursor.sql = _whole(query.sql, table, order)
        cursors.append(cursor)

    async def exported() -> int:
        return len([record async for record in export_conversations(pool, user_id=person(0))])

    async def with_cursors() -> int:
        records = []
        async with transaction(pool) as connection:
            await connection.execute("set transaction isolation level repeatable read, read only")
            messages = _records(connection, cursors[1], person(0))
            message = await anext(messages, None)
            async for conversation in _records(connection, cursors[0], person(0)):
                records.append(conversation)
                while message is not None and message.conversation_id == conversation.id:
                    records.append(message)
                    message = await anext(messages, None)
        return len(records)

    assert plain.run(exported()) == plain.run(with_cursors())
    calls: dict[str, Callable[[], Awaitable[object]]] = {"cursors": with_cursors, "chatdb": exported}
    times = interleave(benchmark, plain, calls, rounds=12, each=1)
    plain.run(pool.close())
    figures.worst("export_user.to_cursors", statistics.median(times["chatdb"]) / statistics.median(times["cursors"]))


async def _records(connection: Any, query: Query[Any], user: str) -> AsyncIterator[Any]:
    """Iterate over the records of a statement with a cursor, 100 rows a round trip."""
    cursor = await connection.cursor(query.sql, user)
    while rows := await cursor.fetch(100):
        for record in query._decode(rows, (user,), ()):
            yield record


def _whole(statement: str, table: str, order: str) -> str:
    """Return a statement that reads all rows of a user, in the columns and the order of one that reads a page."""
    *_, last = re.finditer("^select", statement, re.MULTILINE)
    columns = statement[last.start() : statement.rindex("\nfrom ")]
    source = {"page": "chatdb.conversations", "summed": "chatdb.messages as summed"}[table]
    return f"{columns}\nfrom {source}\nwhere user_id = $1\norder by {order}"
