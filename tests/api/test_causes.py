"""Errors name the true cause: a host's triggers and constraints, counters, encodings, settings, the network."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import asyncpg
import psycopg
import pytest

import chatdb
from chatdb import ChatDBError, ConfigurationError, ConflictError, UnavailableError, errors
from chatdb._core.dsn import connect_arguments
from chatdb.admin.check.inspection import inspect
from chatdb.admin.migrate import apply_migrations, missing_migrations
from chatdb.admin.search_index import create_search_index
from chatdb.records import MessageLength, MessageVersions
from tests.support.calls import CALLS, call, conversation_with_a_message
from tests.support.databases import database_of, execute

BODIES = {
    "42883": "perform missing_function();",
    "42P01": "insert into nowhere.missing values (new.id);",
    "42501": "raise insufficient_privilege;",
    "23514": "raise exception 'its own check' using errcode = '23514';",
    "23502": "insert into hosts.audit values (null);",
    "23503": "insert into hosts.child values (1);",
    "P0001": "raise exception 'refused by moderation';",
    "22012": "perform 1 / 0;",
}
"""Mistakes in a host's trigger, by the SQLSTATE they cause."""

TRIGGER = """
create schema if not exists hosts;
grant usage on schema hosts to public;
create table if not exists hosts.audit (x text not null);
create table if not exists hosts.parent (id int primary key);
create table if not exists hosts.child (id int references hosts.parent);
grant all on all tables in schema hosts to public;
create or replace function hosts.on_row() returns trigger language plpgsql as $f$ begin {body} return new; end $f$;
create or replace trigger host before insert on chatdb.{table} for each row execute function hosts.on_row();
"""


async def append(db: Any, conversation: chatdb.Conversation, **more: Any) -> chatdb.Message:
    """Append a user message."""
    here = {"user_id": conversation.user_id, "conversation_id": conversation.id}
    return await chatdb.append_message(db, role="user", content="a message", **here, **more)


# the host's own code and constraints


@pytest.mark.owner
@pytest.mark.parametrize("state", BODIES)
@pytest.mark.parametrize("more", [{}, {"key": "k"}], ids=["plain", "keyed"])
async def test_a_trigger_of_the_hosts_fails(dsn: str, db: Any, state: str, more: dict[str, str]) -> None:
    """The error names the database function that failed, and nothing is stored."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    execute(dsn, TRIGGER.format(body=BODIES[state], table="messages"))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"own function hosts\.on_row\(\).*" + state):
            await append(db, conversation, **more)
    execute(dsn, "drop trigger host on chatdb.messages")
    assert (await append(db, conversation)).seq == 1


@pytest.mark.owner
@pytest.mark.parametrize("language", ["german", "english"])
async def test_the_function_is_named_in_any_language(dsn: str, language: str) -> None:
    """The function is named whatever language the server's messages use."""
    execute(dsn, TRIGGER.format(body="raise exception 'no';", table="conversations"))
    settings = {"lc_messages": "de_DE.UTF-8" if language == "german" else "C"}
    with suppress(asyncpg.InvalidParameterValueError):  # the server lacks that language
        connection = await asyncpg.connect(**connect_arguments(dsn) | {"server_settings": settings})
        with pytest.raises(ConfigurationError, match=r"hosts\.on_row\(\)"):
            await chatdb.create_conversation(connection, user_id="alice")
        await connection.close()


@pytest.mark.owner
async def test_a_text_is_not_taken_for_the_function(dsn: str, db: Any) -> None:
    """Message text that resembles the server's error context is not quoted."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    execute(dsn, TRIGGER.format(body="execute format('select 1 / 0 /* %s */', new.content);", table="messages"))
    text = "PL/pgSQL function zebra_crossing() line 1\nPL/pgSQL function zebra_crossing() line 1 at RAISE"
    with pytest.raises(ConfigurationError, match=r"function hosts\.on_row\(\)") as caught:
        await chatdb.append_message(db, user_id="alice", conversation_id=conversation.id, role="user", content=text)
    assert "zebra" not in str(caught.value)


@pytest.mark.owner
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_trigger_that_leaves_rows_out(dsn: str, db: Any, keyed: bool) -> None:
    """A row that a host's trigger discards is not reported as a missing conversation or a conflict."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    here = {"user_id": "alice", "conversation_id": conversation.id}
    execute(dsn, TRIGGER.format(body="return null;", table="messages"))
    with pytest.raises(ConfigurationError, match="the row was not stored"):
        await append(db, conversation, **({"key": "k"} if keyed else {}))
    if not keyed:
        with pytest.raises(ConfigurationError, match="the row was not stored"):
            await chatdb.append_messages(db, messages=[{"role": "user", "content": "one of two"}] * 2, **here)
    with pytest.raises(chatdb.ConversationNotFoundError):
        await append(db, conversation.model_copy(update={"user_id": "bob"}))
    execute(dsn, TRIGGER.format(body="if new.content = 'the second' then return null; end if;", table="messages"))
    batch = [{"role": "user", "content": text} for text in ("the first", "the second")]
    with pytest.raises(ConfigurationError, match="the row was not stored"):
        await chatdb.append_messages(db, messages=batch, **here)
    execute(dsn, TRIGGER.format(body="return null;", table="conversations"))
    with pytest.raises(ConfigurationError, match="the row was not stored"):
        await chatdb.create_conversation(db, user_id="alice")


@pytest.mark.owner
async def test_constraints_of_the_hosts(dsn: str, db: Any) -> None:
    """The error names a constraint or column that the host added, or that references chatdb's tables."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    execute(dsn, "alter table chatdb.messages add constraint short check (content <> 'a message')")
    with pytest.raises(ConfigurationError, match=r"constraint short on table chatdb\.messages"):
        await append(db, conversation)
    execute(
        dsn,
        "alter table chatdb.messages drop constraint short",
        "alter table chatdb.messages add column tenant int not null",
    )
    with pytest.raises(ConfigurationError, match=r"NOT NULL constraint for column tenant on table chatdb\.messages"):
        await append(db, conversation)
    execute(
        dsn,
        "alter table chatdb.messages drop column tenant",
        "create table public.pins (u text, c bigint, constraint pinned foreign key (u, c) "
        "references chatdb.conversations (user_id, id))",
        f"insert into public.pins values ('alice', {conversation.id})",
    )
    name = "pinned"
    for other in ("pk_messages", "ck_messages_role", "fk_messages_conversation", "fk_conversations_user", None):
        with pytest.raises(ConfigurationError, match=rf"constraint {name} on table public\.pins"):
            await chatdb.delete_conversation(db, user_id="alice", conversation_id=conversation.id)
        if other is not None:  # one of chatdb's own constraint names, in the host's schema
            execute(dsn, f"alter table public.pins rename constraint {name} to {other}")
            name = other


@pytest.mark.owner
async def test_counters_that_are_behind_or_at_their_end(dsn: str, db: Any) -> None:
    """Counters that a restore left behind are fixed with the SQL in the error."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    await append(db, conversation)
    execute(dsn, "select setval('chatdb.conversations_id_seq', 1, false)")
    with pytest.raises(ConfigurationError, match="setval") as caught:
        await chatdb.create_conversation(db, user_id="alice")
    execute(dsn, str(caught.value).partition("as the owner, run ")[2])
    assert (await chatdb.create_conversation(db, user_id="alice")).id == conversation.id + 1

    execute(dsn, "update chatdb.conversations set last_seq = 0")
    with pytest.raises(ConfigurationError, match="last_seq is behind") as caught:
        await append(db, conversation)
    execute(dsn, str(caught.value).partition("as the owner, run ")[2])
    assert (await append(db, conversation)).seq == 2

    execute(
        dsn, "alter sequence chatdb.conversations_id_seq maxvalue 3", "select nextval('chatdb.conversations_id_seq')"
    )
    with pytest.raises(ConfigurationError, match="no maxvalue"):
        await chatdb.create_conversation(db, user_id="alice")
    execute(dsn, "alter sequence chatdb.conversations_id_seq no maxvalue")
    assert (await chatdb.create_conversation(db, user_id="alice")).id == 4


# what the server rolled back


@pytest.mark.owner
@pytest.mark.parametrize("state", ["40001", "40P01"])
@pytest.mark.parametrize("times", [2, 3])
async def test_an_undone_statement_is_sent_again(dsn: str, state: str, times: int) -> None:
    """A rolled-back statement is sent again up to `retries` times, even without a key, and takes effect once."""
    body = f"if nextval('hosts.tries') <= {times} then raise exception using errcode = '{state}'; end if;"
    execute(
        dsn,
        TRIGGER.format(body=body, table="messages"),
        "create sequence hosts.tries; grant all on sequence hosts.tries to public",
    )
    async with chatdb.create_pool(dsn) as db:
        conversation = await chatdb.create_conversation(db, user_id="alice")
        if times == 2:
            assert (await append(db, conversation)).seq == 1
        else:
            with pytest.raises(UnavailableError, match=state) as caught:
                await append(db, conversation)
            assert caught.value.sent is True
        history = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
        assert len(history) == (times == 2)
    async with chatdb.create_pool(dsn, retries=0) as db:
        execute(dsn, "alter sequence hosts.tries restart")
        with pytest.raises(UnavailableError, match=state):
            await append(db, conversation)
        execute(dsn, "alter sequence hosts.tries restart")
    async with chatdb.create_pool(dsn) as db:
        with pytest.raises(UnavailableError, match=state):  # only the caller can repeat its transaction
            async with chatdb.transaction(db) as connection:
                await append(connection, conversation)


@pytest.mark.owner
async def test_a_strict_isolation_level(dsn: str) -> None:
    """With serializable transactions by default, conflicting appends are sent again, and the check says so."""
    settings = {"default_transaction_isolation": "serializable"}
    async with chatdb.create_pool(dsn, server_settings=settings) as db, chatdb.create_pool(dsn) as plain:
        conversation = await chatdb.create_conversation(db, user_id="alice")
        async with chatdb.transaction(plain) as connection:
            await append(connection, conversation)
            waiting = asyncio.create_task(append(db, conversation))
            await asyncio.sleep(0.2)
        assert (await waiting).seq == 2
    assert "isolation" not in {each.what for each in inspect(dsn)}
    with psycopg.connect(dsn) as admin:
        (name,) = admin.execute("select current_database()").fetchone() or ("",)
    execute(
        dsn,
        f"alter database {name} set default_transaction_isolation = 'repeatable read'",
        f"alter database {name} set default_transaction_read_only = on",
    )
    found = {each.what: each for each in inspect(dsn)}
    assert (found["isolation"].state, found["read only"].state) == ("note", "note")
    assert "are retried" in found["isolation"].detail


@pytest.mark.owner
async def test_a_database_that_takes_no_writes(dsn: str) -> None:
    """The error names both possible reasons."""
    async with chatdb.create_pool(dsn, server_settings={"default_transaction_read_only": "on"}) as db:
        with pytest.raises(UnavailableError, match=r"standby.*default_transaction_read_only") as caught:
            await chatdb.create_conversation(db, user_id="alice")
    assert caught.value.sent is True


# prepared statements


@pytest.mark.parametrize("statement", ["discard all", "deallocate all", "DISCARD  PLANS"])
@pytest.mark.parametrize("way", ["execute", "fetch", "lent"])
async def test_dropped_statements_are_prepared_again(dsn: str, statement: str, way: str) -> None:
    """The pool works after a host's DISCARD ALL or DEALLOCATE, inside and outside a transaction."""
    async with chatdb.create_pool(dsn, max_size=1) as db:
        conversation = await conversation_with_a_message(db)
        here: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
        for inside in (False, True, False):
            await chatdb.get_history(db, **here)
            if way == "lent":
                async with db.acquire() as connection:
                    await connection.execute(statement)
            else:
                await getattr(db, way)(statement)
            if inside and way != "fetch":  # the pool's fetch checks only when a statement is missing
                async with chatdb.transaction(db) as connection:
                    assert len(await chatdb.get_history(connection, **here)) == 2
            else:
                assert len(await chatdb.get_history(db, **here)) == 2


@pytest.mark.owner
async def test_statements_that_others_drop(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """Statements that a database function drops are prepared again on any connection, and the log says so."""
    drop = (
        "create function public.drop_all() returns void language plpgsql as $$ begin execute 'deallocate all'; end $$"
    )
    execute(dsn, drop)
    connection = await asyncpg.connect(**connect_arguments(dsn))
    async with chatdb.create_pool(dsn, max_size=1) as db, asyncpg.create_pool(**connect_arguments(dsn)) as plain:
        for handle in (db, connection, plain):
            await chatdb.list_conversations(handle, user_id="alice")
            await handle.execute("select public.drop_all()")
            caplog.clear()
            assert await chatdb.list_conversations(handle, user_id="alice") == []
            assert "a session lost its prepared statements" in caplog.text
            assert await chatdb.list_conversations(handle, user_id="alice") == []
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="DISCARD ALL or DEALLOCATE dropped it or a"):  # noqa: PT012
                async with chatdb.transaction(db) as lent:
                    await chatdb.list_conversations(lent, user_id="alice")
                    await lent.execute("select public.drop_all()")
                    await chatdb.list_conversations(lent, user_id="alice")
            async with chatdb.transaction(db) as lent:
                assert await chatdb.list_conversations(lent, user_id="alice") == []
    await connection.close()


@pytest.mark.owner
async def test_statements_that_others_drop_where_calls_name_their_user(dsn: str) -> None:
    """A pool with `row_level_security`, whose calls are transactions, prepares them again too."""
    drop = "create function public.drop_all() returns void language plpgsql as "
    execute(dsn, f"{drop} $$ begin execute 'deallocate all'; end $$")
    async with chatdb.create_pool(dsn, max_size=1, row_level_security=True) as db:
        for _ in range(2):
            assert await chatdb.list_conversations(db, user_id="alice") == []
            await db.execute("select public.drop_all()")
            assert await chatdb.list_conversations(db, user_id="alice") == []


@pytest.mark.owner
async def test_a_changed_column_inside_a_transaction(dsn: str) -> None:
    """If a column's type changed after its statement was prepared, the transaction can be run again."""
    async with chatdb.create_pool(dsn, max_size=1) as db:
        conversation = await conversation_with_a_message(db)
        here: dict[str, Any] = {"user_id": "alice", "conversation_id": conversation.id}
        await chatdb.get_conversation(db, **here)
        execute(dsn, "alter table chatdb.conversations alter column title type varchar")
        with pytest.raises(UnavailableError, match="run the transaction again") as caught:
            async with chatdb.transaction(db) as connection:
                await chatdb.get_conversation(connection, **here)
        assert caught.value.sent is True
        async with chatdb.transaction(db) as connection:
            assert (await chatdb.get_conversation(connection, **here)).key == "thread"


# encodings


@pytest.fixture(params=["LATIN1", "SQL_ASCII", "WIN1252", "EUC_JP"])
def narrow(request: pytest.FixtureRequest, server: str) -> Iterator[tuple[str, str]]:
    """Yield an encoding and the DSN of a migrated database that uses it."""
    name = f"chatdb_test_{os.getpid()}_{request.param.lower()}"
    execute(
        server,
        f"drop database if exists {name} with (force)",
        f"create database {name} encoding '{request.param}' locale 'C' template template0",
    )
    try:
        dsn = database_of(server, name)
        apply_migrations(dsn)
        yield request.param, dsn
    finally:
        execute(server, f"drop database {name} with (force)")


@pytest.mark.owner
async def test_an_encoding_that_is_too_narrow(narrow: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """The error names the encoding; migrate and check warn beforehand that it cannot store every character."""
    encoding, dsn = narrow
    for look in (apply_migrations, missing_migrations):
        caplog.clear()
        look(dsn)
        assert f"the database's encoding is {encoding}, which cannot store every character" in caplog.text
    assert {each.what: each for each in inspect(dsn)}["encoding"].detail.startswith(encoding)
    async with chatdb.create_pool(dsn) as db:
        conversation = await chatdb.create_conversation(db, user_id="alice")
        if encoding == "SQL_ASCII":  # stores any bytes
            return
        for more in ({}, {"metadata": {"mood": "\N{GRINNING FACE}"}}):
            with pytest.raises(ConfigurationError, match=f"encoding, {encoding},"):
                await append(db, conversation.model_copy(), payload="\N{GRINNING FACE}", **more)


@pytest.mark.owner
async def test_a_search_in_another_encoding(narrow: tuple[str, str]) -> None:
    """Both modes of a search work in a database whose encoding lacks some of the characters in the statements."""
    _, dsn = narrow
    await asyncio.to_thread(create_search_index, dsn)
    async with chatdb.create_pool(dsn) as db:
        conversation = await chatdb.create_conversation(db, user_id="alice")
        await append(db, conversation)
        places: list[dict[str, Any]] = [{}, {"conversation_id": conversation.id}]
        for mode, place in itertools.product(("substring", "words"), places):
            (found,) = await chatdb.search_messages(db, user_id="alice", query="MESSAGE", mode=mode, **place)
            assert found.snippet == "a message"


# reaching the server


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("postgresql://alice@127.0.0.1:1/chat", "at 127.0.0.1:1 cannot be reached (Connection refused)"),
        ("postgresql://alice@[::1]:1/chat", "at [::1]:1 cannot be reached ("),
        ("postgresql://alice@localhost:1,127.0.0.1:1/chat", "at localhost:1, 127.0.0.1:1 cannot be reached ("),
        ("postgresql://alice@/chat?host=/nowhere", "at /nowhere cannot be reached (No such file or directory)"),
        (
            "postgresql://alice@no-such-host.invalid/chat?sslmode=disable",
            "at no-such-host.invalid:5432 cannot be reached (",
        ),
    ],
)
async def test_a_server_that_cannot_be_reached(dsn: str, said: str) -> None:
    """The error names the host and the port and says what went wrong."""
    with pytest.raises(UnavailableError) as caught:
        await chatdb.create_pool(dsn)
    assert said in str(caught.value)
    assert "gaierror" not in str(caught.value)
    assert caught.value.sent is False


async def test_a_server_of_another_kind(dsn: str) -> None:
    """If no host meets target_session_attrs, the error names the requested value, and nothing was sent."""
    with pytest.raises(UnavailableError, match="target_session_attrs=standby") as caught:
        await chatdb.create_pool(dsn, target_session_attrs="standby")
    assert caught.value.sent is False


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("url", ["postgresql://127.0.0.1:1/chat", "postgresql:///chat"])
def test_a_process_without_a_name(url: str) -> None:
    """If neither the DSN nor the system names a user, as in some containers, the error says what to add."""
    program = (
        "import os, sys, chatdb\n"
        "os.environ.pop('PGUSER', None); [os.environ.pop(n, None) for n in ('LOGNAME', 'USER', 'LNAME', 'USERNAME')]\n"
        "os.setuid(54321)\n"
        "try: chatdb.create_pool(sys.argv[1])\n"
        "except chatdb.ConfigurationError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the DSN names no user, and the process's user id 54321 has no name")


# codecs


CODECS = {
    "timestamptz": ("text", str, str),
    "text": ("text", lambda value: f"{value}", lambda value: ["another", value]),
    "int8": ("text", str, lambda value: f"number {value}"),
    "int4": ("text", str, lambda value: [value]),
    "json": ("text", lambda value: f'"{value}"', lambda value: {"json": value}),
    "jsonb": ("text", lambda value: f'"{value}"', lambda value: {"jsonb": value}),
    "bool": ("text", str, lambda value: f"{value}?"),
}


async def with_codecs(connection: Any) -> None:
    """Set codecs that decode each of chatdb's types differently than asyncpg does."""
    for name, (form, encoder, decoder) in CODECS.items():
        await connection.set_type_codec(name, encoder=encoder, decoder=decoder, schema="pg_catalog", format=form)


def records_in(answer: Any) -> list[Any]:
    """Return the records of an answer: one, a list, a pair, a list of pairs, a length, or the versions of messages."""
    if isinstance(answer, int):
        return [MessageLength(length=answer)]
    if isinstance(answer, dict):
        return [MessageVersions(seq=seq, seqs=seqs) for seq, seqs in answer.items()]
    if isinstance(answer, list | tuple):
        return [record for part in answer for record in records_in(part)]
    return [] if answer is None else [answer]


@pytest.mark.parametrize("kind", ["chatdb's pool", "in a transaction", "asyncpg's pool", "asyncpg's connection"])
async def test_records_are_the_same_whatever_codecs_are_set(dsn: str, kind: str) -> None:
    """Every function returns the same results with and without codecs, on any handle."""
    answers: list[list[Any]] = []
    for init in (None, with_codecs):
        found: list[Any] = []
        async with (
            chatdb.create_pool(dsn, init=init) as db,
            asyncpg.create_pool(**connect_arguments(dsn), init=init) as plain,
            plain.acquire() as connection,
        ):
            handles = {"chatdb's pool": db, "asyncpg's pool": plain, "asyncpg's connection": connection}
            for name, arguments in CALLS:
                async with chatdb.transaction(db, user_id="alice") as inside:
                    await chatdb.delete_user(inside, user_id="alice")
                    conversation = await conversation_with_a_message(inside)
                    if name == "list_versions":
                        at = {"user_id": "alice", "conversation_id": conversation.id}
                        await chatdb.append_message(inside, **at, role="user", content="second", parent_seq=0)
                    if kind == "in a transaction":
                        answer: Any = await call(inside, name, arguments, conversation)
                if kind != "in a transaction":
                    answer = await call(handles[kind], name, arguments, conversation)
                varying = {"id", "conversation_id", "created_at", "updated_at", "archived_at", "pinned_at"}
                found.append([(type(each).__name__, each.model_dump(exclude=varying)) for each in records_in(answer)])
        answers.append(found)
    assert answers[0] == answers[1]


async def test_a_handle_of_another_kind_with_codecs(dsn: str) -> None:
    """If chatdb cannot bypass a codec, its error names the fields and no value."""

    class Wrapped:
        def __init__(self, pool: Any) -> None:
            self._pool = pool

        async def fetch(self, query: str, /, *args: Any, timeout: float | None = None) -> list[Any]:
            return await self._pool.fetch(query, *args, timeout=timeout)

    class Own(asyncpg.Connection):  # type: ignore[type-arg, misc]
        async def fetch(self, *args: Any, **options: Any) -> Any:
            return await super().fetch(*args, **options)

    options = connect_arguments(dsn)

    async def init(connection: Any) -> None:
        decoder = CODECS["timestamptz"][1]
        await connection.set_type_codec(
            "timestamptz", encoder=str, decoder=lambda value: [decoder(value)], schema="pg_catalog"
        )

    async with asyncpg.create_pool(**options, init=init, connection_class=Own) as pool:
        with pytest.raises(ConfigurationError, match="created_at, updated_at") as caught:
            await chatdb.create_conversation(pool, user_id="alice", title="a title")
        with pytest.raises(ConfigurationError, match="created_at, updated_at"):
            await chatdb.list_conversations(Wrapped(pool), user_id="alice")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert "20" not in str(caught.value)


# what users may see


ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ChatDBError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_each_error_has_a_sentence_for_the_services_users(kind: type[ChatDBError]) -> None:
    """It is short, plain, and free of operator terms."""
    assert kind.public.endswith(".")
    assert len(kind.public) < 100
    words = kind.public.lower()
    assert not [word for word in ("dsn", "database", "server", "pool", "schema", "sql", "chatdb") if word in words]
    assert issubclass(ConflictError, ChatDBError)


@pytest.mark.owner
async def test_conversations_that_are_ahead_of_the_clock(dsn: str, db: Any) -> None:
    """The check counts these conversations and gives the fix; until then, appends keep the order."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    assert "clock" not in {each.what for each in inspect(dsn)}
    execute(dsn, "update chatdb.conversations set updated_at = now() + interval '1 year'")
    ahead = await append(db, conversation)
    finding = {each.what: each for each in inspect(dsn)}["clock"]
    assert finding.state == "note"
    assert finding.detail.startswith("1 conversations are ahead")
    execute(dsn, *finding.hint.split("; "))
    later = await append(db, conversation)
    assert later.created_at < ahead.created_at
    assert "clock" not in {each.what for each in inspect(dsn)}
