"""The link to the host's own users: what it refuses, how it resumes, and what it does."""

from __future__ import annotations

import asyncio
import json
import time

import psycopg
import pytest

import chatdb
from chatdb._core.driver_errors import LINK
from chatdb.admin.check.inspection import inspect
from chatdb.admin.users_link import UsersMissingError, link_users, unlink_users
from tests.support.command import chatdb as command
from tests.support.databases import as_role, execute

pytestmark = pytest.mark.owner

NOT_VALID = (
    f"alter table chatdb.conversations add constraint {LINK} foreign key (user_id) "
    "references public.users (id) on delete cascade not valid"
)


@pytest.fixture
def host(dsn: str) -> str:
    """Return the DSN of a database with a users table: alice and bob, each with a conversation of two messages."""
    execute(
        dsn,
        "create table public.users (id varchar(50) primary key, name text)",
        "insert into public.users values ('alice'), ('bob')",
        "insert into chatdb.conversations (user_id, id, last_seq) values ('alice', 1001, 2), ('bob', 1002, 2)",
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
        "select user_id, id, n, 'user', 'hello', now() from chatdb.conversations, generate_series(1, 2) as n",
    )
    return dsn


def rows(dsn: str, statement: str) -> list[tuple[object, ...]]:
    """Return the rows of a statement."""
    with psycopg.connect(dsn) as connection:
        return connection.execute(statement).fetchall()


def state(dsn: str) -> list[tuple[object, ...]]:
    """Return the link's definition, if it exists."""
    return rows(dsn, f"select pg_get_constraintdef(oid) from pg_constraint where conname = '{LINK}'")


def users_of_check(dsn: str) -> str:
    """Return the state of the link according to `chatdb check`."""
    return next(each.state for each in inspect(dsn) if each.what == "users")


LINKED = [("FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE",)]


def test_a_deleted_user_takes_his_chats_along(host: str) -> None:
    """Deleting a user in the host's table deletes that user's conversations and messages, and no others."""
    assert users_of_check(host) == "note"
    assert link_users(host, table="public.users") == ("public.users", "id", ["add", "validate"])
    assert state(host) == LINKED
    assert users_of_check(host) == "ok"
    execute(host, "delete from public.users where id = 'alice'")
    assert rows(host, "select user_id from chatdb.conversations") == [("bob",)]
    assert rows(host, "select distinct user_id from chatdb.messages") == [("bob",)]


async def test_an_unknown_user(host: str) -> None:
    """A conversation of an unknown user is refused with an error that names the argument."""
    await asyncio.to_thread(link_users, host, table="users")
    async with chatdb.create_pool(host) as db:
        await chatdb.check_schema(db)
        for arguments in ({}, {"key": "k"}):
            with pytest.raises(chatdb.InvalidInputError, match="users table") as caught:
                await chatdb.create_conversation(db, user_id="carol", **arguments)
            assert caught.value.parameter == "user_id"
        execute(host, "insert into public.users values ('carol')")
        made = await chatdb.create_conversation(db, user_id="carol")
        await chatdb.append_message(db, user_id="carol", conversation_id=made.id, role="user", content="hello")
        assert (await chatdb.delete_user(db, user_id="carol")).conversations == 1


@pytest.mark.parametrize("kind", ["text", "varchar", "char(40)", "name", "a_domain"])
def test_types_that_compare_with_text(dsn: str, kind: str) -> None:
    """Every text type can be linked, even under a name that needs quotes."""
    execute(
        dsn,
        "create domain a_domain as varchar(40)",
        'create schema "the Host"',
        f'create table "the Host"."Users" (number int primary key, "user Id" {kind} unique not null)',
        """insert into "the Host"."Users" values (1, 'alice')""",
        "insert into chatdb.conversations (user_id) values ('alice')",
    )
    link = link_users(dsn, table='"the Host"."Users"', column="user Id")
    assert link[:2] == ('"the Host"."Users"', '"user Id"')
    execute(dsn, 'delete from "the Host"."Users"')
    assert rows(dsn, "select count(*) from chatdb.conversations") == [(0,)]


@pytest.mark.parametrize("kind", ["uuid", "bigint", "integer", "bytea"])
def test_types_that_do_not(dsn: str, kind: str) -> None:
    """An id of another type is refused with the reason and a fix that works."""
    execute(dsn, f"create table users (id {kind} primary key)")
    for dry_run in (True, False):
        with pytest.raises(chatdb.InvalidInputError, match=f"type {kind}, .* as text") as caught:
            link_users(dsn, table="users", dry_run=dry_run)
    assert caught.value.parameter == "column"
    if kind != "bytea":  # its text form depends on a setting
        execute(dsn, str(caught.value).partition("To add one, run ")[2])
        assert link_users(dsn, table="users", column="user_key").steps == ["add", "validate"]


@pytest.mark.parametrize(
    ("arguments", "parameter", "sentence"),
    [
        ({"table": "people"}, "table", "no table 'people'"),
        ({"table": "users; drop table users"}, "table", "no "),
        ({"table": "a.b.c.d"}, "table", "no "),
        ({"table": ""}, "table", "no "),
        ({"table": "viewed"}, "table", "not an ordinary table"),
        ({"table": "unlogged"}, "table", "not an ordinary table"),
        ({"table": "users", "column": "ids"}, "column", "public.users has no column 'ids'"),
        ({"table": "users", "column": "name"}, "column", "public.users.name is neither .* unique"),
        ({"table": "users", "column": "half"}, "column", "public.users.half is neither .* unique"),
        ({"table": "users", "column": "late"}, "column", "public.users.late is neither .* unique"),
    ],
)
def test_what_cannot_be_referenced(host: str, arguments: dict[str, str], parameter: str, sentence: str) -> None:
    """A table or column that a foreign key cannot reference is refused before anything is locked."""
    execute(
        host,
        "alter table users add column half text, add column late text unique deferrable",
        "create unique index on users (half) where half <> ''",
        "create view viewed as select * from users",
        "create unlogged table unlogged (id text primary key)",
    )
    with pytest.raises(chatdb.InvalidInputError, match=sentence) as caught:
        link_users(host, **arguments)
    assert caught.value.parameter == parameter
    assert state(host) == []


def test_users_that_the_host_lacks(host: str) -> None:
    """The error lists up to twenty users whom the host lacks, and their total number."""
    execute(host, "insert into chatdb.conversations (user_id) select 'u' || n % 25 from generate_series(100, 199) as n")
    for dry_run in (True, False):
        with pytest.raises(UsersMissingError, match="lacks 25 users") as caught:
            link_users(host, table="users", dry_run=dry_run)
        assert (caught.value.total, len(caught.value.users), caught.value.users[:2]) == (25, 20, ["u0", "u1"])
        assert "and 5 more" in str(caught.value)
        assert state(host) == []
    execute(host, "insert into users select distinct user_id from chatdb.conversations on conflict do nothing")
    assert link_users(host, table="users").steps == ["add", "validate"]


def test_again_after_it_was_killed(host: str) -> None:
    """The next run validates what a killed run left; if the host lacks an older user, it removes the link."""
    execute(host, NOT_VALID)
    assert users_of_check(host) == "different"
    assert link_users(host, table="users").steps == ["validate"]
    assert state(host) == LINKED
    assert link_users(host, table="users").steps == []

    assert unlink_users(host)
    execute(host, "insert into chatdb.conversations (user_id) values ('carol')", NOT_VALID)
    with pytest.raises(UsersMissingError, match="'carol'"):
        link_users(host, table="users")
    assert state(host) == []


@pytest.mark.parametrize(
    "other",
    [
        NOT_VALID.replace("cascade", "restrict"),
        NOT_VALID.replace("public.users (id)", "public.people (id)"),
        NOT_VALID.replace("public.users (id)", "public.users (name)"),
    ],
)
def test_a_link_of_another_kind(host: str, other: str) -> None:
    """A link to another table or column, or without the cascade, is refused until --unlink removes it."""
    execute(host, "create table people (id text primary key)", "alter table users add unique (name)", other)
    with pytest.raises(chatdb.InvalidInputError, match="--unlink"):
        link_users(host, table="users")
    assert users_of_check(host) == "different"
    assert unlink_users(host)
    assert not unlink_users(host)
    link_users(host, table="users")
    assert state(host) == LINKED


def test_an_owner_who_may_only_reference_the_users(host: str) -> None:
    """The owner of chatdb's tables needs only SELECT and REFERENCES on the host's, and the error names them."""
    name = "chatdb_test_owner"
    execute(
        host,
        f"create role {name} login password '{name}'",
        f"alter schema chatdb owner to {name}",
        f"alter table chatdb.conversations owner to {name}",
        f"alter table chatdb.messages owner to {name}",
    )
    try:
        with pytest.raises(chatdb.ConfigurationError, match="privilege"):
            link_users(as_role(host, name), table="users")
        execute(host, f"grant select, references on users to {name}")
        assert link_users(as_role(host, name), table="users").steps == ["add", "validate"]
        assert unlink_users(as_role(host, name))
    finally:
        execute(host, f"reassign owned by {name} to current_user", f"drop owned by {name}", f"drop role {name}")


def test_without_chatdbs_tables(empty_dsn: str) -> None:
    """Without chatdb's tables, a SchemaError says what to run."""
    execute(empty_dsn, "create table users (id text primary key)")
    with pytest.raises(chatdb.SchemaError, match="chatdb migrate"):
        link_users(empty_dsn, table="users")
    with pytest.raises(chatdb.SchemaError, match="chatdb migrate"):
        unlink_users(empty_dsn)


@pytest.mark.parametrize("held", ["chatdb.conversations", "public.users"])
def test_a_busy_table(host: str, held: str) -> None:
    """Behind a long transaction, linking gives up in time, lets writers through, and leaves nothing behind."""
    with psycopg.connect(host) as other, psycopg.connect(host, autocommit=True) as writer:
        other.execute(f"lock table {held} in row exclusive mode")
        started = time.monotonic()
        with pytest.raises(chatdb.UnavailableError, match="run this again"):
            link_users(host, table="users", wait=0.5)
        assert time.monotonic() - started < 30
        writer.execute("insert into users values ('carol')")
        writer.execute("insert into chatdb.conversations (user_id) values ('carol')")
        assert state(host) == []
    assert link_users(host, table="users").steps == ["add", "validate"]


@pytest.mark.chaos
async def test_writers_at_work(request: pytest.FixtureRequest, host: str) -> None:
    """Concurrent appends, and transactions that write both tables in either order, get no errors."""
    stop, made = asyncio.Event(), [0, 0]

    async def append(db: chatdb.pool.Pool) -> None:
        while not stop.is_set():
            await chatdb.append_message(db, user_id="alice", conversation_id=1001, role="user", content="more")
            made[0] += 1

    async def register(db: chatdb.pool.Pool, name: str, *, users_first: bool) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            user = f"{name}-{number}"
            async with chatdb.transaction(db) as connection:
                if not users_first:
                    await chatdb.update_conversation(connection, user_id="bob", conversation_id=1002, title=user)
                await connection.execute("insert into users (id) values ($1)", user)
                await asyncio.sleep(0.01)
                await chatdb.create_conversation(connection, user_id=user)
            made[1] += 1

    async with chatdb.create_pool(host) as db, asyncio.TaskGroup() as group:
        writers = [group.create_task(append(db)) for _ in range(3)]
        writers += [group.create_task(register(db, f"u{n}", users_first=n > 0)) for n in range(4)]
        for _ in range(1 if request.config.getoption("--quick") else 2):
            await asyncio.sleep(0.2)
            before = list(made)
            assert (await asyncio.to_thread(link_users, host, table="users")).steps == ["add", "validate"]
            await asyncio.sleep(0.2)
            assert all(now > then for now, then in zip(made, before, strict=True))
            assert await asyncio.to_thread(unlink_users, host)
        stop.set()
    assert all(writer.done() for writer in writers)


async def test_many_at_once(host: str) -> None:
    """Of concurrent calls one links; the others find nothing to do."""
    done = await asyncio.gather(*(asyncio.to_thread(link_users, host, table="users") for _ in range(4)))
    assert sorted(len(each.steps) for each in done) == [0, 0, 0, 2]


def test_the_command(host: str) -> None:
    """`chatdb link-users` reports what it does, has a dry run, lists missing users, and unlinks."""
    env = {"DATABASE_URL": host}
    assert "--table" in command("link-users", env=env, code=2)
    said = command("link-users", "--table", "users", "--dry-run", env=env)
    assert said.startswith("would link conversations to public.users(id)")
    assert state(host) == []
    said = json.loads(command("link-users", "--table", "public.users", "--json", env=env))
    assert said == {"table": "public.users", "column": "id", "done": ["add", "validate"]}
    assert "already" in command("link-users", "--table", "public.users", env=env)
    assert json.loads(command("link-users", "--unlink", "--dry-run", "--json", env=env)) == {"would_unlink": True}
    assert state(host) == LINKED
    assert command("link-users", "--unlink", env=env) == "unlinked conversations from users\n"
    assert command("link-users", "--unlink", env=env) == "nothing to unlink\n"
    execute(host, "insert into chatdb.conversations (user_id) values ('carol')")
    assert "lacks 1 users who have conversations: 'carol'" in command("link-users", "--table", "users", env=env, code=1)
    assert state(host) == []


@pytest.mark.parametrize(
    ("table", "column", "taken"),
    [
        ('public."Users"', '"userId"', ('public."Users"', '"userId"')),
        ("public.Users", "userId", ('public."Users"', '"userId"')),
        ("PUBLIC.PLAIN", "ID", ("public.plain", "id")),
        ('"odd.name ü"', '"a ""b"""', ('public."odd.name ü"', '"a ""b"""')),
        ("odd.name ü", 'a "b"', ('public."odd.name ü"', '"a ""b"""')),
        ('"My Schema"."Users"', "id", ('"My Schema"."Users"', "id")),
        ("My Schema.Users", '"id"', ('"My Schema"."Users"', "id")),
    ],
)
def test_names_are_as_in_sql_or_as_they_are_spelled(dsn: str, table: str, column: str, taken: tuple[str, str]) -> None:
    """Table and column names are read as in SQL, and if that finds nothing, as spelled."""
    execute(
        dsn,
        'create table public."Users" ("userId" text primary key)',
        "create table public.plain (id text primary key)",
        'create table public."odd.name ü" ("a ""b""" text primary key)',
        'create schema "My Schema"',
        'create table "My Schema"."Users" (id text primary key)',
    )
    assert link_users(dsn, table=table, column=column)[:2] == taken


@pytest.mark.parametrize(
    ("table", "column", "sentence"),
    [
        ("nobody", "id", "no table 'nobody'"),
        ('public."users', "id", "no table "),
        ("", "id", "no table ''"),
        ("a\0", "id", "table"),
        ("public.users", "nothing", "has no column 'nothing'"),
        ("public.users", '"id', "has no column"),
        ("public.users", "users.id", "has no column"),
        ("public.users", "\ud800", "column"),
    ],
)
def test_wrong_names_are_said(host: str, table: str, column: str, sentence: str) -> None:
    """An unknown name is an error that names the argument and says how to write names."""
    with pytest.raises(chatdb.InvalidInputError, match=sentence):
        link_users(host, table=table, column=column)
