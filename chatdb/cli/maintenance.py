"""Operator commands on the stored data: abort-streams, prune, search-index, repack and distribute."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final

import typer

from chatdb.cli.console import AsJson, DryRun, Wait, Yes, confirm, err, out, print_result, progress
from chatdb.cli.database import operators_database
from chatdb.cli.durations import parse_duration
from chatdb.cli.signals import run
from chatdb.errors import InvalidInputError
from chatdb.pool import create_pool

_RATE: Final = 5_000
"""Messages a second; docs/operations/prune.md has the measurements."""

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

    from chatdb.admin.citus import DistributionPlan
    from chatdb.admin.locality import RepackPlan
    from chatdb.admin.search_index import Cost, SearchIndex, Step


def abort_streams(
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="TIME",
            help="Abort messages to which nothing was added for this time: 90s, 30m, 1h or 7d. Choose a time longer "
            "than any pause of a stream that is alive.",
        ),
    ],
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """
    Abort messages of all users that a crash left streaming.

    Shows how many it would abort and asks for confirmation. An aborted message
    keeps the text that was stored. A message that is extended, finished or
    deleted meanwhile is left alone. If a run is killed, run the command again.
    Exits with status 1 if another transaction kept a conversation locked.
    Behind chatdb protect, needs a superuser or a role with BYPASSRLS.
    """
    from chatdb.admin.streams import AbortReport, IdleStreams, abort_idle_streams, count_idle_streams

    age = parse_duration("--older-than", older_than)

    async def count(dsn: str) -> IdleStreams:
        async with create_pool(dsn, statement_cache_size=0) as pool:
            return await count_idle_streams(pool, older_than=age, dry_run=dry_run)

    async def abort(dsn: str, found: IdleStreams) -> AbortReport:
        with progress("aborting") as bar:
            task = bar.add_task("messages", total=found.messages)
            async with create_pool(dsn, statement_cache_size=0, notify=True) as pool:
                return await abort_idle_streams(pool, found, progress=lambda done: bar.update(task, completed=done))

    with operators_database() as (dsn, database):
        found = run(count(dsn))
        if dry_run:
            result = {"messages": found.messages, "users": found.users}
            print_result({"would_abort": result}, f"would abort {_streams(**result)}", as_json=as_json)
            return
        if found.messages:
            confirm(
                f"Abort {_streams(found.messages, found.users)} of {database}, to which nothing was added for "
                f"{older_than}?",
                yes=yes,
            )
        report = run(abort(dsn, found)) if found.messages else AbortReport()
    lines = [f"aborted {_streams(report.messages, report.users)}"]
    if report.left_alone:
        lines.append(f"left alone: {report.left_alone:,} messages that were extended, finished or deleted meanwhile")
    if report.locked:
        lines.append(f"locked: {report.locked:,} messages, in conversations that other transactions lock: run it again")
    result = {"messages": report.messages, "users": report.users}
    numbers = {"aborted": result, "left_alone": report.left_alone, "locked": report.locked}
    print_result(numbers, "\n".join(lines), as_json=as_json)
    if report.locked:
        raise typer.Exit(1)


class SearchIndexAction(StrEnum):
    """The actions of `chatdb search-index`."""

    CREATE = "create"
    DROP = "drop"
    STATUS = "status"


def search_index(
    action: Annotated[SearchIndexAction, typer.Argument(help="What to do.", show_default=False)],
    dry_run: DryRun = False,
    yes: Yes = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Create or drop the index for searching whole words, or show its state.

    Optional: search_messages needs it only for mode "words". create prints what
    it costs, then builds it while readers and writers go on. It waits for
    transactions that are open. If a run is killed, run the command again, or
    drop what is left. drop asks for confirmation, which --yes gives. --dry-run
    and --wait apply to create and drop. Run it as the owner of chatdb's tables.
    """
    if action is SearchIndexAction.CREATE:
        _create_search_index(dry_run=dry_run, wait=wait, as_json=as_json)
    elif action is SearchIndexAction.DROP:
        _drop_search_index(dry_run=dry_run, yes=yes, wait=wait, as_json=as_json)
    else:
        from chatdb.admin.search_index import search_index_status

        with operators_database() as (dsn, _):
            index = search_index_status(dsn)
        result = {"exists": index.exists, "valid": index.is_valid, "building": index.is_building, "size": index.size}
        print_result(result, _state_of(index), as_json=as_json)


def _create_search_index(*, dry_run: bool, wait: float, as_json: bool) -> None:
    from chatdb.admin.search_index import create_search_index, estimate_search_index

    if dry_run:
        with operators_database() as (dsn, _):
            index, cost = estimate_search_index(dsn)
        would = {"would_create": not index.is_valid} | ({} if index.is_valid else cost._asdict())
        text = "nothing to do" if index.is_valid else f"would create the search index: {_cost(cost)}"
        print_result(would, text, as_json=as_json)
        return
    with operators_database() as (dsn, _), progress("search index:") as bar:
        build = create_search_index(
            dsn,
            wait=wait,
            progress=_shown(bar),
            on_start=lambda cost: err.print(f"building the search index: {_cost(cost)}", style="yellow"),
        )
    lines = ["dropped the invalid index of an earlier run"] if build.dropped_invalid else []
    created = f"created the search index in {build.seconds:.1f} s: {_bytes(build.size)}"
    lines.append(created if build.created else f"nothing to do: the search index is valid, {_bytes(build.size)}")
    print_result(build._asdict(), "\n".join(lines), as_json=as_json)


def _drop_search_index(*, dry_run: bool, yes: bool, wait: float, as_json: bool) -> None:
    from chatdb.admin.search_index import drop_search_index, search_index_status

    with operators_database() as (dsn, database):
        index = search_index_status(dsn)
        if index.exists and not dry_run:
            confirm(f"Drop the search index of {database}, {_bytes(index.size)}? Mode words stops working.", yes=yes)
            with progress("search index:") as bar:
                index = drop_search_index(dsn, wait=wait, progress=_shown(bar))
    said = "would drop" if dry_run else "dropped"
    text = (
        f"{said} the search index, {_bytes(index.size)}" if index.exists else "nothing to do: there is no search index"
    )
    print_result({said.replace(" ", "_"): index.exists, "size": index.size}, text, as_json=as_json)


def _shown(bar: Progress) -> Callable[[Step], None]:
    """Return a function that shows each step, and names a transaction once if it is waited for longer."""
    task = bar.add_task("starting", total=None)
    seen: Counter[int] = Counter()

    def show(step: Step) -> None:
        bar.update(task, description=step.phase, completed=step.done, total=step.total or None)
        if step.locker is not None:
            seen[step.locker] += 1
            if seen[step.locker] == 3:
                err.print(f"waiting for the transaction of server process {step.locker} to end", style="yellow")

    return show


def _state_of(index: SearchIndex) -> str:
    if not index.exists:
        return "there is no search index: chatdb search-index create"
    if index.is_building:
        part = f", {index.done:,} of {index.total:,} blocks" if index.total else ""
        return f"is being built{f': {index.phase}' if index.phase else ''}{part}"
    if not index.is_valid:
        return "is invalid, because a build ended early: run chatdb search-index create again, or drop"
    if not index.is_current:
        return "is defined differently, so no statement uses it: run chatdb search-index drop, then create"
    return f"valid, {_bytes(index.size)}"


def _cost(cost: Cost) -> str:
    return (
        f"about {cost.messages:,} messages in {_bytes(cost.table_bytes)}, an index of about "
        f"{_bytes(cost.index_bytes)}, and {_seconds(cost.seconds)} or so. From then on, an append takes about twice as "
        "long and writes about nine times the WAL"
    )


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return "a minute"
    return f"{seconds / 60:.0f} minutes" if seconds < 5_400 else f"{seconds / 3600:.1f} hours"


def _bytes(size: int) -> str:
    if size < 2**20:
        return f"{size / 2**10:.0f} kB"
    return f"{size / 2**20:.0f} MB" if size < 2**30 else f"{size / 2**30:,.1f} GB"


def prune(
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="TIME",
            help="Delete conversations to which no message was added for this time: 365d, 12h or 90s.",
        ),
    ],
    rate: Annotated[
        int, typer.Option(min=1, max=1_000_000, metavar="N", help="Maximum number of messages to delete per second.")
    ] = _RATE,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """
    Delete conversations of all users that were last active long ago.

    The time of the last activity is updated_at: when the last message was added
    or the conversation was created. Deletes archived and pinned conversations
    too. Shows how many it would delete and asks for confirmation. A conversation
    that another transaction locks, or that becomes active meanwhile, is left
    alone. If a run is killed, run the command again. Behind chatdb protect,
    needs a superuser or a role with BYPASSRLS.
    """
    from chatdb.admin.retention import PruneReport, count_old_conversations, prune_conversations

    if re.fullmatch("[0-9]+m", older_than):
        raise InvalidInputError(
            "--older-than", "m would be minutes, not months: write days or hours, as in 365d or 12h"
        )
    age = parse_duration("--older-than", older_than, examples="365d, 12h or 90s")
    with operators_database() as (dsn, database):
        found = count_old_conversations(dsn, older_than=age, dry_run=dry_run)
        since = f"{found.inactive_since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        # deleted messages count too
        counts = {"conversations": found.conversations, "max_messages": found.messages, "users": found.users}
        text = f"{found.conversations:,} conversations of {found.users:,} users, with up to {found.messages:,} messages"
        if dry_run:
            would = {"would_delete": counts, "inactive_since": found.inactive_since.isoformat()}
            print_result(would, f"would delete {text}, inactive since {since}", as_json=as_json)
            return
        report = PruneReport()
        if found.conversations:
            confirm(f"Delete {text}, inactive since {since}, from {database}?", yes=yes)
            with progress("deleting") as bar:
                task = bar.add_task("messages", total=found.messages)
                report = prune_conversations(
                    dsn, found, rate=rate, progress=lambda done: bar.update(task, completed=done)
                )
    counts = {"conversations": report.conversations, "messages": report.messages, "users": report.users}
    lines = [
        f"deleted {report.conversations:,} conversations of {report.users:,} users, with {report.messages:,} messages"
    ]
    if report.left_alone:
        lines.append(f"left alone: {report.left_alone:,} conversations that were locked or became active: run it again")
    result = {"deleted": counts, "left_alone": report.left_alone, "inactive_since": found.inactive_since.isoformat()}
    print_result(result, "\n".join(lines), as_json=as_json)


def _streams(messages: int, users: int) -> str:
    return f"{messages:,} streaming messages of {users:,} users"


def repack(
    dry_run: DryRun = False,
    yes: Yes = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Bring the messages of each conversation together on disk.

    Messages are stored in the order in which all users write them. This command
    rewrites the table in the order of conversations, while readers and writers
    go on: with pg_repack if the database has that extension, and with REPACK
    (CONCURRENTLY) on PostgreSQL 19, which is not tested yet. Without either it
    changes nothing, prints the CLUSTER statement that locks the table, and
    exits with status 1. Shows how much it would rewrite and asks for
    confirmation. Run it as a superuser, or as the owner of chatdb's tables.
    """
    from chatdb.admin.locality import Method, plan_repack, repack_messages

    with operators_database() as (dsn, database):
        plan = plan_repack(dsn)
        is_possible = plan.method is not Method.CLUSTER
        if dry_run or not is_possible:
            result = plan._asdict() | {"blocks": plan.scatter.per_history}
            del result["scatter"]
            said = {"would_repack" if dry_run else "repacked": is_possible}
            print_result(said | result, _repack_text(plan), as_json=as_json)
            if dry_run:
                return
            raise typer.Exit(1)
        confirm(f"Rewrite chatdb.messages of {database}? {_repack_cost(plan)}.", yes=yes)
        done = repack_messages(dsn, wait=wait, on_wait=_say_once())
    text = (
        f"rewrote chatdb.messages in {done.seconds:.1f} s, from {_bytes(done.size_before)} to {_bytes(done.size)}\n"
        f"before: {done.scatter_before}\nnow: {done.scatter}"
    )
    numbers = {
        "repacked": True,
        "method": done.method,
        "seconds": done.seconds,
        "size_before": done.size_before,
        "size": done.size,
        "blocks_before": done.scatter_before.per_history,
        "blocks": done.scatter.per_history,
    }
    print_result(numbers, text, as_json=as_json)


def _repack_cost(plan: RepackPlan) -> str:
    return (
        f"{plan.method} rewrites about {plan.messages:,} messages, needs up to {_bytes(2 * plan.size)} of free disk "
        f"space, and takes {_seconds(plan.seconds)} or so. Now {plan.scatter}"
    )


def _repack_text(plan: RepackPlan) -> str:
    from chatdb.admin.locality import CLUSTER, Method

    if plan.method is not Method.CLUSTER:
        return f"would rewrite chatdb.messages: {_repack_cost(plan)}"
    return (
        f"nothing was changed: {plan.reason}\n"
        "Or run this as the owner of the table while nobody uses the service. It locks chatdb.messages against readers "
        f"and writers until it ends:\n\n{CLUSTER};\n\n{_repack_cost(plan)}"
    )


def _say_once() -> Callable[[int], None]:
    """Return a function that names each transaction that is waited for once."""
    seen: set[int] = set()

    def say(pid: int) -> None:
        if pid not in seen:
            seen.add(pid)
            err.print(f"waiting for the transaction of server process {pid} to end", style="yellow")

    return say


def distribute(
    shards: Annotated[
        int, typer.Option(min=1, max=1024, help="Shards of each table. To change it later, undo and run again.")
    ] = 32,
    undo: Annotated[bool, typer.Option("--undo", help="Bring the rows back to the coordinator.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    wait: Wait = 60,
    as_json: AsJson = False,
) -> None:
    """
    Distribute the tables by user over the nodes of a Citus cluster.

    Run it on the coordinator, with any number of rows. One transaction copies
    them: writers wait meanwhile, and with --undo readers too. After an error,
    the tables are as before. Shows what it would do and for how long calls
    wait, and asks for confirmation. Does nothing if the tables are distributed.
    """
    from chatdb.admin.citus import distribute_tables, gather_tables, plan_distribution

    with operators_database() as (dsn, database):
        plan = plan_distribution(dsn, shards=shards, undo=undo)
        done = "gathered" if undo else "distributed"
        result: dict[str, object] = plan._asdict()
        if plan.is_done:
            text = f"nothing to do: the tables are {'not ' if undo else ''}distributed"
            print_result({done: False} | result, text, as_json=as_json)
            return
        if dry_run:
            text = f"would {_distribution_text(plan, undo=undo)}"
            print_result({f"would_have_{done}": True} | result, text, as_json=as_json)
            return
        confirm(f"{_distribution_text(plan, undo=undo).capitalize()}. Start on {database}?", yes=yes)

        def say(step: str, seconds: float) -> None:
            if not as_json:
                out.print(f"{step}: {seconds:.1f} s")

        if undo:
            plan = gather_tables(dsn, wait=wait, report=say)
        else:
            plan = distribute_tables(dsn, shards=shards, wait=wait, report=say)
    text = "done: restart services whose pools were opened before chatdb's functions existed" if not undo else "done"
    print_result({done: True} | plan._asdict(), text, as_json=as_json)


def _distribution_text(plan: DistributionPlan, *, undo: bool) -> str:
    if not plan.moves_rows:
        return "finish what a run left: the tables are distributed, and no rows are copied"
    if undo:
        where, who = "bring the tables back to the coordinator", "all calls wait"
    else:
        where = f"distribute the tables by user, in {plan.shards} shards on {plan.nodes} nodes"
        who = "readers go on, and writers wait"
    return f"{where}, and copy about {plan.messages:,} messages; {who} meanwhile, for about {plan.seconds:.0f} s"
