"""`chatdb check` and `check_schema` on intact and damaged databases: they find and name each damage and its fix."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import psycopg
import pytest

import chatdb
from chatdb._core.dsn import database_of
from chatdb.admin.check import inspection
from chatdb.admin.check.inspection import inspect, is_wrong
from chatdb.admin.check.plans import check_plans
from chatdb.admin.connection import connected
from chatdb.admin.migrate import apply_migrations, migration_files
from chatdb.admin.search_index import create_search_index
from chatdb.cli.app import app
from chatdb.testing.databases import Databases
from tests.support.catalog import DATA
from tests.support.command import PROGRAM, on_a_terminal
from tests.support.databases import as_role, execute
from tests.support.migrations import yoyo
from tests.support.paths import ROOT
from tests.support.pgbouncer import VERSIONS, pgbouncer
from tests.support.roles import Roles

pytestmark = pytest.mark.owner

CASCADE = (
    "alter table chatdb.messages drop constraint fk_messages_conversation, add constraint fk_messages_conversation "
    "foreign key (user_id, conversation_id) references chatdb.conversations (user_id, id)"
)
KEY = "uq_messages_user_id_conversation_id_key"


def run(dsn: str, *arguments: str, code: int, program: tuple[str, ...] = ()) -> str:
    """Run `chatdb check`, in this process unless `program` is given; return its output, which never has the DSN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", dsn)
        patch.delenv("CHATDB_MIGRATE_URL", raising=False)
        if program:
            done = subprocess.run([*program, "check", *arguments], capture_output=True, text=True)
            status, said, failed = done.returncode, done.stdout, done.stderr
        else:
            with (
                redirect_stdout(StringIO()) as output,
                redirect_stderr(StringIO()) as errors,
                pytest.raises(SystemExit) as ended,
            ):
                app(["check", *arguments])
            status, said, failed = ended.value.code, output.getvalue(), errors.getvalue()
    assert (status, failed) == (code, f"database: {database_of(dsn)}\n")
    assert "postgresql://" not in said
    return said


def wrong(dsn: str, *arguments: str, program: tuple[str, ...] = ()) -> dict[str, tuple[str, str]]:
    """Return the problems that `chatdb check --json` finds, each with its state and hint."""
    found = json.loads(run(dsn, "--json", *arguments, code=1, program=program))
    places = [each["state"] in {"missing", "different"} for each in found]
    assert places == sorted(places), "problems come last"
    return {each["what"]: (each["state"], each["hint"]) for each, is_bad in zip(found, places, strict=True) if is_bad}


def checked(dsn: str) -> str:
    """Return the error text of `check_schema`, empty if the schema is correct."""

    async def check() -> str:
        async with chatdb.create_pool(dsn, min_size=1, max_size=1) as db:
            try:
                await chatdb.check_schema(db)
            except chatdb.SchemaError as error:
                return str(error)
            return ""

    return asyncio.run(check())


def fix(dsn: str, hint: str) -> None:
    """Follow a hint."""
    for statement in re.split("; (?:or, to have it empty: )?|, then ", hint):
        if statement == "chatdb migrate":
            apply_migrations(dsn)
        elif statement != "restore it from a backup":
            execute(dsn, statement)


def test_a_healthy_database(dsn: str) -> None:
    """Every check is listed, and every check passes."""
    found = {each["what"]: each["state"] for each in json.loads(run(dsn, "--json", code=0, program=(str(PROGRAM),)))}
    listed = ["server", "extensions", "encoding", "pooler", "table conversations", "table messages"]
    listed += ["checks of messages", "primary key pk_messages", f"index {KEY}", "cascade fk_messages_conversation"]
    listed += ["migration 0001.chatdb-create-schema", "statements", "row-level security"]
    assert {each: found[each] for each in listed} == dict.fromkeys(listed, "ok")
    assert found.pop("users") == "note", "the link to the host's users is optional"
    with psycopg.connect(dsn) as connection:  # up to PostgreSQL 14, every role may create objects in public
        is_open = connection.info.server_version < 150_000
    assert found.pop("schema public", None) == ("note" if is_open else None)
    assert set(found.values()) == {"ok"}
    assert checked(dsn) == ""


def test_more_is_welcome(dsn: str) -> None:
    """A newer release's columns, tables, indexes and migration count as no damage, with any search_path."""
    execute(
        dsn,
        "alter table chatdb.messages add column language text, add check (language <> '')",
        "create index ix_messages_language on chatdb.messages (language)",
        "create table chatdb.attachments (id bigint primary key)",
        "insert into chatdb._chatdb_migration values ('0999.more', 'x', '2', now())",
    )
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"alter database {connection.info.dbname} set search_path = chatdb, public")
    found = {each["what"]: each["state"] for each in json.loads(run(dsn, "--json", code=0))}
    assert found["migration 0999.more"] == "note"
    assert checked(dsn) == ""


@pytest.mark.parametrize(
    ("damage", "found"),
    {
        "a table": (
            "drop table chatdb.messages cascade",
            {
                "migration 0003.chatdb-create-messages": "missing",
                "migration 0007.chatdb-add-parents": "missing",
                "migration 0009.chatdb-add-state": "missing",
                "migration 0012.chatdb-set-autovacuum": "missing",
                "table messages": "missing",
                "foreign key fk_message_parts_message": "missing",
            },
        ),
        "a column": (
            "alter table chatdb.messages drop column token_count",
            {"column messages.token_count": "missing", "check ck_messages_token_count": "missing"},
        ),
        "a column's type": (
            "alter table chatdb.messages alter column token_count type bigint",
            {"column messages.token_count": "different"},
        ),
        "a column's collation": (
            'alter table chatdb.messages alter column key type text collate "default"',
            {"column messages.key": "different"},
        ),
        "NOT NULL": (
            "alter table chatdb.messages alter column content drop not null",
            {"column messages.content": "different"},
        ),
        "more NOT NULL": (
            "alter table chatdb.messages alter column token_count set not null",
            {"column messages.token_count": "different"},
        ),
        "a default": (
            "alter table chatdb.conversations alter column created_at drop default",
            {"column conversations.created_at": "different"},
        ),
        "an identity": (
            "alter table chatdb.messages alter column id drop identity",
            {"column messages.id": "different"},
        ),
        "a generated column": (
            "alter table chatdb.conversations alter column active_on drop expression",
            {"column conversations.active_on": "different"},
        ),
        "a CHECK": (
            "alter table chatdb.messages drop constraint ck_messages_role",
            {"check ck_messages_role": "missing"},
        ),
        "a CHECK's limit": (
            "alter table chatdb.messages drop constraint ck_messages_content, "
            "add constraint ck_messages_content check (octet_length(content) <= 1000)",
            {"check ck_messages_content": "different"},
        ),
        "the foreign key": (
            "alter table chatdb.messages drop constraint fk_messages_conversation",
            {"foreign key fk_messages_conversation": "missing"},
        ),
        "the cascade": (CASCADE, {"foreign key fk_messages_conversation": "different"}),
        "its validation": (
            f"{CASCADE} on delete cascade not valid",
            {"foreign key fk_messages_conversation": "different"},
        ),
        "its triggers": (
            "alter table chatdb.conversations disable trigger all",
            {"foreign key fk_messages_conversation": "different"},
        ),
        "a primary key": (
            "alter table chatdb.messages drop constraint pk_messages cascade",
            {"primary key pk_messages": "missing", "foreign key fk_message_parts_message": "missing"},
        ),
        "a primary key's index": (
            "update pg_index set indisvalid = false where indexrelid = 'chatdb.pk_messages'::regclass",
            {"primary key pk_messages": "different"},
        ),
        "an index": (f"drop index chatdb.{KEY}", {f"index {KEY}": "missing"}),
        "an index's validity": (
            f"update pg_index set indisvalid = false where indexrelid = 'chatdb.{KEY}'::regclass",
            {f"index {KEY}": "different"},
        ),
        "an index's uniqueness": (
            f"drop index chatdb.{KEY}; create index {KEY} on chatdb.messages (user_id, conversation_id, key)",
            {f"index {KEY}": "different"},
        ),
        "an index's order": (
            "drop index chatdb.ix_conversations_user_id_active_on; create index ix_conversations_user_id_active_on "
            "on chatdb.conversations (user_id, created_at)",
            {"index ix_conversations_user_id_active_on": "different"},
        ),
    }.values(),
)
def test_damage_to_the_catalog(dsn: str, damage: str, found: dict[str, str]) -> None:
    """Both checks find and name exactly the damage, and the hints fix it."""
    execute(dsn, damage)
    bad = wrong(dsn)
    assert {what: state for what, (state, _) in bad.items()} == found
    assert any(each.what.startswith("statement") for each in inspect(dsn)), "problems hide no other finding"
    said = checked(dsn)
    for what in found:
        if what.startswith("migration"):  # check_schema does not read them
            continue
        assert what.split(" ")[1].removeprefix("messages.").removeprefix("conversations.") in said
    for _, hint in bad.values():
        fix(dsn, hint)
    if "drop expression" in damage:  # recreating the column dropped its index
        for index in filter(is_wrong, inspect(dsn)):
            assert index.what.startswith("index ix_conversations_user_id_active_on")
            fix(dsn, index.hint)
    if "drop table" in damage:  # the first check came before the table that the foreign key references
        (reference,) = filter(is_wrong, inspect(dsn))
        fix(dsn, reference.hint)
    assert [each for each in inspect(dsn) if is_wrong(each)] == []
    assert checked(dsn) == ""


def test_hints_are_what_one_would_do(dsn: str) -> None:
    """A hint fixes the damage and no more: validate, reindex, alter one column."""
    execute(
        dsn,
        f"{CASCADE} on delete cascade not valid",
        "alter table chatdb.messages alter column content drop not null, alter column role type varchar(20)",
        f"update pg_index set indisvalid = false where indexrelid = 'chatdb.{KEY}'::regclass",
    )
    hints = {what: hint for what, (_, hint) in wrong(dsn).items()}
    assert hints.pop("column messages.role").startswith(
        'alter table chatdb.messages alter column role type text collate "C" using role::text'
    )
    assert hints.pop("check ck_messages_role").startswith("alter table chatdb.messages drop constraint ck_messages_")
    assert hints == {
        "foreign key fk_messages_conversation": (
            "alter table chatdb.messages validate constraint fk_messages_conversation"
        ),
        f"index {KEY}": f"reindex index concurrently chatdb.{KEY}",
        "column messages.content": "alter table chatdb.messages alter column content set not null",
    }


def test_no_schema_at_all(empty_dsn: str) -> None:
    """An empty database lacks the schema and the migrations; chatdb migrate fixes both."""
    bad = wrong(empty_dsn)
    assert set(bad) == {"schema chatdb", *(f"migration {file.name}" for file in migration_files())}
    assert set(bad.values()) == {("missing", "chatdb migrate")}
    assert "run chatdb migrate" in checked(empty_dsn)
    fix(empty_dsn, "chatdb migrate")
    run(empty_dsn, code=0)


def test_a_migration_not_applied(empty_dsn: str) -> None:
    """If a migration is not applied, the fix for everything it adds is chatdb migrate."""
    apply_migrations(empty_dsn, to="0002")
    bad = wrong(empty_dsn)
    assert {*bad.values()} == {("missing", "chatdb migrate")}
    assert {*bad} == {
        "migration 0003.chatdb-create-messages",
        "migration 0004.chatdb-add-revision-archive-pins",
        "migration 0005.chatdb-index-lists",
        "migration 0006.chatdb-add-heads",
        "migration 0007.chatdb-add-parents",
        "migration 0008.chatdb-index-branches",
        "migration 0009.chatdb-add-state",
        "migration 0010.chatdb-create-message-parts",
        "migration 0011.chatdb-validate-state",
        "migration 0012.chatdb-set-autovacuum",
        "migration 0013.chatdb-create-functions",
        "table messages",
        "table message_parts",
        "column conversations.archived_at",
        "column conversations.edits",
        "column conversations.pinned_at",
        "column conversations.head_seq",
        "column conversations.head_last_seq",
        "column conversations.head_is_newest",
        "index ix_conversations_user_id_active_on_archived",
        "index ix_conversations_user_id_active_on_listed",
        "index ix_conversations_user_id_created_at_id",
        "index ix_conversations_user_id_pinned_at",
    }
    assert "messages.content" in checked(empty_dsn)


def test_a_migration_of_another_content(dsn: str) -> None:
    """A migration applied with different content is named; one that only yoyo recorded is fine."""
    execute(dsn, "update chatdb._chatdb_migration set sha256 = 'x' where migration_id = '0003.chatdb-create-messages'")
    bad = wrong(dsn)
    assert [*bad] == ["migration 0003.chatdb-create-messages"]
    assert "release that applied it" in bad["migration 0003.chatdb-create-messages"][1]
    execute(dsn, "drop table chatdb._chatdb_migration")
    yoyo(dsn, "apply", "--batch")
    run(dsn, code=0)


def test_an_edited_file(dsn: str, tmp_path: Path) -> None:
    """An edited migration file is named, also by the command of that installation."""
    for folder in ("chatdb", "migrations", "sql"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / "migrations" / "0003.chatdb-create-messages.sql"
    path.write_text(path.read_text(encoding="utf-8").replace("4194304", "8388608"), encoding="utf-8")
    (edited,) = filter(is_wrong, inspect(dsn, folder=tmp_path / "migrations"))
    assert edited.what == "migration files"
    assert "0003.chatdb-create-messages.sql" in edited.detail
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from chatdb.cli.app import main; main()"
    assert wrong(dsn, program=(sys.executable, "-c", script)) == {"migration files": ("different", edited.hint)}


@pytest.fixture
def role(dsn: str):
    """Yield a role with all privileges on chatdb's tables and a name that needs quotes."""
    name = "Chatdb test-reader"
    execute(
        dsn,
        f'create role "{name}" login',
        f'grant usage on schema chatdb to "{name}"',
        f'grant select, insert, update, delete on all tables in schema chatdb to "{name}"',
    )
    yield name
    execute(dsn, f'drop owned by "{name}"', f'drop role "{name}"')


def test_a_revoked_privilege(dsn: str, role: str) -> None:
    """The check names missing privileges, the hint grants them, and an unknown role is reported."""
    run(dsn, "--role", role, code=0)
    execute(
        dsn,
        f'revoke usage on schema chatdb from "{role}"',
        f'revoke update, delete on chatdb.messages from "{role}"',
    )
    found = [each for each in json.loads(run(dsn, "--role", role, "--json", code=1)) if each["state"] != "ok"]
    found = [each for each in found if each["what"] not in {"users", "schema public"}]
    assert [(each["what"], each["state"]) for each in found] == [(f"privileges of {role}", "missing")] * 2
    assert {each["hint"] for each in found} == {
        f'grant update, delete on chatdb.messages to "{role}"',
        f'grant usage on schema chatdb to "{role}"',
    }
    run(dsn, code=0)  # the connecting role lacks none
    for each in found:
        fix(dsn, each["hint"])
    run(dsn, "--role", role, code=0)
    assert wrong(dsn, "--role", "nobody-such") == {
        "privileges of nobody-such": ("missing", 'create role "nobody-such" login')
    }


def test_a_role_with_few_rights(server: str, dsn: str) -> None:
    """The check runs as the service's role, which may not read yoyo's tables, and as a role without privileges."""
    name = "chatdb_test_checker"
    execute(dsn, f"create role {name} login password '{name}'")
    try:
        bad = wrong(as_role(dsn, name))
        assert [*bad] == [f"privileges of {name}"]
        for statement in (f"grant usage on schema chatdb to {name}", f"grant select on chatdb.messages to {name}"):
            execute(dsn, statement)
        found = {each.what: each for each in inspect(as_role(dsn, name))}
        assert found["migrations"].state == "note"
        assert "lacks privileges" in found["statements"].detail
        execute(dsn, f"grant select, insert, update, delete on all tables in schema chatdb to {name}")
        run(as_role(dsn, name), code=0)
    finally:
        execute(dsn, f"drop owned by {name}", f"drop role {name}")


def test_an_encoding_that_lacks_characters(server: str, databases: Databases) -> None:
    """The check reports a database that is not in UTF-8, and reads it without a failure."""
    with psycopg.connect(server) as connection:
        provider = "locale_provider libc" if connection.info.server_version >= 150_000 else ""
    with databases.new(options=f"encoding 'LATIN1' {provider} locale 'C'") as dsn:
        apply_migrations(dsn)
        assert [*wrong(dsn)] == ["encoding"]


@pytest.mark.parametrize(("oldest", "newest", "state"), [(99, 99, "different"), (1, 2, "note")])
def test_the_servers_version(dsn: str, monkeypatch: pytest.MonkeyPatch, oldest: int, newest: int, state: str) -> None:
    """A server that is too old is a problem; a newer one is a note."""
    monkeypatch.setattr(inspection, "OLDEST", oldest)
    monkeypatch.setattr(inspection, "NEWEST", newest)
    assert next(each for each in inspect(dsn) if each.what == "server").state == state


def test_an_index_that_a_failed_build_left(dsn: str) -> None:
    """An invalid index that is not chatdb's is a note with a hint that drops it."""
    execute(
        dsn,
        "create index ix_messages_key_ccnew on chatdb.messages (key)",
        "update pg_index set indisvalid = false where indexrelid = 'chatdb.ix_messages_key_ccnew'::regclass",
    )
    found = {each.what: each for each in inspect(dsn)}
    assert found["index ix_messages_key_ccnew"][1:] == (
        "note",
        "is invalid: a failed build left it behind",
        "chatdb migrate",
    )
    apply_migrations(dsn)
    assert "index ix_messages_key_ccnew" not in {each.what for each in inspect(dsn)}


def test_the_plans(dsn: str) -> None:
    """On large tables each statement's plan uses its index; without the indexes the check names the statements."""
    with connected(dsn) as connection:
        assert "too small to tell" in check_plans(connection)[0].detail
        connection.execute(DATA.encode())
        (found,) = check_plans(connection)
        assert (found.state, found.detail) == ("ok", "each is planned with an index")
        connection.execute(
            f"alter table chatdb.messages drop constraint pk_messages cascade; drop index chatdb.{KEY}".encode()
        )
        bad = {each.what: each.detail for each in check_plans(connection) if is_wrong(each)}
        assert bad["statement get_history"] == "no index serves it: it scans all of messages"
        assert "SQLSTATE 42P10" in bad["statement append_message_conditional"]
        assert "statement list_conversations" not in bad


def test_the_plans_with_the_search_index(dsn: str) -> None:
    """With the search index, which the planner may take for all messages of a user, nothing is wrong."""
    execute(dsn, DATA)
    create_search_index(dsn)
    found = {each.what: each for each in inspect(dsn)}
    assert found["statements"].state == found["index ix_messages_search"].state == "ok"
    assert "search_messages_words" not in found["statements"].detail
    assert not [each for each in found.values() if is_wrong(each)]


def test_a_planner_that_shuns_indexes(dsn: str) -> None:
    """A plan that scans a large table despite an index is a note with a hint."""
    execute(
        dsn,
        "insert into chatdb.conversations (user_id, id) select 'alice', n from generate_series(1, 2000) as n",
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
        "select 'alice', n, m, 'user', repeat('x', 100), now() "
        "from generate_series(1, 2000) as n, generate_series(1, 10) as m order by random()",
        "analyze chatdb.conversations, chatdb.messages",
    )
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"alter database {connection.info.dbname} set random_page_cost = 100")
    found = {each.what: each for each in inspect(dsn)}
    assert found["statement append_message"].state == "note"
    assert found["statement append_message"].hint.startswith("analyze ")
    assert not any(map(is_wrong, found.values()))


def test_it_changes_nothing(dsn: str) -> None:
    """The check writes nothing, works in a read-only session, and leaves the session as it was."""
    with connected(dsn) as connection:
        check_plans(connection)
        assert connection.execute("select name from pg_prepared_statements where name like 'chatdb%'").fetchall() == []
        assert connection.execute("show enable_seqscan").fetchone() == ("on",)
        assert connection.execute("show plan_cache_mode").fetchone() == ("auto",)
        connection.execute("set default_transaction_read_only = on")
        assert [each.state for each in check_plans(connection)] == ["ok"]


def test_how_it_is_shown(dsn: str) -> None:
    """On a terminal and in a pipe, the output has each check with its full name, then the verdict."""
    execute(
        dsn, f'drop index chatdb.ix_conversations_user_id_active_on; create index "{"x" * 63}" on chatdb.messages (seq)'
    )
    whats = [each.what for each in inspect(dsn)]
    *lines, verdict = run(dsn, code=1).splitlines()
    assert [line.split("\t")[0] for line in lines] == ["what", *whats]
    assert {line.count("\t") for line in lines} == {3}
    assert verdict.startswith("not ok: 1 ")
    shown = on_a_terminal("check", env={"DATABASE_URL": dsn, "COLUMNS": "80"}, code=1)
    assert all(what in shown for what in whats)
    assert verdict in shown.splitlines()[-1]
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())) <= 80
    execute(dsn, "drop schema chatdb cascade")
    apply_migrations(dsn)
    assert run(dsn, code=0).splitlines()[-1].startswith("ok: ")


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("path", "is_found"),
    [
        ("public, pg_catalog", True),
        ('"$user", public, "pg_catalog"', True),
        ("pg_catalog, public", False),
        ("public", False),
        ("public, pg_catalogue", False),
    ],
)
def test_a_search_path_that_ends_with_pg_catalog(dsn: str, roles: Roles, path: str, *, is_found: bool) -> None:
    """A search_path with another schema before pg_catalog is found for this role, the database and another role."""
    with psycopg.connect(dsn) as connection:
        database, user = connection.info.dbname, connection.info.user

    def found(role: str | None = None) -> list[str]:
        return [each.what for each in inspect(dsn, role=role) if each.what.startswith("search_path") and is_wrong(each)]

    execute(dsn, f"alter role {roles.app} in database {database} set search_path = {path}")
    assert found() == []
    assert found(roles.app) == [f"search_path of {roles.app}"] * is_found
    execute(dsn, f"alter database {database} set search_path = {path}")
    assert found(roles.reader) == [f"search_path of {name}" for name in (user, roles.reader)] * is_found
    execute(dsn, f"alter role {roles.reader} in database {database} set search_path = public")
    assert found(roles.reader) == [f"search_path of {user}"] * is_found


@pytest.mark.parametrize("version", VERSIONS)
def test_through_poolers(dsn: str, tmp_path: Path, version: str) -> None:
    """A transaction pooler is noted, and the check works through it."""
    with pgbouncer(dsn, tmp_path, version) as pooled:
        found = {each.what: each for each in inspect(pooled)}
    assert found["pooler"].state == "note"
    assert not any(map(is_wrong, found.values()))
    assert {each.what: each.state for each in inspect(dsn)}["pooler"] == "ok"


def test_a_server_that_is_not_there() -> None:
    """The error for an unreachable server is one sentence without the password."""
    command = [PROGRAM, "check", "--json"]
    env = os.environ | {"DATABASE_URL": "postgresql://a:secret@127.0.0.1:1/x"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "secret" not in done.stderr + done.stdout


def test_quoted_identifiers_are_no_difference(dsn: str) -> None:
    """With `quote_all_identifiers` on, a correct schema passes and a changed one does not."""
    execute(
        dsn,
        "do $$ begin execute format('alter database %I set quote_all_identifiers = on', current_database()); end $$",
    )
    assert checked(dsn) == ""
    assert not any(map(is_wrong, inspect(dsn)))
    execute(dsn, "alter table chatdb.messages drop constraint ck_messages_seq")
    execute(dsn, "alter table chatdb.messages add constraint ck_messages_seq check (seq >= 0)")
    assert "ck_messages_seq" in checked(dsn)
