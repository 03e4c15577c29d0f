"""Operator commands on the schema: migrate, rollback, check, adopt, link-users and protect."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from chatdb.cli.console import (
    AsJson,
    DryRun,
    Wait,
    Yes,
    ask,
    confirm,
    err,
    fail,
    out,
    print_json,
    print_result,
    printable,
    printable_line,
    progress,
)
from chatdb.cli.database import operators_database

if TYPE_CHECKING:
    from chatdb.admin.check.findings import Finding

ShowSql = Annotated[bool, typer.Option("--dry-run", help="Print the SQL that would run, without changing anything.")]


def migrate(
    to: Annotated[
        str | None, typer.Option(metavar="NAME", help="Last migration to apply, by name or number. Default: all.")
    ] = None,
    dry_run: ShowSql = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Create chatdb's tables or upgrade them to this release.

    Does nothing if the tables are up to date. Several processes can run it at
    once: one works, the others wait. It completes what a killed run left
    unfinished and rebuilds invalid indexes. Compatible with yoyo apply; you can
    alternate between them.
    """
    from chatdb.admin.migrate import apply_migrations, missing_migrations

    with operators_database() as (dsn, _):
        if dry_run:
            missing = missing_migrations(dsn, to=to)
            names = [file.name for file in missing]
            for file in missing if not as_json else ():
                print(f"-- {file.path.name}\n\n{file.sql}")
        else:
            names = apply_migrations(dsn, to=to, wait=wait, report=None if as_json else _say("applied"))
    done = {"would_apply" if dry_run else "applied": names}
    print_result(done, "" if names else "nothing to apply", as_json=as_json)


def rollback(
    to: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Last migration to keep, by name or number (0: none). Default: all but the last.",
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Roll back the last migration. Deletes the data in the tables it drops.

    Shows how many rows it would delete and asks for confirmation.
    """
    from chatdb.admin.migrate import last_migrations, rollback_migrations

    with operators_database() as (dsn, database):
        last = last_migrations(dsn, to=to)
        names = [file.name for file, _ in last]
        if not as_json or not yes:
            for file, tables in last:
                counted = ", ".join(f"{_rows(count)} of {table}" for table, count in tables.items())
                err.print(f"{file.name}: {file.warning}" + (f" Deletes {counted}." if counted else ""), style="yellow")
        if last and not dry_run:
            confirm(
                f"Roll back {len(last)} migration(s) of {database} and delete the data in the dropped tables?", yes=yes
            )
            report = None if as_json else _say("rolled back")
            names = rollback_migrations(dsn, to=to, expected=names, wait=wait, report=report)
    rows = {table: count for _, tables in last for table, count in tables.items()}
    done = {"would_take_back" if dry_run else "taken_back": names, "rows": rows}
    print_result(done, "" if last else "nothing to roll back", as_json=as_json)


_COLORS = {"ok": "green", "note": "cyan", "missing": "red", "different": "red"}


def check(
    role: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also check the privileges of this role, such as the service's.")
    ] = None,
    replica: Annotated[
        list[str] | None,
        typer.Option(metavar="DSN", help="Also check the role and lag of this replica. Can be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Compare the database with what this release needs.

    Changes nothing. Prints a fix for each problem. Problems are listed last,
    before the verdict. Exits with status 1 if something is missing or different.
    """
    from chatdb.admin.check.inspection import inspect, is_wrong

    with operators_database() as (dsn, _):
        found = inspect(dsn, role=role, replicas=replica or ())
    wrong = sum(map(is_wrong, found))
    verdict = "ok: the database has what this release needs"
    if wrong:
        verdict = f"not ok: {wrong} missing or different, see the last lines above"
    if as_json:
        print_json([each._asdict() for each in found])
    elif not out.is_terminal:
        for row in (("what", "state", "detail", "hint"), *found):
            print("\t".join(map(printable_line, row)))
        print(verdict)
    else:
        _show(found)
        out.print(verdict, style="bold red" if wrong else "bold green")
    if wrong:
        raise typer.Exit(1)


def _show(found: list[Finding]) -> None:
    """Print each finding: its name unbroken on one line, then its detail and hint."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, state, detail, hint in found:
        name = Text(printable_line(what), style="bold")
        lines = [Text(printable(text)) for text in (detail, hint and f"-> {hint}") if text]
        table.add_row(Text(state, style=_COLORS[state]), Text("\n").join([name, *lines]))
    out.print(table, soft_wrap=False)


def adopt(
    dry_run: DryRun = False,
    delete_gone: Annotated[
        bool,
        typer.Option(
            "--delete-gone",
            help="Delete adopted rows from chatdb if they were deleted from the older tables. Asks for confirmation.",
        ),
    ] = False,
    yes: Yes = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Copy an older system's conversations and messages into chatdb.

    Reads the older tables in the schema public and never changes them. The
    older system can keep writing: run the command again to copy new rows or to
    resume a killed run. Quarantines rows that chatdb cannot store, with the
    reason.
    """
    from chatdb.admin.adopt import Counts
    from chatdb.admin.adopt import adopt as adopt_rows

    if delete_gone and not (dry_run or yes or sys.stdin.isatty()):
        fail("--delete-gone asks for confirmation, which needs a terminal. Pass --yes to confirm")

    def asked(gone: Counts) -> bool:
        bar.stop()
        return yes or ask(
            f"Delete {gone} from {database}, except in conversations with messages that were not adopted?"
        )

    with operators_database() as (dsn, database), progress("adopting") as bar:
        task = bar.add_task("messages", total=None)
        report = adopt_rows(
            dsn,
            dry_run=dry_run,
            delete_gone=asked if delete_gone else None,
            wait=wait,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_result(report.as_dict(), report.described(), as_json=as_json)


def link_users(
    table: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Your application's users table, as written in SQL, such as public.users."),
    ] = None,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of that table that holds the user_id values.")
    ] = "id",
    unlink: Annotated[bool, typer.Option("--unlink", help="Remove the link. Deletes no rows.")] = False,
    dry_run: DryRun = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Link conversations to your users table with a foreign key.

    Optional. Deleting a user from your table then deletes their conversations.
    The column must be unique, have a text type, and contain every user who has
    conversations. Blocks writers only for a moment. If a run is killed, run the
    command again.
    """
    from chatdb.admin.users_link import UsersMissingError, link_users, unlink_users

    if unlink:
        with operators_database() as (dsn, _):
            was_linked = unlink_users(dsn, wait=wait, dry_run=dry_run)
        done = "would unlink" if dry_run else "unlinked"
        text = f"{done} conversations from users" if was_linked else "nothing to unlink"
        print_result({done.replace(" ", "_"): was_linked}, text, as_json=as_json)
        return
    if table is None:
        raise typer.BadParameter("name your users table, or pass --unlink", param_hint="--table")
    try:
        with operators_database() as (dsn, _):
            link = link_users(dsn, table=table, column=column, wait=wait, dry_run=dry_run)
    except UsersMissingError as error:
        if not as_json:
            raise
        print_json({"missing": error.users, "total": error.total})
        raise typer.Exit(1) from None
    text = f"conversations are already linked to {link.table}({link.column})"
    if link.steps:
        said = "would link" if dry_run else "linked"
        text = f"{said} conversations to {link.table}({link.column}), foreign key: {', '.join(link.steps)}"
    result = {"table": link.table, "column": link.column, "would_do" if dry_run else "done": link.steps}
    print_result(result, text, as_json=as_json)


def protect(
    off: Annotated[bool, typer.Option("--off", help="Disable row-level security.")] = False,
    dry_run: ShowSql = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Enable row-level security on chatdb's tables.

    Each transaction must then name its user and reaches only that user's rows;
    any other statement fails. Open the service's pool with
    create_pool(row_level_security=True), or use chatdb.transaction(db,
    user_id=...). Superusers and roles with BYPASSRLS are exempt. Does nothing
    if row-level security is already enabled.
    """
    from chatdb.admin.row_security import protect_tables, protection_statements

    with operators_database() as (dsn, _):
        statements = protection_statements(dsn, off=off) if dry_run else protect_tables(dsn, off=off, wait=wait)
    lines = [f"{statement};" for statement in statements] or ["nothing to do"]
    if statements and not dry_run:
        lines.append(f"row-level security is {'off' if off else 'on'}")
    print_result({"would_run" if dry_run else "ran": statements}, "\n".join(lines), as_json=as_json)


def _rows(count: int | None) -> str:
    return "all rows (row-level security hides their number)" if count is None else f"{count:,} rows"


def _say(what: str) -> Callable[[str, float], None]:
    return lambda name, seconds: out.print(f"{what} {name} in {seconds:.2f} s")
