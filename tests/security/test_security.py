"""The roles of docs/explanation/security.md, and the cost of another user's id compared with a missing id."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import quantiles
from typing import Any

import psycopg
import pytest

import chatdb
from chatdb.admin.migrate import apply_migrations
from chatdb.testing.databases import Databases
from tests.support.calls import CALLS as EVERY_CALL
from tests.support.calls import CONVERSATION_CALLS, MISSING, call, conversation_with_a_message, iterated
from tests.support.catalog import DATA
from tests.support.databases import as_role, cloned, execute
from tests.support.roles import Roles
from tests.support.sqlfiles import TEXTS, file_of


@pytest.fixture
def database(databases: Databases, roles: Roles) -> Iterator[str]:
    """Yield the superuser's DSN of a database with these roles."""
    with cloned(databases, roles) as dsn:
        yield dsn


FORBIDDEN = [
    "create schema mine",
    "create table chatdb.mine (id int)",
    "create table public.mine (id int)",
    "create temporary table mine (id int)",
    "create view public.mine as select 1",
    "create function public.mine() returns int language sql as 'select 1'",
    "create type public.mine as enum ('a')",
    "create role chatdb_test_mine",
    "create database chatdb_test_mine",
    "create extension pageinspect",
    "create index on chatdb.messages (id)",
    "create policy mine on chatdb.messages using (true)",
    "create rule mine as on delete to chatdb.messages do instead nothing",
    "alter table chatdb.messages add column mine int",
    "alter table chatdb.messages disable row level security",
    "alter table chatdb.messages disable trigger all",
    "alter table chatdb.messages owner to current_user",
    "alter role current_user superuser",
    "alter role current_user bypassrls",
    "alter system set fsync = off",
    "drop table chatdb.messages",
    "drop schema chatdb cascade",
    "drop index chatdb.pk_messages",
    "truncate chatdb.messages",
    "truncate chatdb.conversations cascade",
    "comment on table chatdb.messages is 'mine'",
    "select from pg_catalog.pg_authid",
    "select from pg_catalog.pg_statistic",
    "select from chatdb._chatdb_migration",
    "delete from chatdb._chatdb_migration",
    "select pg_catalog.pg_read_file('PG_VERSION')",
    "copy chatdb.messages to program 'true'",
    "copy chatdb.messages to '/tmp/mine'",
    "set role {owner}",
    "set session authorization {owner}",
    "set session_replication_role = replica",
]
"""What neither the application nor the reader may do."""

WRITES = [
    "insert into chatdb.conversations (user_id) values ('ada')",
    "update chatdb.conversations set title = 'x'",
    "delete from chatdb.conversations",
    "delete from chatdb.messages",
    "select from chatdb.conversations for update",
]


PRIVILEGES = "select relname, relacl::text from pg_class where relnamespace = 'chatdb'::regnamespace order by 1"


def refusal(connection: psycopg.Connection, statement: str) -> str | None:
    """Return the SQLSTATE of a refused statement, or None."""
    try:
        connection.execute(statement.encode())
    except psycopg.Error as error:
        return error.sqlstate
    return None


def test_what_the_roles_may_not(database: str, roles: Roles) -> None:
    """Neither the application nor the reader can change the schema, truncate tables or read secrets."""
    count = 0
    for role, forbidden in ((roles.app, FORBIDDEN), (roles.reader, FORBIDDEN + WRITES)):
        with psycopg.connect(as_role(database, role), autocommit=True) as connection:
            for statement in forbidden:
                sql = statement.format(owner=roles.owner)
                found = refusal(connection, sql)
                assert found == "42501", sql
                count += 1
    with psycopg.connect(as_role(database, roles.app), autocommit=True) as connection:
        privileges = connection.execute(PRIVILEGES).fetchall()
        connection.execute("grant all on chatdb.messages to public")  # PostgreSQL only warns
        assert connection.execute(PRIVILEGES).fetchall() == privileges
        assert [refusal(connection, statement) for statement in WRITES] == [None] * len(WRITES)
    with pytest.raises(chatdb.ConfigurationError, match="owner"):
        apply_migrations(as_role(database, roles.app))
    with psycopg.connect(database) as connection:
        made = "select from pg_database where not datacl::text ~ '[{,]=' and datname = current_database()"
        assert len(connection.execute(made.encode()).fetchall()) == 1
    print(f"figure: {count} statements refused to the application and the reader")


async def test_what_the_roles_may(database: str, roles: Roles) -> None:
    """The application can call every function; the reader can call only those that read."""
    async with (
        chatdb.create_pool(as_role(database, roles.app)) as app,
        chatdb.create_pool(as_role(database, roles.reader)) as reader,
    ):
        await chatdb.check_schema(app)
        await chatdb.check_schema(reader)
        refused: set[str] = set()
        for name, arguments in EVERY_CALL:
            await chatdb.delete_user(app, user_id="alice")
            conversation = await conversation_with_a_message(app)
            try:
                await call(reader, name, arguments, conversation)
            except chatdb.ConfigurationError:
                refused.add(name)
            await call(app, name, arguments, conversation)
    reading = ("get_", "load_", "list_", "iter_", "read_", "search_", "export_")
    reads = {name for name, _ in EVERY_CALL if name.startswith(reading)}
    assert refused == {name for name, _ in EVERY_CALL} - reads


# another user's id compared with a missing one

ADA, BOB, NOBODY = 1, 2, 50
"""The ids of conversations are n * 100 + the number of their user."""


def place(number: int, whose: int) -> dict[str, Any]:
    """Return the arguments for a message in a user's conversation."""
    return {"user_id": f"user {ADA}", "conversation_id": number * 100 + whose, "seq": 1, "key": "key 1"}


def values(stem: str, number: int, whose: int) -> str:
    """Return a statement's arguments for a user's conversation, as SQL."""
    given = place(number, whose)
    known: dict[str, Any] = {"role": "user", "content": "x", "row_limit": 100, "after_seq": 0, "before_seq": 2**62}
    known |= {"second_role": "user", "second_content": "x"}
    arrays = {"roles": "array['user']", "contents": "array['x']", "keys": "array['key 1']"}
    found: list[str] = []
    for parameter in file_of(stem).parameters:
        value = (given | known).get(parameter.name)
        if parameter.name in arrays:
            found.append(arrays[parameter.name])
        elif parameter.type.endswith("[]"):
            found.append(f"array[null]::{parameter.type}")
        elif parameter.type == "bool":
            found.append(str(parameter.name != "create_missing"))
        else:
            found.append("null" if value is None else f"'{value}'")
    return ", ".join(found)


ON_CONVERSATIONS = [stem for stem in TEXTS if "conversation_id" in {p.name for p in file_of(stem).parameters}]


@pytest.fixture(scope="module")
def filled(databases: Databases, roles: Roles) -> Iterator[str]:
    """Yield the application's DSN of a database with conversations of twenty users."""
    with cloned(databases, roles) as dsn:
        execute(dsn, DATA)
        yield as_role(dsn, roles.app)


def test_a_foreign_id_reads_what_a_missing_one_does(filled: str) -> None:
    """Each statement reads the same blocks, and rows in each plan node, for another user's id and a missing one."""
    compared = 0
    with psycopg.connect(filled, prepare_threshold=None) as connection:
        connection.execute("set plan_cache_mode = force_generic_plan; set random_page_cost = 1.1")
        for stem in ON_CONVERSATIONS:
            connection.execute(f"prepare compared as {file_of(stem).sql}".encode())

            def seen(number: int, whose: int, stem: str = stem) -> tuple[int, list[float]]:
                explain = f"explain (analyze, buffers, format json) execute compared ({values(stem, number, whose)})"
                row = connection.execute(explain.encode()).fetchone()
                assert row
                plan = row[0][0]["Plan"]
                return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], [*actual(plan)]

            numbers = [*range(20, 140, 6)]
            for _ in range(2):  # by the second run all blocks are cached and all hint bits are set
                foreign, missing = ([seen(number, whose) for number in numbers] for whose in (BOB, NOBODY))
            assert foreign == missing, stem
            own = seen(numbers[0], ADA)
            assert own[1] != foreign[0][1], f"{stem} finds nothing of one's own either"
            compared += len(numbers)
            connection.rollback()
            connection.execute("deallocate compared")
            connection.execute("set plan_cache_mode = force_generic_plan; set random_page_cost = 1.1")
    print(f"figure: {compared} foreign and missing ids in {len(ON_CONVERSATIONS)} statements: the same blocks and rows")


def actual(plan: dict[str, Any]) -> Iterator[float]:
    """Yield the number of rows that each node of a plan returned."""
    yield plan["Actual Rows"] * plan["Actual Loops"]
    for part in plan.get("Plans", ()):
        yield from actual(part)


@pytest.mark.chaos
async def test_how_long_a_foreign_id_takes(filled: str, pytestconfig: pytest.Config) -> None:
    """Print the times of another user's and of missing ids, in turns."""
    rounds = 40 if pytestconfig.getoption("--quick") else 400
    times: dict[str, list[float]] = {"foreign": [], "missing": []}
    async with chatdb.create_pool(filled, max_size=1) as db:
        for number in range(rounds):
            for name, arguments in CONVERSATION_CALLS.items():
                function = iterated if name == "iter_messages" else getattr(chatdb, name)
                turns = [("foreign", BOB), ("missing", NOBODY)]
                for kind, whose in turns if number % 2 else turns[::-1]:
                    at = {"user_id": f"user {ADA}", "conversation_id": (number % 150 + 1) * 100 + whose}
                    start = time.perf_counter()
                    with pytest.raises(chatdb.ConversationNotFoundError):
                        await function(db, **at, **arguments)
                    times[kind].append(1e6 * (time.perf_counter() - start))
    cuts = {kind: quantiles(found, n=100, method="inclusive") for kind, found in times.items()}
    slower = sum(one > other for one, other in zip(*times.values(), strict=True)) / len(times["foreign"])
    told = ", ".join(f"{kind} {found[49]:.0f} / {found[98]:.0f}" for kind, found in cuts.items())
    pairs = len(times["foreign"])
    print(f"figure: µs at p50 / p99 of {pairs:,} pairs: {told}; the foreign one was slower in {slower:.1%}")


def test_the_missing_id_is_missing(filled: str) -> None:
    """The compared ids belong to another user and to nobody."""
    with psycopg.connect(filled) as connection:
        found = connection.execute("select distinct user_id, id % 100 from chatdb.conversations").fetchall()
    assert (f"user {BOB}", BOB) in found
    assert NOBODY not in {whose for _, whose in found}
    assert MISSING > 150 * 100
