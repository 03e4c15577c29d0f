"""Runs the phases of an adoption in order and fills its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

from chatdb.admin.adopt import steps
from chatdb.admin.adopt.report import NONE, AdoptReport, Counts
from chatdb.admin.adopt.runner import Runner
from chatdb.admin.connection import (
    WAIT,
    advisory_lock,
    fetch_value,
    psycopg,
    refuse_distributed,
)
from chatdb.errors import ChatDBError, SchemaError

BATCH_SIZE = 20_000
"""The approximate number of messages in one transaction."""

Progress = Callable[[int, int], None]
"""Called with the number of rows done and the total."""

_IDS = ("integer", "bigint")
_TEXTS = ("character varying", "text")
_TIMES = ("timestamp without time zone", "timestamp with time zone")
_USERS = (*_TEXTS, "uuid", *_IDS)
_TABLES = {
    "conversations": {"id": _IDS, "user_id": _USERS, "created_at": _TIMES, "updated_at": _TIMES},
    "messages": {
        "id": _IDS,
        "conversation_id": _IDS,
        "user_id": _USERS,
        "role": _TEXTS,
        "content": _TEXTS,
        "created_at": _TIMES,
    },
}
"""The older system's tables, their columns, and the types that each column may have."""

# added to those of advisory_lock; they override the role's and the server's settings
_SETTINGS = (
    "set default_transaction_isolation to 'repeatable read'",
    "set timezone to 'UTC'",
    "set row_security to off",  # fail instead of missing rows that a policy hides
    "set jit to off",
    "set work_mem to '64MB'",
    "set temp_buffers to '64MB'",  # a batch fits in them
)


def adopt(
    dsn: str,
    *,
    dry_run: bool = False,
    delete_gone: Callable[[Counts], bool] | None = None,
    wait: float = WAIT,
    progress: Progress | None = None,
    batch: int = BATCH_SIZE,
) -> AdoptReport:
    """
    Adopt the rows of `public.conversations` and `public.messages` that chatdb does not have yet, and return a report.

    Blocks. Each batch is one transaction, so a run continues where a killed one stopped. A `dry_run` is rolled back.
    `delete_gone` is called with the counts of adopted rows that have since been deleted upstream. If it returns true,
    they are deleted from chatdb too, except in conversations with a message that was not adopted.

    Raises SchemaError if chatdb's or the original tables are missing or do not have the expected columns, and
    UnavailableError if another process or transaction still holds a lock after `wait` seconds.
    """
    start = time.monotonic()
    report = AdoptReport(dry_run=dry_run)
    with advisory_lock(dsn, wait=wait) as connection:
        refuse_distributed(connection, "chatdb adopt", "adopt first, then run chatdb distribute")
        for setting in _SETTINGS:
            connection.execute(setting.encode())
        connection.execute(f"set lock_timeout to {round(wait * 1000) or 1}".encode())
        connection.prepare_threshold = None  # plan each statement for the rows of its batch
        runner = Runner(connection, {"batch_size": batch}, dry_run=dry_run)
        _check_originals(connection, runner, report)
        runner.run(steps.SET_UP)
        with connection.transaction(force_rollback=True) if dry_run else nullcontext():
            _adopt(connection, runner, report, progress)
            _verify(runner, report)
        if delete_gone is not None and any(report.gone) and not dry_run:
            runner.run(steps.FIND_DELETED_UPSTREAM)
            report.gone = runner.counts("deleted_upstream")
            if delete_gone(report.gone):
                runner.run_atomically(steps.DELETE)
                report.deleted = runner.counts("deleted")
    report.seconds = time.monotonic() - start
    return report


def _check_originals(connection: psycopg.Connection, runner: Runner, report: AdoptReport) -> None:
    """
    Check the original tables. Reports missing tables and columns that are not copied.

    Raises SchemaError, which lists every difference.
    """
    for table in ("chatdb.conversations", "chatdb.messages"):
        if not fetch_value(connection, "select pg_catalog.to_regclass(%s) is not null", table):
            raise SchemaError(f"the database has no table {table}: run chatdb migrate or yoyo apply")
    differences: list[str] = []
    extra_columns: dict[str, dict[str, str]] = {}
    for name, expected in _TABLES.items():
        table = f"public.{name}"
        statement = "select relkind from pg_catalog.pg_class where oid = pg_catalog.to_regclass(%s)"
        kind = fetch_value(connection, statement, table)
        if kind is None:
            report.missing.append(table)
            continue
        runner.numbers[f"has_{name}"] = 1
        if kind not in ("r", "p"):
            differences.append(f"{table} is not a table")
        columns = {row["name"]: row for row in runner.execute(steps.FIND_COLUMNS, table)}
        for column, accepted in expected.items():
            if column not in columns:
                differences.append(f"{table} has no column {column}")
            elif (found := columns[column]["type"]) not in accepted:
                differences.append(f"{table}.{column} is {found}, not {' or '.join(accepted)}")
        extra_columns[table] = {column: row["identifier"] for column, row in columns.items() if column not in expected}
        if not differences and not columns["id"]["is_primary_key"]:
            statement = f"select pg_catalog.count(*) - pg_catalog.count(distinct id) from {table}"  # noqa: S608 - of _TABLES
            if doubtful := fetch_value(connection, statement):
                problem = f"{doubtful:,} rows have a null or duplicate id"
                differences.append(f"{table} has no primary key, and {problem}")
    if len(report.missing) == len(_TABLES):
        raise SchemaError(f"there is nothing to adopt: the tables {' and '.join(report.missing)} do not exist")
    if differences:
        raise SchemaError(f"chatdb cannot adopt these tables: {'; '.join(differences)}")
    for table, identifiers in extra_columns.items():
        if not identifiers:
            continue
        counts = [f"pg_catalog.count({identifier})" for identifier in identifiers.values()]
        row = connection.execute(f"select {', '.join(counts)} from {table}".encode()).fetchone()  # noqa: S608 - quoted
        report.extra_columns |= dict(zip((f"{table}.{name}" for name in identifiers), row or (), strict=True))


def _adopt(connection: psycopg.Connection, runner: Runner, report: AdoptReport, progress: Progress | None) -> None:
    runner.run(steps.START)
    numbers = runner.numbers
    report.adopted_before = runner.counts("adopted_before")
    if report.adopted_before.messages and not fetch_value(connection, "select exists (select from chatdb.messages)"):
        raise SchemaError(
            f"chatdb's tables are empty, although {report.adopted_before} were adopted: to adopt everything again, run "
            "chatdb rollback --to 0001, chatdb migrate and drop schema chatdb_adopt cascade"
        )
    rows = 0
    for _ in range(numbers["batches"]):
        runner.run_atomically(steps.BATCH)
        report.adopted = report.adopted.plus(runner.counts("adopted"))
        report.late += numbers["late"]
        report.renumbered += numbers["renumbered"]
        _add_reasons(runner, report)
        rows += numbers["rows"]
        if progress is not None:
            progress(rows, max(rows, numbers["total"]))
    runner.run_atomically(steps.ORPHANS)
    _add_reasons(runner, report)
    runner.run(steps.FINISH)
    if report.adopted.messages > BATCH_SIZE and not report.dry_run:  # for the plans of the first queries
        connection.execute("analyze chatdb.conversations, chatdb.messages")


def _add_reasons(runner: Runner, report: AdoptReport) -> None:
    for reason, counts in runner.reasons.items():
        report.aside[reason] = report.aside.get(reason, NONE).plus(counts)
    report.aside = dict(sorted(report.aside.items()))


def _verify(runner: Runner, report: AdoptReport) -> None:
    """Compare the originals with the records, and the records with chatdb's tables, in one snapshot."""
    runner.run(steps.COUNT_WRITERS)
    runner.run_atomically(steps.VERIFY)
    numbers = runner.numbers
    for name in _TABLES:
        found = numbers[f"adopted_{name}"] + numbers[f"quarantined_{name}"] + numbers[f"remaining_{name}"]
        if found != numbers[f"originals_{name}"]:
            raise ChatDBError(
                f"{found - numbers[f'originals_{name}']:,} rows of public.{name} are both adopted and quarantined: "
                "check whether another program has written to the schema chatdb_adopt"
            )
        if not numbers[f"has_{name}"]:
            numbers[f"deleted_upstream_{name}"] = 0
    _add_reasons(runner, report)
    report.writers = numbers["writers"]
    report.originals = runner.counts("originals")
    report.remaining = NONE if report.dry_run else runner.counts("remaining")
    report.gone = runner.counts("deleted_upstream")
    report.deleted_in_chatdb = runner.counts("deleted_in_chatdb")
    report.changed_users = numbers["changed_users"]
