"""The migrations of the checkout, and helpers for tests of migrations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from chatdb.admin import migrate
from tests.support.forked import run
from tests.support.paths import ROOT

FILES = sorted((ROOT / "migrations").glob("*.sql"))
NAMES = [path.stem for path in FILES if not path.stem.endswith(".rollback")]


def yoyo(dsn: str, *arguments: str) -> str:
    """Run yoyo in the checkout, and return its output."""
    program = Path(sys.executable).with_name("yoyo")
    status, said, failed = run(program, *arguments, env=os.environ | {"DATABASE_URL": dsn}, cwd=ROOT)
    assert status == 0, failed
    return said


def objects(dsn: str) -> list[tuple[str, ...]]:
    """Return the columns, constraints and indexes of the schema chatdb, with their definitions."""
    with psycopg.connect(dsn) as connection:
        return connection.execute(
            """
            select c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull::text
            from pg_class c join pg_attribute a on a.attrelid = c.oid
            where c.relnamespace = to_regnamespace('chatdb') and a.attnum > 0 and not a.attisdropped
                and c.relname !~ '_chatdb_migration'
            union all
            select conrelid::regclass::text, conname, pg_get_constraintdef(oid), ''
            from pg_constraint where connamespace = to_regnamespace('chatdb') and conname !~ '_chatdb_migration'
            union all
            select tablename, indexname, indexdef, '' from pg_indexes
            where schemaname = 'chatdb' and tablename !~ '_chatdb_migration'
            order by 1, 2, 3
            """
        ).fetchall()


CONCURRENTLY = """-- transactional: false
set lock_timeout = '2s';
create index concurrently if not exists ix_messages_created_at on chatdb.messages (created_at);
"""


def release(folder: Path) -> None:
    """Write the checksums of a folder of migrations."""
    with (folder / migrate.SUMS).open("w") as sums:
        subprocess.run("sha256sum *.sql", shell=True, cwd=folder, check=True, stdout=sums)


def add(folder: Path, name: str, sql: str, rollback: str) -> None:
    """Add a migration to a folder, and update the checksums."""
    (folder / f"{name}.sql").write_text(sql)
    (folder / f"{name}.rollback.sql").write_text(rollback)
    release(folder)


def value(dsn: str, statement: str) -> object:
    """Return the single value of a statement."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute(statement.encode()).fetchone()
        return row[0] if row else None


@contextmanager
def transaction(dsn: str, *statements: str) -> Iterator[psycopg.Connection]:
    """Run statements in a transaction that stays open during the block."""
    with psycopg.connect(dsn) as connection:
        for statement in statements:
            connection.execute(statement.encode())
        yield connection
        connection.rollback()
