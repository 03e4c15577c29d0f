"""Distribute the tables on a Citus cluster, and bring them back, under writers: `nox -s distributed` runs it."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import chatdb
from chatdb.admin.citus import distribute_tables, gather_tables, plan_distribution
from chatdb.admin.migrate import apply_migrations
from tests.support.chaos import figure, query
from tests.support.cluster import Node, cluster
from tests.support.databases import execute
from tests.support.distributed import cluster_database, nodes
from tests.support.repacking import fill

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif("CHATDB_TEST_CITUS_DSN" not in os.environ, reason="no Citus cluster is named"),
]
WRITERS = 16
SAID = {"role": "user", "content": "hello"}


@pytest.fixture
def coordinator() -> Iterator[str]:
    """Yield the DSN of a migrated database on each node of the cluster."""
    with cluster_database(os.environ["CHATDB_TEST_CITUS_DSN"], f"chatdb_test_{os.getpid()}") as dsn:
        apply_migrations(dsn)
        yield dsn


class Writers:
    """Tasks that write to a conversation each, in every way, and remember what was acknowledged."""

    def __init__(self, db: chatdb.pool.Pool) -> None:
        self.errors: list[Exception] = []
        self.calls = 0
        self.longest = 0.0
        self._db = db
        self._is_over = False
        self._stored: dict[int, set[int]] = defaultdict(set)
        self._moved: dict[int, int] = defaultdict(int)

    def _at(self, number: int) -> dict[str, Any]:
        return {"user_id": f"user {number % 8}", "conversation_key": f"key {number}"}

    async def _write(self, number: int, turn: int) -> None:
        db, at = self._db, self._at(number)
        user, new = at["user_id"], at | {"role": "user", "content": f"turn {turn}"}
        match turn % 7:
            case 0:
                await chatdb.upsert_message(db, **new, key="upserted")
            case 1:
                message = await chatdb.start_message(db, **at)
                await chatdb.extend_message(db, **at, seq=message.seq, offset=0, text="hello")
                await chatdb.finish_message(db, **at, seq=message.seq)
                self._stored[number].add(message.seq)
            case 2:
                message = await chatdb.append_message(db, **new)
                await chatdb.delete_message(db, **at, seq=message.seq)
            case 3:
                await chatdb.update_conversation(db, **at, title=f"turn {turn}")
            case 4:
                guest = f"guest {number} {turn}"
                await chatdb.create_conversation(db, user_id=guest, key=f"turn {turn}", messages=[SAID])
                await chatdb.move_user(db, user_id=guest, to_user_id=f"moved {number}")
                self._moved[number] += 1
            case 5:
                await chatdb.create_conversation(db, user_id=user, key=f"short {number}")
                await chatdb.delete_conversation(db, user_id=user, conversation_key=f"short {number}")
            case _:
                self._stored[number].add((await chatdb.append_message(db, **new, key=f"turn {turn}")).seq)

    async def run(self, number: int) -> None:
        """Write until `stop`."""
        await chatdb.create_conversation(self._db, user_id=f"user {number % 8}", key=f"key {number}")
        for turn in itertools.count():
            if self._is_over:
                return
            start = time.perf_counter()
            try:
                await self._write(number, turn)
                self.calls += 1
            except Exception as error:  # noqa: BLE001 - counted
                self.errors.append(error)
            self.longest = max(self.longest, time.perf_counter() - start)

    def stop(self) -> None:
        """Let each task end after its call."""
        self._is_over = True

    async def check(self, number: int) -> None:
        """Fail if an acknowledged message or conversation is missing."""
        found = {message.seq async for message in chatdb.iter_messages(self._db, **self._at(number))}
        assert self._stored[number] <= found
        counts = await self._db.fetchrow(
            "select count(distinct id) as ids, count(*) as rows from chatdb.conversations where user_id = $1",
            f"moved {number}",
        )
        assert counts["ids"] == counts["rows"] == self._moved[number]


async def test_under_writers(coordinator: str) -> None:
    """
    While the tables are distributed, brought back, and distributed again, no call fails and nothing is lost.

    The copy takes longer than PostgreSQL waits until it looks for deadlocks. Each id stays unique.
    """
    await asyncio.to_thread(fill, coordinator, 1_000)
    async with chatdb.create_pool(coordinator, max_size=WRITERS) as db:
        writers = Writers(db)
        tasks = [asyncio.create_task(writers.run(number)) for number in range(WRITERS)]
        steps: list[Callable[[], object]] = [
            lambda: distribute_tables(coordinator, shards=8),
            lambda: gather_tables(coordinator),
            lambda: distribute_tables(coordinator, shards=4),
            lambda: gather_tables(coordinator),
            lambda: distribute_tables(coordinator, shards=4),
        ]
        try:
            for step in steps:
                await asyncio.sleep(0.5)
                writers.longest, start = 0.0, time.perf_counter()
                await asyncio.to_thread(step)
                seconds = time.perf_counter() - start
                figure(f"{seconds:.1f} s, longest call {writers.longest:.1f} s, {writers.calls:,} calls so far")
            await asyncio.sleep(0.5)
        finally:
            writers.stop()
            await asyncio.gather(*tasks)
        assert writers.errors == []
        for number in range(WRITERS):
            await writers.check(number)
        for table in ("conversations", "messages"):
            row = await db.fetchrow(f"select count(*) as rows, count(distinct id) as ids from chatdb.{table}")
            assert row["rows"] == row["ids"]
    plan = plan_distribution(coordinator)
    assert (plan.is_done, plan.shards) == (True, 4)


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[list[Node]]:
    """Yield the nodes of a cluster that tests may kill."""
    with cluster() as nodes:
        yield nodes


@pytest.fixture
def filled(own_cluster: list[Node]) -> Iterator[str]:
    """Yield the DSN of a database on each of our nodes, with 100,000 messages that are not distributed."""
    with cluster_database(own_cluster[0].dsn, "filled", [node.dsn for node in own_cluster[1:]]) as dsn:
        apply_migrations(dsn)
        fill(dsn, 1_000)
        yield dsn


def contents(dsn: str) -> list[tuple[Any, ...]]:
    """Return how many rows there are, and a checksum of them, whichever node has them."""
    [count] = query(dsn, "select count(*), sum(last_seq) from chatdb.conversations")
    [messages] = query(
        dsn,
        "select count(*), sum(('x' || left(md5(user_id || seq || content), 8))::bit(32)::int8) from chatdb.messages",
    )
    return [count, messages]


COPYING = {False: (1, "%copy %messages%"), True: (0, "insert into chatdb.messages%")}
"""For each direction, the node and the statement that show that messages are being copied."""


@pytest.mark.parametrize("killed", [0, 1], ids=["coordinator", "worker"])
@pytest.mark.parametrize("undo", [False, True], ids=["distribute", "undo"])
async def test_a_kill_in_the_middle(own_cluster: list[Node], filled: str, undo: bool, killed: int) -> None:
    """A server killed while rows are copied: a sentence, all rows as before, and a second run succeeds."""
    run = gather_tables if undo else distribute_tables
    if undo:
        distribute_tables(filled, shards=4)
    before = contents(filled)
    number, statement = COPYING[undo]
    running = asyncio.create_task(asyncio.to_thread(run, filled))
    await asyncio.to_thread(own_cluster[number].wait_for, statement)
    own_cluster[killed].kill()
    with pytest.raises(chatdb.UnavailableError, match=r"nothing is lost.*run this again") as caught:
        await running
    # the server of this session answered that it rolled back, or can no longer answer
    assert caught.value.sent is (None if killed == 0 else True)
    own_cluster[killed].start()
    assert plan_distribution(filled, undo=undo).moves_rows
    assert contents(filled) == before
    run(filled)
    assert plan_distribution(filled, undo=undo).is_done
    assert contents(filled) == before
    async with chatdb.create_pool(filled) as db:
        await chatdb.check_schema(db)
        newest = await chatdb.append_message(db, user_id="user 1", conversation_id=1, role="user", content="next")
        assert newest.seq == 101


@pytest.mark.parametrize("killed", [0, 1], ids=["coordinator", "worker"])
@pytest.mark.parametrize("undo", [False, True], ids=["distribute", "undo"])
async def test_a_kill_during_the_commit(own_cluster: list[Node], filled: str, undo: bool, killed: int) -> None:
    """
    A server killed after all nodes have prepared the transaction: it is committed, and a second run completes the work.

    The coordinator waits in its commit for a standby that does not exist.
    """
    run = gather_tables if undo else distribute_tables
    if undo:
        distribute_tables(filled, shards=4)
    before = contents(filled)
    coordinator, number = own_cluster[0], COPYING[undo][0]
    execute(filled, "alter database filled set synchronous_commit = on")
    running = asyncio.create_task(asyncio.to_thread(run, filled))
    await asyncio.to_thread(own_cluster[number].wait_for, COPYING[undo][1])
    coordinator.await_standby("nobody")
    await asyncio.to_thread(coordinator.wait_for, "%", "SyncRep")
    own_cluster[killed].kill()
    coordinator_is_up = killed > 0
    if coordinator_is_up:
        coordinator.await_standby("")
    if undo and coordinator_is_up:
        await running  # the nodes have nothing more to do
    else:
        with pytest.raises(chatdb.UnavailableError, match=r"nothing is lost.*run this again") as caught:
            await running
        assert caught.value.sent is (True if coordinator_is_up else None)
    own_cluster[killed].start()
    if not coordinator_is_up:
        coordinator.await_standby("")
    run(filled)
    assert plan_distribution(filled, undo=undo).is_done
    assert contents(filled) == before


@pytest.mark.parametrize("disk", ["data", "log"])
@pytest.mark.parametrize("undo", [False, True], ids=["distribute", "undo"])
def test_a_disk_that_is_full(own_cluster: list[Node], filled: str, undo: bool, disk: str) -> None:
    """A node whose disk is full while rows are copied: the same. With a full disk of its log, the server stops."""
    run = gather_tables if undo else distribute_tables
    if undo:
        distribute_tables(filled, shards=4)
    before = contents(filled)
    number = 0 if undo else 1
    with own_cluster[number].full(disk), pytest.raises(chatdb.UnavailableError, match=r"nothing is lost") as caught:
        run(filled)
    if disk == "data":
        assert "out of disk space" in str(caught.value)
    else:
        own_cluster[number].kill()
        own_cluster[number].start()
    assert caught.value.sent is (None if number == 0 and disk == "log" else True)
    assert contents(filled) == before
    run(filled)
    assert plan_distribution(filled, undo=undo).is_done
    assert contents(filled) == before


def test_what_it_refuses(coordinator: str) -> None:
    """A worker, a host's foreign key, a trigger and row-level security are refused with what to do."""
    [_, worker, *_] = nodes(coordinator)
    apply_migrations(coordinator)
    with pytest.raises(chatdb.ChatDBError, match=r"coordinator|chatdb migrate"):
        plan_distribution(worker)
    execute(
        coordinator,
        'create table public.notes (user_id text collate "C", conversation_id bigint, constraint fk_notes '
        "foreign key (user_id, conversation_id) references chatdb.conversations (user_id, id))",
    )
    with pytest.raises(chatdb.ConfigurationError, match="drop constraint fk_notes"):
        distribute_tables(coordinator)
    execute(coordinator, "drop table public.notes", "alter table chatdb.messages enable row level security")
    with pytest.raises(chatdb.ConfigurationError, match="protect --off"):
        distribute_tables(coordinator)


def test_what_undoing_refuses(coordinator: str) -> None:
    """A view, a constraint and a column of the host, which the copy would lose."""
    distribute_tables(coordinator, shards=4)
    execute(coordinator, "create view public.newest as select max(created_at) from chatdb.messages")
    with pytest.raises(chatdb.ConfigurationError, match=r"view public.newest .*drop it first"):
        gather_tables(coordinator)
    execute(coordinator, "drop view public.newest", "alter table chatdb.messages add column note text")
    with pytest.raises(chatdb.ConfigurationError, match=r"column note.*drop it first"):
        gather_tables(coordinator)
    execute(
        coordinator,
        "alter table chatdb.messages drop column note",
        "alter table chatdb.messages add constraint ck_note check (content <> 'note')",
    )
    with pytest.raises(chatdb.ConfigurationError, match=r"constraint ck_note.*remove it first"):
        gather_tables(coordinator)
    execute(coordinator, "alter table chatdb.messages drop constraint ck_note")
    gather_tables(coordinator)
    assert plan_distribution(coordinator, undo=True).is_done
