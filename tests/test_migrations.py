"""The migrations: by yoyo's own command and by chatdb's, forwards, back, again, and beside a host's own tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

import chatdb
from chatdb.migrate import apply_migrations
from tests.conftest import as_role, execute

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "migrations").glob("*.sql"))
NAMES = [path.stem for path in FILES if not path.stem.endswith(".rollback")]


def yoyo(dsn: str, *arguments: str) -> str:
    """Run yoyo in the checkout as a person would, and return what it prints."""
    command = [str(Path(sys.executable).with_name("yoyo")), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DATABASE_URL": dsn}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(dsn: str) -> list[tuple[str, ...]]:
    """Return what stands in the schema chatdb: columns, constraints and indexes, each by its definition."""
    with psycopg.connect(dsn) as connection:
        return connection.execute(
            """
            select c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull::text
            from pg_class c join pg_attribute a on a.attrelid = c.oid
            where c.relnamespace = to_regnamespace('chatdb') and a.attnum > 0
            union all
            select conrelid::regclass::text, conname, pg_get_constraintdef(oid), ''
            from pg_constraint where connamespace = to_regnamespace('chatdb')
            union all
            select tablename, indexname, indexdef, '' from pg_indexes where schemaname = 'chatdb'
            order by 1, 2, 3
            """
        ).fetchall()


def test_names() -> None:
    """Each migration has a number that follows, and a rollback."""
    assert [int(name.split(".")[0]) for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert all(re.fullmatch(r"\d{4}\.[a-z0-9-]+", name) for name in NAMES)
    assert [path.stem for path in FILES if path.stem.endswith(".rollback")] == [f"{name}.rollback" for name in NAMES]


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_yoyo_from_the_checkout(empty_dsn: str, scheme: str) -> None:
    """Yoyo's apply, list and rollback work as they are with both schemes of DATABASE_URL."""
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


def test_one_step_back_and_forth(empty_dsn: str) -> None:
    """Each migration can be taken back alone and applied again, with the same schema after it."""
    yoyo(empty_dsn, "apply", "--batch")
    applied = objects(empty_dsn)
    for count in range(1, len(NAMES) + 1):
        for name in reversed(NAMES[-count:]):
            yoyo(empty_dsn, "rollback", "--batch", "--revision", name)
        yoyo(empty_dsn, "apply", "--batch")
        assert objects(empty_dsn) == applied


def test_chatdb_and_yoyo_follow_each_other(empty_dsn: str) -> None:
    """What one has applied, the other takes as applied."""
    assert apply_migrations(empty_dsn) == NAMES
    assert apply_migrations(empty_dsn) == []
    assert "U " not in yoyo(empty_dsn, "list")


def test_again_after_half_a_migration(empty_dsn: str) -> None:
    """Every statement can be run again: a migration that was carried out but not marked is applied once more."""
    apply_migrations(empty_dsn)
    applied = objects(empty_dsn)
    execute(empty_dsn, "delete from _yoyo_migration")
    assert apply_migrations(empty_dsn) == NAMES
    assert objects(empty_dsn) == applied


def test_a_host_with_tables_of_the_same_names(empty_dsn: str) -> None:
    """The host's own conversations and messages in public stay as they are."""
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
    """Yoyo finds its own tables again when the role is called like the schema."""
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
    """A server that is not there is an UnavailableError that says nothing of the password."""
    with pytest.raises(chatdb.UnavailableError, match="cannot be reached") as caught:
        apply_migrations("postgresql://alice:secret@127.0.0.1:1/chat")
    assert caught.value.sent is False
    assert "secret" not in str(caught.value)


def test_a_role_that_may_not_create(empty_dsn: str) -> None:
    """A role without the privilege to create is a ConfigurationError that says so, and leaves nothing behind."""
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
