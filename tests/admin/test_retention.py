"""`chatdb prune`: conversations that are inactive for long are deleted whole, and no other row is touched."""

from __future__ import annotations

import asyncio
import json
import re
import time
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

import chatdb
from chatdb._core.dsn import database_of
from chatdb.admin import retention
from chatdb.admin.retention import OldConversations, PruneReport, count_old_conversations, prune_conversations
from chatdb.admin.row_security import protect_tables
from chatdb.pool import Connection, Pool
from tests.support.command import PROGRAM, chatdb_process, environment
from tests.support.command import chatdb as run_chatdb
from tests.support.databases import as_role, execute
from tests.support.embedded import standby
from tests.support.paths import ROOT

pytestmark = pytest.mark.owner

YEAR = timedelta(days=365)


async def stored(db: Pool, user: str, *, days: float = 400, messages: int = 2, count: int = 1) -> list[int]:
    """Create conversations with messages, last active so many days ago, and return their ids."""
    ids: list[int] = await db.fetchval(
        "with c as (insert into chatdb.conversations (user_id, last_seq, updated_at) "
        "select $1, $2, now() - $3::interval from generate_series(1, $4) returning id), "
        "m as (insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
        "select $1, id, seq, 'user', 'text', now() from c, generate_series(1, $2) as seq) "
        "select array_agg(id) from c",
        user,
        messages,
        timedelta(days=days),
        count,
    )
    return ids


async def remaining(db: Pool) -> dict[str, list[tuple[int, int]]]:
    """Return each user's conversations and their numbers of messages, which have no other rows."""
    rows = await db.fetch(
        "select c.user_id, c.id, coalesce(messages, 0) from chatdb.conversations as c full join "
        "(select user_id, conversation_id as id, count(*) as messages from chatdb.messages group by 1, 2) as m "
        "using (user_id, id) order by id"
    )
    found: dict[str, list[tuple[int, int]]] = {}
    for user, conversation, messages in rows:
        found.setdefault(user, []).append((conversation, messages))
    return found


async def counted(dsn: str, older_than: timedelta = YEAR) -> OldConversations:
    """Count the old conversations as the command does."""
    return await asyncio.to_thread(count_old_conversations, dsn, older_than=older_than)


async def pruned(dsn: str, older_than: timedelta = YEAR, *, rate: float = 1_000_000) -> PruneReport:
    """Delete the conversations that are old now."""
    found = await counted(dsn, older_than)
    return await asyncio.to_thread(prune_conversations, dsn, found, rate=rate)


@pytest.mark.parametrize(("page", "batch"), [(1, 1), (2, 7), (10_000, 1_000)])
async def test_what_is_old_is_deleted(
    db: Pool, dsn: str, monkeypatch: pytest.MonkeyPatch, page: int, batch: int
) -> None:
    """The old conversations of all users are deleted with their messages and streams, and the younger ones stay."""
    monkeypatch.setattr(retention, "PAGE_SIZE", page)
    monkeypatch.setattr(retention, "BATCH_SIZE", batch)
    await stored(db, "ann", count=3)
    await stored(db, "ann", days=500, messages=9)
    await stored(db, "ann", days=500, messages=0, count=2)
    await stored(db, "Zoë", days=366, messages=3)
    await stored(db, "zoe", count=2)
    [streaming] = await stored(db, "bob")
    await chatdb.start_message(db, user_id="bob", conversation_id=streaming)
    await db.execute("update chatdb.conversations set updated_at = now() - '400 days'::interval where user_id = 'bob'")
    await db.execute("update chatdb.message_parts set flushed_at = now() - '400 days'::interval")
    young = {
        "ann": [(id_, 2) for id_ in await stored(db, "ann", days=364.999, count=2)],
        "eve": [(id_, 1) for id_ in await stored(db, "eve", days=0, messages=1)],
        "future": [(id_, 1) for id_ in await stored(db, "future", days=-10_000, messages=1)],
    }
    found = await counted(dsn)
    assert found[:3] == (10, 6 + 9 + 3 + 4 + 3, 4)
    progress: list[int] = []
    report = await asyncio.to_thread(prune_conversations, dsn, found, rate=1_000_000, progress=progress.append)
    assert report == PruneReport(conversations=10, messages=25, users=4)
    assert progress == sorted(progress)
    assert progress[-1] == found.messages
    assert await remaining(db) == young
    assert await db.fetchval("select count(*) from chatdb.message_parts") == 0
    assert await pruned(dsn) == PruneReport()


async def test_archived_and_pinned_conversations(db: Pool, dsn: str) -> None:
    """They are deleted too, because only activity counts; and a changed title is no activity."""
    archived, pinned, renamed = await stored(db, "ann", count=3)
    await chatdb.update_conversation(db, user_id="ann", conversation_id=archived, archived=True)
    await chatdb.update_conversation(db, user_id="ann", conversation_id=pinned, pinned=True)
    await chatdb.update_conversation(db, user_id="ann", conversation_id=renamed, title="new")
    assert (await pruned(dsn)).conversations == 3
    assert await remaining(db) == {}


async def test_what_is_locked_is_left_alone(db: Pool, dsn: str) -> None:
    """Conversations that another transaction locks delay nobody; the next run deletes them."""
    locked = await stored(db, "ann", count=40)
    await stored(db, "ann")
    await stored(db, "bob")
    async with chatdb.transaction(db) as connection:
        await connection.execute("select from chatdb.conversations where id = any($1) for key share", locked)
        started = time.monotonic()
        assert await pruned(dsn) == PruneReport(conversations=2, messages=4, users=2, left_alone=40)
        assert time.monotonic() - started < 20
    assert await remaining(db) == {"ann": [(id_, 2) for id_ in locked]}
    assert await pruned(dsn) == PruneReport(conversations=40, messages=80, users=1)


async def test_what_becomes_active_is_left_alone(db: Pool, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append before the list is read, after it, or one that commits during the deletion, keeps the conversation."""
    [before, after, during, _] = await stored(db, "ann", count=4)
    found = await counted(dsn)
    prune = retention._prune

    async def append(db: Pool | Connection, conversation: int) -> None:
        await chatdb.append_message(db, user_id="ann", conversation_id=conversation, role="user", content="hello")

    def listed(*arguments: Any) -> list[dict[str, Any]]:
        asyncio.run_coroutine_threadsafe(append(db, after), loop).result()
        return prune(*arguments)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(retention, "_prune", listed)
    await append(db, before)
    async with chatdb.transaction(db) as connection:
        await append(connection, during)
        report = await asyncio.to_thread(prune_conversations, dsn, found, rate=1_000_000)
    assert report == PruneReport(conversations=1, messages=2, users=1, left_alone=2)
    assert await remaining(db) == {"ann": [(before, 3), (after, 3), (during, 3)]}


async def test_a_stream_that_is_alive(db: Pool, dsn: str) -> None:
    """A conversation whose message is being extended is left alone, even if a flush has not committed yet."""
    [flushed, flushing, _] = await stored(db, "ann", count=3)
    starts: dict[int, dict[str, Any]] = {}
    for conversation in (flushed, flushing):
        message = await chatdb.start_message(db, user_id="ann", conversation_id=conversation)
        starts[conversation] = {"user_id": "ann", "conversation_id": conversation, "seq": message.seq}
    await db.execute("update chatdb.conversations set updated_at = now() - '400 days'::interval")
    await db.execute("update chatdb.message_parts set flushed_at = now() - '400 days'::interval")
    await chatdb.extend_message(db, **starts[flushed], offset=0, text="alive")
    async with chatdb.transaction(db) as connection:
        await chatdb.extend_message(connection, **starts[flushing], offset=0, text="alive")
        started = time.monotonic()
        assert await pruned(dsn) == PruneReport(conversations=1, messages=2, users=1, left_alone=2)
        assert time.monotonic() - started < 30
    assert await remaining(db) == {"ann": [(flushed, 3), (flushing, 3)]}


async def test_a_trigger_that_suppresses_deletes(db: Pool, dsn: str) -> None:
    """The command ends, counts what stays, and deletes no message of it."""
    await db.execute(
        "create function public.keep() returns trigger language plpgsql as 'begin return null; end';"
        "create trigger keep before delete on chatdb.conversations for each row "
        "when (old.user_id = 'ann') execute function public.keep()"
    )
    kept = await stored(db, "ann", count=5)
    await stored(db, "bob")
    assert await pruned(dsn) == PruneReport(conversations=1, messages=2, users=1, left_alone=5)
    assert await pruned(dsn) == PruneReport(left_alone=5)
    assert await remaining(db) == {"ann": [(id_, 2) for id_ in kept]}


async def test_the_rate(db: Pool, dsn: str) -> None:
    """It deletes no more messages a second than it may, in batches of at most one second's work."""
    await stored(db, "ann", messages=9, count=20)
    done: list[int] = []
    started = time.monotonic()
    found = await counted(dsn)
    await asyncio.to_thread(prune_conversations, dsn, found, rate=100, progress=done.append)
    assert 2 <= time.monotonic() - started < 10
    assert done == [90, 180]


async def test_the_command(db: Pool, dsn: str) -> None:
    """It says how many conversations of how many users, since when and where, asks, and prints what it did."""
    env = {"CHATDB_MIGRATE_URL": dsn, "DATABASE_URL": "postgresql://127.0.0.1:1/other"}

    async def run(*arguments: str, code: int = 0) -> str:
        return await asyncio.to_thread(chatdb_process, "prune", *arguments, env=env, code=code)

    await stored(db, "ann", count=2)
    await stored(db, "bob", messages=1)
    said = await run("--older-than", "365d", code=1)
    assert "Delete 3 conversations of 2 users, with up to 5 messages, inactive since 20" in said
    assert f" UTC, from {database_of(dsn)}? Pass --yes to confirm" in said
    shown = await run("--older-than", "365d", "--dry-run")
    assert shown.startswith("would delete 3 conversations of 2 users, with up to 5 messages, inactive since 20")
    printed = json.loads(await run("--older-than", "365d", "--dry-run", "--json"))
    assert printed["would_delete"] == {"conversations": 3, "max_messages": 5, "users": 2}
    assert printed["inactive_since"].startswith("20")
    assert len(await remaining(db)) == 2
    nothing = "deleted 0 conversations of 0 users, with 0 messages\n"
    assert await run("--older-than", "10000d") == nothing
    assert await run("--older-than", "365d", "-y") == "deleted 3 conversations of 2 users, with 5 messages\n"
    assert await remaining(db) == {}
    printed = json.loads(await run("--older-than", "365d", "--yes", "--json"))
    assert printed["deleted"] == {"conversations": 0, "messages": 0, "users": 0}
    assert printed["left_alone"] == 0


@pytest.mark.parametrize(
    ("age", "said"),
    [
        ("-1d", "number above 0"),
        ("0d", "number above 0"),
        ("365", "number above 0"),
        ("", "number above 0"),
        ("1e3d", "number above 0"),
        ("10001d", "between 0 and 10,000 days"),
        ("999999999d", "between 0 and 10,000 days"),
        ("9999999999d", "number above 0"),
        ("12m", "minutes, not months"),
        ("1y", "such as 365d, 12h or 90s"),
    ],
)
def test_a_wrong_age(age: str, said: str) -> None:
    """An age that is negative, zero, absurd or ambiguous is refused before anything is sent."""
    nowhere = {"DATABASE_URL": "postgresql://127.0.0.1:1/d"}
    assert said in run_chatdb("prune", f"--older-than={age}", "--yes", env=nowhere, code=1)


async def test_behind_row_level_security(db: Pool, dsn: str) -> None:
    """A role that row-level security restricts is refused in a clear sentence; one that bypasses it deletes."""
    kept = await stored(db, "ann")
    await asyncio.to_thread(protect_tables, dsn)
    name = f"restricted_{urlsplit(dsn).path[1:]}"
    execute(dsn, f"create role {name} login password '{name}'", f"grant usage on schema chatdb to {name}")
    try:
        execute(dsn, f"grant select, insert, update, delete on all tables in schema chatdb to {name}")
        arguments = ("prune", "--older-than", "365d", "--yes")
        for more in ((), ("--dry-run",)):
            restricted = {"DATABASE_URL": as_role(dsn, name)}
            said = await asyncio.to_thread(chatdb_process, *arguments, *more, env=restricted, code=1)
            assert "run this as a superuser or a role with BYPASSRLS" in said
        assert await remaining(db) == {"ann": [(kept[0], 2)]}
        execute(dsn, f"alter role {name} bypassrls")
        await asyncio.to_thread(chatdb_process, *arguments, env={"DATABASE_URL": as_role(dsn, name)})
        assert await remaining(db) == {}
    finally:
        execute(dsn, f"drop owned by {name}", f"drop role {name}")


async def test_a_server_that_is_read_only(db: Pool, dsn: str) -> None:
    """On a server that refuses writes the command says so and deletes nothing; a dry run works."""
    [kept] = await stored(db, "ann")
    env = {"DATABASE_URL": f"{dsn}{'&' if '?' in dsn else '?'}options=-c%20default_transaction_read_only%3Don"}
    said = await asyncio.to_thread(chatdb_process, "prune", "--older-than", "365d", "--yes", env=env, code=1)
    assert "read-only" in said
    said = await asyncio.to_thread(chatdb_process, "prune", "--older-than", "365d", "--dry-run", env=env)
    assert "would delete 1 conversations" in said
    assert await remaining(db) == {"ann": [(kept, 2)]}


def test_on_a_standby() -> None:
    """A standby is refused with a sentence before the question, and a dry run works."""
    insert = "insert into chatdb.conversations (user_id, updated_at) values ('ann', now() - interval '400 days')"
    with standby(insert) as dsn:
        said = run_chatdb("prune", "--older-than", "365d", env={"DATABASE_URL": dsn}, code=1)
        assert "the server is a standby, which is read-only: connect to the primary" in said
        said = run_chatdb("prune", "--older-than", "365d", "--dry-run", env={"DATABASE_URL": dsn})
        assert "would delete 1 conversations" in said


def test_a_database_without_the_tables(empty_dsn: str) -> None:
    """It says to run chatdb migrate."""
    said = run_chatdb("prune", "--older-than", "365d", env={"DATABASE_URL": empty_dsn}, code=1)
    assert "chatdb migrate" in said


async def test_the_recipe_for_other_rules(db: Pool, dsn: str) -> None:
    """The statements of docs/operations/prune.md delete what is not pinned of the users with that plan, and vacuum."""
    page = (ROOT / "docs" / "operations" / "prune.md").read_text(encoding="utf-8")
    recipe, vacuum = re.findall(r"^```sql\n(with old .*?|vacuum .*?)^```", page, re.MULTILINE | re.DOTALL)
    execute(
        dsn,
        "create table public.users (id text primary key, plan text)",
        "insert into public.users values ('ann', 'free'), ('bob', 'paid')",
    )
    await stored(db, "ann", days=31, count=3)
    [pinned] = await stored(db, "ann", days=31)
    await chatdb.update_conversation(db, user_id="ann", conversation_id=pinned, pinned=True)
    [young] = await stored(db, "ann", days=29)
    [paid] = await stored(db, "bob", days=31)
    await db.execute(recipe)
    await db.execute(vacuum)
    assert await remaining(db) == {"ann": [(pinned, 2), (young, 2)], "bob": [(paid, 2)]}


@pytest.mark.chaos
async def test_a_killed_run_can_be_repeated(db: Pool, dsn: str) -> None:
    """After a kill -9 in the middle, each conversation is there whole or not at all; the next run deletes the rest."""
    for user in range(40):
        await stored(db, f"user {user}", messages=20, count=5)
    young = {"eve": [(id_, 20) for id_ in await stored(db, "eve", days=1, messages=20, count=5)]}
    arguments = ("prune", "--older-than", "365d", "--yes", "--database", dsn)
    kills = 0
    while kills < 3:
        process = await asyncio.create_subprocess_exec(
            PROGRAM, *arguments, "--rate", "1000", env=environment({}), stdout=asyncio.subprocess.DEVNULL
        )
        before = len(await remaining(db))
        while len(await remaining(db)) > before - 5:
            await asyncio.sleep(0.01)
            assert process.returncode is None
        process.kill()
        await process.wait()
        kills += 1
        left = await remaining(db)
        assert all(messages == 20 for conversations in left.values() for _, messages in conversations)
        assert 1 < len(left) < 41
    left = await remaining(db)
    report = await pruned(dsn)
    assert report.users == len(left) - 1
    assert await remaining(db) == young
