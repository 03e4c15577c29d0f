"""
The gates: the limits of a run, one line each. If a gate fails, `nox -s bench` fails, names it and prints the margin.

A gate judges one figure from the suites. If its suite ran and recorded no figure, the gate fails. Ratios compare
medians of one run on asyncio's own loop, with the rounds of all clients interleaved. The report also shows ratios on
uvloop, but no gate judges them: a bare connection is faster there, so the same Python code weighs a few percent more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["target", "counts", "ratios", "growth", "bulk", "formats", "search", "locality"]


@dataclass(frozen=True)
class Gate:
    """A limit for a figure. Every run judges the `quick` gates; only the full run judges the others."""

    name: str
    title: str
    limit: float
    unit: str
    group: Group
    at_most: bool = True
    quick: bool = False

    def passes(self, value: float) -> bool:
        """Return whether a value is within the limit."""
        return value <= self.limit if self.at_most else value >= self.limit

    def margin(self, value: float) -> float:
        """Return the margin as a fraction of the limit, negative if the gate fails."""
        better = self.limit - value if self.at_most else value - self.limit
        return better / self.limit if self.limit else better

    def judged(self, value: float) -> str:
        """Return the result as one line of text."""
        bound = "at most" if self.at_most else "at least"
        unit = f" {self.unit}" if self.unit else ""
        words = "better" if self.passes(value) else "worse"
        by = f"{abs(self.margin(value)):.0%}" if self.limit else f"{abs(value - self.limit):g}"
        return f"{self.title}: {value:,.4g}{unit}, {bound} {self.limit:,g}{unit}, {by} {words}"


def _at_most(name: str, title: str, limit: float, unit: str, group: Group, *, quick: bool = False) -> Gate:
    return Gate(name, title, limit, unit, group, quick=quick)


def _at_least(name: str, title: str, limit: float, unit: str, group: Group, *, quick: bool = False) -> Gate:
    return Gate(name, title, limit, unit, group, at_most=False, quick=quick)


OPERATIONS = {
    "history_100": "history of 100, random conversations",
    "history_100_hot": "history of 100, same 20 each time",
    "last_20": "last 20",
    "page_middle": "page of 100 in the middle of 10,000",
    "whole_10000": "whole conversation of 10,000",
    "append": "append one",
    "turn": "append a turn",
    "append_keyed": "append with a key, new",
    "append_again": "append with a key, repeated",
    "list_20": "list 20 of 10 conversations",
    "list_20_spread": "list 20 of 10,000, spread over a year",
    "list_20_busy": "list 20 of 10,000, all on one day",
    "create": "create a conversation",
    "create_first": "create a conversation with its first message",
    "get_or_create": "get or create",
    "delete": "delete a conversation of 100",
}
"""The operations to time and count, with their titles."""

COUNTED_ONLY = {
    "history_by_key": "history of 100, by the conversation's key",
    "history_before_key": "history of 100 before a message's key",
    "list_messages_after_key": "100 messages after a message's key",
    "get_by_key": "get a conversation by its key",
    "get_message_by_key": "get a message by both keys",
    "append_by_key": "append one, by the conversation's key",
    "turn_by_key": "append a turn, by the conversation's key",
    "create_first_keyed": "create a conversation with a key and its first message",
    "append_create": "append with create=True, stored conversation",
    "append_create_new": "append with create=True, new conversation",
    "append_expected": "append with expected",
    "append_patch": "append with a patch of the conversation's metadata",
    "turn_skip": "append a turn with on_existing=skip, half of it stored",
    "upsert_conversation": "upsert_conversation, stored",
    "upsert_conversation_new": "upsert_conversation, new",
    "upsert_message": "upsert_message, stored",
    "upsert_message_new": "upsert_message, new",
    "load": "load_conversation with 100 messages",
    "load_by_key": "load_conversation with 100 messages, by key",
    "replace_after": "replace the last turn",
    "pop": "pop_message",
    "update_patch": "update_conversation with a patch",
    "update_message_patch": "update_message with a patch",
    "list_after": "list 20 of 10,000 after a cursor",
    "list_after_key": "list 20 of 3,500 after a key, 95 % archived",
    "list_unarchived": "list 20 of 3,500, 95 % archived",
    "list_archived": "list 20 archived ones of 3,500",
    "list_both": "list 20 of 3,500 with the archived ones",
    "list_created": "list 20 of 10,000 by creation, latest first",
    "list_created_ascending": "list 20 of 10,000 by creation, oldest first",
    "previews": "previews of 10 conversations",
    "pinned": "list 20 pinned ones of 3,500",
    "branch_100": "get_branch of 100, unbranched",
    "branch_100_forked": "get_branch of 100 with 8 forks",
    "load_forked": "load_conversation with 100 messages and 8 forks",
    "previews_forked": "previews of 20 conversations with 8 forks",
    "versions": "list_versions of 100, unbranched",
    "versions_forked": "list_versions of 100 with 8 forks",
    "context": "get_context of 8,000 tokens of 10,000 messages",
    "context_forked": "get_context of 8,000 tokens of 10,000 messages with 8 forks",
    "append_parent": "append with parent_seq",
    "switch": "switch_branch",
    "pop_forked": "pop_message with 8 forks",
    "delete_message_forked": "delete_message with 8 forks",
    "delete_branch": "delete_branch of 30 messages",
    "fork": "fork_conversation of 100",
    "start": "start_message",
    "extend": "extend_message, 1 kB",
    "read": "read_message, the last 1 kB of 20 kB",
    "finish": "finish_message, 100 parts of 1 kB",
    "streaming": "list_streaming, 20 messages of 20 kB",
    "history_streamed": "history of 100, the newest message streamed, 20 kB",
    "branch_streamed": "get_branch of 100, the newest message streamed, 20 kB",
    "poll": "poll of 1,000 watched conversations",
}
"""The operations that are only counted: chatdb's other ways to address, write and list."""

IMPORTED_FORMATS = (
    "chatgpt", "claude", "messages", "open-webui", "librechat", "gemini", "grok", "deepseek", "sharegpt",
)  # fmt: skip
"""The formats of files that `test_formats.py` imports."""

_OF_LEAST = "rate relative to json.loads and COPY"

COUNTED = [*(name for name in OPERATIONS if name not in {"history_100_hot", "whole_10000"}), *COUNTED_ONLY]
"""The operations that must take one statement and one round trip."""

STREAMS = {
    "stream": "stream of 100 kB in 100 flushes, natural text",
    "stream_random": "stream of 100 kB in 100 flushes, random text",
    "stream_checkpoint": "stream of 100 kB in 100 flushes, natural text, after a checkpoint",
    "stream_random_checkpoint": "stream of 100 kB in 100 flushes, random text, after a checkpoint",
}
"""Whole streams, with start and finish. The WAL of those after a checkpoint, with full pages, is only reported."""

WATCHED = {
    "watch_hints": "append until a watcher has the message, with hints",
    "watch_polls": "append until a watcher has the message, by polling every 0.5 s",
}
"""The latency of a watcher, which is only reported."""

SEARCHED = {
    "search_words": "search for a rare word among 26,000 messages",
    "search_words_pending": "search for a rare word, full pending list",
    "search_substring": "search for a text among 26,000 messages",
    "search_substring_indexed": "search for a text among 26,000 messages, with the index for words",
    "append_indexed": "append one, with the index for words",
    "move_user": "move_user, 10 conversations of 100",
    "move_user_indexed": "move_user, 10 conversations of 100, with the index for words",
    "export_user": "export_user, 10 conversations of 100",
}
"""The operations on the data to search. A quick run has a tenth of it."""

TITLES = OPERATIONS | COUNTED_ONLY | STREAMS | WATCHED | SEARCHED

BUFFERS = {
    "history_100": 112,
    "last_20": 26,
    "list_20_spread": 30,
    "list_20_busy": 230,
    "append": 36,
    "turn": 50,
    "append_keyed": 44,
    "append_again": 30,
    "list_20": 8,
    "create": 16,
    "create_first": 32,
    "get_or_create": 4,
    "history_by_key": 128,
    "history_before_key": 115,
    "list_messages_after_key": 115,
    "get_by_key": 9,
    "get_message_by_key": 16,
    "append_by_key": 28,
    "turn_by_key": 45,
    "create_first_keyed": 40,
    "append_create": 34,
    "append_create_new": 41,
    "append_expected": 30,
    "append_patch": 42,
    "turn_skip": 46,
    "upsert_conversation": 9,
    "upsert_conversation_new": 22,
    "upsert_message": 37,
    "upsert_message_new": 41,
    "load": 120,
    "load_by_key": 124,
    # the foreign key of message_parts looks for the parts of each deleted message: 4 to 5 accesses
    "replace_after": 62,
    "pop": 38,
    "update_patch": 10,
    "update_message_patch": 34,
    "list_after": 30,
    "list_after_key": 40,
    "list_unarchived": 40,
    "list_archived": 12,
    "list_both": 12,
    "list_created": 10,
    "list_created_ascending": 10,
    "previews": 75,
    "pinned": 30,
    "branch_100": 120,
    "branch_100_forked": 70,
    "load_forked": 75,
    "previews_forked": 95,
    "versions": 8,
    "versions_forked": 125,
    "context": 20,
    "context_forked": 50,
    "append_parent": 50,
    "switch": 76,
    "pop_forked": 47,
    "delete_message_forked": 46,
    "delete_branch": 270,  # 30 deleted messages
    "fork": 1_450,
    "start": 42,
    "extend": 29,
    "read": 18,
    "finish": 500,
    "streaming": 620,
    "history_streamed": 140,
    "branch_streamed": 146,
    "poll": 4_100,
}
"""The most blocks that a call may read or write, by operation."""

WAL = {
    # mostly first appends of a day, which write to each index of the conversation; migration 0005 added two
    "append": 1_450,
    "turn": 2_600,
    "append_keyed": 1_650,
    "append_again": 1_050,
    "create": 650,
    "create_first": 1_560,
    "append_by_key": 1_050,
    "turn_by_key": 2_550,
    "create_first_keyed": 1_880,
    "append_create": 1_150,
    "append_create_new": 1_940,
    "append_expected": 1_100,
    "append_patch": 1_450,
    "turn_skip": 1_400,
    "upsert_conversation": 250,
    "upsert_conversation_new": 1_080,
    "upsert_message": 1_200,
    "upsert_message_new": 1_280,
    "replace_after": 2_500,
    "pop": 260,
    "update_patch": 220,
    "update_message_patch": 1_350,
    "append_parent": 1_700,
    "switch": 180,
    "pop_forked": 240,
    "delete_message_forked": 330,
    "delete_branch": 1_950,
    "fork": 114_000,
    "start": 1_080,
    "extend": 1_720,
    "finish": 61_000,
}
"""The most bytes of WAL that a call may write, by operation, without the splits of index pages."""

_FULL_LIST, _INDEXED = SEARCHED["search_words_pending"], SEARCHED["append_indexed"]
_TO_OWN, _TO_PLAIN = "buffers relative to reading the user's messages", "relative to one without"

SEARCH_STATEMENTS = {"export_user": 3}
"""Statements and round trips of the operations on the data to search that take more than one."""

SEARCH_BUFFERS = {
    "search_words": 60,
    "search_words_pending": 60,
    "append_indexed": 110,  # some of the appends merge the pending list into the index
    # each of 1,000 messages: a row and an entry in each index, and for the index of words one for each word
    "move_user": 27_000,
    "move_user_indexed": 125_000,
    "export_user": 1_050,
}
"""The most blocks, by operation on the data to search."""

SEARCH_WAL = {
    "append_indexed": 20_000,
    "move_user": 950_000,
    "move_user_indexed": 18_000_000,
}
"""The most bytes of WAL, by operation on the data to search."""

GATES = [
    # the target: p99 in milliseconds
    _at_most("warm.p99", "history of 100, warm, p99", 100, "ms", "target", quick=True),
    _at_most("cold.p99", "history of 100, server restarted, caches dropped, p99", 100, "ms", "target", quick=True),
    _at_most("near.p99", "history of 100, 1 ms round trip, p99", 100, "ms", "target", quick=True),
    _at_most("far.p99", "history of 100, 10 ms round trip, p99", 100, "ms", "target", quick=True),
    _at_most("tasks.p99", "history of 100, 64 tasks on a pool of 16, p99", 100, "ms", "target", quick=True),
    _at_most("large.p99", "history of 100, 10 M messages, p99", 100, "ms", "target"),
    _at_most("large_cold.p99", "history of 100, 10 M messages, cold, p99", 100, "ms", "target"),
    _at_most("large_tasks.p99", "history of 100, 10 M messages, 64 tasks on a pool of 16, p99", 100, "ms", "target"),
    _at_most("large_far.p99", "history of 100, 10 M messages, 10 ms round trip, p99", 100, "ms", "target"),
    # counts, which have no noise
    *(
        _at_most(f"{name}.{count}", f"{TITLES[name]}: {count.replace('_', ' ')}", 1, "", "counts", quick=True)
        for count in ("statements", "round_trips")
        for name in COUNTED
    ),
    *(
        _at_most(f"{name}.buffers", f"{TITLES[name]}: buffers", limit, "", "counts", quick=True)
        for name, limit in BUFFERS.items()
    ),
    *(
        _at_most(f"{name}.wal", f"{TITLES[name]}: WAL", limit, "bytes", "counts", quick=True)
        for name, limit in WAL.items()
    ),
    _at_most("index.splits", "index pages split by an append", 0.1, "", "counts", quick=True),
    _at_most("extend.blocks", "extend_message, 1 kB: different blocks", 12, "", "counts", quick=True),
    _at_most("extend.conversations", "conversations that flushes write to or lock", 0, "", "counts", quick=True),
    *(
        _at_most(f"{name}.wal_to_size", f"{STREAMS[name]}: WAL relative to the text", 3, "x", "counts", quick=True)
        for name in ("stream", "stream_random")
    ),
    _at_least("hot.single", "HOT updates at 10 appends a day", 85, "%", "counts", quick=True),
    _at_least("hot.turns", "HOT updates at 5 turns a day", 75, "%", "counts", quick=True),
    _at_most("plans.unexpected", "plans with a wrong index, a sort or a sequential scan", 0, "", "counts", quick=True),
    _at_most("plans.custom", "statements that the server plans for each call", 0, "", "counts", quick=True),
    _at_most("whole_10000.memory", "whole conversation of 10,000: peak memory", 4, "MiB", "counts", quick=True),
    # time relative to raw asyncpg on a bare connection, and speedup over the original SQLModel code
    _at_most("history_100.to_raw", "history of 100, random: time relative to raw asyncpg", 1.1, "x", "ratios"),
    _at_most("history_100_hot.to_raw", "history of 100, hot: time relative to raw asyncpg", 1.2, "x", "ratios"),
    _at_most("last_20.to_raw", "last 20: time relative to raw asyncpg", 1.2, "x", "ratios"),
    _at_most("whole_10000.to_raw", "whole conversation of 10,000: time relative to raw asyncpg", 1.5, "x", "ratios"),
    _at_most("append.to_raw", "append one: time relative to raw asyncpg", 1.15, "x", "ratios"),
    _at_most("turn.to_raw", "append a turn: time relative to raw asyncpg", 1.15, "x", "ratios"),
    _at_most("list_20.to_raw", "list 20: time relative to raw asyncpg", 1.25, "x", "ratios"),
    _at_most("create_first.to_raw", "create with a first message: time relative to raw asyncpg", 1.3, "x", "ratios"),
    _at_most("append_create.to_append", "append with create=True: time relative to an append", 1.3, "x", "ratios"),
    _at_most("branch_100.to_history", "get_branch of 100: time relative to get_history", 1.1, "x", "ratios"),
    _at_least("mixed_16.of_raw", "16 tasks, 80/20: operations/s relative to raw asyncpg", 0.9, "x", "ratios"),
    _at_most("telemetry.to_without", "history of 100 with spans and metrics, relative to without", 1.05, "x", "ratios"),
    _at_most("telemetry.late", "spans of 20 histories that are not made when the last one returns", 0, "", "ratios"),
    _at_least("telemetry.of_without", "16 tasks with spans and metrics: calls/s of those without", 0.7, "x", "ratios"),
    _at_most("reader.to_history", "history of 100 from a replica, relative to a pool on it", 1.02, "x", "ratios"),
    _at_most("telemetry.unused", "share of a history of 100 that a pool without listeners takes", 0.2, "%", "ratios"),
    _at_least("hints.of_without", "16 writers with hints: appends/s relative to those without", 0.9, "x", "ratios"),
    _at_least("history_100.faster", "history of 100, random: faster than SQLModel", 1.6, "x", "ratios"),
    _at_least("history_100_hot.faster", "history of 100, hot: faster than SQLModel", 2.2, "x", "ratios"),
    _at_least("last_20.faster", "last 20: faster than SQLModel", 3, "x", "ratios"),
    _at_least("whole_10000.faster", "whole conversation of 10,000: faster than SQLModel", 2, "x", "ratios"),
    _at_least("append.faster", "append one: faster than SQLModel", 3, "x", "ratios"),
    _at_least("turn.faster", "append a turn: faster than SQLModel", 4, "x", "ratios"),
    _at_least("append_far.faster", "append one, 1 ms round trip: faster than SQLModel", 6, "x", "ratios"),
    _at_least("turn_far.faster", "append a turn, 1 ms round trip: faster than SQLModel", 6, "x", "ratios"),
    _at_least("list_20.faster", "list 20: faster than SQLModel", 4, "x", "ratios"),
    _at_least("mixed_16.faster", "16 tasks, 80/20: operations/s relative to SQLModel", 4, "x", "ratios"),
    # from 100 k to 10 M messages
    _at_most("growth.p50", "history of 100, 10 M relative to 100 k messages: p50", 1.3, "x", "growth"),
    _at_most("growth.buffers", "history of 100, 10 M relative to 100 k messages: buffers", 1.05, "x", "growth"),
    # the write path of imports, rows in memory
    _at_least("bulk.rate", "bulk import, rows in memory", 40_000, "messages/s", "bulk"),
    _at_least("bulk.of_copy", "bulk import: rate relative to \\copy", 0.5, "x", "bulk"),
    # imports of files, relative to json.loads of the file and COPY of the same rows
    *(
        _at_least(f"format_{name}.of_least", f"import of {name}: {_OF_LEAST}", 0.3, "x", "formats")
        for name in IMPORTED_FORMATS
    ),
    _at_least("format_real.of_least", f"import of the 125 MB file: {_OF_LEAST}", 0.6, "x", "formats"),
    # the place of messages on disk, on real texts that were written in turn
    _at_most("message.bytes", "a message with its indexes and TOAST", 980, "bytes", "locality", quick=True),
    _at_most("locality.blocks", "history of 100 after a rewrite: different blocks", 20, "", "locality", quick=True),
    _at_most("locality.sample_buffers", "chatdb check: buffers of its sample", 4_000, "", "locality", quick=True),
    _at_most("locality.sample_error", "chatdb check: error of its sample", 0.2, "", "locality", quick=True),
    _at_most("locality.time", "cold history of 100 after a rewrite: relative to before", 0.6, "x", "locality"),
    # search, people and export, on real messages of 98 users
    *(
        _at_most(f"{name}.{count}", f"{title}: {count.replace('_', ' ')}", limit, "", "search", quick=True)
        for count in ("statements", "round_trips")
        for name, title in SEARCHED.items()
        for limit in (SEARCH_STATEMENTS.get(name, 1),)
    ),
    *(
        _at_most(f"{name}.buffers", f"{SEARCHED[name]}: buffers", limit, "", "search", quick=True)
        for name, limit in SEARCH_BUFFERS.items()
    ),
    *(
        _at_most(f"{name}.wal", f"{SEARCHED[name]}: WAL", limit, "bytes", "search", quick=True)
        for name, limit in SEARCH_WAL.items()
    ),
    _at_most("search_words_pending.worst", f"{_FULL_LIST}: buffers, worst word", 60, "", "search", quick=True),
    _at_most("search_substring.to_own", f"search for a text: {_TO_OWN}", 1.1, "x", "search", quick=True),
    _at_most(
        "search_substring_pending.to_own",
        f"search for a text, full pending list: {_TO_OWN}",
        1.1,
        "x",
        "search",
        quick=True,
    ),
    _at_most("search_plans.changed", "plans that the index for words changes", 0, "", "search", quick=True),
    _at_most("append_indexed.wal_to_plain", f"{_INDEXED}: WAL {_TO_PLAIN}", 20, "x", "search", quick=True),
    _at_most("append_indexed.to_plain", f"{_INDEXED}: time {_TO_PLAIN}", 2.5, "x", "search"),
    _at_most("append_indexed.mean_to_plain", f"{_INDEXED}: mean time {_TO_PLAIN}", 3.5, "x", "search"),
    _at_most("export_user.to_cursors", "chatdb export: time relative to server-side cursors", 1.1, "x", "search"),
]  # fmt: skip
