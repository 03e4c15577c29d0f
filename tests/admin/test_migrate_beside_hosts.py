"""`chatdb migrate` on databases of the first release, and alongside a host's yoyo and Alembic."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Integer, MetaData, NullPool, Table, create_engine

import chatdb
from chatdb.admin.check.inspection import inspect, is_wrong
from chatdb.admin.migrate import applied_migrations, apply_migrations, migration_files, rollback_migrations
from tests.support import forked
from tests.support.databases import as_role, execute
from tests.support.migrations import NAMES, objects, transaction, value, yoyo
from tests.support.paths import ROOT

pytestmark = pytest.mark.owner

DUMPS = sorted((ROOT / "tests" / "support" / "data").glob("07b569c-*.sql"))
ROWS = (
    "select (id, last_seq, created_at, updated_at, active_on, user_id, key, title, metadata)::text "
    "from chatdb.conversations union all "
    "select (id, conversation_id, seq, created_at, token_count, user_id, role, key, content, payload, metadata)::text "
    "from chatdb.messages order by 1",
    "select conname, pg_get_constraintdef(oid) from pg_constraint where conname = 'ck_conversations_metadata'",
)


def load(dsn: str, dump: Path) -> None:
    """Load a dump of the first release."""
    execute(dsn, dump.read_text(encoding="utf-8"))


def rows(dsn: str, statement: str) -> list[Any]:
    """Return the rows of a statement."""
    with psycopg.connect(dsn) as connection:
        return connection.execute(statement.encode()).fetchall()


def recorded(dsn: str) -> list[str]:
    """Return the migrations that yoyo has recorded in public."""
    return [name for (name,) in rows(dsn, "select migration_id from public._yoyo_migration order by 1")]


@pytest.mark.parametrize("dump", DUMPS, ids=lambda path: path.stem)
def test_a_database_of_the_first_release(empty_dsn: str, dump: Path) -> None:
    """The rows stay, the schema becomes that of a new database, and the bookkeeping moves into the schema chatdb."""
    load(empty_dsn, dump)
    before = rows(empty_dsn, ROWS[0])
    assert len(before) == 5
    with pytest.raises(chatdb.SchemaError, match="run chatdb migrate first"):
        rollback_migrations(empty_dsn)
    assert apply_migrations(empty_dsn) == NAMES
    assert rows(empty_dsn, ROWS[0]) == before
    assert "<= 1048576" in rows(empty_dsn, ROWS[1])[0][1]
    assert "NOT VALID" not in rows(empty_dsn, ROWS[1])[0][1]
    assert [each for each in inspect(empty_dsn) if is_wrong(each)] == []
    assert applied_migrations(empty_dsn) == {file.name: file.checksum for file in migration_files()}
    assert recorded(empty_dsn) == []
    assert value(empty_dsn, "select to_regclass('public._chatdb_migration')") is None
    assert apply_migrations(empty_dsn) == []
    assert rollback_migrations(empty_dsn, to="0") == NAMES[::-1]
    assert value(empty_dsn, "select to_regnamespace('chatdb')") is None


@pytest.mark.parametrize("dump", DUMPS, ids=lambda path: path.stem)
def test_a_database_of_the_first_release_by_yoyo(empty_dsn: str, dump: Path) -> None:
    """`yoyo apply` also upgrades it, and `chatdb migrate` then finds nothing to do."""
    load(empty_dsn, dump)
    before = rows(empty_dsn, ROWS[0])
    yoyo(empty_dsn, "apply", "--batch")
    assert rows(empty_dsn, ROWS[0]) == before
    assert [each for each in inspect(empty_dsn) if is_wrong(each)] == []
    assert apply_migrations(empty_dsn) == []
    assert [each for each in inspect(empty_dsn) if is_wrong(each)] == []


def test_the_wider_limit_holds_up_nobody(empty_dsn: str) -> None:
    """While a reader's transaction is open, widening the limit gives up after `wait`; a writer's does not stop it."""
    load(empty_dsn, DUMPS[0])
    with (
        transaction(empty_dsn, "select from chatdb.conversations"),
        pytest.raises(chatdb.UnavailableError, match="55P03"),
    ):
        apply_migrations(empty_dsn, wait=0)
    with transaction(empty_dsn, "insert into chatdb.conversations (user_id) values ('a')"):
        assert apply_migrations(empty_dsn, to="0001") == []
    assert apply_migrations(empty_dsn) == NAMES[1:]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Return a folder of a host's own migrations with the names of chatdb's first release."""
    (tmp_path / "0001.create-schema.sql").write_text("create table public.host_settings (id int primary key);")
    for name, before in (("0002.create-conversations", "0001.create-schema"), ("0003.create-messages", "")):
        depends = f"-- depends: {before or '0002.create-conversations'}\n"
        (tmp_path / f"{name}.sql").write_text(f"{depends}create table public.host_{name[:4]} (id int primary key);")
    return tmp_path


HOSTS = ["0001.create-schema", "0002.create-conversations", "0003.create-messages"]
HOSTS_TABLES = ["host_0002", "host_0003", "host_settings"]


def host_applies(dsn: str, folder: Path) -> None:
    """Run the host's yoyo."""
    database = dsn.replace("postgresql://", "postgresql+psycopg://", 1)
    program = Path(sys.executable).with_name("yoyo")
    arguments = ("apply", "--batch", "--no-config-file", "-d", database, str(folder))
    assert forked.run(program, *arguments, env={**os.environ})[0] == 0


def hosts_tables(dsn: str) -> list[str]:
    """Return the host's tables."""
    return [name for (name,) in rows(dsn, "select tablename from pg_tables where tablename ~ '^host_' order by 1")]


@pytest.mark.parametrize("first", ["host", "chatdb", "yoyo apply"])
def test_a_host_with_migrations_of_the_same_names(empty_dsn: str, host: Path, first: str) -> None:
    """Both are applied in either order, and neither removes the other's records or tables."""
    if first == "chatdb":
        assert apply_migrations(empty_dsn) == NAMES
    elif first == "yoyo apply":
        yoyo(empty_dsn, "apply", "--batch")
    host_applies(empty_dsn, host)
    assert apply_migrations(empty_dsn) == (NAMES if first == "host" else [])
    assert hosts_tables(empty_dsn) == HOSTS_TABLES
    assert [each for each in inspect(empty_dsn) if is_wrong(each)] == []
    assert [name for name in recorded(empty_dsn) if name not in NAMES] == HOSTS
    assert rollback_migrations(empty_dsn, to="0") == NAMES[::-1]
    assert objects(empty_dsn) == []
    assert recorded(empty_dsn) == HOSTS
    assert apply_migrations(empty_dsn) == NAMES
    assert recorded(empty_dsn) == HOSTS
    assert hosts_tables(empty_dsn) == HOSTS_TABLES


def test_a_host_beside_the_first_release(empty_dsn: str, host: Path) -> None:
    """A host migration skipped because the first release had its name can be applied afterwards."""
    load(empty_dsn, next(path for path in DUMPS if "chatdb-migrate" in path.name))
    host_applies(empty_dsn, host)
    assert hosts_tables(empty_dsn) == []
    execute(empty_dsn, "insert into _yoyo_migration values ('h', '20260101_01_host', now())")
    apply_migrations(empty_dsn)
    assert recorded(empty_dsn) == ["20260101_01_host"]
    host_applies(empty_dsn, host)
    assert hosts_tables(empty_dsn) == HOSTS_TABLES
    assert apply_migrations(empty_dsn) == []
    assert recorded(empty_dsn) == [*HOSTS, "20260101_01_host"]


def test_a_host_that_hid_the_first_release(empty_dsn: str, host: Path) -> None:
    """A host's migration stays the host's even if the first release recorded its own checksum for it."""
    load(empty_dsn, next(path for path in DUMPS if "chatdb-migrate" in path.name))
    execute(
        empty_dsn,
        "drop schema chatdb cascade",
        "delete from _yoyo_migration where migration_id <> '0001.create-schema'",
        "delete from _chatdb_migration where migration_id <> '0001.create-schema'",
        "create table public.host_settings (id int primary key)",
    )
    assert apply_migrations(empty_dsn) == NAMES
    assert recorded(empty_dsn) == ["0001.create-schema"]
    assert value(empty_dsn, "select to_regclass('public._chatdb_migration')") is None
    host_applies(empty_dsn, host)
    assert hosts_tables(empty_dsn) == HOSTS_TABLES


def test_default_privileges_leave_the_bookkeeping_alone(empty_dsn: str) -> None:
    """Default privileges do not let the service's role write to the bookkeeping table."""
    load(empty_dsn, DUMPS[0])
    execute(empty_dsn, "drop role if exists chatdb_test_app", "create role chatdb_test_app")
    try:
        execute(
            empty_dsn,
            "grant usage on schema chatdb to chatdb_test_app",
            "alter default privileges in schema chatdb grant all on tables to chatdb_test_app, public",
        )
        apply_migrations(empty_dsn)
        may = "select has_table_privilege('chatdb_test_app', 'chatdb._chatdb_migration', 'select, insert, delete')"
        assert value(empty_dsn, may) is False
    finally:
        execute(empty_dsn, "drop owned by chatdb_test_app", "drop role chatdb_test_app")


TRAP = (
    "create schema trap",
    "create function trap.spring() returns trigger language plpgsql as "
    "$$ begin insert into trap.sprung select current_user; return new; end $$",
    "create table trap.sprung (who text)",
    "grant usage on schema trap to public",
    "grant all on trap.sprung to public",
)


def test_planted_tables_of_yoyos(owner: str, empty_dsn: str) -> None:
    """Tables with yoyo's names and a trigger, planted by another role, are neither read nor written."""
    name = "chatdb_test_planter"
    execute(empty_dsn, f"drop role if exists {name}", f"create role {name} login password '{name}'")
    try:
        execute(empty_dsn, *TRAP, f"grant create, usage on schema public to {name}")
        execute(
            as_role(empty_dsn, name),
            "create table public._yoyo_migration (migration_hash text, migration_id text, applied_at_utc timestamp)",
            "create table public.yoyo_lock (locked int primary key, ctime timestamp, pid int)",
            *(f"insert into public._yoyo_migration values ('{n}', '{n}', now())" for n in NAMES),
            *(
                f"create trigger spring before insert or delete on public.{table} for each row "
                "execute function trap.spring()"
                for table in ("_yoyo_migration", "yoyo_lock")
            ),
            "grant all on public._yoyo_migration, public.yoyo_lock to public",
        )
        assert apply_migrations(owner) == NAMES
        assert rollback_migrations(owner, to="0") == NAMES[::-1]
        assert apply_migrations(empty_dsn) == NAMES
        assert value(empty_dsn, "select count(*) from trap.sprung") == 0
        assert recorded(empty_dsn) == NAMES
    finally:
        execute(empty_dsn, f"drop owned by {name}", f"drop role {name}")


def test_a_planted_function(empty_dsn: str) -> None:
    """Planted functions and operators in public with a closer match are not called, even under yoyo."""
    planted = (
        "create sequence public.planted",
        "create function public.format(text, name) returns text language plpgsql as "
        "$$ begin perform nextval('public.planted'); return 'select 1'; end $$",
        "create function public.same(oid, int) returns bool language plpgsql as "
        "$$ begin perform nextval('public.planted'); return $1 = $2::oid; end $$",
        "create operator public.= (leftarg = oid, rightarg = int, function = public.same)",
    )
    execute(empty_dsn, "drop role if exists chatdb", *planted, "create role chatdb")
    try:
        apply_migrations(empty_dsn)
        yoyo(empty_dsn, "apply", "--batch")
        rollback_migrations(empty_dsn, to="0")
        assert value(empty_dsn, "select is_called from public.planted") is False
    finally:
        execute(empty_dsn, "drop owned by chatdb", "drop role chatdb")


@pytest.mark.parametrize(
    "planted", ["create schema chatdb", "create schema chatdb; create table chatdb.conversations (id int)"]
)
def test_a_schema_of_another_role(owner: str, empty_dsn: str, planted: str) -> None:
    """A schema chatdb that another role owns is refused, the error names the owner, and nothing changes."""
    name = "chatdb_test_planter"
    execute(empty_dsn, f"drop role if exists {name}", f"create role {name} login password '{name}'")
    try:
        execute(
            empty_dsn,
            f"do $$ begin execute format('grant create on database %I to {name}', current_database()); end $$",
        )
        execute(as_role(empty_dsn, name), planted)
        before = objects(empty_dsn)
        for dsn in (owner, empty_dsn):
            with pytest.raises(chatdb.ConfigurationError, match=f"schema chatdb belongs to the role {name}"):
                apply_migrations(dsn)
        assert objects(empty_dsn) == before
        assert value(empty_dsn, "select to_regclass('chatdb._chatdb_migration')") is None
    finally:
        execute(empty_dsn, f"drop owned by {name}", f"drop role {name}")


def include_name() -> Any:
    """Return the filter of docs/howto/alembic.md."""
    page = (ROOT / "docs" / "howto" / "alembic.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(YOYO.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["include_name"]


def proposed(dsn: str, **options: Any) -> list[str]:
    """Return the tables that Alembic's autogenerate would drop or create for a host's own model."""
    metadata = MetaData()
    Table("host_users", metadata, Column("id", Integer, primary_key=True))
    engine = create_engine(dsn.replace("postgresql://", "postgresql+psycopg://", 1), poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"target_metadata": metadata} | options)
        return [f"{change[0]} {change[1].name}" for change in compare_metadata(context, metadata)]


@pytest.mark.parametrize("include_schemas", [False, True])
@pytest.mark.parametrize("by", ["chatdb migrate", "yoyo apply", *(path.stem for path in DUMPS)])
def test_alembic(empty_dsn: str, include_schemas: bool, by: str) -> None:
    """With the documented filter, Alembic proposes changes to the host's tables only, not to chatdb's or yoyo's."""
    if by == "chatdb migrate":
        apply_migrations(empty_dsn)
    elif by == "yoyo apply":
        yoyo(empty_dsn, "apply", "--batch")
    else:
        load(empty_dsn, ROOT / "tests" / "support" / "data" / f"{by}.sql")
    execute(empty_dsn, "create table public.host_old (id int primary key)")
    options = {"include_schemas": include_schemas}
    wanted = ["add_table host_users", "remove_table host_old"]
    assert sorted(proposed(empty_dsn, include_name=include_name(), **options)) == wanted
    without = sorted(proposed(empty_dsn, **options))
    assert (without == wanted) == (by == "chatdb migrate" and not include_schemas)
