"""The commands know `chatdb.message_parts`, the table of the messages that are streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import chatdb
from chatdb.admin.check.inspection import inspect, is_wrong
from chatdb.admin.row_security import protect_tables
from chatdb.admin.users_link import link_users
from chatdb.pool import Pool
from tests.support.command import chatdb_process
from tests.support.databases import as_role, execute

pytestmark = pytest.mark.owner

TABLES = ("conversations", "messages", "message_parts")


async def streaming(db: Pool, user: str, count: int = 2) -> dict[str, Any]:
    """Store messages that stream, each in two parts, and return the address of the conversation."""
    made = await chatdb.create_conversation(db, user_id=user, messages=[{"role": "user", "content": "q"}])
    at = {"user_id": user, "conversation_id": made.id}
    for seq in range(2, count + 2):
        await chatdb.start_message(db, **at)
        for offset, text in enumerate("ab"):
            await chatdb.extend_message(db, **at, seq=seq, offset=offset, text=text)
    return at


def rows_of(dsn: str) -> dict[str, dict[str, int]]:
    """Return how many rows of each table each user has."""
    with psycopg.connect(dsn) as connection:
        return {
            table: dict(connection.execute(f"select user_id, count(*) from chatdb.{table} group by 1").fetchall())
            for table in TABLES
        }


async def test_a_deleted_user_leaves_no_row(db: Pool, dsn: str) -> None:
    """`chatdb delete-user` deletes the parts as well, and nobody else's."""
    for user in ("ann", "bob"):
        await streaming(db, user)
    expected = {"conversations": {"bob": 1}, "messages": {"bob": 3}, "message_parts": {"bob": 6}}
    said = await asyncio.to_thread(chatdb_process, "delete-user", "ann", "--yes", env={"DATABASE_URL": dsn})
    assert said == "deleted 1 conversations, 3 messages\n"
    assert rows_of(dsn) == expected


async def test_a_user_deleted_from_the_hosts_table_leaves_no_row(db: Pool, dsn: str) -> None:
    """After `chatdb link-users`, the cascade reaches the parts."""
    for user in ("ann", "bob"):
        await streaming(db, user)
    execute(dsn, "create table public.users (id text primary key)", "insert into public.users values ('ann'), ('bob')")
    await asyncio.to_thread(link_users, dsn, table="public.users")
    execute(dsn, "delete from public.users where id = 'ann'")
    assert rows_of(dsn) == {"conversations": {"bob": 1}, "messages": {"bob": 3}, "message_parts": {"bob": 6}}


@pytest.mark.parametrize("way", ["conversation", "message", "branch", "after", "pop"])
async def test_each_deletion_takes_the_parts(db: Pool, dsn: str, way: str) -> None:
    """Whatever deletes a message that streams leaves no part of it."""
    at = await streaming(db, "ann", count=1)
    match way:
        case "conversation":
            await chatdb.delete_conversation(db, **at)
        case "message":
            await chatdb.delete_message(db, **at, seq=2)
        case "branch":
            await chatdb.delete_branch(db, **at, seq=2)
        case "after":
            await chatdb.delete_messages_after(db, **at, after_seq=1)
        case _:
            await chatdb.pop_message(db, **at)
    assert rows_of(dsn)["message_parts"] == {}


def test_check_names_what_a_role_lacks(dsn: str) -> None:
    """A role without privileges on the parts gets the statement that grants them, and then all is well."""
    name = f"service_{urlsplit(dsn).path[1:]}"
    execute(dsn, f"create role {name} login password '{name}'", f"grant usage on schema chatdb to {name}")
    try:
        grant = "select, insert, update, delete"
        execute(dsn, f"grant {grant} on chatdb.conversations, chatdb.messages to {name}")
        [finding] = [each for each in inspect(dsn, role=name) if is_wrong(each)]
        assert finding.what == f"privileges of {name}"
        assert finding.hint == f"grant {grant} on chatdb.message_parts to {name}"
        execute(dsn, finding.hint)
        found = inspect(dsn, role=name)
        assert not any(map(is_wrong, found))
        details = {each.what: each.detail for each in found}
        assert details[f"privileges of {name}"].endswith(" on conversations, messages, message_parts")
        assert details["cascade fk_message_parts_message"] == "deleting a message deletes the parts of its text"
        assert "" not in details.values()
    finally:
        execute(dsn, f"drop owned by {name}", f"drop role {name}")


async def test_protect_covers_the_parts(db: Pool, dsn: str) -> None:
    """A restricted role reads no other user's parts; `check` finds a missing policy, and `protect` restores it."""
    await streaming(db, "ann")
    await asyncio.to_thread(protect_tables, dsn)
    name = f"service_{urlsplit(dsn).path[1:]}"
    execute(dsn, f"create role {name} login password '{name}'", f"grant usage on schema chatdb to {name}")
    try:
        execute(dsn, f"grant select, insert, update, delete on all tables in schema chatdb to {name}")
        with psycopg.connect(as_role(dsn, name)) as connection:
            for user, count in (("bob", 0), ("ann", 6)):
                connection.execute("select set_config('chatdb.user_id', %s, true)", [user])
                assert connection.execute("select count(*) from chatdb.message_parts").fetchone() == (count,)
        execute(dsn, "drop policy rls_message_parts on chatdb.message_parts")
        [finding] = [each for each in await asyncio.to_thread(inspect, dsn) if is_wrong(each)]
        assert (finding.what, finding.hint) == ("row-level security", "chatdb protect")
        statements = await asyncio.to_thread(protect_tables, dsn)
        assert [statement[:45] for statement in statements] == ["create policy rls_message_parts on chatdb.mes"]
        execute(dsn, "alter table chatdb.message_parts no force row level security")
        assert any(map(is_wrong, await asyncio.to_thread(inspect, dsn)))
        await asyncio.to_thread(protect_tables, dsn)
        assert not any(map(is_wrong, await asyncio.to_thread(inspect, dsn)))
        off = await asyncio.to_thread(protect_tables, dsn, off=True)
        assert "drop policy rls_message_parts on chatdb.message_parts" in off
        assert await db.fetchval("select count(*) from pg_policies where schemaname = 'chatdb'") == 0
    finally:
        execute(dsn, f"drop owned by {name}", f"drop role {name}")


async def test_a_rollback_says_what_it_deletes(db: Pool, dsn: str) -> None:
    """The warning names the text of messages that are streaming, and counts the rows."""
    await streaming(db, "ann")
    arguments = ("rollback", "--to", "0009", "--dry-run")
    said = await asyncio.to_thread(chatdb_process, *arguments, "--json", env={"DATABASE_URL": dsn})
    assert json.loads(said)["rows"] == {"chatdb.message_parts": 6}
