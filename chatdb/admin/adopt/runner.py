"""Runs the steps of `chatdb adopt`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any

from chatdb._core.query import data_folder
from chatdb.admin.adopt.report import Counts
from chatdb.admin.adopt.steps import Step
from chatdb.admin.connection import dict_row, psycopg

_RETRIES = 5
_LOCK_TABLE = "lock table chatdb.conversations in share row exclusive mode"
_CONFLICTS = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,  # another session just created a conversation with this user and id
)


class Runner:
    """Runs steps on one connection. In a dry run, the caller has opened a transaction."""

    def __init__(self, connection: psycopg.Connection, numbers: Mapping[str, int], *, dry_run: bool) -> None:
        self.numbers = defaultdict[str, int](int, numbers)
        """The steps' input, and the numbers that they have reported."""
        self.reasons: dict[str, Counts] = {}
        """The reasons for quarantine that the last phase has reported."""
        self._connection = connection
        self._dry_run = dry_run

    def run(self, phase: tuple[Step, ...]) -> None:
        """Run the steps of a phase in order, each in its own transaction unless one is open."""
        self.reasons = {}
        for step in phase:
            is_wanted = not step.when or self.numbers[step.when]
            is_unwanted = step.unless and self.numbers[step.unless]
            if step.dry_run in {None, self._dry_run} and is_wanted and not is_unwanted:
                self._run_step(step)

    def run_atomically(self, phase: tuple[Step, ...]) -> None:
        """
        Run the steps of a phase in one transaction; retry if others wrote to the same conversations.

        The last attempt locks the table against other writers.
        """
        if self._dry_run:
            self.run(phase)
            return
        for retries in range(_RETRIES + 1):
            try:
                with self._connection.transaction():
                    if retries == _RETRIES:
                        self._connection.execute(_LOCK_TABLE)
                    self.run(phase)
                    return
            except _CONFLICTS:
                if retries == _RETRIES:
                    raise
                time.sleep(0.05 * (retries + 1))

    def counts(self, name: str) -> Counts:
        """Return the numbers of conversations and messages that were reported under `name`."""
        return Counts(self.numbers[f"{name}_conversations"], self.numbers[f"{name}_messages"])

    def execute(self, file: str, *arguments: object) -> psycopg.Cursor[dict[str, Any]]:
        """Run the statement in a file of `sql/adopt`."""
        return psycopg.RawCursor(self._connection, row_factory=dict_row).execute(_statement(file), arguments or None)

    def _run_step(self, step: Step) -> None:
        cursor = self.execute(step.file, *(self.numbers[name] for name in step.arguments))
        if step.returns == "counts":
            self.numbers.update(*cursor)
        elif step.returns == "reasons":
            self.reasons = {row["reason"]: Counts(row["conversations"], row["messages"]) for row in cursor}
        if step.rowcount:
            self.numbers[step.rowcount] = cursor.rowcount
        if step.analyze:
            self._connection.execute(f"analyze pg_temp.{step.analyze}".encode())


@cache
def _statement(file: str) -> bytes:
    return (data_folder("sql") / "adopt" / f"{file}.sql").read_bytes()
