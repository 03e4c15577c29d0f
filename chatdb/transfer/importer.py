"""Import conversations from a stream of items, in bulk and in one transaction."""

from __future__ import annotations

import asyncio
import contextlib
import json
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from operator import attrgetter
from sys import getsizeof
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from chatdb._core.driver_errors import mapped_driver_errors
from chatdb._core.query import Query
from chatdb._core.validate import as_text_array, check_user_id
from chatdb.errors import ConfigurationError, ConflictError
from chatdb.formats.items import (
    FINGERPRINT,
    UNKNOWN_TIME,
    Changed,
    Item,
    Opened,
    Skipped,
    SourceConversation,
    SourceMessage,
)
from chatdb.pool import Pool, transaction
from chatdb.records import (
    BegunConversation,
    ImportedContent,
    ImportedConversation,
    ImportedMessage,
    ImportedMessages,
    ImportedParent,
    StoredConversation,
)
from chatdb.transfer.merging import (
    CHANGED,
    EDITED_IN_BOTH,
    FLAGGED,
    RENAMED,
    RENAMED_IN_BOTH,
    Merge,
    differs,
    is_imported,
)

if TYPE_CHECKING:
    from chatdb.pool import Connection

_import_conversations = Query("transfer/import_conversations", ImportedConversation)
_import_conversations_find = Query("transfer/import_conversations_find", StoredConversation)
_import_conversations_begun = Query("transfer/import_conversations_begun", BegunConversation)
_import_conversations_extend = Query("transfer/import_conversations_extend", ImportedConversation)
_import_conversations_parents = Query("transfer/import_conversations_parents", ImportedParent)
_import_conversations_stored = Query("transfer/import_conversations_stored", ImportedMessage)
_import_conversations_contents = Query("transfer/import_conversations_contents", ImportedContent)
_import_conversations_change = Query("transfer/import_conversations_change", ImportedConversation)
_import_conversations_update = Query("transfer/import_conversations_update", ImportedParent)
_import_conversations_messages = Query("transfer/import_conversations_messages", ImportedMessages)

OTHER_OF_KEY = "the user has a different conversation with this key"
FUTURE = "a time in the future was replaced by the time of the import"
SAME_ID = "the export has several conversations with this id: merged into one"
CHANGED_SINCE = "the stored conversation differs from the start of the imported one"

# the server stores one batch while the next is read: large enough to be worth three statements
_BATCH_MESSAGES = 5_000
_BATCH_CONVERSATIONS = 1_000
_BATCH_BYTES = 8 * 1024 * 1024
_MAX_REASONS = 100
_MAX_PLACES = 100
_SHOWN_PLACES = 5
CLOCKS_DIFFER = timedelta(minutes=5)
"""How far ahead of the server's clock a time in the file may be."""

_COLUMNS = ("user_id", "conversation_id", *SourceMessage._fields)
_PARENT_SEQ = _COLUMNS.index("parent_seq")


@dataclass
class ImportReport:
    """
    Number of conversations and messages by outcome.

    `conversations` and `messages` are new, `extended_conversations` got new messages, `stored_...` existed before.
    `skipped` and `changed` map each reason to its numbers of conversations and messages, and `places` to where the
    first 100 of them are: file, conversation and message. `files` maps the name of each file to its format, and
    `unread` each reason to the number of files that were not read to their end.
    """

    conversations: int = 0
    extended_conversations: int = 0
    messages: int = 0
    stored_conversations: int = 0
    stored_messages: int = 0
    skipped: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    changed: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    places: dict[str, list[str]] = field(default_factory=dict[str, list[str]], repr=False)
    files: dict[str, str] = field(default_factory=dict[str, str])
    unread: dict[str, int] = field(default_factory=dict[str, int])

    def skip(self, reason: str, *, conversations: int = 0, messages: int = 0, files: int = 0, place: str = "") -> None:
        """Count skipped items by reason."""
        reason = self._count(self.skipped, reason, conversations, messages, place)
        if files:
            self.unread[reason] = self.unread.get(reason, 0) + files

    def change(self, reason: str, *, conversations: int = 0, messages: int = 0, place: str = "") -> None:
        """Count changed items by reason."""
        self._count(self.changed, reason, conversations, messages, place)

    def _count(
        self, reasons: dict[str, tuple[int, int]], reason: str, conversations: int, messages: int, place: str
    ) -> str:
        if reason not in reasons and len(reasons) >= _MAX_REASONS:
            place, reason = ", ".join(filter(None, (place, reason))), "other reasons"
        before = reasons.get(reason, (0, 0))
        reasons[reason] = (before[0] + conversations, before[1] + messages)
        places = self.places.setdefault(reason, [])
        if place and len(places) < _MAX_PLACES and place not in places[-1:]:
            places.append(place)
        return reason

    @property
    def took_nothing(self) -> bool:
        """Whether conversations were skipped and none is stored, now or from an earlier import."""
        taken = self.conversations + self.extended_conversations + self.stored_conversations
        return taken == 0 and any(conversations for conversations, _ in self.skipped.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers and reasons as a JSON object."""
        listed = {
            name: self._listed(reasons) for name, reasons in (("skipped", self.skipped), ("changed", self.changed))
        }
        files = [{"name": name, "format": taken_for} for name, taken_for in self.files.items()]
        fields = asdict(self) | listed | {"files": files}
        del fields["places"], fields["unread"]
        return fields

    def _listed(self, reasons: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
        return [
            {"reason": reason, "conversations": some, "messages": few}
            | ({"files": self.unread.get(reason, 0)} if reasons is self.skipped else {})
            | {"places": self.places.get(reason, [])}
            for reason, (some, few) in reasons.items()
        ]

    def described(self, seconds: float) -> str:
        """Return the numbers and reasons as lines of text."""
        lines = [*self._taken_for(), f"imported {self.conversations:,} conversations, {self.messages:,} messages"]
        if self.messages:
            lines[-1] += f" in {seconds:.1f} s ({self.messages / seconds:,.0f} messages/s)"
        if self.extended_conversations:
            lines.append(f"extended {self.extended_conversations:,} conversations with new messages")
        if self.stored_conversations or self.stored_messages:
            lines.append(
                f"already stored: {self.stored_conversations:,} conversations, {self.stored_messages:,} messages"
            )
        for verb, reasons in (("skipped", self.skipped), ("changed", self.changed)):
            for reason, (conversations, messages) in reasons.items():
                unread = self.unread.get(reason, 0) if reasons is self.skipped else 0
                counts = [f"{unread:,} files" if unread > 1 else "1 file"] if unread else []
                if conversations or messages or not unread:
                    counts.append(f"{conversations:,} conversations, {messages:,} messages")
                lines.append(f"{verb} {', '.join(counts)}: {reason}")
                places = self.places.get(reason, [])
                lines += [f"  in {place}" for place in places[:_SHOWN_PLACES]]
                if len(places) > _SHOWN_PLACES:
                    lines.append("  and more: --json lists the first 100")
        return "\n".join(lines)

    def _taken_for(self) -> list[str]:
        """Return what each format was read from."""
        names: defaultdict[str, list[str]] = defaultdict(list)
        for name, taken_for in self.files.items():
            names[taken_for].append(name)
        return [
            f"read {found[0] if len(found) == 1 else f'{len(found):,} files'} as {taken_for}"
            for taken_for, found in names.items()
        ]


@dataclass(slots=True)
class _Target:
    """A conversation in the file and its match in the table."""

    source: SourceConversation
    occurrence: int
    matched: bool = False
    id: int | None = None
    """ID of the conversation for its messages; None if unknown or refused."""
    stored: StoredConversation | None = None
    """The conversation as the user already has it."""
    compared: bool = False
    refused: str | None = None
    ends_at: int | None = None
    """Seq of its last message if the file is truncated: a later import can continue there."""
    old_seqs: array[int] = field(default_factory=partial(array, "q"))
    """The seqs in the file that are not above the stored `last_seq`."""
    old_parents: array[int] = field(default_factory=partial(array, "q"))
    """For each of them, the seq that it follows in the file."""
    first_new_seq: int | None = None
    place: str = ""
    """The file, and the conversation in it, for the report."""
    is_repeated: bool = False
    """Whether the import had another conversation with its id."""
    begun: int = 0
    """The number of its messages that an earlier export had, if the conversation was found by their texts."""
    merge: Merge | None = None
    """What is stored, if its messages have the ids of an export, or if it was found by its beginning."""

    def add_old(self, message: SourceMessage) -> None:
        """Keep where a message is in the file's tree, in case that new messages follow it and it is deleted."""
        before = self.old_seqs[-1] if self.old_seqs else 0
        self.old_seqs.append(message.seq)
        self.old_parents.append(before if message.parent_seq is None else message.parent_seq)

    def parent_of(self, seq: int) -> int:
        """Return the seq that this old message follows in the file, or 0."""
        place = bisect_right(self.old_seqs, seq) - 1
        if place < 0:
            return 0
        return self.old_parents[place] if self.old_seqs[place] == seq else self.old_seqs[place]

    @property
    def is_merged(self) -> bool:
        """Whether its messages are merged into a stored conversation, rather than appended."""
        return self.stored is not None and (self.source.has_ids or self.begun > 0)

    @property
    def head_seq(self) -> int:
        """The seq of the file's head."""
        return self.source.last_seq if self.source.head_seq is None else self.source.head_seq


_Batch = list[tuple[_Target, list[SourceMessage]]]

_LastSeq = tuple[_Target, int, int, int]
"""A conversation, its old last_seq, the new one, and the head."""

_Row = tuple[Any, ...]


async def import_conversations(pool: Pool, *, user_id: str, items: Iterable[Item]) -> ImportReport:
    """
    Store what a reader in `chatdb.transfer` yields as conversations of a user, and return a report.

    Uses one transaction: an error, a lost connection or a cancellation leaves nothing behind. Skips conversations that
    the user already has, and appends new messages to those that grew, whose head becomes that of the file. A thread
    reads the items one batch ahead of the server, so memory does not grow with the file.

    Raises InvalidInputError if the source is invalid, ConflictError if another client writes the same conversations at
    the same time, and ConfigurationError if the pool's connections set a codec for json.
    """
    user = check_user_id(user_id)
    report = ImportReport()
    batches = _batches(items, report)
    of_file: set[int] = set()
    ahead = asyncio.create_task(asyncio.to_thread(next, batches, None))
    try:
        async with transaction(pool, user_id=user) as connection:
            started_at, has_row_security, has_stored = await _started_at(connection, user)
            while (batch := await asyncio.shield(ahead)) is not None:
                ahead = asyncio.create_task(asyncio.to_thread(next, batches, None))
                batch = _drop_future_times(batch, started_at, report)
                targets = [target for target, _ in batch if not target.matched]
                await _find_or_create(connection, user, targets, started_at, report, of_file if has_stored else None)
                await _store(connection, user, batch, started_at, report, has_row_security=has_row_security)
    finally:
        with contextlib.suppress(Exception):  # raise the first error, not this one
            await ahead  # its thread still reads the caller's file
    return report


def _batches(items: Iterable[Item], report: ImportReport) -> Iterator[_Batch]:
    """Split the stream when a batch is full, even within a conversation, or when a key repeats."""
    batch: _Batch = []
    size = memory = seq = 0
    keys: set[str] = set()
    hashes: set[int] = set()
    occurrences: defaultdict[datetime | None, Iterator[int]] = defaultdict(count)
    file = ""
    for item in items:
        match item:
            case SourceMessage():
                if size >= _BATCH_MESSAGES or memory >= _BATCH_BYTES:
                    yield batch
                    batch = [(batch[-1][0], [])]
                    size = memory = 0
                batch[-1][1].append(item)
                seq = item.seq
                size += 1
                memory += getsizeof(item.content) + getsizeof(item.payload)
            case SourceConversation(key=key):
                if len(batch) >= _BATCH_CONVERSATIONS or key in keys:
                    yield batch
                    batch, size, memory, keys = [], 0, 0, set[str]()
                if key is not None:
                    keys.add(key)
                occurrence = next(occurrences[item.created_at]) if key is None else 0
                target = _Target(item, occurrence, place=_within(file, _named(item)))
                if item.has_ids:
                    target.is_repeated = hash(key) in hashes
                    hashes.add(hash(key))
                batch.append((target, []))
                seq = 0
            case Skipped():
                if item.seq:
                    seq = item.seq
                elif batch and seq < batch[-1][0].source.last_seq:
                    batch[-1][0].ends_at = seq
                place = _within(file, item.place)
                numbers = {"conversations": item.conversations, "messages": item.messages, "files": item.files}
                report.skip(item.reason, **numbers, place=place)
            case Changed():
                place = _within(file, item.place)
                report.change(item.reason, conversations=item.conversations, messages=item.messages, place=place)
            case Opened():
                file = item.name
                if item.format:
                    report.files[file] = item.format
    yield batch


def _named(source: SourceConversation) -> str:
    return f"conversation {json.dumps((source.title or source.key or '')[:80], ensure_ascii=False)}"


def _within(file: str, place: str) -> str:
    return ", ".join(filter(None, (file, place)))


def _drop_future_times(batch: _Batch, started_at: datetime, report: ImportReport) -> _Batch:
    """Drop times in the future, which would keep a conversation at the top of a list; the import's time is used."""
    latest = started_at + CLOCKS_DIFFER

    def known(time: datetime | None) -> datetime | None:
        return None if time is None or time > latest else time

    past: _Batch = []
    for target, messages in batch:
        source = target.source
        times = (source.created_at, source.updated_at, source.archived_at, source.pinned_at)
        if times != tuple(map(known, times)):
            created_at, updated_at = known(source.created_at), known(source.updated_at)
            target.source = source._replace(
                # only the creation time identifies a conversation without a key
                created_at=created_at or updated_at,
                updated_at=updated_at,
                archived_at=source.archived_at and (known(source.archived_at) or started_at),
                pinned_at=source.pinned_at and (known(source.pinned_at) or started_at),
            )
            if any(time is not None and latest < time < UNKNOWN_TIME for time in times):
                report.change(FUTURE, conversations=1)
        replaced = [message._replace(created_at=known(message.created_at)) for message in messages]
        ahead = sum(new.created_at != old.created_at for new, old in zip(replaced, messages, strict=True))
        if ahead:
            report.change(FUTURE, messages=ahead)
        past.append((target, replaced if ahead else messages))
    return past


async def _started_at(connection: Connection, user: str) -> tuple[datetime, bool, bool]:
    """Return the time of the import, whether row-level security is active, and whether the user has conversations."""
    with mapped_driver_errors():
        row = await connection.fetchrow(
            "select pg_catalog.now() as started_at, '[]'::json as sent, "
            "pg_catalog.row_security_active('chatdb.messages') as has_row_security, "
            "exists(select from chatdb.conversations where user_id = $1) as has_stored",
            user,
        )
    if row is None or row["sent"] != "[]":
        raise ConfigurationError("the pool's connections set a codec for json: import with a pool that sets none")
    return row["started_at"], row["has_row_security"], row["has_stored"]


async def _store(
    connection: Connection,
    user: str,
    batch: _Batch,
    started_at: datetime,
    report: ImportReport,
    *,
    has_row_security: bool,
) -> None:
    grown: list[_LastSeq] = []
    files: dict[int, _Target] = {}
    merged = [(target, messages) for target, messages in batch if target.is_merged]
    rows = await _merge(connection, user, merged, started_at, report)
    for target, messages in batch:
        if target.is_merged:
            continue
        new = messages if target.stored is None else _new_messages(target, target.stored, messages, grown, report)
        if target.stored is not None:
            files[target.stored.id] = target
        rows.extend(
            (user, target.id, *(message if message.created_at else message._replace(created_at=started_at)))
            for message in new
        )
    await _set_last_seq(connection, user, grown, started_at)
    report.extended_conversations += len(grown)
    await _follow_stored(connection, user, grown, rows, files, started_at)
    if not has_row_security:
        with mapped_driver_errors():
            await connection.copy_records_to_table("messages", schema_name="chatdb", columns=_COLUMNS, records=rows)
    elif rows:  # PostgreSQL refuses COPY FROM under row-level security
        _, *columns = map(as_text_array, zip(*rows, strict=True))
        await _import_conversations_messages.fetch_one(connection, user, *columns)
    report.messages += len(rows)
    cut_off: list[_LastSeq] = [
        (target, target.source.last_seq, target.ends_at, target.ends_at)
        for target, _ in batch
        if target.ends_at is not None and target.id is not None
    ]
    await _set_last_seq(connection, user, cut_off, started_at)


async def _find_or_create(
    connection: Connection,
    user: str,
    targets: list[_Target],
    started_at: datetime,
    report: ImportReport,
    of_file: set[int] | None,
) -> None:
    """
    Find the stored conversations, and store the others.

    `of_file` gets the ids of those that the file has: they are not the beginning of another conversation in it. It is
    None if nothing was stored before the import.
    """
    sources = [target.source for target in targets]
    matches = await _import_conversations_find.fetch_all(
        connection,
        user,
        [source.key for source in sources],
        as_text_array(source.created_at for source in sources),
        as_text_array(target.occurrence for target in targets),
        as_text_array(source.last_seq for source in sources),
    )
    for stored in matches:
        target = targets[stored.ordinality - 1]
        target.stored = stored
        if target.source.has_ids:
            report.stored_conversations += 1
        elif target.source.created_at not in (None, stored.created_at):
            target.refused = OTHER_OF_KEY
            report.skip(OTHER_OF_KEY, conversations=1)
        elif target.source.last_seq <= stored.last_seq:
            report.stored_conversations += 1
    if of_file is not None:
        of_file.update(target.stored.id for target in targets if target.stored)
        await _find_beginnings(connection, user, [each for each in targets if each.stored is None], of_file)
    report.stored_conversations += sum(target.begun > 0 for target in targets)
    new = [target for target in targets if target.stored is None]
    try:
        ids = await _import_conversations.fetch_all(
            connection,
            user,
            [target.source.key for target in new],
            [target.source.title for target in new],
            [target.source.metadata for target in new],
            as_text_array(target.source.last_seq for target in new),
            as_text_array(target.source.created_at or started_at for target in new),
            as_text_array(target.source.updated_at or started_at for target in new),
            as_text_array(target.source.archived_at for target in new),
            as_text_array(target.source.pinned_at for target in new),
            as_text_array(target.head_seq for target in new),
        )
    except ConflictError as error:
        raise ConflictError("another client is storing the same conversations: import again") from error
    for target, imported in zip(new, sorted(ids, key=attrgetter("id")), strict=True):
        target.id = imported.id
        if of_file is not None:
            of_file.add(imported.id)
    for target in targets:
        target.matched = True
    report.conversations += len(new)


async def _find_beginnings(connection: Connection, user: str, targets: list[_Target], of_file: set[int]) -> None:
    """Find the stored conversations of which the file has more, by the texts of all their messages."""
    keys: list[str] = []
    wanted: list[tuple[_Target, int]] = []
    for target in targets:
        for length, beginning in enumerate(target.source.beginnings, 2):
            keys.append((target.source.key or "")[:-FINGERPRINT] + beginning)
            wanted.append((target, length))
    if not keys:
        return
    matches = await _import_conversations_begun.fetch_all(connection, user, keys)
    for found in sorted(matches, key=attrgetter("ordinality"), reverse=True):  # the longest beginning first
        target, length = wanted[found.ordinality - 1]
        if target.stored is None and found.id not in of_file:
            of_file.add(found.id)
            target.begun = length
            target.stored = StoredConversation(
                ordinality=found.ordinality, id=found.id, last_seq=found.last_seq, created_at=found.created_at,
                final_seq=None, final_key=None, final_created_at=None,
            )  # fmt: skip


async def _merge(
    connection: Connection,
    user: str,
    merged: list[tuple[_Target, list[SourceMessage]]],
    started_at: datetime,
    report: ImportReport,
) -> list[_Row]:
    """Update the stored conversations of a later export, and return the messages to add."""
    await _read_stored(connection, user, merged, report)
    rows: list[_Row] = []
    found: list[_Found] = []
    changes: dict[int, _Change] = {}
    for target, messages in merged:
        merge = target.merge
        if merge is None:
            report.skip(OTHER_OF_KEY, messages=len(messages), place=target.place)
            continue
        last_seq, edits = merge.last_seq, merge.edits
        head_seq = merge.head_seq
        for message in messages:
            place = merge.place(message)
            if isinstance(place, SourceMessage):
                rows.append((user, merge.id, *place._replace(created_at=place.created_at or started_at)))
                continue
            report.stored_messages += 1
            if place is not None and message.seq > merge.begun and differs(message, place):
                found.append((target, merge, message, place))
        if merge.last_seq > last_seq and not merge.grew:
            merge.grew = True
            report.extended_conversations += 1
            report.stored_conversations -= 1
        title: str | None = None
        flags: dict[str, bool] = {}
        patch: dict[str, object] = {}
        if not messages or messages[-1].seq == target.source.last_seq:
            merge.set_head(target.source)
            title, is_conflict = merge.new_title(target.source)
            if title is not None or is_conflict:
                report.change(RENAMED if title else RENAMED_IN_BOTH, conversations=1, place=target.place)
            imported, flags = merge.new_flags(target.source)
            if flags:
                report.change(FLAGGED, conversations=1, place=target.place)
            patch |= {f"imported_{name}": flag for name, flag in imported.items()}
            if title is not None:
                patch["imported_title"] = title
        if patch or merge.last_seq != last_seq or merge.head_seq != head_seq:
            merge.edits += bool(title is not None or flags)
            changes[merge.id] = _Change(target.source, merge, last_seq, edits, title, flags, patch)
    updates = await _choose_updates(connection, user, found, report)
    for target, merge, *_ in updates:
        changes.setdefault(merge.id, _Change(target.source, merge, merge.last_seq, merge.edits))
        merge.edits += 1
    await _change(connection, user, [*changes.values()], started_at)
    if updates:
        _, merges, seqs, changed = zip(*updates, strict=True)
        await _import_conversations_update.fetch_all(
            connection,
            user,
            as_text_array(merge.id for merge in merges),
            as_text_array(seqs),
            [message.content for message in changed],
            [message.payload for message in changed],
            [message.metadata for message in changed],
            [message.state for message in changed],
        )
    return rows


class _Change(NamedTuple):
    """A stored conversation to update, with what it was before."""

    source: SourceConversation
    merge: Merge
    last_seq: int
    edits: int
    title: str | None = None
    flags: Mapping[str, bool] = MappingProxyType({})
    """Those of `archived` and `pinned` to set or unset."""
    metadata_patch: Mapping[str, object] = MappingProxyType({})

    def flagged_at(self, name: str, started_at: datetime) -> datetime | str | None:
        """Return since when it is archived or pinned, `infinity` if it is no longer, or None if that stays."""
        if name not in self.flags:
            return None
        at = self.source.archived_at if name == "archived" else self.source.pinned_at
        return (at or started_at) if self.flags[name] else "infinity"


_Found = tuple[_Target, Merge, SourceMessage, ImportedMessage]
"""A message of the file that differs from the stored one."""

_Update = tuple[_Target, Merge, int, SourceMessage]
"""The stored seq of a message, and the message of the file that replaces it."""


async def _read_stored(
    connection: Connection, user: str, merged: list[tuple[_Target, list[SourceMessage]]], report: ImportReport
) -> None:
    """Read what is stored of the conversations that the file begins, unless it only shares their key."""
    new = {t.stored.id: (t, messages) for t, messages in merged if t.stored and t.merge is None and not t.refused}
    if not new:
        return
    rows: defaultdict[int, list[ImportedMessage]] = defaultdict(list)
    for row in await _import_conversations_stored.fetch_all(connection, user, as_text_array(new)):
        rows[row.id].append(row)
    for number, (target, messages) in new.items():
        merge = Merge(rows[number], begun=target.begun)
        is_same_time = target.begun > 0 or (
            target.stored is not None and target.source.created_at in (None, target.stored.created_at)
        )
        if merge.has_any(messages) or is_same_time:
            target.merge = merge
            if target.is_repeated:
                report.change(SAME_ID, conversations=1, place=target.place)
        else:
            target.refused = OTHER_OF_KEY
            report.stored_conversations -= 1
            report.skip(OTHER_OF_KEY, conversations=1, place=target.place)


async def _choose_updates(
    connection: Connection, user: str, found: list[_Found], report: ImportReport
) -> list[_Update]:
    """Return the messages to update: those that the export has changed and the user has not."""
    if not found:
        return []
    contents = await _import_conversations_contents.fetch_all(
        connection,
        user,
        as_text_array(stored.id for *_, stored in found),
        as_text_array(stored.seq for *_, stored in found),
    )
    updates: list[_Update] = []
    for each in contents:
        target, merge, message, stored = found[each.ordinality - 1]
        is_ours = is_imported(message, each, key=target.source.key or "", state=stored.state)
        if is_ours is None or stored.seq is None:
            continue
        place = f"{target.place}, message #{stored.seq}"
        report.change(CHANGED if is_ours else EDITED_IN_BOTH, messages=1, place=place)
        if is_ours:
            updates.append((target, merge, stored.seq, message))
    return updates


async def _change(connection: Connection, user: str, changes: list[_Change], started_at: datetime) -> None:
    if not changes:
        return
    changed = await _import_conversations_change.fetch_all(
        connection,
        user,
        as_text_array(each.merge.id for each in changes),
        as_text_array(each.last_seq for each in changes),
        as_text_array(each.edits for each in changes),
        as_text_array(each.merge.last_seq for each in changes),
        as_text_array(each.merge.edits for each in changes),
        as_text_array(each.source.updated_at or started_at for each in changes),
        as_text_array(each.merge.head_seq for each in changes),
        [each.title for each in changes],
        as_text_array(each.flagged_at("archived", started_at) for each in changes),
        as_text_array(each.flagged_at("pinned", started_at) for each in changes),
        [json.dumps(each.metadata_patch) if each.metadata_patch else None for each in changes],
    )
    if len(changed) < len(changes):
        raise ConflictError("another client wrote to one of the conversations during the import: import again")


def _new_messages(
    target: _Target,
    stored: StoredConversation,
    messages: list[SourceMessage],
    grown: list[_LastSeq],
    report: ImportReport,
) -> list[SourceMessage]:
    """Return the messages after the stored ones, if the last stored one matches the file's."""
    new: list[SourceMessage] = []
    for message in messages:
        if target.refused is None and not target.compared and message.seq >= (stored.final_seq or 0):
            target.compared = True
            if stored.final_seq is not None and not _is_final(message, stored):
                target.refused = CHANGED_SINCE
                report.skip(CHANGED_SINCE, conversations=1)
                report.stored_conversations -= target.source.last_seq <= stored.last_seq
            elif target.source.last_seq > stored.last_seq:
                target.id = stored.id
                grown.append((target, stored.last_seq, target.source.last_seq, target.source.last_seq))
        if target.refused is not None:
            report.skip(target.refused, messages=1)
        elif message.seq > stored.last_seq:
            target.first_new_seq = target.first_new_seq or message.seq
            new.append(message)
        else:
            report.stored_messages += 1
            target.add_old(message)
    return new


def _is_final(message: SourceMessage, stored: StoredConversation) -> bool:
    if message.seq != stored.final_seq:
        return False
    if message.key is None and message.created_at is None:
        return True  # ShareGPT: the conversation's key has a hash of the texts
    if message.key is None and stored.final_key is None:
        return message.created_at == stored.final_created_at
    return message.key == stored.final_key


async def _follow_stored(
    connection: Connection,
    user: str,
    grown: list[_LastSeq],
    rows: list[_Row],
    files: dict[int, _Target],
    started_at: datetime,
) -> None:
    """
    Set the heads of the conversations that grew, and let new messages follow only stored ones.

    The conversations are locked, so nobody deletes a message before the end of the import.
    """
    named: dict[int, tuple[int, int]] = {}
    """The old message that a new row names, or that the first new row follows in order of seq."""
    for number, row in enumerate(rows):
        target = files.get(row[1])
        if target is None or target.stored is None:
            continue
        if row[_PARENT_SEQ] is None and row[2] == target.first_new_seq and target.old_seqs:
            named[number] = (row[1], target.old_seqs[-1])
        elif row[_PARENT_SEQ] and row[_PARENT_SEQ] <= target.stored.last_seq:
            named[number] = (row[1], row[_PARENT_SEQ])
    moved = [target for target, *_ in grown if target.head_seq != target.source.last_seq]
    heads_named = {(each.id, each.head_seq) for each in moved if each.stored and each.head_seq <= each.stored.last_seq}
    stored, newest = await _nearest_stored(connection, user, {*named.values(), *heads_named}, files)
    for number, place in named.items():
        row = rows[number]
        if row[_PARENT_SEQ] is not None or stored[place] != newest[place]:
            rows[number] = _with_parent(row, stored[place])
    heads: list[_LastSeq] = []
    for target in moved:
        last_seq, head_seq = target.source.last_seq, target.head_seq
        heads.append((target, last_seq, last_seq, stored.get((target.id, head_seq), head_seq)))
    await _set_last_seq(connection, user, heads, started_at)


def _with_parent(row: _Row, seq: int | None) -> _Row:
    return (*row[:_PARENT_SEQ], seq, *row[_PARENT_SEQ + 1 :])


async def _nearest_stored(
    connection: Connection, user: str, places: set[tuple[Any, int]], files: dict[int, _Target]
) -> tuple[dict[tuple[Any, int], int], dict[tuple[Any, int], int]]:
    """
    Return the nearest stored message at or above each place in the file's tree, and the one at or before it by seq.

    Each is 0 if there is none.
    """
    stored: dict[tuple[Any, int], int] = {}
    newest: dict[tuple[Any, int], int] = {}
    walks = {place: place[1] for place in places}
    while walks:
        asked = sorted({(place[0], seq) for place, seq in walks.items()})
        columns = map(as_text_array, zip(*asked, strict=True))
        found = await _import_conversations_parents.fetch_all(connection, user, *columns)
        before = dict.fromkeys(asked, 0) | {asked[each.ordinality - 1]: each.seq for each in found}
        for place, asked_seq in [*walks.items()]:
            highest = before[place[0], asked_seq]
            newest.setdefault(place, highest)
            seq = asked_seq
            while seq > highest:  # no message between the two is stored
                seq = files[place[0]].parent_of(seq)
            walks[place] = seq
            if seq in (0, highest):
                stored[place] = walks.pop(place)
    return stored, newest


async def _set_last_seq(connection: Connection, user: str, changes: list[_LastSeq], started_at: datetime) -> None:
    if not changes:
        return
    targets, old, new, heads = zip(*changes, strict=True)
    changed = await _import_conversations_extend.fetch_all(
        connection,
        user,
        as_text_array(target.id for target in targets),
        as_text_array(old),
        as_text_array(new),
        as_text_array(target.source.updated_at or started_at for target in targets),
        as_text_array(heads),
    )
    if len(changed) < len(changes):
        raise ConflictError("another client appended to one of the conversations during the import: import again")
