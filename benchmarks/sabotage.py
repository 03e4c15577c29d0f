"""Ways to break chatdb on purpose. `nox -s bench_selftest` shows that a gate fails for each."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import chatdb
import chatdb.telemetry
from benchmarks.server import BenchServer
from chatdb import branches, search, streaming
from chatdb._core.query import Query


@dataclass(frozen=True)
class Sabotage:
    """A way to break chatdb, the gates that must fail (others may), and the run that shows it."""

    what: str
    falls: tuple[str, ...]
    sql: str = ""
    target: str = ""
    replacement: Any = None
    run: tuple[str, ...] = ("test_counts.py", "--quick", "--benchmark-disable")


async def _looks_first(
    db: Any, *, user_id: str, conversation_id: int | None = None, conversation_key: str | None = None, **rest: Any
) -> list[chatdb.Message]:
    at = {"user_id": user_id, "conversation_id": conversation_id, "conversation_key": conversation_key}
    await chatdb.get_conversation(db, **at)
    return await _get_history(db, **at, **rest)


async def _reset(connection: Any) -> None:
    await connection.execute("select pg_advisory_unlock_all(); close all; unlisten *; reset all")


def _changed(query: Query[Any], old: str, new: str) -> Query[Any]:
    """Return a statement with another text in one place."""
    assert query.sql.count(old) == 1
    changed = copy.copy(query)
    changed.sql = query.sql.replace(old, new)
    return changed


def _in_the_message(query: Query[Any]) -> Query[Any]:
    """Return extend_message with a text that grows in its message instead of in parts."""
    start, end = query.sql.index("part as ("), query.sql.index("select length, null as refusal")
    grown = (
        "grown as (update chatdb.messages set content = content || $7 where user_id = $1 "
        "and conversation_id = (select conversation_id from stream) and seq = (select seq from stream))\n\n"
    )
    return _changed(query, query.sql[start:end], grown)


def _notifies_in_appends(dsn: Any, **options: Any) -> Any:
    """Return a pool that gathers no hints; the server notifies in each append of a pool that should gather them."""
    name = "notifies" if options.pop("notify", False) else "quiet"
    return _create_pool(dsn, server_settings={"application_name": name}, **options)


def _works_on_ten_calls(pool: chatdb.Pool, **options: Any) -> None:
    """Instrument a pool, and work on every tenth call for as long as on ten."""
    number = count(1)
    _instrument(pool, **options)
    pool.add_call_listener(lambda call: time.sleep(1e-3) if next(number) % 10 == 0 else None)


def _later() -> Any:
    """Return what calls functions a second later."""
    loop = asyncio.get_running_loop()
    return SimpleNamespace(call_soon=lambda *arguments: loop.call_later(1, *arguments))


_get_history = chatdb.get_history
_instrument = chatdb.telemetry.instrument
_create_pool = chatdb.create_pool

_CUSTOM_PLANS = (
    "do $$ begin execute format("
    "'alter database %I set plan_cache_mode = force_custom_plan', current_database()); end $$"
)

TIMED_HINTS = ("test_operations.py", "-k", "test_hints")
"""The run that appends with 16 writers, with hints and without."""

TIMED = ("test_operations.py", "-k", "test_operation and asyncio and last_20")
"""The run that times one small read with chatdb, a bare connection and SQLModel."""

TIMED_TELEMETRY = ("test_operations.py", "-k", "test_telemetry and asyncio")
"""The runs that time histories with spans and metrics and without."""

TIMED_READER = ("test_operations.py", "-k", "test_reader and asyncio")
"""The run that times a history of a replica through a reader and without."""

TIMED_BRANCH = ("test_operations.py", "-k", "test_branch and asyncio")
"""The run that times get_branch beside get_history."""

SEARCHED = ("test_search.py", "--quick", "--benchmark-disable")
"""The run that counts searches, moves and exports."""

LOCAL = ("test_locality.py", "--quick", "--benchmark-disable")
"""The run that counts the blocks and bytes of messages."""

IMPORTED = ("test_formats.py", "-k", "test_format and sharegpt")
"""The run that imports a file of plain conversations."""

ALL = {
    "nothing": Sabotage("changes nothing", ()),
    "drop_index": Sabotage(
        "drops the index that serves the list",
        ("plans.unexpected", "list_unarchived.buffers"),
        sql="drop index chatdb.ix_conversations_user_id_active_on_listed",
    ),
    "custom_plans": Sabotage(
        "makes the server plan every call",
        ("plans.custom",),
        sql=_CUSTOM_PLANS,
    ),
    "reset_query": Sabotage(
        "makes the pool send asyncpg's reset query after each call",
        ("history_100.round_trips", "history_100.statements", "append.round_trips"),
        target="chatdb.create_pool",
        replacement=lambda *args, **options: _create_pool(*args, reset=_reset, **options),
    ),
    "two_statements": Sabotage(
        "looks up the conversation before reading its history",
        ("history_100.statements", "history_100.round_trips", "last_20.statements"),
        target="chatdb.get_history",
        replacement=_looks_first,
    ),
    "index_on_updated_at": Sabotage(
        "adds an index on updated_at",
        ("hot.single", "hot.turns"),
        sql="create index on chatdb.conversations (user_id, updated_at desc)",
    ),
    "packed_index": Sabotage(
        "packs the pages of an index of conversations, so that an append splits them",
        ("index.splits",),
        sql="alter index chatdb.ix_conversations_user_id_active_on set (fillfactor = 100); "
        "reindex index chatdb.ix_conversations_user_id_active_on",
    ),
    "no_branches_index": Sabotage(
        "drops the index of the messages that begin a branch",
        ("plans.unexpected", "branch_100.buffers", "branch_100_forked.buffers", "context.buffers"),
        sql="drop index chatdb.ix_messages_user_id_conversation_id_seq_branches",
    ),
    "parent_of_each": Sabotage(
        "stores the parent of each appended message",
        ("append_again.wal", "versions.buffers"),
        sql="create function public.parent_of_each() returns trigger language plpgsql as "
        "'begin new.parent_seq := new.seq - 1; return new; end'; "
        "create trigger parent_of_each before insert on chatdb.messages "
        "for each row execute function public.parent_of_each()",
    ),
    "context_sum": Sabotage(
        "bounds a context with a sum, which could fall again, so that the server reads on",
        ("context.buffers", "context_forked.buffers"),
        target="chatdb.branches._get_context",
        replacement=_changed(branches._get_context, "count(*) filter (where total > $4)", "sum((total > $4)::int)"),
    ),
    "index_on_head_seq": Sabotage(
        "adds an index on head_seq",
        ("switch.wal", "pop_forked.wal"),
        sql="create index on chatdb.conversations (user_id, head_seq)",
    ),
    "text_in_message": Sabotage(
        "lets a text that is streamed grow in its message instead of in parts",
        ("stream.wal_to_size", "stream_random.wal_to_size"),
        target="chatdb.streaming._extend_message",
        replacement=_in_the_message(streaming._extend_message),
    ),
    "extend_raises_revision": Sabotage(
        "makes each flush raise the conversation's revision",
        ("extend.conversations", "extend.blocks", "extend.buffers"),
        target="chatdb.streaming._extend_message",
        replacement=_changed(
            streaming._extend_message,
            "part as (",
            "raised as (update chatdb.conversations set edits = edits + 1 where user_id = $1 "
            "and id = (select conversation_id from stream)),\n\npart as (",
        ),
    ),
    "parts_with_statistics": Sabotage(
        "gathers statistics of the parts, from which the server estimates many parts for each message",
        ("plans.custom",),
        sql="alter table chatdb.message_parts alter user_id set statistics -1, "
        "alter conversation_id set statistics -1, alter seq set statistics -1, alter start set statistics -1; "
        "analyze chatdb.message_parts",
    ),
    "nothing_searched": Sabotage("changes nothing and counts searches, moves and exports", (), run=SEARCHED),
    "words_without_index": Sabotage(
        "searches for words with an expression that the index does not have",
        ("search_words.buffers", "search_words_pending.buffers", "search_words_pending.worst"),
        target="chatdb.search._search_messages_words",
        replacement=_changed(search._search_messages_words, " @@ (select", " || '' @@ (select"),
        run=SEARCHED,
    ),
    "pending_list": Sabotage(
        "lets the list that each search for words reads grow to PostgreSQL's default",
        ("search_words_pending.buffers", "search_words_pending.worst"),
        sql="alter index chatdb.ix_messages_search set (gin_pending_list_limit = 4096)",
        run=SEARCHED,
    ),
    "no_pending_list": Sabotage(
        "makes each append write to all parts of the index",
        ("append_indexed.wal", "append_indexed.wal_to_plain", "append_indexed.buffers", "move_user_indexed.wal"),
        sql="alter index chatdb.ix_messages_search set (fastupdate = off)",
        run=SEARCHED,
    ),
    "search_everyone": Sabotage(
        "searches for a text in the messages of all users",
        ("search_substring.to_own", "search_substring_pending.to_own"),
        target="chatdb.search._search_messages",
        replacement=_changed(search._search_messages, "where user_id = $1\n", "where user_id || '' = $1\n"),
        run=SEARCHED,
    ),
    "plans_differ": Sabotage(
        "drops an index of the messages beside the index for words",
        ("search_plans.changed",),
        sql="drop index chatdb.ix_messages_user_id_conversation_id_seq_branches",
        run=SEARCHED,
    ),
    "export_small_pages": Sabotage(
        "exports pages of 100 messages",
        ("export_user.statements", "export_user.round_trips"),
        target="chatdb.users._MESSAGES_PAGE",
        replacement=100,
        run=SEARCHED,
    ),
    "nothing_rewritten": Sabotage("changes nothing and counts the blocks of messages", (), run=LOCAL),
    "another_order": Sabotage(
        "rewrites the table without changing the order of messages",
        ("locality.blocks",),
        target="chatdb.admin.locality.CLUSTER",
        replacement="vacuum (full, analyze) chatdb.messages",
        run=LOCAL,
    ),
    "larger_messages": Sabotage(
        "adds an index to the messages",
        ("message.bytes",),
        sql="create index on chatdb.messages (user_id, created_at)",
        run=LOCAL,
    ),
    "nothing_imported": Sabotage("changes nothing and imports a file", (), run=IMPORTED),
    "texts_compared": Sabotage(
        "compares each text of a plain conversation character by character",
        ("format_sharegpt.of_least",),
        target="chatdb.formats.items.readable",
        replacement=lambda text: text if all(c != "\0" and not "\ud800" <= c <= "\udfff" for c in text) else "",
        run=IMPORTED,
    ),
    "nothing_hinted": Sabotage("changes nothing and appends with hints", (), run=TIMED_HINTS),
    "notify_in_append": Sabotage(
        "notifies watchers in the transaction of each append",
        ("hints.of_without",),
        sql="create function public.notify() returns trigger language plpgsql as "
        "$$begin if current_setting('application_name') = 'notifies' then "
        "perform pg_notify('chatdb', ' ' || new.conversation_id); end if; return null; end$$; "
        "create trigger notify after insert on chatdb.messages for each row execute function public.notify()",
        target="chatdb.create_pool",
        replacement=_notifies_in_appends,
        run=TIMED_HINTS,
    ),
    "nothing_told": Sabotage("changes nothing and times a history with spans and metrics", (), run=TIMED_TELEMETRY),
    "slow_listener": Sabotage(
        "waits a tenth of a millisecond in the listener of each call",
        ("telemetry.to_without", "telemetry.late"),
        target="chatdb.telemetry.instrument",
        replacement=lambda pool, **options: pool.add_call_listener(lambda call: time.sleep(1e-4)),
        run=TIMED_TELEMETRY,
    ),
    "slow_now_and_then": Sabotage(
        "works for a millisecond after every tenth call, which the median call does not see",
        ("telemetry.to_without",),
        target="chatdb.telemetry.instrument",
        replacement=_works_on_ten_calls,
        run=TIMED_TELEMETRY,
    ),
    "late_spans": Sabotage(
        "makes the spans a second later, when nobody measures",
        ("telemetry.late",),
        target="chatdb.telemetry.get_running_loop",
        replacement=_later,
        run=TIMED_TELEMETRY,
    ),
    "slow_span": Sabotage(
        "takes half a millisecond more to make each span",
        ("telemetry.to_without", "telemetry.of_without"),
        target="chatdb.telemetry.time_ns",
        replacement=lambda: time.sleep(5e-4) or time.time_ns(),
        run=TIMED_TELEMETRY,
    ),
    "slow_lookup": Sabotage(
        "takes 3 µs to find the listeners of a pool",
        ("telemetry.unused",),
        target="chatdb._core.asyncpg_private.listeners_of",
        replacement=lambda db: sum(range(300)),
        run=TIMED_TELEMETRY,
    ),
    "nothing_replicated": Sabotage("changes nothing and times a history of a replica", (), run=TIMED_READER),
    "slow_choice": Sabotage(
        "sleeps before it chooses a replica",
        ("reader.to_history",),
        target="chatdb.replicas.Replicas.choose",
        replacement=lambda replicas, user: time.sleep(1e-5) or replicas._replicas[0],
        run=TIMED_READER,
    ),
    "nothing_branched": Sabotage("changes nothing and times get_branch", (), run=TIMED_BRANCH),
    "branch_planned": Sabotage(
        "makes the server plan every call, which takes longer for get_branch than for get_history",
        ("branch_100.to_history",),
        sql=_CUSTOM_PLANS,
        run=TIMED_BRANCH,
    ),
    "nothing_timed": Sabotage("changes nothing and times the last 20", (), run=TIMED),
    "asyncpgs_way": Sabotage(
        "makes the pool fall back to asyncpg's own way, as if asyncpg had other private names",
        ("last_20.to_raw",),
        target="chatdb._core.asyncpg_private.FAST",
        replacement=False,
        run=TIMED,
    ),
}


@contextmanager
def applied(name: str | None, server: BenchServer, database: str) -> Iterator[None]:
    """Apply a sabotage, if one is named, until the end of the block."""
    chosen = ALL.get(name or "", Sabotage("", ()))
    if chosen.sql:
        with server.connect(database) as connection:
            connection.execute(chosen.sql)
    if chosen.target:
        with patch(chosen.target, chosen.replacement):
            yield
    else:
        yield
