"""PgBouncer in transaction mode: a version that tracks prepared statements and one that does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psycopg
import pytest

import chatdb
from chatdb import ConfigurationError, UnavailableError
from chatdb._core.driver_errors import map_driver_error
from chatdb._core.dsn import connect_arguments
from chatdb.admin.check.inspection import inspect
from chatdb.admin.migrate import apply_migrations, last_migrations, missing_migrations, rollback_migrations
from chatdb.admin.retention import count_old_conversations, prune_conversations
from chatdb.admin.row_security import protection_statements
from chatdb.admin.users_link import link_users, unlink_users
from tests.support.command import chatdb_process as command
from tests.support.databases import execute
from tests.support.pgbouncer import OPTIONS, VERSIONS, pgbouncer
from tests.support.pools import kill_sessions, until

Pooled = Callable[..., str]
PREPARED = "select count(*) from pg_prepared_statements"


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Return each PgBouncer version."""
    return request.param


@pytest.fixture
def pooled(dsn: str, tmp_path: Path, version: str) -> Iterator[Pooled]:
    """Yield a function that starts a PgBouncer for the test's database and returns its DSN."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(pgbouncer(dsn, tmp_path, version, **settings))


def pool_of(dsn: str, version: str, **options: Any) -> chatdb.pool.Pool:
    """Return a pool with only the options that this PgBouncer requires."""
    return chatdb.create_pool(dsn, **OPTIONS[version], **options)


async def use(db: Any, user: str, *, times: int = 1) -> None:
    """Write, read and update as a user, and check that the results are only the user's own."""
    for number in range(times):
        key = f"{user} {number}"
        one = await chatdb.create_conversation(db, user_id=user, key=key)
        at = {"user_id": user, "conversation_id": one.id}
        async with chatdb.transaction(db, user_id=user) as connection:
            await chatdb.append_message(connection, role="user", content=key, **at)
        await chatdb.append_messages(db, messages=[{"role": "assistant", "content": user}], **at)
        assert (await chatdb.update_conversation(db, title=key, **at)).title == key
        assert [message.content for message in await chatdb.get_history(db, **at)] == [key, user]
        assert {found.user_id for found in await chatdb.list_conversations(db, user_id=user)} == {user}
        assert [message.content async for message in chatdb.iter_messages(db, batch=1, **at)] == [key, user]
        assert (await chatdb.delete_messages_after(db, after_seq=1, **at)).messages == 1


# --- prepared statements ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [200, 3], ids=["kept", "crowded out"])
async def test_many_clients_on_few_connections(pooled, version, kept):
    """Pools share a few server connections, and use prepared statements where PgBouncer keeps them."""
    few = {"default_pool_size": 3, "server_round_robin": 1}
    dsn = pooled(**few, **({} if version == "1.18" else {"max_prepared_statements": kept}))
    async with AsyncExitStack() as stack:
        pools: list[Any] = [await stack.enter_async_context(pool_of(dsn, version, max_size=4)) for _ in range(3)]
        arguments = connect_arguments(dsn) | OPTIONS[version]
        pools.append(await stack.enter_async_context(asyncpg.create_pool(**arguments, min_size=1, max_size=4)))
        await asyncio.gather(*(use(pools[number % 4], f"user {number}", times=2) for number in range(16)))
        prepared = {await pools[0].fetchval(PREPARED) for _ in range(6)}
    assert all(0 < found <= kept for found in prepared) == (version != "1.18")


async def test_statements_that_nobody_keeps(pooled, dsn, version):
    """If PgBouncer keeps no prepared statements, the error names `statement_cache_size=0`, which works."""
    through = pooled(**({} if version == "1.18" else {"max_prepared_statements": 0}))
    async with chatdb.create_pool(through, max_size=1) as db, chatdb.create_pool(dsn, max_size=1) as direct:
        await chatdb.list_conversations(db, user_id="ada")
        async with chatdb.create_pool(through, statement_cache_size=0) as other, chatdb.transaction(other) as busy:
            await busy.execute("select 1")  # on the connection that has the prepared statement
            with pytest.raises(ConfigurationError, match="statement_cache_size=0"):
                await chatdb.list_conversations(db, user_id="ada")
            await use(other, "ada")
        assert len(await chatdb.list_conversations(direct, user_id="ada")) == 1


async def test_sessions_that_end(pooled, dsn, version):
    """Reads and keyed writes survive ended server sessions, and idle clients that the pooler closes."""
    async with pool_of(pooled(client_idle_timeout=0.5), version, max_size=2) as db:
        await use(db, "ada")
        kill_sessions(dsn)
        await use(db, "bob")
        await asyncio.sleep(2)
        assert len(await chatdb.list_conversations(db, user_id="ada")) == 1
        await asyncio.sleep(2)
        await chatdb.create_conversation(db, user_id="ada", key="another")


@pytest.mark.owner
async def test_the_retention(pooled, dsn, version):
    """`chatdb prune` works through PgBouncer, and its settings reach no other client."""
    through = pooled(default_pool_size=1)
    async with pool_of(through, version) as db:
        await use(db, "ada")
        execute(dsn, "update chatdb.conversations set updated_at = now() - interval '2 days'")
        await use(db, "bob")
        found = await asyncio.to_thread(count_old_conversations, through, older_than=timedelta(days=1))
        report = await asyncio.to_thread(prune_conversations, through, found, rate=1_000_000)
        assert (report.conversations, report.users, report.left_alone) == (1, 1, 0)
        assert await db.fetchval("show lock_timeout") == "0"
        assert await chatdb.list_conversations(db, user_id="ada") == []
        assert len(await chatdb.list_conversations(db, user_id="bob")) == 1


async def test_idle_connections_are_closed(pooled, version):
    """The pool also closes idle connections to a pooler, and opens new ones on demand."""
    async with pool_of(pooled(), version, max_size=4, max_inactive_connection_lifetime=0.4) as db:
        await asyncio.gather(*(use(db, f"user {number}") for number in range(8)))
        assert db.get_size() == 4
        await until(lambda: db.get_size() == 0)
        await use(db, "ada")


@pytest.mark.owner
async def test_tables_that_change(pooled, dsn, version):
    """Migrations and new columns on a pool in use break no prepared statement and require no restart."""
    async with pool_of(pooled(default_pool_size=3, server_round_robin=1), version, max_size=6) as db:

        async def load(when: str) -> None:
            await asyncio.gather(*(use(db, f"{when} {number}") for number in range(12)))

        await load("before")
        with psycopg.connect(dsn, autocommit=True) as admin:
            for table in ("conversations", "messages"):
                admin.execute(f"alter table chatdb.{table} add column one int default 1, add column two text")
                admin.execute(f"alter table chatdb.{table} drop column one")
        await load("changed")
        await asyncio.to_thread(rollback_migrations, dsn, to="0")
        await asyncio.to_thread(apply_migrations, dsn)
        await load("again")


# --- listening -------------------------------------------------------------------------------------------------------


async def test_listening(pooled, dsn, version):
    """A direct listener receives every notification; one through the pooler receives none and disturbs nobody."""
    heard: list[Any] = []

    def hear(*said: Any) -> None:
        heard.append(said[-1])

    def overhear(*_: Any) -> None:
        heard.append("through the pooler")

    through = pool_of(pooled(default_pool_size=1), version, max_size=2)
    async with through as db, chatdb.create_pool(dsn) as direct, direct.acquire() as ear, db.acquire() as deaf:
        await ear.add_listener("news", hear)
        await deaf.add_listener("news", overhear)
        for number in range(20):
            await direct.execute("select pg_notify('news', $1)", f"{number}")
            await use(db, f"user {number}")
        await until(lambda: len(heard) >= 20)
        await ear.remove_listener("news", hear)
        await deaf.remove_listener("news", overhear)
    assert heard == [f"{number}" for number in range(20)]


# --- settings --------------------------------------------------------------------------------------------------------


async def test_each_pool_has_its_name(pooled, version):
    """Pools that share a server connection each have their own application_name."""
    dsn = pooled(default_pool_size=1)
    named = pool_of(f"{dsn}&application_name=one", version)
    async with named as one, pool_of(dsn, version, server_settings={"application_name": "two"}) as two:
        for _ in range(3):
            assert await one.fetchval("select current_setting('application_name')") == "one"
            assert await two.fetchval("select current_setting('application_name')") == "two"


@pytest.mark.parametrize("kind", ["options", "server_settings"])
async def test_settings_that_are_not_taken(pooled, dsn, version, kind):
    """Other settings raise an error that suggests ALTER ROLE, which works."""
    through = pooled()
    asked: dict[str, Any] = {"dsn": f"{through}&options=-c%20statement_timeout%3D7s"}
    if kind == "server_settings":
        asked = {"dsn": through, "server_settings": {"statement_timeout": "7s"}}
    with pytest.raises(ConfigurationError, match=r"ALTER ROLE \.\.\. SET") as caught:
        await chatdb.create_pool(**asked)
    assert "statement_cache_size" not in str(caught.value)
    with psycopg.connect(dsn, autocommit=True) as admin:
        name = admin.info.dbname
        admin.execute(f"alter role current_user in database {name} set statement_timeout = '7s'")
        async with pool_of(through, version) as db:
            assert await db.fetchval("select current_setting('statement_timeout')") == "7s"


# --- the pooler's own errors -----------------------------------------------------------------------------------------


async def test_a_login_that_is_refused(pooled, tmp_path):
    """A wrong password, user or database is reported as such, not as missing prepared statements."""
    users = tmp_path / "users.txt"
    users.write_text('"ada" "right"\n')
    parts = urlsplit(pooled(auth_type="plain", auth_file=users))

    async def refused(login: str, path: str = parts.path) -> None:
        netloc = f"{login}@127.0.0.1:{parts.port}"
        with pytest.raises(ConfigurationError, match="refused the connection") as caught:
            await chatdb.create_pool(urlunsplit(parts._replace(netloc=netloc, path=path)))
        assert login.partition(":")[2] not in str(caught.value)

    await refused("ada:wrong")
    await refused("nobody:right-one")
    await refused("ada:right", "/missing")
    await refused("ada:right", "/no_connections")


async def test_a_pooler_that_is_full(pooled, version):
    """A client beyond max_client_conn gets UnavailableError with `sent` False."""
    async with pool_of(pooled(max_client_conn=3), version) as db, AsyncExitStack() as stack:

        async def take(number: int) -> None:
            for _ in range(number):
                await stack.enter_async_context(chatdb.transaction(db))

        with pytest.raises(UnavailableError, match="not accepting connections") as caught:
            await take(4)
    assert caught.value.sent is False


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        ("no such database: my_connections", ConfigurationError, "the user name, password or database name"),
        ('password authentication failed for user "my_connections"', ConfigurationError, "the user name, password"),
        ("no more connections allowed (max_client_conn)", UnavailableError, "not accepting connections"),
        ("remaining connection slots are reserved for superusers", UnavailableError, "not accepting connections"),
        ("sorry, too many clients already", UnavailableError, "not accepting connections"),
        ("no memory for authentication pool", UnavailableError, "lost"),
        ("query_wait_timeout", UnavailableError, "lost"),
        ("SSL required", ConfigurationError, "TLS"),
        ("unsupported startup parameter: search_path", ConfigurationError, "ALTER ROLE"),
        ('prepared statement "__asyncpg_stmt_1__" does not exist', ConfigurationError, "statement_cache_size=0"),
    ],
)
def test_a_poolers_words(words, error, told):
    """A pooler's errors share one SQLSTATE; chatdb distinguishes them by text, ignoring the names in it."""
    found = map_driver_error(asyncpg.PostgresError.new({"S": "FATAL", "C": "08P01", "M": words}))
    assert type(found) is error
    assert told in str(found)
    assert "my_connections" not in str(found)


@pytest.mark.owner
def test_a_look_leaves_the_pooled_session_as_it_was(pooled, dsn):
    """`chatdb check` and the dry runs leave no settings in a pooled session for its next client."""
    execute(dsn, "create table public.users (id text primary key)")
    through = pooled(default_pool_size=1)
    settings = "select name, setting from pg_catalog.pg_settings where name <> 'application_name' order by name"
    with psycopg.connect(through) as connection:
        before = connection.execute(settings).fetchall()
    looks = (
        lambda: inspect(through),
        lambda: missing_migrations(through),
        lambda: last_migrations(through),
        lambda: protection_statements(through),
        lambda: link_users(through, table="users", dry_run=True),
        lambda: unlink_users(through, dry_run=True),
        lambda: apply_migrations(through),
    )
    for look in looks:
        with suppress(ConfigurationError):  # some refuse a pooler
            look()
        with psycopg.connect(through) as connection:
            after = connection.execute(settings).fetchall()
        assert [*set(after) - {*before}] == []


# --- the command line ------------------------------------------------------------------------------------------------


def test_commands(pooled, tmp_path):
    """
    Commands without options work in turn on the same server connection.

    Each is a process of its own, because every process uses the same prepared statement names.
    """
    lines = tmp_path / "chat.json"
    lines.write_text('[{"id": "a title", "conversations": [{"from": "human", "value": "hello"}]}]')
    env = {"DATABASE_URL": pooled(default_pool_size=1)}
    commands = (["import", str(lines)], ["list"], ["export"], ["list"])
    out = [command(*words, "--user", "ada", env=env) for words in commands]
    assert "a title" in out[1] == out[3]
    assert "hello" in out[2]
