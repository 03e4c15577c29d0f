"""Checks that the tables of the older system are those that chatdb can adopt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatdb.admin.adopt.steps import FIND_COLUMNS
from chatdb.admin.connection import fetch_value
from chatdb.errors import SchemaError

if TYPE_CHECKING:
    import psycopg

    from chatdb.admin.adopt.report import AdoptReport
    from chatdb.admin.adopt.runner import Runner

_IDS = ("integer", "bigint")
_TEXTS = ("character varying", "text")
_TIMES = ("timestamp without time zone", "timestamp with time zone")
TABLES = {
    "conversations": {
        "id": _IDS,
        "user_id": (*_TEXTS, "uuid", *_IDS),
        "created_at": _TIMES,
        "updated_at": _TIMES,
    },
    "messages": {
        "id": _IDS,
        "conversation_id": _IDS,
        "user_id": (*_TEXTS, "uuid", *_IDS),
        "role": _TEXTS,
        "content": _TEXTS,
        "created_at": _TIMES,
    },
}
"""The tables in `public`, with their columns and the types that are taken."""


def check_originals(connection: psycopg.Connection, runner: Runner, report: AdoptReport) -> None:
    """
    Compare the tables with what is expected. Reports those that are missing, and the columns that are not copied.

    Raises SchemaError, with all that differs.
    """
    for table in ("chatdb.conversations", "chatdb.messages"):
        if not fetch_value(connection, "select pg_catalog.to_regclass(%s) is not null", table):
            raise SchemaError(f"the database lacks the table {table}: run chatdb migrate first")
    differences: list[str] = []
    extra_columns: dict[str, dict[str, str]] = {}
    for name, expected in TABLES.items():
        table = f"public.{name}"
        statement = "select relkind from pg_catalog.pg_class where oid = pg_catalog.to_regclass(%s)"
        kind = fetch_value(connection, statement, table)
        if kind is None:
            report.missing.append(table)
            continue
        runner.numbers[f"has_{name}"] = 1
        if kind not in ("r", "p"):
            differences.append(f"{table} is no table")
        columns = runner.execute(FIND_COLUMNS, table).fetchall()
        types = {column["name"]: column["type"] for column in columns}
        for column, accepted in expected.items():
            if column not in types:
                differences.append(f"{table} has no column {column}")
            elif types[column] not in accepted:
                differences.append(f"{table}.{column} is {types[column]}, not {' or '.join(accepted)}")
        extra_columns[table] = {
            column["name"]: column["identifier"] for column in columns if column["name"] not in expected
        }
        if not differences and not any(column["name"] == "id" and column["is_primary_key"] for column in columns):
            differences += _check_ids(connection, table)
    if len(report.missing) == len(TABLES):
        raise SchemaError(f"there is nothing to adopt: looked for the tables {' and '.join(report.missing)}")
    if differences:
        raise SchemaError(f"these are not the tables that chatdb can adopt: {'; '.join(differences)}")
    for table, identifiers in extra_columns.items():
        if not identifiers:
            continue
        counts = [f"pg_catalog.count({identifier})" for identifier in identifiers.values()]
        row = connection.execute(f"select {', '.join(counts)} from {table}".encode()).fetchone()  # noqa: S608 - quoted
        report.extra_columns |= dict(zip((f"{table}.{name}" for name in identifiers), row or (), strict=True))


def _check_ids(connection: psycopg.Connection, table: str) -> list[str]:
    statement = f"select pg_catalog.count(*) - pg_catalog.count(distinct id) from {table}"  # noqa: S608 - of TABLES
    doubtful = int(str(fetch_value(connection, statement)))
    return [f"{table} has no primary key, and {doubtful:,} rows whose id is null or another row's"] if doubtful else []
