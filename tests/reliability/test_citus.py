"""Distribute the tables on a Citus cluster, and bring them back, under writers: `nox -s distributed` runs it."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Iterator

import psycopg
import pytest

import chatdb
from chatdb.admin.citus import distribute_tables, gather_tables, plan_distribution
from chatdb.admin.migrate import apply_migrations
from tests.support.databases import execute
from tests.support.distributed import cluster_database, nodes

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif("CHATDB_TEST_CITUS_DSN" not in os.environ, reason="no Citus cluster is named"),
]
WRITERS = 16


@pytest.fixture
def coordinator() -> Iterator[str]:
    """Yield the DSN of a migrated database on each node of the cluster."""
    with cluster_database(os.environ["CHATDB_TEST_CITUS_DSN"], f"chatdb_test_{os.getpid()}") as dsn:
        apply_migrations(dsn)
        yield dsn


async def test_under_writers(coordinator: str) -> None:
    """While the tables are distributed, brought back, and distributed again, no call fails and nothing is lost."""
    acknowledged: dict[int, set[int]] = defaultdict(set)
    errors: list[Exception] = []
    is_over = asyncio.Event()
    async with chatdb.create_pool(coordinator, max_size=WRITERS) as db:
        made = [await chatdb.create_conversation(db, user_id=f"user {n % 8}") for n in range(WRITERS)]

        async def write(number: int) -> None:
            there = {"user_id": made[number].user_id, "conversation_id": made[number].id}
            turn = 0
            while not is_over.is_set():
                turn += 1
                try:
                    if turn % 5:
                        key = f"key {turn}" if turn % 2 else None
                        message = await chatdb.append_message(db, **there, role="user", content="hello", key=key)
                    else:
                        message = await chatdb.start_message(db, **there)
                        await chatdb.extend_message(db, **there, seq=message.seq, offset=0, text="hello")
                        await chatdb.finish_message(db, **there, seq=message.seq)
                    acknowledged[number].add(message.seq)
                except Exception as error:  # noqa: BLE001 - counted
                    errors.append(error)

        tasks = [asyncio.create_task(write(number)) for number in range(WRITERS)]
        steps: list[Callable[[], object]] = [
            lambda: distribute_tables(coordinator, shards=8),
            lambda: gather_tables(coordinator),
            lambda: distribute_tables(coordinator, shards=4),
        ]
        for step in steps:
            await asyncio.sleep(0.5)
            await asyncio.to_thread(step)
        await asyncio.sleep(0.5)
        is_over.set()
        await asyncio.gather(*tasks)
        assert errors == []
        for number, conversation in enumerate(made):
            found = {
                message.seq
                async for message in chatdb.iter_messages(
                    db, user_id=conversation.user_id, conversation_id=conversation.id
                )
            }
            assert acknowledged[number] <= found
            assert found == set(range(1, len(found) + 1))
    assert plan_distribution(coordinator).is_done
    assert plan_distribution(coordinator).shards == 4


@pytest.mark.parametrize("undo", [False, True])
def test_a_full_disk(coordinator: str, undo: bool) -> None:
    """If a node has no room, the error says that nothing is lost, and a second run succeeds."""
    execute(
        coordinator,
        "insert into chatdb.conversations (user_id, last_seq) select 'user ' || n, 0 from generate_series(1, 200) as n",
    )
    run = gather_tables if undo else distribute_tables
    if undo:
        distribute_tables(coordinator, shards=4)
    _fill_disks(coordinator)
    with pytest.raises(chatdb.UnavailableError, match="nothing is lost") as caught:
        run(coordinator)
    assert caught.value.sent is True
    _fill_disks(coordinator, off=True)
    run(coordinator)
    with psycopg.connect(coordinator) as connection:
        assert connection.execute("select count(*) from chatdb.conversations").fetchone() == (200,)
    assert plan_distribution(coordinator, undo=undo).is_done


def _fill_disks(dsn: str, *, off: bool = False) -> None:
    """Let each node fail as with a full disk as soon as it creates a table or a schema."""
    for node in nodes(dsn):
        execute(node, "set citus.enable_ddl_propagation = off", "drop event trigger if exists full_disk")
        if not off:
            execute(
                node,
                "set citus.enable_ddl_propagation = off",
                "create or replace function public.fail() returns event_trigger language plpgsql as "
                "$$begin raise exception 'no space left on device' using errcode = 'disk_full'; end$$",
                "create event trigger full_disk on ddl_command_end when tag in ('CREATE SCHEMA', 'CREATE TABLE') "
                "execute function public.fail()",
            )


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
