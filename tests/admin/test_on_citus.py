"""The operators' commands on distributed tables: what works, and what each other one says. `nox -s distributed`."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import asyncpg
import pytest

import chatdb
from chatdb._core.asyncpg_private import FUNCTIONS
from chatdb._core.dsn import connect_arguments
from chatdb.admin.adopt.adoption import adopt
from chatdb.admin.check.findings import DIFFERENT, MISSING, NOTE
from chatdb.admin.check.inspection import inspect
from chatdb.admin.citus import distribute_tables, gather_tables, plan_distribution
from chatdb.admin.locality import plan_repack, repack_messages
from chatdb.admin.migrate import apply_migrations, rollback_migrations
from chatdb.admin.retention import count_old_conversations
from chatdb.admin.row_security import protect_tables, protection_statements
from chatdb.admin.users_link import link_users, unlink_users
from tests.support.command import chatdb as command
from tests.support.command import chatdb_process
from tests.support.databases import execute
from tests.support.distributed import cluster_database
from tests.support.transfers import exported, portable

pytestmark = pytest.mark.skipif("CHATDB_TEST_CITUS_DSN" not in os.environ, reason="no Citus cluster is named")
USERS = [f"user {number}" for number in range(8)]
"""Enough to be on both nodes."""


@pytest.fixture
def coordinator() -> Iterator[str]:
    """Yield the DSN of a database on each node of the cluster, with chatdb's tables, which are not distributed."""
    with cluster_database(os.environ["CHATDB_TEST_CITUS_DSN"], f"chatdb_test_{os.getpid()}") as dsn:
        apply_migrations(dsn)
        yield dsn


@pytest.fixture
def distributed(coordinator: str) -> str:
    """Return the DSN of a database with distributed tables."""
    distribute_tables(coordinator, shards=4)
    return coordinator


@pytest.fixture
async def pool(distributed: str) -> AsyncIterator[chatdb.pool.Pool]:
    """Yield a pool on distributed tables."""
    async with chatdb.create_pool(distributed) as db:
        yield db


REFUSALS: dict[str, tuple[Callable[[str], object], str]] = {
    "protect": (protect_tables, "keep the users apart in the service"),
    "protect --dry-run": (protection_statements, "keep the users apart in the service"),
    "prune": (
        lambda dsn: count_old_conversations(dsn, older_than=timedelta(days=1)),
        "user by user, with chatdb.delete_conversation",
    ),
    "repack": (repack_messages, "run pg_repack or CLUSTER on the shards, on each node"),
    "repack --dry-run": (plan_repack, "run pg_repack or CLUSTER on the shards, on each node"),
    "adopt": (adopt, "adopt first, then run chatdb distribute"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_refuses(distributed: str, name: str) -> None:
    """Each command that does not work says so, and what to do instead."""
    run, instead = REFUSALS[name]
    with pytest.raises(
        chatdb.ConfigurationError, match=rf"chatdb {name.split()[0]} does not work on tables that Citus .*{instead}"
    ):
        run(distributed)


def test_the_command_distributes(coordinator: str) -> None:
    """The command says what it would do, does it, and has nothing more to do; the same in the other direction."""
    env = {"DATABASE_URL": coordinator}
    assert "would distribute the tables by user, in 32 shards on 2 nodes" in command("distribute", "--dry-run", env=env)
    assert "readers go on, and writers wait" in command("distribute", "--dry-run", env=env)
    assert "functions sent to the nodes: " in command("distribute", "--yes", "--shards", "4", env=env)
    assert "nothing to do: the tables are distributed" in command("distribute", "--yes", env=env)
    assert "all calls wait meanwhile" in command("distribute", "--undo", "--dry-run", env=env)
    assert "rows brought back: " in command("distribute", "--undo", "--yes", env=env)
    assert "nothing to do: the tables are not distributed" in command("distribute", "--undo", "--yes", env=env)


async def test_migrate(distributed: str) -> None:
    """Migrations can be undone and applied; functions that a migration created are sent by a second run."""
    assert apply_migrations(distributed) == []
    rollback_migrations(distributed)
    assert [migration.partition(".")[0] for migration in apply_migrations(distributed)] == ["0013"]
    assert not plan_distribution(distributed).is_done
    async with chatdb.create_pool(distributed) as db:
        assert db.functions == FUNCTIONS
        await chatdb.create_conversation(db, user_id="ann", messages=[{"role": "user", "content": "not sent yet"}])
    distribute_tables(distributed)
    assert plan_distribution(distributed).is_done


def test_check(distributed: str) -> None:
    """The check finds nothing wrong, and says what it left out."""
    findings = inspect(distributed)
    assert [finding for finding in findings if finding.state in {MISSING, DIFFERENT}] == []
    [note] = [finding for finding in findings if finding.what == "Citus"]
    assert (note.state, "were not checked" in note.detail) == (NOTE, True)


async def test_import_and_export(pool: chatdb.pool.Pool, distributed: str, tmp_path: Path) -> None:
    """An import stores each conversation once, a second adds what is new, and the export has all of it."""
    run = partial(asyncio.to_thread, chatdb_process, env={"DATABASE_URL": distributed})
    file = tmp_path / "conversations.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(300)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert "300 conversations, 600 messages" in await run("import", file, "--user", "ann")
    assert "already stored: 300 conversations, 600 messages" in await run("import", file, "--user", "ann")
    text = await exported(pool, "ann")
    file.write_bytes(text)
    await run("import", file, "--user", "bob")
    assert portable(await exported(pool, "bob")) == portable(text)
    output = tmp_path / "out.jsonl"
    await run("export", "--user", "ann", "--output", output)
    assert output.read_bytes() == text
    await run("delete-user", "ann", "--yes")
    assert await chatdb.list_conversations(pool, user_id="ann") == []
    assert len(await chatdb.list_conversations(pool, user_id="bob", limit=1000)) == 300


async def test_move_user(pool: chatdb.pool.Pool) -> None:
    """Everything of a user moves to each other user, on whichever node that one is."""
    stored: list[str] = []
    for number, user in enumerate(USERS):
        messages = [{"role": "user", "content": f"message {number}"}]
        await chatdb.create_conversation(pool, user_id=user, key=f"key {number}", messages=messages)
        stored.append(f"key {number}")
        if number:
            moved = await chatdb.move_user(pool, user_id=USERS[number - 1], to_user_id=user)
            assert (moved.conversations, moved.messages) == (number, number)
            assert await chatdb.list_conversations(pool, user_id=USERS[number - 1]) == []
        assert {each.key for each in await chatdb.list_conversations(pool, user_id=user)} == set(stored)


async def test_abort_streams_and_the_search_index(pool: chatdb.pool.Pool, distributed: str) -> None:
    """These work as on one server."""
    run = partial(asyncio.to_thread, chatdb_process, env={"DATABASE_URL": distributed})
    await chatdb.create_conversation(pool, user_id="ann", key="k")
    await chatdb.start_message(pool, user_id="ann", conversation_key="k", key="m")
    await chatdb.extend_message(pool, user_id="ann", conversation_key="k", key="m", offset=0, text="plum pudding")
    await asyncio.sleep(1.1)
    await run("abort-streams", "--older-than", "1s", "--yes")
    message = await chatdb.get_message(pool, user_id="ann", conversation_key="k", key="m")
    assert (message.state, message.content) == ("aborted", "plum pudding")
    await run("search-index", "create", "--yes")
    [found] = await chatdb.search_messages(pool, user_id="ann", query="pudding", mode="words")
    assert found.seq == 1
    await run("search-index", "drop", "--yes")


async def test_linked_users(coordinator: str) -> None:
    """Tables are linked after they were distributed, to a reference table, and unlinked before that is undone."""
    execute(
        coordinator,
        "create table public.users (id text primary key)",
        "insert into public.users values ('ann'), ('eve')",
    )
    link_users(coordinator, table="public.users")
    with pytest.raises(chatdb.ConfigurationError, match="run chatdb link-users --unlink first"):
        distribute_tables(coordinator)
    assert unlink_users(coordinator)
    distribute_tables(coordinator, shards=4)
    with pytest.raises(chatdb.ConfigurationError, match=r"select create_reference_table\('public.users'\) first"):
        link_users(coordinator, table="public.users")
    execute(coordinator, "select create_reference_table('public.users')")
    assert link_users(coordinator, table="public.users").steps == ["add", "validate"]
    async with chatdb.create_pool(coordinator) as db:
        await chatdb.create_conversation(db, user_id="ann", messages=[{"role": "user", "content": "hello"}])
        for messages in ([], [{"role": "user", "content": "hello"}]):
            with pytest.raises(chatdb.InvalidInputError, match="link-users") as caught:
                await chatdb.create_conversation(db, user_id="bob", messages=messages)
            assert caught.value.parameter == "user_id"
        await chatdb.create_conversation(db, user_id="eve")
        execute(coordinator, "delete from public.users where id = 'eve'")
        assert await chatdb.list_conversations(db, user_id="eve") == []
    with pytest.raises(chatdb.ConfigurationError, match="run chatdb link-users --unlink first"):
        gather_tables(coordinator)
    assert unlink_users(coordinator)
    gather_tables(coordinator)


async def test_a_pool_that_was_open_before(coordinator: str) -> None:
    """A pool goes on when the tables are distributed and brought back; a bare connection says what to use instead."""
    at = {"user_id": "ann", "conversation_key": "k"}
    async with chatdb.create_pool(coordinator) as db:
        await chatdb.create_conversation(db, user_id="ann", key="k")
        await chatdb.append_message(db, **at, role="user", content="1", key="1")
        distribute_tables(coordinator, shards=4)
        await chatdb.append_message(db, **at, role="user", content="2", key="2")
        connection = await asyncpg.connect(**connect_arguments(coordinator))
        with pytest.raises(chatdb.ConfigurationError, match=r"Citus .*chatdb\.create_pool"):
            await chatdb.append_message(connection, **at, role="user", content="3", key="3")
        await connection.close()
        gather_tables(coordinator)
        await chatdb.append_message(db, **at, role="user", content="3", key="3")
        assert [message.seq for message in await chatdb.get_history(db, **at)] == [1, 2, 3]
