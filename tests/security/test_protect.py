"""Row-level security: `chatdb protect`, and what a restricted role sees inside and outside its transactions."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest

import chatdb
from chatdb import ConfigurationError, Conversation, ConversationNotFoundError, Deleted
from chatdb.admin.check.inspection import inspect
from chatdb.admin.migrate import apply_migrations, last_migrations, migration_files, rollback_migrations
from chatdb.admin.row_security import TABLES, protect_tables, protection_statements
from chatdb.admin.users_link import link_users
from chatdb.formats.items import Item, SourceConversation, SourceMessage
from chatdb.testing.databases import Databases
from chatdb.transfer.exporter import export_conversations
from chatdb.transfer.importer import import_conversations
from tests.support.calls import CALLS, call, conversation_with_a_message
from tests.support.catalog import DATA, SEARCH_INDEX, Live
from tests.support.command import chatdb as command
from tests.support.databases import as_role, cloned, execute
from tests.support.migrations import transaction
from tests.support.pgbouncer import OPTIONS, VERSIONS, pgbouncer
from tests.support.plans import check_plan
from tests.support.proxy import Proxy, Statement
from tests.support.roles import Roles
from tests.support.sqlfiles import TEXTS, SqlFile, file_of, is_table


class Place(NamedTuple):
    """The DSNs of one database for each role of docs/explanation/security.md."""

    superuser: str
    owner: str
    app: str
    reader: str


@pytest.fixture
def place(databases: Databases, roles: Roles) -> Iterator[Place]:
    """Yield a new database without row-level security."""
    with cloned(databases, roles) as dsn:
        yield Place(dsn, *(as_role(dsn, role) for role in (roles.owner, roles.app, roles.reader)))


@pytest.fixture
def walled(place: Place) -> Place:
    """Return a new database with row-level security."""
    protect_tables(place.owner)
    return place


def rows(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    """Return the rows that a statement selects."""
    with psycopg.connect(dsn) as connection:
        return connection.execute(statement.encode()).fetchall()


def snapshot(dsn: str, user: str) -> list[Any]:
    """Return a user's rows, including the version of each row."""
    texts = [f"select t::text, xmin::text, ctid::text from chatdb.{table} as t" for table in TABLES]
    return [rows(dsn, f"{text} where user_id = '{user}' order by 1") for text in texts]


# the command


def test_on_and_off(place: Place) -> None:
    """The command switches all tables on and off, prints what it ran, and does nothing the second time."""
    env = {"DATABASE_URL": "postgresql://127.0.0.1:1/nowhere", "CHATDB_MIGRATE_URL": place.owner}
    state = f"select relrowsecurity, relforcerowsecurity from pg_class where relname = any (array{[*TABLES]})"
    before = json.loads(command("protect", "--dry-run", "--json", env=env))["would_run"]
    first_words = [statement.split()[0] for statement in before]
    assert first_words == ["create", "grant", *["create", "alter"] * 3]
    assert rows(place.owner, state) == [(False, False)] * 3
    assert json.loads(command("protect", "--json", env=env)) == {"ran": before}
    assert rows(place.owner, state) == [(True, True)] * 3
    assert command("protect", env=env) == "nothing to do\n"
    assert "row-level security is off" in command("protect", "--off", env=env)
    assert rows(place.owner, state) == [(False, False)] * 3
    assert rows(place.owner, "select from pg_policy") == []
    assert rows(place.owner, "select from pg_proc where proname = 'rls_user_id'") == []
    assert protect_tables(place.owner, off=True) == []


@pytest.mark.parametrize(
    "change",
    [
        "alter table chatdb.messages no force row level security",
        "alter table chatdb.messages disable row level security",
        "drop policy rls_messages on chatdb.messages",
        "alter policy rls_messages on chatdb.messages using (true)",
        "alter policy rls_messages on chatdb.messages with check (true)",
        "alter policy rls_messages on chatdb.messages to current_user",
        "create or replace function chatdb.rls_user_id() returns text language sql stable as $$ select 'ada' $$",
        "alter function chatdb.rls_user_id() volatile",
        "alter function chatdb.rls_user_id() security definer",
        "alter function chatdb.rls_user_id() set search_path = public",
        "revoke execute on function chatdb.rls_user_id() from public",
    ],
)
def test_a_wall_with_a_hole_is_mended(walled: Place, roles: Roles, change: str) -> None:
    """The command restores any missing or changed part of the protection."""
    execute(walled.owner, change)
    assert protection_statements(walled.owner)
    assert checked(walled.owner, roles.app) == {"row-level security": "different"}
    assert protect_tables(walled.owner)
    assert protection_statements(walled.owner) == []


def test_an_older_wall_is_replaced(place: Place, roles: Roles) -> None:
    """The command replaces an earlier release's policies, which hide all rows without a user, with ones that raise."""
    condition = "user_id = nullif(current_setting('chatdb.user_id', true), '')"
    for table in TABLES:
        execute(
            place.owner,
            f"create policy rls_{table} on chatdb.{table} using ({condition}) with check ({condition})",
            f"alter table chatdb.{table} enable row level security, force row level security",
        )
    assert rows(place.app, "select from chatdb.messages") == []
    assert checked(place.owner, roles.app) == {"row-level security": "different"}
    assert [statement.split()[0] for statement in protect_tables(place.owner)] == [
        *("create", "grant", *("drop", "create") * 3)
    ]
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="no user is named"):
        rows(place.app, "select from chatdb.messages")


@pytest.mark.parametrize("setting", ["search_path = chatdb, public", "quote_all_identifiers = on"])
def test_settings_of_the_role_are_no_difference(walled: Place, roles: Roles, setting: str) -> None:
    """Policies count as intact even if a role's settings change how the server prints names."""
    execute(walled.superuser, f"alter role {roles.owner} in database {roles_database(walled)} set {setting}")
    assert protection_statements(walled.owner) == []


def roles_database(place: Place) -> str:
    """Return the name of the test's database."""
    return str(rows(place.superuser, "select current_database()")[0][0])


def test_whoever_protects_the_tables_owner_has_the_function(place: Place, roles: Roles) -> None:
    """The function belongs to the tables' owner and every role may call it, whoever runs the command."""
    execute(place.superuser, "alter default privileges revoke execute on functions from public")
    assert protect_tables(place.superuser)[2] == f"alter function chatdb.rls_user_id() owner to {roles.owner}"
    assert rows(place.superuser, "select proowner::regrole::text from pg_proc where proname = 'rls_user_id'") == [
        (roles.owner,)
    ]
    with psycopg.connect(place.app) as connection:
        connection.execute("set chatdb.user_id = 'ada'")
        assert connection.execute("select from chatdb.messages").fetchall() == []
    assert protection_statements(place.owner) == []


def test_a_planted_function_is_replaced(place: Place, roles: Roles) -> None:
    """Another role's function of the same name gets chatdb's body and the tables' owner."""
    execute(
        place.superuser,
        "create function chatdb.rls_user_id() returns text language sql stable as $$ select 'bob' $$",
        f"alter function chatdb.rls_user_id() owner to {roles.app}",
    )
    assert len(protect_tables(place.superuser)) == 8
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="no user is named"):
        rows(place.app, "select from chatdb.messages")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="must be owner"):
        execute(place.app, "alter function chatdb.rls_user_id() volatile")


def test_all_is_taken_back_behind_the_wall(walled: Place) -> None:
    """Rolling back all migrations also drops the policies' function."""
    rollback_migrations(walled.owner, to="0")
    assert rows(walled.owner, "select from pg_namespace where nspname = 'chatdb'") == []


def test_a_command_over_all_users(walled: Place) -> None:
    """An operator command that would see no rows names the roles that can run it."""
    execute(walled.owner, 'create table public.users (id text collate "C" primary key)')
    execute(walled.superuser, "insert into chatdb.conversations (user_id) values ('nobody')")
    with pytest.raises(ConfigurationError, match="superuser or a role with BYPASSRLS"):
        link_users(walled.owner, table="public.users")
    with pytest.raises(chatdb.ChatDBError, match="nobody"):
        link_users(walled.superuser, table="public.users")


async def test_readiness(walled: Place) -> None:
    """`check_schema` raises if a restricted role names no user, and passes otherwise."""
    async with chatdb.create_pool(walled.app) as db:
        with pytest.raises(chatdb.SchemaError, match="create_pool\\(row_level_security=True\\)"):
            await chatdb.check_schema(db)
        async with chatdb.transaction(db, user_id="ada") as connection:
            await chatdb.check_schema(connection)
    for dsn, protected in ((walled.app, True), (walled.superuser, False)):
        async with chatdb.create_pool(dsn, row_level_security=protected) as db:
            await chatdb.check_schema(db)


def checked(dsn: str, role: str | None = None) -> dict[str, str]:
    """Return each finding of `chatdb check` about row-level security."""
    found = [(each.what, each.state) for each in inspect(dsn, role=role) if "row-level security" in each.what]
    assert len(found) == len(dict(found))
    return dict(found)


def test_what_the_check_says(place: Place, roles: Roles) -> None:
    """The check reports whether row-level security is on, whether it restricts a role, and a host's own policies."""
    assert checked(place.owner, roles.app) == {"row-level security": "ok"}
    execute(place.owner, "alter table chatdb.messages enable row level security")
    execute(place.owner, "create policy mine on chatdb.messages for select using (true)")
    assert checked(place.owner, roles.app) == {"row-level security": "note"}
    execute(place.owner, "drop policy mine on chatdb.messages")
    protect_tables(place.owner)
    assert checked(place.owner, roles.app) == {
        f"row-level security for {roles.owner}": "ok",
        f"row-level security for {roles.app}": "ok",
    }
    assert checked(place.superuser, "nobody_of_this_name").popitem()[1] == "note"
    planned = next(each for each in inspect(place.app) if each.what == "statements")
    assert planned.state == "ok"
    assert planned.detail.startswith("each is planned with an index")
    execute(place.owner, "create policy mine on chatdb.messages for select using (true)")
    assert checked(place.owner, roles.app) == {"row-level security": "different"}
    execute(place.owner, *(f"drop policy {name} on chatdb.messages" for name in ("mine", "rls_messages")))
    execute(place.owner, "drop policy rls_conversations on chatdb.conversations")
    assert checked(place.owner) == {"row-level security": "different"}, "nobody sees a row"


def test_another_policy(place: Place) -> None:
    """A permissive policy of the host is refused by name; a restrictive one is accepted."""
    execute(place.owner, "create policy mine on chatdb.messages for select using (true)")
    with pytest.raises(ConfigurationError, match="mine"):
        protect_tables(place.owner)
    assert rows(place.owner, "select relrowsecurity from pg_class where relname = 'conversations'") == [(False,)]
    execute(
        place.owner,
        "drop policy mine on chatdb.messages",
        "create policy mine on chatdb.messages as restrictive using (true)",
    )
    assert len(protect_tables(place.owner)) == 8


def test_a_busy_table(place: Place) -> None:
    """The command waits at most `wait` seconds for a busy table, and blocks other sessions for at most two."""
    with transaction(place.app, "select from chatdb.messages") as connection:
        with pytest.raises(chatdb.UnavailableError, match="55P03"):
            protect_tables(place.owner, wait=0)
        assert protection_statements(place.owner)
        timer = threading.Timer(2.5, connection.rollback)
        timer.start()
        assert len(protect_tables(place.owner, wait=60)) == 8
        timer.join()


def test_who_may_not(place: Place, empty_dsn: str) -> None:
    """The application's role is refused, and so is a database without tables."""
    with pytest.raises(ConfigurationError, match="owner"):
        protect_tables(place.app)
    with pytest.raises(chatdb.SchemaError, match="chatdb migrate"):
        protect_tables(empty_dsn)


def test_a_rollback_counts_no_hidden_rows(walled: Place) -> None:
    """If row-level security hides the rows, a rollback does not report a count of zero."""
    execute(walled.superuser, "insert into chatdb.conversations (user_id) values ('ada')")
    for dsn, count in ((walled.owner, None), (walled.superuser, 0)):
        found = [tables for _, tables in last_migrations(dsn, to="0002")]
        assert found == [*[{}] * 3, {"chatdb.message_parts": count}, *[{}] * 6, {"chatdb.messages": count}]
    said = command("rollback", "--to", "0002", env={"DATABASE_URL": walled.owner}, code=1)
    assert "Deletes all rows (row-level security hides their number)" in said


# every function

LISTS = {"list_conversations", "list_previews", "list_pinned", "list_streaming", "search_messages", "export_user"}
"""The functions that answer a user without conversations."""


def described(answer: Any) -> Any:
    """Return an answer without the values that differ between runs."""
    if isinstance(answer, list | tuple):
        return [described(item) for item in answer]
    if isinstance(answer, dict):
        return answer
    if answer is None or isinstance(answer, int):
        return answer
    varying = {"id", "conversation_id", "created_at", "updated_at"}
    fields = answer.model_dump(exclude=varying)
    times = {"archived_at", "pinned_at"}
    return type(answer).__name__, {name: value if name not in times else bool(value) for name, value in fields.items()}


WITHIN_A_USER = [(name, arguments) for name, arguments in CALLS if name != "move_user"]
"""The calls that work on one user's rows."""


@pytest.mark.parametrize("role", ["app", "owner"])
async def test_every_function_works_inside(databases: Databases, roles: Roles, walled: Place, role: str) -> None:
    """In its user's transaction, every function answers as without row-level security, for the owner too."""
    with cloned(databases, roles) as plain:
        answers: list[list[Any]] = []
        for dsn in (as_role(plain, roles.app), getattr(walled, role)):
            found: list[Any] = []
            async with chatdb.create_pool(dsn) as db:
                for name, arguments in WITHIN_A_USER:
                    async with chatdb.transaction(db, user_id="alice") as connection:
                        await chatdb.delete_user(connection, user_id="alice")
                        conversation = await conversation_with_a_message(connection)
                        found.append((name, described(await call(connection, name, arguments, conversation))))
            answers.append(found)
    assert answers[0] == answers[1]
    assert len(answers[0]) == len(WITHIN_A_USER)


@pytest.mark.parametrize("role", ["app", "owner"])
@pytest.mark.parametrize("user", [None, "alice", "bob"])
async def test_a_move_needs_an_operators_role(walled: Place, role: str, user: str | None) -> None:
    """Whatever user is named, a restricted role moves nothing and is told why; a superuser moves everything."""
    async with chatdb.create_pool(getattr(walled, role)) as db:
        async with chatdb.transaction(db, user_id="alice") as connection:
            await conversation_with_a_message(connection)
        before = snapshot(walled.superuser, "alice")
        async with chatdb.transaction(db, user_id=user) as connection:
            with pytest.raises(ConfigurationError, match="BYPASSRLS"):
                await chatdb.move_user(connection, user_id="alice", to_user_id="bob")
        assert snapshot(walled.superuser, "alice") == before
    async with chatdb.create_pool(walled.superuser, row_level_security=True) as operator:
        moved = await chatdb.move_user(operator, user_id="alice", to_user_id="bob")
        assert moved == chatdb.Moved(conversations=1, messages=2)
    assert snapshot(walled.superuser, "alice") == [[], [], []]


@pytest.mark.parametrize("user", [None, "bob"])
async def test_nothing_is_there_outside(walled: Place, user: str | None) -> None:
    """Without a user, every call raises an error with the fix; in another user's transaction, it finds nothing."""
    async with chatdb.create_pool(walled.app) as db:
        async with chatdb.transaction(db, user_id="alice") as connection:
            conversation = await conversation_with_a_message(connection)
        before = snapshot(walled.superuser, "alice")
        for name, arguments in CALLS:
            try:
                async with chatdb.transaction(db, user_id=user) as connection:
                    answer: Any = await call(connection, name, arguments, conversation)
            except chatdb.ChatDBError as error:
                answer = error
            creates = name in {"create_conversation", "upsert_conversation"} or arguments.get("create")
            if name == "move_user":
                assert type(answer) is ConfigurationError
                assert "BYPASSRLS" in str(answer)
            elif user is None or creates:
                assert type(answer) is ConfigurationError
                assert "transaction(db, user_id=...)" in str(answer)
            elif name == "delete_user":
                assert answer == Deleted(conversations=0, messages=0)
            elif (
                name in LISTS
                and "after_key" not in arguments
                and (name != "search_messages" or "conversation_key" not in arguments)
            ):
                assert answer == []
            else:
                assert type(answer) is ConversationNotFoundError, name
    assert snapshot(walled.superuser, "alice") == before


async def test_a_row_of_another_users(walled: Place) -> None:
    """No INSERT or UPDATE, not even the host's, can assign a row to another user."""
    async with chatdb.create_pool(walled.app) as db:
        for statement in (
            "insert into chatdb.conversations (user_id) values ('bob')",
            "update chatdb.conversations set user_id = 'bob'",
            "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
            "select 'bob', id, 1, 'user', 'x', now() from chatdb.conversations",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):  # noqa: PT012
                async with chatdb.transaction(db, user_id="ada") as connection:
                    await chatdb.create_conversation(connection, user_id="ada")
                    await connection.execute(statement)


@pytest.mark.parametrize("role", ["app", "owner"])
async def test_the_foreign_key_works(walled: Place, role: str) -> None:
    """Deleting a conversation deletes only its messages, and a message without a conversation is refused."""
    async with chatdb.create_pool(getattr(walled, role)) as db:
        numbers = {}
        for user in ("ada", "bob"):
            async with chatdb.transaction(db, user_id=user) as connection:
                numbers[user] = (await chatdb.create_conversation(connection, user_id=user)).id
                here = {"user_id": user, "conversation_id": numbers[user]}
                await chatdb.append_messages(connection, messages=[{"role": "user", "content": "x"}] * 3, **here)
        bobs = snapshot(walled.superuser, "bob")
        async with chatdb.transaction(db, user_id="ada") as connection:
            await connection.execute("delete from chatdb.conversations")
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            async with chatdb.transaction(db, user_id="ada") as connection:
                await connection.execute(
                    "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
                    "values ('ada', $1, 1, 'user', 'x', now())",
                    numbers["bob"],
                )
    assert snapshot(walled.superuser, "ada") == [[] for _ in TABLES]
    assert snapshot(walled.superuser, "bob") == bobs


# the user of a transaction


async def seen(connection: Any) -> list[str]:
    """Return the users whose conversations an unfiltered statement sees."""
    return [row["user_id"] for row in await connection.fetch("select user_id from chatdb.conversations order by 1")]


async def assert_refused(connection: Any) -> None:
    """Check that the database refuses a statement because no user is named."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="no user is named"):
        await seen(connection)


@pytest.fixture
async def users(walled: Place) -> Any:
    """Yield the application's pool of one connection, on a database with one conversation for each of two users."""
    execute(walled.superuser, "insert into chatdb.conversations (user_id) values ('ada'), ('bob')")
    async with chatdb.create_pool(walled.app, max_size=1) as db:
        yield db


async def test_a_user_ends_with_his_transaction(users: Any) -> None:
    """After COMMIT or ROLLBACK, statements are refused until another user is named."""
    for user in ("ada", "bob"):
        async with chatdb.transaction(users, user_id=user) as connection:
            assert await seen(connection) == [user]
        await assert_refused(users)
        with pytest.raises(ZeroDivisionError):
            async with chatdb.transaction(users, user_id=user):
                raise ZeroDivisionError
        await assert_refused(users)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with chatdb.transaction(users) as connection:
                await seen(connection)


async def test_a_savepoints_user_ends_with_it(users: Any) -> None:
    """However a savepoint of a user ends, the outer transaction has none again."""
    async with chatdb.transaction(users) as connection:
        for user in ("ada", "bob"):
            async with chatdb.transaction(connection, user_id=user):
                assert await seen(connection) == [user]
        for error in (ZeroDivisionError, asyncio.CancelledError):
            with pytest.raises(error):
                async with chatdb.transaction(connection, user_id="bob"):
                    raise error
        with pytest.raises(asyncpg.InFailedSQLTransactionError):  # noqa: PT012
            async with chatdb.transaction(connection, user_id="bob"):
                with pytest.raises(asyncpg.DivisionByZeroError):
                    await connection.execute("select 1 / 0")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with chatdb.transaction(connection):
                await seen(connection)


async def test_no_other_user_in_a_users_transaction(users: Any) -> None:
    """A transaction of another user inside a user's is refused, and the outer one goes on."""
    async with chatdb.transaction(users, user_id="ada") as connection:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="names another user"):
                async with chatdb.transaction(connection, user_id="bob"):
                    await seen(connection)
            async with chatdb.transaction(connection), chatdb.transaction(connection, user_id="ada"):
                assert await seen(connection) == ["ada"]
            assert await seen(connection) == ["ada"]


async def test_a_user_that_cannot_be(users: Any) -> None:
    """A `user_id` that no row can have is refused before any statement."""
    for user in ("", "a\0", "\ud800", "x" * 256, 1):
        with pytest.raises(chatdb.InvalidInputError, match="user_id"):
            async with chatdb.transaction(users, user_id=user):  # type: ignore[arg-type]
                pass
    async with chatdb.transaction(users, user_id="o'; drop table chatdb.messages; --") as connection:
        assert await seen(connection) == []


async def test_the_reader_and_the_owner_are_held_back(walled: Place, users: Any) -> None:
    """Row-level security also restricts the reader and, with FORCE, the owner."""
    for dsn in (walled.reader, walled.owner):
        async with chatdb.create_pool(dsn) as db:
            await assert_refused(db)
            async with chatdb.transaction(db, user_id="ada") as connection:
                assert await seen(connection) == ["ada"]


async def test_it_costs_two_round_trips(walled: Place) -> None:
    """One call in a transaction of its user costs three round trips; each further call adds one."""
    with Proxy(walled.app) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1) as db:
            for calls in (1, 1, 3):
                proxy.clear()
                async with chatdb.transaction(db, user_id="ada") as connection:
                    for _ in range(calls):
                        await chatdb.list_conversations(connection, user_id="ada")
            assert ("".join(proxy.sent), proxy.round_trips) == ("QBESBESBESQ", 5)


# the pool that names the user of each call


@pytest.mark.parametrize("role", ["app", "owner"])
async def test_every_function_works_on_the_pool(databases: Databases, roles: Roles, walled: Place, role: str) -> None:
    """With `row_level_security`, every function of one user answers as without it and reaches no other user."""
    with cloned(databases, roles) as plain:
        answers: list[list[Any]] = []
        for dsn in (as_role(plain, roles.app), getattr(walled, role)):
            found: list[Any] = []
            async with chatdb.create_pool(dsn, row_level_security=dsn != as_role(plain, roles.app)) as db:
                bobs = await chatdb.create_conversation(db, user_id="bob")
                before = snapshot(walled.superuser, "bob")
                for name, arguments in WITHIN_A_USER:
                    await chatdb.delete_user(db, user_id="alice")
                    conversation = await conversation_with_a_message(db)
                    found.append((name, described(await call(db, name, arguments, conversation))))
                with pytest.raises(ConversationNotFoundError):
                    await chatdb.get_history(db, user_id="alice", conversation_id=bobs.id)
                assert snapshot(walled.superuser, "bob") == before
            answers.append(found)
    assert answers[0] == answers[1]
    assert len(answers[0]) == len(WITHIN_A_USER)


async def test_a_deployment_behind_the_wall(walled: Place, roles: Roles) -> None:
    """The migration of the parts gives each role what it may do with messages, and protects the new table as well."""
    execute(walled.superuser, f"grant select on chatdb.messages to {roles.reader} with grant option")
    rollback_migrations(walled.owner, to="0008")
    assert apply_migrations(walled.owner) == [file.name for file in migration_files()[8:]]

    granted = """
        select a.grantee::regrole::text, a.privilege_type, a.is_grantable
        from pg_class as c cross join lateral aclexplode(c.relacl) as a
        where c.oid = 'chatdb.{}'::regclass and a.grantee <> c.relowner order by 1, 2
    """
    privileges = rows(walled.superuser, granted.format("message_parts"))
    assert privileges == rows(walled.superuser, granted.format("messages"))
    assert (roles.reader, "SELECT", True) in privileges
    assert len(privileges) == 5
    assert protection_statements(walled.owner) == []
    async with chatdb.create_pool(walled.app, row_level_security=True) as db:
        conversation = await chatdb.create_conversation(db, user_id="alice")
        async with chatdb.stream_message(db, user_id="alice", conversation_id=conversation.id) as stream:
            await stream.write("hello")
            await stream.flush()
            async with chatdb.transaction(db, user_id="bob") as connection:
                assert await connection.fetch("select from chatdb.message_parts") == []
            async with chatdb.transaction(db, user_id="alice") as connection:
                assert len(await connection.fetch("select from chatdb.message_parts")) == 2
        assert stream.message.content == "hello"


async def test_a_call_on_the_pool_is_three_round_trips(walled: Place) -> None:
    """Each call sends BEGIN with the user, the statement and COMMIT; the host's own statements need `transaction`."""
    with Proxy(walled.app) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1, row_level_security=True) as db:
            conversation = await conversation_with_a_message(db)
            here = {"user_id": "alice", "conversation_id": conversation.id}
            for _ in range(2):
                proxy.clear()
                await chatdb.get_history(db, **here)
            assert ("".join(proxy.sent), proxy.round_trips) == ("QBESQ", 3)
            await assert_refused(db)
            async with chatdb.transaction(db, user_id="alice") as connection:
                await chatdb.append_message(connection, role="user", content="x", **here)
                proxy.clear()
                await chatdb.get_history(connection, **here)
                assert proxy.round_trips == 1
            proxy.clear()
            with pytest.raises(chatdb.MessageNotFoundError):
                await chatdb.get_message(db, seq=99, **here)
            with pytest.raises(chatdb.ConflictError):
                await chatdb.append_message(db, role="user", content="another text", key="first", **here)
            assert len(await chatdb.get_history(db, **here)) == 3


@pytest.mark.parametrize("user", ["o'brien", "back\\slash", "\\'; drop table chatdb.messages; --", "ünï 💬", "'", "\\"])
@pytest.mark.parametrize("escape", ["on", "off"])
async def test_any_user_can_be_named(walled: Place, user: str, escape: str) -> None:
    """Quotes, backslashes and Unicode in a `user_id` arrive unchanged, and the transaction leaves nothing to reset."""
    settings = {"standard_conforming_strings": escape}
    with Proxy(walled.app) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1, row_level_security=True, server_settings=settings) as db:
            await chatdb.create_conversation(db, user_id=user)
            proxy.clear()
            async with chatdb.transaction(db, user_id=user) as connection:
                assert await connection.fetchval("select current_setting('chatdb.user_id')") == user
            assert "".join(proxy.sent).count("Q") == 3, "BEGIN, COMMIT and, after a foreign statement, the reset"
            proxy.clear()
            assert [each.user_id for each in await chatdb.list_conversations(db, user_id=user)] == [user]
            async with chatdb.transaction(db, user_id=user):
                pass
            assert "".join(proxy.sent).count("Q") == 4


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
async def test_a_lost_commit(walled: Place, answered: bool) -> None:
    """If the connection is lost at COMMIT, `.sent` is None, and a keyed write is retried."""
    cut = 0

    def watch(statement: Statement) -> bool:
        nonlocal cut
        lost = cut > 0 and statement.sql == "commit" and statement.answered == answered
        cut -= lost
        return lost

    with Proxy(walled.app, watch=watch) as proxy:
        async with chatdb.create_pool(proxy.dsn, row_level_security=True) as db:
            number = (await chatdb.create_conversation(db, user_id="ada")).id
            here: dict[str, Any] = {"user_id": "ada", "conversation_id": number, "role": "user"}
            cut = 1
            with pytest.raises(chatdb.UnavailableError) as caught:
                await chatdb.append_message(db, content="a first text", **here)
            assert caught.value.sent is None
            cut = 2
            await chatdb.append_message(db, content="a second text", key="k", **here)
            assert cut == 0
            stored = [each.content for each in await chatdb.list_messages(db, user_id="ada", conversation_id=number)]
    assert stored == (["a first text"] * answered + ["a second text"])


async def test_a_write_that_waits_for_others(walled: Place) -> None:
    """A deletion that meets other writes is sent again, at last in a transaction of its user that keeps the lock."""
    sent = 0
    holds = [threading.Event() for _ in range(3)]

    def watch(statement: Statement) -> bool:
        nonlocal sent
        if not statement.answered and "chatdb.pop_message" in statement.sql:
            attempt = sent // 2  # each is prepared and then run
            sent += 1
            if attempt < len(holds):
                holds[attempt].wait(30)  # the next writer gets the lock first
        return False

    def waiting() -> set[str]:
        blocked = "select substring(query from 'chatdb\\.(\\w+)') from pg_stat_activity where wait_event_type = 'Lock'"
        return {name for (name,) in rows(walled.superuser, blocked)}

    async def until(name: str) -> None:
        async with asyncio.timeout(30):
            while name not in waiting():  # noqa: ASYNC110 - it changes in the server
                await asyncio.sleep(0.01)

    with Proxy(walled.app, watch=watch) as proxy:
        async with (
            chatdb.create_pool(walled.app, row_level_security=True) as db,
            chatdb.create_pool(proxy.dsn, max_size=1, row_level_security=True, statement_cache_size=0) as popping,
        ):
            own, bobs = [
                await chatdb.create_conversation(db, user_id=user, messages=[{"role": "user", "content": user}])
                for user in ("ada", "bob")
            ]
            here = {"user_id": "ada", "conversation_id": own.id}
            before = snapshot(walled.superuser, "bob")

            async def hold(number: int) -> None:
                async with chatdb.transaction(db, user_id="ada") as connection:
                    await chatdb.append_message(connection, role="user", content=f"{number}", **here)
                    holds[number].set()
                    stored[number].set()
                    await released[number].wait()

            stored, released = ([asyncio.Event() for _ in range(3)] for _ in range(2))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(hold(0))
                await stored[0].wait()
                popped = tasks.create_task(chatdb.pop_message(popping, **here))
                await until("pop_message")
                for number in (1, 2):
                    released[number - 1].set()
                    async with asyncio.timeout(30):
                        while sent <= 2 * number:  # noqa: ASYNC110 - the proxy's thread counts
                            await asyncio.sleep(0.01)
                    # the next attempt waits in the proxy until this writer has the lock
                    tasks.create_task(hold(number))
                    await stored[number].wait()
                    await until("pop_message")
                released[2].set()
            assert popped.result() is not None
            assert popped.result().content == "2"
            assert [each.content for each in await chatdb.list_messages(db, **here)] == ["ada", "0", "1"]
            with pytest.raises(ConversationNotFoundError):
                await chatdb.pop_message(popping, user_id="ada", conversation_id=bobs.id)
            await assert_refused(popping)
            assert snapshot(walled.superuser, "bob") == before
    assert sent == 2 * 5, "four attempts, and one at another user's, each prepared and then run"


async def test_a_lost_begin(walled: Place) -> None:
    """If the connection is lost before the statement, `.sent` is False and nothing is stored."""
    lost = False
    with Proxy(walled.app, watch=lambda statement: lost and statement.sql.startswith("begin")) as proxy:
        async with chatdb.create_pool(proxy.dsn, row_level_security=True) as db:
            number = (await chatdb.create_conversation(db, user_id="ada")).id
            lost = True
            with pytest.raises(chatdb.UnavailableError) as caught:
                await chatdb.append_message(db, user_id="ada", conversation_id=number, role="user", content="x")
            assert caught.value.sent is False
    assert snapshot(walled.superuser, "ada")[1] == []


async def test_cancelled_calls_leave_no_user_behind(walled: Place) -> None:
    """After a cancelled call, the next one on its connection sees only its own user's rows."""
    async with chatdb.create_pool(walled.app, max_size=2, row_level_security=True) as db:
        numbers = {user: (await chatdb.create_conversation(db, user_id=user)).id for user in ("ada", "bob")}
        for delay in range(100):
            user = ("ada", "bob")[delay % 2]
            here: dict[str, Any] = {"user_id": user, "conversation_id": numbers[user]}
            task = asyncio.create_task(chatdb.append_message(db, role="user", content=user, **here))
            await asyncio.sleep(delay / 20_000)
            task.cancel()
            await asyncio.wait([task])
            for each, number in numbers.items():
                history = await chatdb.get_history(db, user_id=each, conversation_id=number)
                assert {message.content for message in history} <= {each}
        await assert_refused(db)


async def test_a_change_of_the_tables_is_no_surprise(walled: Place) -> None:
    """If a statement's result type changes, the call prepares it again and answers."""
    async with chatdb.create_pool(walled.app, max_size=3, row_level_security=True) as db:
        here = {"user_id": "alice", "conversation_id": (await conversation_with_a_message(db)).id}
        for kind in ("varchar", "text"):
            await asyncio.gather(*(chatdb.get_conversation(db, **here) for _ in range(10)))
            execute(walled.owner, f"alter table chatdb.conversations alter column title type {kind}")
            found = await asyncio.gather(*(chatdb.get_conversation(db, **here) for _ in range(10)))
            assert [conversation.key for conversation in found] == ["thread"] * 10


def test_the_option_is_a_bool() -> None:
    """Any value other than True and False is refused."""
    with pytest.raises(ConfigurationError, match="row_level_security"):
        chatdb.create_pool("postgresql://localhost/x", row_level_security="yes")  # type: ignore[arg-type]


# statements without a user filter


def argument(file: SqlFile, name: str, conversation: Conversation) -> Any:
    """Return a value for a statement's parameter, for a conversation."""
    return {
        "user_id": "ada",
        "user_ids": ["ada"],
        "revisions": ["0"],
        "start": 0,
        "older_than": timedelta(0),
        "aborted": False,
        "conversation_id": conversation.id,
        "conversation_ids": [str(conversation.id)],
        "ids": [str(conversation.id)],
        "seq": 1,
        "seqs": ["9" if "roles" in {each.name for each in file.parameters} else "1"],
        "after_seq": 0,
        "min_id": -(2**63),
        "after_conversation_id": conversation.id,
        "max_conversation_id": conversation.id,
        "max_seq": 2**62,
        "max_bytes": 2**30,
        "to_user_id": "eve",
        "before_seq": 2**62,
        "expected_id": conversation.id,
        "expected_revision": conversation.revision,
        "must_be_new": False,
        "skip_stored": False,
        "create_missing": False,
        "row_limit": 10,
        "max_tokens": 8000,
        "query": "secret",
        "after_created_at": None,
        "key": "k",
        "conversation_key": None if "conversation_id" in {each.name for each in file.parameters} else "k",
        "keys": ["k"],
        "role": "user",
        "roles": ["user"],
        "title": "taken",
        "content": "secret",
        "contents": ["secret"],
        "created_ats": [str(conversation.created_at)],
        "updated_ats": [str(conversation.created_at)],
        "occurrences": ["0"],
        "last_seqs": ["5"],
        "old_last_seqs": [str(conversation.last_seq)],
        "new_last_seqs": [str(conversation.last_seq + 1)],
        "old_edits": [str(conversation.revision - conversation.last_seq)],
        "new_edits": [str(conversation.revision - conversation.last_seq)],
    }.get(name, True if name.startswith("set_") else [None] if name.endswith("s") else None)


WITHOUT_THEIR_INDEX = {"search_messages_words", "search_messages_words_conversation"}
"""The files whose operator is not leakproof, so that the policy comes first and the search index is of no use."""

FORGETFUL = {
    stem: file_of(stem)
    for stem in TEXTS
    # without its index a search reads nothing; a move only asks whether row-level security holds
    if "user_id = $1" in file_of(stem).sql and stem not in WITHOUT_THEIR_INDEX | {"move_user"}
}


async def taken(connection: Any, sql: str, arguments: list[Any]) -> tuple[Any, list[Any]]:
    """Run a statement and roll it back; return its answer and the other user's rows."""
    block = connection.transaction()
    await block.start()
    try:
        answer: Any = [dict(row) for row in await connection.fetch(sql, *arguments)]
    except asyncpg.PostgresError as error:
        answer = type(error)
    found: list[Any] = []
    if not isinstance(answer, type):
        await connection.execute("select set_config('chatdb.user_id', 'bob', true)")
        for table in TABLES:
            where = "from chatdb.{0} as t where user_id = 'bob' order by 1"
            found += await connection.fetch(f"select t::text, xmin::text {where.format(table)}")
    await block.rollback()
    return answer, found


async def test_a_statement_that_forgets_its_user_reaches_nothing(walled: Place) -> None:
    """Without its user filters, a statement reaches another user's rows only if row-level security is off."""
    reached: dict[bool, set[str]] = {True: set(), False: set()}
    async with chatdb.create_pool(walled.app, max_size=1) as db:
        async with chatdb.transaction(db, user_id="bob") as connection:
            for flags in ({"archived": True}, {"pinned": True}):
                other = await chatdb.create_conversation(connection, user_id="bob", title="secret")
                await chatdb.update_conversation(connection, user_id="bob", conversation_id=other.id, **flags)
            conversation = await chatdb.create_conversation(connection, user_id="bob", key="k", title="secret")
            here = {"user_id": "bob", "conversation_id": conversation.id}
            await chatdb.append_message(connection, role="user", content="secret", key="k", **here)
            await chatdb.start_message(connection, key="l", **here)
            await chatdb.extend_message(connection, key="l", offset=0, text="secret", **here)
            conversation = await chatdb.get_conversation(connection, **here)
        for has_row_security in (True, False):
            if not has_row_security:
                protect_tables(walled.owner, off=True)
            for stem, file in FORGETFUL.items():
                arguments = [argument(file, parameter.name, conversation) for parameter in file.parameters]
                forgetful = re.sub(r"(\w+\.)?user_id = \$1", "$1::text is not null", file.sql)
                async with chatdb.transaction(db, user_id="ada") as connection:
                    whole, untouched = await taken(connection, file.sql, arguments)
                async with chatdb.transaction(db, user_id="ada") as connection:
                    answer, found = await taken(connection, forgetful, arguments)
                assert len(untouched) == 7, stem
                is_other = stem == "count_user" and answer != whole
                is_other |= isinstance(answer, type) or isinstance(whole, type)
                if (
                    (is_other and answer != whole)
                    or (not is_other and len(answer) != len(whole))
                    or "secret" in str(answer)
                    or "bob" in str(answer)
                    or found != untouched
                ):
                    reached[has_row_security].add(stem)
    assert reached == {True: set(), False: {*FORGETFUL}}
    print(f"figure: {len(FORGETFUL)} statements without user_id reach another user's rows; behind the wall 0")


EVERYTHING = "select user_id from chatdb.messages union all select user_id from chatdb.conversations"


@pytest.mark.chaos
@pytest.mark.parametrize("version", VERSIONS)
async def test_many_users_on_one_pooler(
    walled: Place, tmp_path: Path, pytestconfig: pytest.Config, version: str
) -> None:
    """Through PgBouncer in transaction mode, unfiltered statements see only their transaction's user."""
    per_user = 20 if pytestconfig.getoption("--quick") else 260
    names = [f"user {number}" for number in range(40)]
    own = foreign = outside = 0

    async def work(db: Any, user: str) -> None:
        nonlocal own, foreign, outside
        for number in range(per_user):
            if number % 5 == 3:
                history = await chatdb.get_history(db, user_id=user, conversation_id=numbers[user])
                whose = {message.content for message in history}
                own += user in whose
                foreign += len(whose - {user})
                continue
            if number % 5 == 4:  # on any of the pooler's sessions
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    outside += len(await db.fetch("select user_id from chatdb.messages"))
                continue
            async with chatdb.transaction(db, user_id=user) as connection:
                if number % 10 == 0:
                    here = {"user_id": user, "conversation_id": numbers[user]}
                    await chatdb.append_message(connection, role="user", content=user, **here)
                found = await connection.fetch(EVERYTHING)
                whose = {row["user_id"] for row in found}
                own += user in whose
                foreign += len(whose - {user})

    with pgbouncer(walled.app, tmp_path, version, default_pool_size=4) as dsn:
        options = {"max_size": 20, "row_level_security": True} | OPTIONS[version]
        async with chatdb.create_pool(dsn, **options) as db, chatdb.create_pool(dsn, **options) as other:
            numbers: dict[str, int] = {}
            for user in names:
                async with chatdb.transaction(db, user_id=user) as connection:
                    numbers[user] = (await chatdb.create_conversation(connection, user_id=user)).id
            await asyncio.gather(*(work((db, other)[place % 2], user) for place, user in enumerate(names)))
    reads = len(names) * per_user
    assert (foreign, outside) == (0, 0)
    assert own == reads * 4 // 5
    print(f"figure: {reads:,} reads of {len(names)} users over 4 sessions of PgBouncer {version}: 0 foreign, 0 outside")


# import, export and the command line


def file(length: int) -> Iterator[Item]:
    """Yield two conversations with branches, one without a key."""
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    for key in ("k", None):
        yield SourceConversation(key, "a title", '{"m": 1}', length, moment, moment, head_seq=length - 2)
        for seq in range(1, length + 1):
            key_of = f"{seq}" if key else None
            parent = seq - 3 if seq % 3 == 0 else None
            yield SourceMessage(
                seq,
                "user",
                f"text {seq}",
                '{"p":  1}',
                None,
                seq,
                key_of,
                moment,
                parent,
                None if seq % 5 else "aborted",
            )


async def test_import_and_export(databases: Databases, roles: Roles, walled: Place) -> None:
    """A restricted role imports, repeats, extends and exports with the same results as an unrestricted one."""
    exported = []
    with cloned(databases, roles) as plain:
        for dsn in (as_role(plain, roles.app), walled.app):
            async with chatdb.create_pool(dsn) as db:
                for length in (2_600, 2_600, 2_603):
                    report = await import_conversations(db, user_id="ada", items=file(length))
                    bobs = await import_conversations(db, user_id="bob", items=file(length))
                    assert report == bobs
                assert (report.extended_conversations, report.messages, report.stored_messages) == (2, 6, 5_200)
                records = [record async for record in export_conversations(db, user_id="ada")]
                assert {record.user_id for record in records} == {"ada"}
                assert [one.head_seq for one in records if isinstance(one, chatdb.Conversation)] == [2_601] * 2
                assert [one.parent_seq for one in records if isinstance(one, chatdb.Message)][3:6] == [None, None, 3]
                exported.append(described(records))
    assert exported[0] == exported[1]
    assert len(exported[0]) == 2 + 2 * 2_603


def test_the_command_line(walled: Place, tmp_path: Path) -> None:
    """Import, list, show and export work unchanged for a restricted role."""
    env = {"DATABASE_URL": walled.app}
    source = tmp_path / "file.json"
    source.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi there"}]}]))
    assert "imported 1 conversations" in command("import", source, "--user", "ada", env=env)
    (listed,) = json.loads(command("list", "--user", "ada", "--json", env=env))
    number = str(listed["id"])
    assert "hi there" in command("show", number, "--user", "ada", env=env)
    assert "hi there" in command("show", number, "--user", "ada", "--last", "1", env=env)
    assert "hi there" in command("export", "--user", "ada", env=env)
    assert "hi there" not in command("export", "--user", "bob", env=env)
    assert "no such conversation" in command("show", number, "--user", "bob", env=env, code=1)


# costs


@pytest.fixture(scope="module")
def planned(databases: Databases, roles: Roles) -> Iterator[Live]:
    """Yield a restricted connection to tables large enough for realistic plans."""
    with cloned(databases, roles) as dsn:
        execute(dsn, DATA, f"alter role {roles.app} in database {urlsplit(dsn).path[1:]} set track_functions = 'pl'")
        protect_tables(as_role(dsn, roles.owner))
        with psycopg.connect(as_role(dsn, roles.app), autocommit=True, prepare_threshold=None) as connection:
            connection.execute("set random_page_cost = 1.1; set chatdb.user_id = 'user 1'")
            yield Live(connection)


@pytest.mark.parametrize("stem", [stem for stem in TEXTS if stem != "check_schema" and stem not in WITHOUT_THEIR_INDEX])
def test_the_plans_are_the_same(planned: Live, stem: str) -> None:
    """With row-level security each statement uses the same indexes."""
    check_plan(planned, file_of(stem))


def test_a_search_by_words_works_without_its_index(databases: Databases, roles: Roles) -> None:
    """With row-level security a search by words answers, but no index condition has its words."""
    with cloned(databases, roles) as dsn:
        execute(dsn, DATA, "create extension btree_gin", SEARCH_INDEX.replace("concurrently ", ""))
        protect_tables(as_role(dsn, roles.owner))
        with psycopg.connect(as_role(dsn, roles.app), autocommit=True, prepare_threshold=None) as connection:
            connection.execute("set chatdb.user_id = 'user 1'")
            live = Live(connection)
            given = {"user_id": "user 1", "query": "hello", "words": ["hello"], "conversation_key": "key 1"}
            for stem, rows in (("search_messages_words", 5), ("search_messages_words_conversation", 3)):
                plan = live.executed(file_of(stem), given | {"row_limit": rows})
                assert not any("to_tsvector" in node.get("Index Cond", "") for node in plan)
                assert any("to_tsvector" in node.get("Filter", "") for node in plan)
                assert plan[0]["Actual Rows"] == rows


def asked(live: Live) -> int:
    """Return how often the session has called the user function since the server last flushed the counts."""
    return sum(count for (count,) in live.rows("select calls from pg_stat_xact_user_functions"))


# move_user asks only whether row-level security holds
@pytest.mark.parametrize("stem", sorted(TEXTS.keys() - WITHOUT_THEIR_INDEX - {"check_schema", "move_user"}))
def test_the_user_is_asked_for_once(planned: Live, stem: str) -> None:
    """A statement calls the user function at most twice per table that it names, not once per row."""
    file, connection = file_of(stem), planned.connection
    (at,) = planned.rows("select id, last_seq from chatdb.conversations where user_id = 'user 1' limit 1")
    conversation = Conversation.model_construct(id=at[0], last_seq=at[1], revision=at[1], created_at=datetime.now(UTC))
    arguments = [argument(file, parameter.name, conversation) for parameter in file.parameters]
    user = ["user 1"] * 50 if file.parameters[0].name == "user_ids" else "user 1"
    arguments = [user, *(each * 50 if isinstance(each, list) else each for each in arguments[1:])]
    connection.execute("set plan_cache_mode = force_generic_plan")
    connection.execute(f"prepare asked as {file.sql}".encode())
    calls: list[int] = []
    for _ in range(2):
        with connection.transaction(force_rollback=True):
            before = asked(planned)
            with suppress(psycopg.errors.IntegrityError, psycopg.errors.CardinalityViolation), connection.transaction():
                cursor = psycopg.ClientCursor(connection)
                cursor.execute(f"execute asked ({', '.join(['%s'] * len(arguments))})".encode(), arguments)
            calls.append(asked(planned) - before)
    connection.execute("deallocate asked")
    tables = sum(is_table(node) for node in file.nodes)
    assert 1 <= calls[1] <= 2 * tables, calls  # an UPDATE checks the old and the new row


@pytest.mark.chaos
async def test_what_it_costs(place: Place, pytestconfig: pytest.Config) -> None:
    """Print the times of reads, appends and imports, with and without row-level security."""
    rounds = 100 if pytestconfig.getoption("--quick") else 1_000
    times: dict[str, list[float]] = {}
    fill = [{"role": "user", "content": "x" * 200}] * 100
    body = {"role": "user", "content": "x" * 200}
    moment = datetime(2026, 1, 1, tzinfo=UTC)

    def source(key: str) -> Iterator[Item]:
        yield SourceConversation(key, None, None, 20_000, moment, moment)
        for seq in range(1, 20_001):
            yield SourceMessage(seq, "user", "x" * 200, None, None, None, None, moment)

    async def timed(name: str, work: Any) -> None:
        start = time.perf_counter()
        await work
        times.setdefault(name, []).append(1000 * (time.perf_counter() - start))

    async def within(db: Any, name: str, **arguments: Any) -> None:
        async with chatdb.transaction(db, user_id="ada") as connection:
            await getattr(chatdb, name)(connection, **arguments)

    async def both(kind: str, db: Any, read: dict[str, Any], written: dict[str, Any]) -> None:
        await timed(f"{kind}: history", within(db, "get_history", **read))
        await timed(f"{kind}: append", within(db, "append_message", **written, **body))

    async with (
        chatdb.create_pool(place.app, max_size=1) as db,
        chatdb.create_pool(place.app, max_size=1, row_level_security=True) as protected,
    ):
        made = [await chatdb.create_conversation(db, user_id="ada") for _ in range(2)]
        read, written = ({"user_id": "ada", "conversation_id": conversation.id} for conversation in made)
        await chatdb.append_messages(db, messages=fill, **read)
        for part in range(10):  # alternate, so that all kinds run under the same load
            for _ in range(rounds // 10):
                await timed("plain: history", chatdb.get_history(db, **read))
                await timed("plain: append", chatdb.append_message(db, **written, **body))
                await both("transaction", db, read, written)
            if part < 3:
                imported = import_conversations(db, user_id="ada", items=source(f"plain {part}"))
                await timed("plain: import of 20,000", imported)
            await asyncio.to_thread(protect_tables, place.owner)
            for _ in range(rounds // 10):
                await both("wall", db, read, written)
                await timed("pool: history", chatdb.get_history(protected, **read))
                await timed("pool: append", chatdb.append_message(protected, **written, **body))
            if part < 3:
                imported = import_conversations(db, user_id="ada", items=source(f"wall {part}"))
                await timed("wall: import of 20,000", imported)
            await asyncio.to_thread(protect_tables, place.owner, off=True)
    figures = {name: quantiles(found, n=100, method="inclusive") for name, found in times.items()}
    told = "; ".join(f"{name} {cuts[49]:.2f} / {cuts[98]:.2f}" for name, cuts in sorted(figures.items()))
    print(f"figure: ms at p50 / p99 of {rounds} rounds, plain 1 round trip, the others 3: {told}")


@pytest.mark.parametrize("stem", [stem for stem in TEXTS if "bottom" in TEXTS[stem]])
def test_a_line_reads_only_its_runs(planned: Live, stem: str) -> None:
    """With row-level security too, both ends of a run bound the scan: as a filter, each fork reads the whole log."""
    assert [node for node in planned.plan(file_of(stem)) if "bottom" in node.get("Filter", "")] == []
