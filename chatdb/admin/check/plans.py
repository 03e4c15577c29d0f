"""Asks the planner which index it would use for each statement under `sql/`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from chatdb._core.query import statement_files
from chatdb.admin.check.findings import DIFFERENT, NOTE, OK, Finding
from chatdb.admin.connection import errors, psycopg
from chatdb.admin.search_index import SEARCH_INDEX
from chatdb.schema import EXPECTED_SCHEMA

SMALL = 1 << 16
"""Maximum size in bytes of a table for which a sequential scan is fine."""

_TRANSIENT = {"message_parts"}
"""The table that is almost empty while few messages are streamed, on a large database as well."""

_ANALYZE = "analyze chatdb.conversations, chatdb.messages; on an SSD also set random_page_cost = 1.1"


class _Statement(NamedTuple):
    name: str
    sql: str
    parameters: int
    indexes: set[str]


class _Plan(NamedTuple):
    indexes: set[str]
    whole: set[str]


def statements_by_index() -> dict[str, list[str]]:
    """Return each index with the statements that it serves, according to their files."""
    names: dict[str, list[str]] = defaultdict(list)
    for statement in _statements():
        for index in statement.indexes:
            names[index].append(statement.name)
    return names


def check_plans(connection: psycopg.Connection) -> list[Finding]:
    """
    Return the findings on the generic plans, which a service gets.

    The plan of a small table proves nothing. If it scans the table, the statement is planned again with
    `enable_seqscan = off` and passes if it uses an index. The size of a transient table says nothing about the others.
    The search index is optional, so a statement may lack it.
    """
    small = _small(connection)
    proves_nothing = small - _TRANSIENT
    findings: list[Finding] = []
    forced_off: list[str] = []
    others: list[str] = []
    unseen: list[str] = []
    for statement in _statements():
        what = f"statement {statement.name}"
        try:
            plan = _plan(connection, statement)
            forced = _plan(connection, statement, whole=False) if plan.whole else plan
        except errors.InsufficientPrivilege:
            unseen.append(statement.name)
        except (errors.ProgrammingError, errors.NotSupportedError) as error:  # the latter because of a host's rule
            detail = f"the server rejects it (SQLSTATE {error.sqlstate})"
            findings.append(Finding(what, DIFFERENT, detail, "fix the tables and indexes"))
        else:
            if plan.whole <= small & _TRANSIENT:
                plan = forced
            if forced.whole:
                detail = f"no index serves it: it scans all of {', '.join(sorted(forced.whole))}"
                hint = f"fix {', '.join(sorted(statement.indexes)) or 'the tables'}"
                findings.append(Finding(what, DIFFERENT, detail, hint))
            elif plan.whole - small:  # the right plan if one user has most of the rows
                detail = f"its plan scans all of {', '.join(sorted(plan.whole - small))}"
                findings.append(Finding(what, NOTE, detail, _ANALYZE))
            elif plan.whole:
                forced_off.append(statement.name)
            elif not proves_nothing and not statement.indexes - {SEARCH_INDEX} <= plan.indexes:
                others.append(f"{statement.name} ({', '.join(sorted(plan.indexes))})")
    if unseen:
        findings.append(
            Finding("statements", NOTE, f"{len(unseen)} cannot be planned, because this role lacks privileges")
        )
    if not findings:
        detail = "each is planned with an index"
        detail += ", though the tables are too small to tell" if proves_nothing else ""
        detail += f" ({len(forced_off)} with enable_seqscan = off)" if forced_off else ""
        detail += f"; currently with another index than in their files: {', '.join(others)}" if others else ""
        findings.append(Finding("statements", OK, detail))
    return findings


def _statements() -> Iterator[_Statement]:
    for path in statement_files():
        header, _, body = path.read_text(encoding="utf-8").partition("\n\n")
        if re.search(r" chatdb\.", body):  # a table, not the quoted name of a setting
            _, _, served = header.partition("\n-- served by ")
            parameters = len(re.findall(r"^-- \$", header, re.MULTILINE))
            yield _Statement(path.stem, body, parameters, set(re.findall(r"\w+", served)))


def _plan(connection: psycopg.Connection, statement: _Statement, *, whole: bool = True) -> _Plan:
    """Return the generic plan; it takes three round trips, and five if the server rejects the statement."""
    name = f"chatdb_check_{statement.name}"
    nulls = f"({', '.join(['null'] * statement.parameters)})" if statement.parameters else ""
    steps = (
        "savepoint chatdb_check",
        "set local plan_cache_mode = force_generic_plan",
        "set local lock_timeout = '2s'",
        *(() if whole else ("set local enable_seqscan = off",)),
        f"prepare {name} as {statement.sql}\n",
        f"explain (format json) execute {name}{nulls}",
        f"deallocate {name}",  # here: a pooler may run the next transaction in another server process
    )
    with connection.transaction(force_rollback=True):
        try:
            plan = _only_result(connection.execute(";".join(steps).encode()))
        except psycopg.Error:
            with suppress(psycopg.Error):  # it was not prepared
                connection.execute(f"rollback to savepoint chatdb_check; deallocate {name}".encode())
            raise
    nodes = list(_nodes(plan[0]["Plan"]))
    indexes = {node["Index Name"] for node in nodes if "Index Name" in node}
    indexes |= {index for node in nodes for index in node.get("Conflict Arbiter Indexes", ())}
    scanned = {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
    tables = scanned & EXPECTED_SCHEMA.keys()  # PostgreSQL's own are small
    return _Plan(indexes, tables)


def _only_result(cursor: psycopg.Cursor) -> Any:  # noqa: ANN401 - the server's JSON
    """Return the value of the only one of several statements that returns rows."""
    while cursor.description is None:
        cursor.nextset()
    [(value,)] = cursor.fetchall()
    return value


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


def _small(connection: psycopg.Connection) -> set[str]:
    rows = connection.execute(
        "select relname from pg_catalog.pg_class where relnamespace = 'chatdb'::regnamespace and relname = any(%s) "
        "and pg_catalog.pg_relation_size(oid) <= %s",
        [[*EXPECTED_SCHEMA], SMALL],
    )
    return {name for (name,) in rows}
