"""Adopts the older system's rows: the order of the phases, and what is reported of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from chatdb.admin.adopt import steps
from chatdb.admin.adopt.originals import TABLES, check_originals
from chatdb.admin.adopt.report import NONE, AdoptReport, Counts
from chatdb.admin.adopt.runner import Runner
from chatdb.admin.connection import advisory_lock, fetch_value
from chatdb.errors import ChatDBError, SchemaError

if TYPE_CHECKING:
    import psycopg

WAIT = 60.0
"""Maximum wait, in seconds, for another operator command and for locked rows."""

BATCH_SIZE = 20_000
"""About how many messages are adopted in one transaction."""

Progress = Callable[[int, int], None]
"""Called with the number of rows that are done, and of all that were found."""

# what a run needs, whatever the settings of the role or the server are
_SETTINGS = (
    "set default_transaction_isolation to 'repeatable read'",
    "set timezone to 'UTC'",
    "set row_security to off",  # rows that a policy hides are an error
    "set statement_timeout to 0",
    "set idle_in_transaction_session_timeout to 0",
    "set idle_session_timeout to 0",
    "set jit to off",
    "set work_mem to '64MB'",
    "set temp_buffers to '64MB'",  # in which a batch fits
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
    Adopt what chatdb does not have yet of `public.conversations` and `public.messages`, and report what became of it.

    Blocks. Each batch is one transaction, so the next run continues one that was killed. A `dry_run` is rolled back.
    `delete_gone` is called with the numbers of what was adopted and has been deleted upstream since. If it returns
    true, these are deleted from chatdb too, unless their conversation has a message that was not adopted.

    Raises SchemaError if chatdb's tables or the originals are missing or not as expected, and UnavailableError if
    another process or transaction is not done after `wait` seconds.
    """
    start = time.monotonic()
    report = AdoptReport(dry_run=dry_run)
    with advisory_lock(dsn, wait=wait) as connection:
        for setting in _SETTINGS:
            connection.execute(setting.encode())
        connection.execute(f"set lock_timeout to {round(wait * 1000) or 1}".encode())
        connection.prepare_threshold = None  # a plan is made for what a batch has
        runner = Runner(connection, {"batch_size": batch}, dry_run=dry_run)
        check_originals(connection, runner, report)
        runner.run(steps.SET_UP)
        with connection.transaction(force_rollback=True) if dry_run else nullcontext():
            _adopt(connection, runner, report, progress)
            _verify(runner, report)
        if delete_gone is not None and any(report.gone) and not dry_run:
            _delete_gone(runner, report, delete_gone)
    report.seconds = time.monotonic() - start
    return report


def _adopt(connection: psycopg.Connection, runner: Runner, report: AdoptReport, progress: Progress | None) -> None:
    runner.run(steps.START)
    numbers = runner.numbers
    report.adopted_before = runner.counts("adopted_before")
    if report.adopted_before.messages and not fetch_value(connection, "select exists (select from chatdb.messages)"):
        raise SchemaError(
            f"chatdb's tables are empty, though {report.adopted_before} were adopted: they were made anew since. "
            "To adopt all again: chatdb rollback --to 0001, chatdb migrate, drop schema chatdb_adopt cascade"
        )
    rows = 0
    for _ in range(numbers["batches"]):
        runner.run(steps.BATCH)
        report.adopted = report.adopted.plus(runner.counts("adopted"))
        report.late += numbers["late"]
        report.renumbered += numbers["renumbered"]
        _add_reasons(runner, report)
        rows += numbers["rows"]
        if progress is not None:
            progress(rows, max(rows, numbers["total"]))
    runner.run(steps.ORPHANS)
    _add_reasons(runner, report)
    runner.run(steps.FINISH)
    if report.adopted.messages > BATCH_SIZE and not report.dry_run:  # so that the first queries have plans that fit
        connection.execute("analyze chatdb.conversations, chatdb.messages")


def _add_reasons(runner: Runner, report: AdoptReport) -> None:
    for reason, counts in runner.reasons.items():
        report.aside[reason] = report.aside.get(reason, NONE).plus(counts)
    report.aside = dict(sorted(report.aside.items()))


def _verify(runner: Runner, report: AdoptReport) -> None:
    """Compare the originals with what is recorded, and that with chatdb, in one snapshot."""
    runner.run(steps.COUNT_WRITERS)
    runner.run(steps.VERIFY)
    numbers = runner.numbers
    for name in TABLES:
        found = numbers[f"adopted_{name}"] + numbers[f"quarantined_{name}"] + numbers[f"remaining_{name}"]
        if found != numbers[f"originals_{name}"]:
            raise ChatDBError(
                f"of public.{name} {found - numbers[f'originals_{name}']:,} rows are both adopted and kept aside: "
                "has something else written to the schema chatdb_adopt?"
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


def _delete_gone(runner: Runner, report: AdoptReport, agrees: Callable[[Counts], bool]) -> None:
    runner.run(steps.FIND_DELETED_UPSTREAM)
    report.gone = runner.counts("deleted_upstream")
    if agrees(report.gone):
        runner.run(steps.DELETE)
        report.deleted = runner.counts("deleted")
