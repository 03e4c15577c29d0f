"""The commands for whoever runs the database: migrate, rollback, check, adopt, link-users and protect."""

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

Wait = Annotated[
    float,
    typer.Option(
        min=0, max=86_400, metavar="SECONDS", help="Maximum wait for another operator command and for table locks."
    ),
]


def migrate(
    to: Annotated[
        str | None, typer.Option(metavar="NAME", help="The last migration to apply, by its name or number.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the SQL that would be run, and run none.")] = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Create chatdb's tables, or bring them up to this release; does nothing if they are.

    The files and the bookkeeping are those of yoyo apply, and either may follow the other. Many may run at once. One
    that was killed is taken up where it was; an invalid index is rebuilt.
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
        typer.Option(metavar="NAME", help="The last migration to keep, by its name or number; 0 takes all back."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """Take the last migration back, or all after --to. This deletes the data of the tables that it drops."""
    from chatdb.admin.migrate import last_migrations, rollback_migrations

    with operators_database() as (dsn, database):
        last = last_migrations(dsn, to=to)
        names = [file.name for file, _ in last]
        if not as_json or not yes:
            for file, tables in last:
                counted = ", ".join(f"{_rows(count)} of {table}" for table, count in tables.items())
                err.print(f"{file.name}: {file.warning}" + (f" Deletes {counted}." if counted else ""), style="yellow")
        if last and not dry_run:
            confirm(f"Take back {len(last)} migrations of {database}, with all data that they hold?", yes=yes)
            report = None if as_json else _say("took back")
            names = rollback_migrations(dsn, to=to, expected=names, wait=wait, report=report)
    rows = {table: count for _, tables in last for table, count in tables.items()}
    done = {"would_take_back" if dry_run else "taken_back": names, "rows": rows}
    print_result(done, "" if last else "nothing to take back", as_json=as_json)


_COLORS = {"ok": "green", "note": "cyan", "missing": "red", "different": "red"}


def check(
    role: Annotated[
        str | None, typer.Option(metavar="NAME", help="A role whose privileges to check, such as the service's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Compare the database with what this release needs, and say how to fix what is wrong.

    Nothing is changed. What is missing or different comes last, then the verdict. Exit status 1 if something is wrong.
    """
    from chatdb.admin.check.inspection import inspect, is_wrong

    with operators_database() as (dsn, _):
        found = inspect(dsn, role=role)
    wrong = sum(map(is_wrong, found))
    verdict = "ok: the database has what this release needs"
    if wrong:
        verdict = f"not ok: {wrong} things are missing or different, see the last lines above"
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
    """Show a finding in a line for its name, whole at 80 columns, and lines for what there is to say of it."""
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
            "--delete-gone", help="Delete from chatdb what was adopted and is gone from the older tables since; asks."
        ),
    ] = False,
    yes: Yes = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Bring conversations and messages of an older system over, from its tables in public, which stay as they are.

    The older system can go on writing, and the next run brings what came since. What does not fit is kept aside, with
    the reason. One that was killed is taken up where it was.
    """
    from chatdb.admin.adopt import Counts
    from chatdb.admin.adopt import adopt as run

    if delete_gone and not (dry_run or yes or sys.stdin.isatty()):
        fail("--delete-gone asks before it deletes. Say so with --yes")

    def asked(gone: Counts) -> bool:
        bar.stop()
        return yes or ask(f"Delete {gone} from {database}, as far as nobody has appended there?")

    with operators_database() as (dsn, database), progress("adopting") as bar:
        task = bar.add_task("messages", total=None)
        report = run(
            dsn,
            dry_run=dry_run,
            delete_gone=asked if delete_gone else None,
            wait=wait,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_result(report.as_dict(), report.described(), as_json=as_json)


def link_users(
    table: Annotated[
        str | None, typer.Option(metavar="NAME", help="The host's own table of users, as in SQL: public.users.")
    ] = None,
    column: Annotated[str, typer.Option(metavar="NAME", help="Its column that has what chatdb calls user_id.")] = "id",
    unlink: Annotated[bool, typer.Option("--unlink", help="Take the link back. Deletes no rows.")] = False,
    dry_run: DryRun = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Link conversations to the host's users, so that deleting a user there deletes his conversations.

    It is optional. The column must be unique, of a type like text, and have all users who have conversations. Writers
    go on meanwhile. One that was killed is taken up where it was.
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
        raise typer.BadParameter("name the host's table of users, or --unlink", param_hint="--table")
    try:
        with operators_database() as (dsn, _):
            link = link_users(dsn, table=table, column=column, wait=wait, dry_run=dry_run)
    except UsersMissingError as error:
        if not as_json:
            raise
        print_json({"missing": error.users, "total": error.total})
        raise typer.Exit(1) from None
    text = f"conversations are linked to {link.table}({link.column}) already"
    if link.steps:
        said = "would link" if dry_run else "linked"
        text = f"{said} conversations to {link.table}({link.column}): {', '.join(link.steps)} the foreign key"
    result = {"table": link.table, "column": link.column, "would_do" if dry_run else "done": link.steps}
    print_result(result, text, as_json=as_json)


def protect(
    off: Annotated[bool, typer.Option("--off", help="Switch it off again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the SQL that would be run, and run none.")] = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Switch row-level security on: a statement reaches only rows of the user whom its transaction names.

    From then on the service opens its pool with create_pool(row_level_security=True), or works inside
    chatdb.transaction(db, user_id=...): a statement that names no user is an error.
    Superusers and roles with BYPASSRLS are not held back. Does nothing if all is as it should be.
    """
    from chatdb.admin.row_security import protect_tables, protection_statements

    with operators_database() as (dsn, _):
        statements = protection_statements(dsn, off=off) if dry_run else protect_tables(dsn, off=off, wait=wait)
    lines = [f"{statement};" for statement in statements] or ["nothing to do"]
    if statements and not dry_run:
        lines.append(f"row-level security is {'off' if off else 'on'}")
    print_result({"would_run" if dry_run else "ran": statements}, "\n".join(lines), as_json=as_json)


def _rows(count: int | None) -> str:
    return "all rows, which row-level security hides from this role," if count is None else f"{count:,} rows"


def _say(what: str) -> Callable[[str, float], None]:
    return lambda name, seconds: out.print(f"{what} {name} in {seconds:.2f} s")
