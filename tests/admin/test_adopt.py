"""`chatdb adopt` on an older system's tables, created by Alembic and filled by SQLModel."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, timedelta
from urllib.parse import urlsplit

import psycopg
import pytest

import chatdb
from benchmarks.original import Conversation, Message
from chatdb.admin.adopt import AdoptReport, Counts, adopt, steps
from chatdb.admin.migrate import apply_migrations, rollback_migrations
from chatdb.admin.search_index import create_search_index, search_index_status
from chatdb.errors import ConfigurationError, SchemaError, UnavailableError
from chatdb.testing.databases import Databases
from tests.support import older as older_system
from tests.support.command import chatdb as command
from tests.support.databases import as_role, execute
from tests.support.older import START, Writers, add, fill, rows, untouched
from tests.support.paths import ROOT

DOCUMENT = (ROOT / "docs" / "operations" / "adoption.md").read_text(encoding="utf-8")
REASONS = {
    reason.replace("''", "'")
    for name in ("300_take_batch", "320_take_messages", "520_take_orphans")
    for reason in re.findall(
        r"(?:then |^    )'(.+?)'(?: as reason)?$", (ROOT / "sql" / "adopt" / f"{name}.sql").read_text(), re.MULTILINE
    )
}

Stored = dict[int, tuple[object, ...]]
"""Conversations by id: user, times, last_seq, and the messages in order."""


@pytest.fixture(scope="module")
def older_template(
    databases: Databases, owners_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Yield the name of a migrated database that also has the older system's tables."""
    with databases.new(owners_template) as dsn:
        older_system.migrate(dsn, tmp_path_factory.mktemp("alembic"))
        yield urlsplit(dsn).path[1:]


@pytest.fixture
def older(databases: Databases, older_template: str) -> Iterator[str]:
    """Yield the DSN of a database with chatdb's tables and the older system's empty tables."""
    with databases.new(older_template) as dsn:
        yield dsn


async def stored(dsn: str) -> Stored:
    """Return the conversations of all users, as chatdb's own functions return them."""
    found: Stored = {}
    with psycopg.connect(dsn) as connection:
        users = [user for (user,) in connection.execute("select distinct user_id from chatdb.conversations")]
    async with chatdb.create_pool(dsn) as db:
        for user in users:
            for each in await chatdb.list_conversations(db, user_id=user, limit=10_000):
                messages = [
                    (m.id, m.user_id, m.seq, m.role, m.content, m.created_at)
                    async for m in chatdb.iter_messages(db, user_id=user, conversation_id=each.id)
                ]
                found[each.id] = (user, each.created_at, each.updated_at, each.last_seq, messages)
    return found


def expected(dsn: str, *, without: set[int] = frozenset()) -> Stored:  # type: ignore[assignment]
    """Return what chatdb must contain after an adoption that leaves out the messages in `without`."""
    conversations, messages = rows(dsn)
    of: dict[int, list[Message]] = defaultdict(list)
    for message in messages:
        if message.id not in without:
            of[message.conversation_id].append(message)
    return {
        int(each.id or 0): (
            each.user_id,
            each.created_at.replace(tzinfo=UTC),
            each.updated_at.replace(tzinfo=UTC),
            len(of[int(each.id or 0)]),
            [
                (m.id, m.user_id, seq, m.role, m.content, m.created_at.replace(tzinfo=UTC))
                for seq, m in enumerate(of[int(each.id or 0)], 1)
            ],
        )
        for each in conversations
    }


def in_zone(dsn: str, zone: str) -> None:
    """Set the time zone of all sessions on this database."""
    execute(dsn, f"alter database {one(dsn, 'select current_database()')} set timezone to '{zone}'")


def one(dsn: str, statement: str) -> object:
    """Return the first value of a statement's first row."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute(statement).fetchone()
    return row and row[0]


def aside(dsn: str) -> dict[int, str]:
    """Return the reason for each quarantined message, by id."""
    with psycopg.connect(dsn) as connection:
        return dict(connection.execute("select id, reason from chatdb_adopt.quarantine_messages").fetchall())


def a_message(conversation: int, user: str, minute: float = 0, content: str = "new", role: str = "user") -> Message:
    """Return a message of the older system."""
    moment = START + timedelta(minutes=minute)
    return Message(conversation_id=conversation, user_id=user, role=role, content=content, created_at=moment)


def a_conversation(user: str) -> Conversation:
    """Return a conversation of the older system."""
    return Conversation(user_id=user, created_at=START, updated_at=START)


async def is_adopted(dsn: str) -> None:
    """Check that chatdb has adopted every row of the older system and reports so."""
    report = adopt(dsn)
    assert report.is_complete
    assert report.aside == {}
    assert await stored(dsn) == expected(dsn)


async def test_every_row_and_nothing_else(older: str) -> None:
    """All rows are adopted unchanged, in any server time zone, and the older tables stay untouched."""
    in_zone(older, "Pacific/Chatham")
    fill(older)
    before = untouched(older)
    report = adopt(older)
    assert (report.adopted, report.originals, report.is_complete) == (Counts(12, 108), Counts(12, 108), True)
    assert "nothing is left" in report.described()
    assert await stored(older) == expected(older)
    assert untouched(older) == before
    again = adopt(older)
    assert (again.adopted, again.adopted_before, again.is_complete) == (Counts(0, 0), Counts(12, 108), True)
    assert await stored(older) == expected(older)
    assert untouched(older) == before


async def test_what_came_since(older: str) -> None:
    """A second run adopts only new messages, new conversations and changed `updated_at` values."""
    fill(older, conversations=3, messages=4)
    adopt(older)
    (made,) = add(older, a_conversation("new"))
    add(older, a_message(made, "new"), a_message(1, "u0", 60 * 24 * 7))
    execute(older, "update conversations set updated_at = '2026-09-01' where id = 2")
    report = adopt(older)
    assert (report.adopted, report.adopted_before) == (Counts(1, 2), Counts(3, 12))
    assert (report.late, report.renumbered) == (0, 0)
    assert await stored(older) == expected(older)


async def test_a_late_commit(older: str) -> None:
    """A message older than adopted ones is inserted before them, and edits made in chatdb since are kept."""
    fill(older, conversations=2, messages=4)
    adopt(older)
    async with chatdb.create_pool(older) as db:
        last = await chatdb.get_message(db, user_id="u0", conversation_id=1, seq=4)
        await chatdb.update_message(db, user_id="u0", conversation_id=1, seq=4, metadata={"liked": True})
        add(older, a_message(1, "u0", -5), a_message(1, "u0", -4), a_message(1, "u0", 60 * 24))
        report = adopt(older)
        assert (report.renumbered, report.late, report.adopted.messages) == (4, 0, 3)
        assert await stored(older) == expected(older)
        moved = await chatdb.get_message(db, user_id="u0", conversation_id=1, seq=6)
        assert (moved.id, moved.metadata) == (last.id, {"liked": True})
        assert (await chatdb.append_message(db, user_id="u0", conversation_id=1, role="user", content="x")).seq == 8
    assert one(older, "select count(*) from chatdb_adopt.messages as a natural join chatdb.messages as m") == 11


async def test_behind_messages_of_chatdbs_own(older: str) -> None:
    """If users have appended in chatdb, no seq changes: late messages go to the end and are counted."""
    fill(older, conversations=2, messages=3)
    adopt(older)
    async with chatdb.create_pool(older) as db:
        own = await chatdb.append_message(db, user_id="u0", conversation_id=1, role="user", content="own")
        before = (await stored(older))[1][4]
        late = add(older, a_message(1, "u0", -5), a_message(1, "u0", 60))
        assert adopt(older).late == 2
        (after,) = add(older, a_message(1, "u0", (own.created_at.replace(tzinfo=None) - START).total_seconds() + 60))
        report = adopt(older)
        assert (report.late, report.renumbered, report.is_complete) == (0, 0, True)
        messages = (await stored(older))[1][4]
        assert messages[:4] == before
        assert [m[0] for m in messages[4:]] == [*late, after]
        assert [m[2] for m in messages] == [1, 2, 3, 4, 5, 6, 7]
        assert (await chatdb.append_message(db, user_id="u0", conversation_id=1, role="user", content="x")).seq == 8


async def test_behind_what_was_deleted_in_chatdb(older: str) -> None:
    """Rows deleted in chatdb do not come back, and a late message then goes to the end."""
    fill(older, conversations=3, messages=3)
    adopt(older)
    async with chatdb.create_pool(older) as db:
        await chatdb.delete_message(db, user_id="u0", conversation_id=1, seq=2)
        await chatdb.delete_conversation(db, user_id="u1", conversation_id=2)
        late, homeless = add(older, a_message(1, "u0", -5), a_message(2, "u1"))
        report = adopt(older)
        assert (report.late, report.renumbered, report.deleted_in_chatdb) == (1, 0, Counts(1, 4))
        assert report.aside == {"its conversation was deleted in chatdb": Counts(0, 1)}
        assert aside(older) == {homeless: "its conversation was deleted in chatdb"}
        found = await stored(older)
    assert [(m[0] == late, m[2]) for m in found[1][4]] == [(False, 1), (False, 3), (True, 4)]
    assert sorted(found) == [1, 3]


MISFITS = {
    "its user is not its conversation's": "update messages set user_id = 'other' where id = 1",
    "it has no user": "update messages set user_id = null where id = 2",
    "its role is none of chatdb's": "update messages set role = 'USER' where id = 3",
    "it has no role": "update messages set role = null where id = 4",
    "its text is longer than 4 MiB": f"update messages set content = repeat('é', {(2 << 20) + 1}) where id = 5",
    "it has no text": "update messages set content = null where id = 6",
    "its time is infinite or not in the years 1 to 9999": "update messages set created_at = '10000-01-01' where id = 7",
    "its conversation is missing": "update messages set conversation_id = 4711 where id = 8",
}
MENDED = {
    1: "update messages set user_id = 'u0' where id = 1",
    2: "update messages set user_id = 'u1' where id = 2",
    3: "update messages set role = 'user' where id = 3",
    4: "update messages set role = 'tool' where id = 4",
    5: f"update messages set content = repeat('é', {2 << 20}) where id = 5",
    6: "update messages set content = '' where id = 6",
    7: "update messages set created_at = '9999-12-31 23:59:59.999999' where id = 7",
    8: "update messages set conversation_id = 2 where id = 8",
}


async def test_misfits_are_kept_aside_and_mended(older: str) -> None:
    """Each misfit message is quarantined whole, with its reason; once fixed, it is adopted in its place."""
    fill(older, conversations=3, messages=4)
    wanted = expected(older, without=set(range(1, 9)))
    execute(
        older,
        "alter table messages drop constraint messages_conversation_id_fkey, alter user_id drop not null, "
        "alter role drop not null, alter content drop not null",
        *MISFITS.values(),
    )
    tried = adopt(older, dry_run=True)
    report = adopt(older)
    assert report.aside == tried.aside == {reason: Counts(0, 1) for reason in MISFITS}
    assert (report.adopted, report.is_complete) == (Counts(3, 4), True)
    assert aside(older) == dict(enumerate(MISFITS, 1))
    assert one(older, "select count(*) from chatdb_adopt.quarantine_messages natural join messages") == 5, (
        "what has no null"
    )
    assert (
        one(older, "select content = repeat('é', 2097153) from chatdb_adopt.quarantine_messages where id = 5") is True
    )
    assert {each: value[4] for each, value in (await stored(older)).items()} == {
        each: value[4] for each, value in wanted.items()
    }
    for number, mend in MENDED.items():
        execute(older, mend)
        report = adopt(older)
        assert report.adopted == Counts(0, 1)
        assert set(aside(older)) == set(range(number + 1, 9))
    assert report.aside == {}
    assert await stored(older) == expected(older)


BAD_CONVERSATIONS = {
    "it has no user": "update conversations set user_id = '' where id = 1",
    "its user has more than 255 characters": "update conversations set user_id = repeat('u', 256) where id = 2",
    "it has no time": "update conversations set created_at = null, updated_at = null where id = 3",
    "its time is infinite or not in the years 1 to 9999": (
        "update conversations set updated_at = 'infinity' where id = 4"
    ),
    "chatdb has another conversation of this user and id": "update conversations set id = 1000 where id = 5",
}


async def test_conversations_that_do_not_fit(older: str) -> None:
    """A misfit conversation is quarantined with all its messages and adopted with them once fixed."""
    fill(older, conversations=6, messages=4)
    execute(
        older,
        "alter table messages drop constraint messages_conversation_id_fkey",
        "alter table conversations alter created_at drop not null, alter updated_at drop not null",
        *BAD_CONVERSATIONS.values(),
        "update messages set conversation_id = 1000 where conversation_id = 5",
        "insert into chatdb.conversations (id, user_id) values (1000, 'u1')",
    )
    tried = adopt(older, dry_run=True)
    report = adopt(older)
    assert report.aside == tried.aside
    assert report.aside == {"its conversation is quarantined": Counts(0, 20)} | {
        reason: Counts(1, 0) for reason in BAD_CONVERSATIONS
    }
    assert (report.adopted, report.is_complete) == (Counts(1, 4), True)
    assert one(older, "select updated_at = 'infinity' from chatdb_adopt.quarantine_conversations where id = 4") is True
    execute(
        older,
        "update conversations set user_id = 'u0' where id = 1",
        "update conversations set user_id = 'u1' where id = 2",
        "update conversations set created_at = '2026-01-01' where id = 3",
        "update conversations set updated_at = '0001-01-01' where id = 4",
        "update conversations set id = 1001 where id = 1000",
        "update messages set conversation_id = 1001 where conversation_id = 1000",
    )
    report = adopt(older)
    assert (report.adopted, report.is_complete) == (Counts(5, 20), True)
    assert report.aside == {"chatdb has another conversation of this user and id": Counts(1, 0)}, "the row as it was"
    execute(older, "update conversations set updated_at = '2026-01-01' where id = 3")  # as chatdb filled it in
    assert {each: value for each, value in (await stored(older)).items() if each != 1000} == expected(older)


def test_every_reason_is_documented_and_tested() -> None:
    """The guide lists exactly the reasons that the SQL reports."""
    assert set(re.findall(r"^\| `([^`]+)` \| (?:conversation|message)", DOCUMENT, re.MULTILINE)) == REASONS
    tested = {*MISFITS, *BAD_CONVERSATIONS, "its conversation is quarantined", "its conversation was deleted in chatdb"}
    assert tested == REASONS


async def test_messages_without_a_time(older: str) -> None:
    """A message without a time gets the previous message's, or the conversation's, and so keeps its position."""
    (made,) = add(older, a_conversation("u"))
    ids = add(older, *(a_message(made, "u", minute) for minute in (1, 2, 3, 4, 5)))
    execute(
        older,
        "alter table messages alter created_at drop not null",
        f"update messages set created_at = null where id in ({ids[0]}, {ids[2]}, {ids[3]})",
    )
    assert adopt(older).adopted == Counts(1, 5)
    messages = (await stored(older))[made][4]
    assert [m[0] for m in messages] == ids
    minutes = [(m[5].replace(tzinfo=None) - START) / timedelta(minutes=1) for m in messages]
    assert minutes == [0, 2, 2, 2, 5]


VARIANTS = {
    "no cascade": [
        "alter table messages drop constraint messages_conversation_id_fkey",
        "alter table messages add foreign key (conversation_id) references conversations",
    ],
    "no indexes": ["drop index ix_messages_conversation_id, ix_messages_user_id, ix_conversations_user_id"],
    "no keys": [
        "alter table messages drop constraint messages_conversation_id_fkey, drop constraint messages_pkey",
        "alter table conversations drop constraint conversations_pkey",
    ],
    "other types": [
        "alter table messages alter id type bigint, alter conversation_id type bigint, alter content type varchar",
        "alter table messages alter created_at type timestamptz using created_at at time zone 'UTC'",
        "alter table conversations alter updated_at type timestamptz using updated_at at time zone 'UTC'",
        'alter table conversations alter user_id type text collate "C", alter id type bigint',
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
async def test_variants(older: str, variant: str) -> None:
    """The cascade, indexes, keys and wider types make no difference."""
    fill(older, conversations=4, messages=5)
    wanted = expected(older)
    execute(older, *VARIANTS[variant])
    in_zone(older, "Pacific/Chatham")
    assert adopt(older).adopted == Counts(4, 20)
    assert await stored(older) == wanted
    assert adopt(older).is_complete


@pytest.mark.parametrize(("kind", "value"), [("uuid", "00000000-0000-0000-0000-00000000000{}"), ("bigint", "{}")])
async def test_users_that_are_no_text(older: str, kind: str, value: str) -> None:
    """A user's id may be a number or a UUID and is converted to text."""
    fill(older, conversations=3, messages=2)
    cast = value.format("' || right(user_id, 1) || '")
    for table in ("conversations", "messages"):
        execute(older, f"alter table {table} alter user_id type {kind} using ('{cast}')::{kind}")
    assert adopt(older).adopted == Counts(3, 6)
    assert {each[0] for each in (await stored(older)).values()} == {value.format(n) for n in range(3)}


async def test_one_table_only(older: str) -> None:
    """Conversations without a messages table are adopted; messages without conversations are all quarantined."""
    fill(older, conversations=3, messages=2)
    execute(older, "alter table messages rename to other_messages")
    report = adopt(older)
    assert (report.missing, report.adopted, report.is_complete) == (["public.messages"], Counts(3, 0), True)
    execute(older, "alter table conversations rename to other_conversations", "drop schema chatdb_adopt cascade")
    execute(older, "alter table other_messages rename to messages", "truncate chatdb.conversations cascade")
    report = adopt(older)
    assert report.aside == {"its conversation is missing": Counts(0, 6)}
    execute(older, "alter table other_conversations rename to conversations")
    await is_adopted(older)
    execute(older, "alter table messages rename to other_messages")
    report = adopt(older, delete_gone=lambda _: True)
    assert (report.gone, report.deleted) == (Counts(0, 0), Counts(0, 0)), "a missing table is not an empty one"


def test_empty_tables(older: str) -> None:
    """Empty tables make a complete adoption of nothing."""
    report = adopt(older)
    assert (report.adopted, report.originals, report.is_complete) == (Counts(0, 0), Counts(0, 0), True)


def test_other_tables_of_the_names(older: str) -> None:
    """Unsuitable tables are refused with every difference, and nothing is written."""
    fill(older, conversations=1, messages=1)
    execute(
        older,
        "alter table messages drop column content, alter role type jsonb using to_jsonb(role)",
        "alter table conversations rename to c",
        "create view conversations as select id::smallint as id, user_id, created_at from c",
    )
    with pytest.raises(SchemaError) as caught:
        adopt(older)
    for difference in (
        "public.messages has no column content",
        "public.messages.role is jsonb, not character varying or text",
        "public.conversations is not a table",
        "public.conversations has no column updated_at",
        "public.conversations.id is smallint, not integer or bigint",
    ):
        assert difference in str(caught.value)
    assert one(older, "select to_regnamespace('chatdb_adopt')") is None
    execute(older, "drop view conversations", "alter table c rename to conversations", "drop table messages")
    execute(older, "alter table conversations drop constraint conversations_pkey")
    execute(older, "insert into conversations select * from conversations")
    with pytest.raises(SchemaError, match="no primary key, and 1 rows have a null or duplicate id"):
        adopt(older)


def test_what_is_missing(dsn: str, empty_dsn: str) -> None:
    """If chatdb's or the older tables are missing, the error says so."""
    with pytest.raises(SchemaError, match=r"has no table chatdb\.conversations: run chatdb migrate or yoyo apply"):
        adopt(empty_dsn)
    with pytest.raises(SchemaError, match=r"tables public\.conversations and public\.messages do not exist"):
        adopt(dsn)


def test_extra_columns(older: str) -> None:
    """The report names columns that are not copied, with the number of rows that have a value."""
    fill(older, conversations=2, messages=3)
    execute(older, 'alter table messages add "Model %" text', "alter table conversations add title text")
    execute(older, """update messages set "Model %" = 'large' where id < 4""")
    report = adopt(older)
    assert report.extra_columns == {"public.conversations.title": 0, "public.messages.Model %": 3}
    assert "the column public.messages.Model %, which has a value in 3 rows" in report.described()
    assert report.is_complete


def test_a_dry_run_writes_nothing(older: str) -> None:
    """A dry run reports the same numbers as the real run and writes nothing, on the first run and later."""
    fill(older)
    add(older, a_message(1, "u0", role="narrator"))
    tried = adopt(older, dry_run=True)
    assert one(older, "select to_regnamespace('chatdb_adopt')") is None
    assert one(older, "select count(*) from chatdb.conversations") == 0
    assert one(older, "select last_value from chatdb.messages_id_seq") == 1
    done = adopt(older)
    assert (tried.adopted, tried.aside, tried.originals) == (done.adopted, done.aside, done.originals)
    assert (tried.is_complete, done.is_complete) == (False, True)
    add(older, a_message(1, "u0", -5), a_message(2, "u1", 60 * 24 * 9))
    tried = adopt(older, dry_run=True)
    assert (tried.adopted, tried.renumbered, tried.adopted_before) == (Counts(0, 2), 9, done.adopted)
    assert one(older, "select count(*) from chatdb_adopt.messages") == done.adopted.messages
    done = adopt(older)
    assert (tried.adopted, tried.renumbered) == (done.adopted, done.renumbered)


def test_the_sequences(older: str) -> None:
    """The sequences of chatdb's ids move beyond the adopted ids and never back."""
    fill(older, conversations=2, messages=2)
    execute(older, "update messages set id = 2000000000 where id = 4")
    adopt(older)
    assert one(older, "select nextval('chatdb.messages_id_seq')") > 2_000_000_000
    assert one(older, "select nextval('chatdb.conversations_id_seq')") > 2
    execute(older, "select setval('chatdb.conversations_id_seq', 5000000000)")
    adopt(older)
    assert one(older, "select nextval('chatdb.conversations_id_seq')") == 5_000_000_001


async def test_what_is_gone(older: str) -> None:
    """Upstream deletions are reported, and repeated only on request and not in conversations with new messages."""
    fill(older, conversations=5, messages=3)
    (empty,) = add(older, a_conversation("u0"))
    adopt(older)
    async with chatdb.create_pool(older) as db:
        await chatdb.append_message(db, user_id="u0", conversation_id=empty, role="user", content="own")
        await chatdb.append_message(db, user_id="u1", conversation_id=2, role="user", content="own")
        await chatdb.append_message(db, user_id="u2", conversation_id=3, role="user", content="own")
    execute(older, f"delete from conversations where id in (1, 2, {empty})")
    execute(older, "delete from messages where id = (select min(id) from messages where conversation_id = 3)")
    execute(older, "delete from messages where id = (select min(id) from messages where conversation_id = 4)")
    before = await stored(older)
    report = adopt(older)
    assert (report.gone, report.deleted, report.is_complete) == (Counts(3, 8), Counts(0, 0), True)
    assert adopt(older, delete_gone=lambda _: False).deleted == Counts(0, 0)
    assert await stored(older) == before
    asked: list[Counts] = []
    report = adopt(older, delete_gone=lambda gone: not asked.append(gone))
    assert (asked, report.gone, report.deleted) == ([Counts(3, 8)], Counts(3, 8), Counts(1, 4))
    after = await stored(older)
    assert 1 not in after
    assert [after[each] for each in (2, 3, 5, empty)] == [before[each] for each in (2, 3, 5, empty)]
    assert after[4][4] == before[4][4][1:]
    report = adopt(older)
    assert (report.gone, report.is_complete, report.deleted_in_chatdb) == (Counts(2, 4), True, Counts(0, 0))


async def test_gone_without_a_cascade(older: str) -> None:
    """A conversation is not deleted while the older table still has its adopted messages."""
    fill(older, conversations=2, messages=2)
    adopt(older)
    execute(older, "alter table messages drop constraint messages_conversation_id_fkey")
    execute(older, "delete from conversations where id = 1")
    before = await stored(older)
    report = adopt(older, delete_gone=lambda _: True)
    assert (report.gone, report.deleted, report.is_complete) == (Counts(1, 0), Counts(0, 0), True)
    assert await stored(older) == before


def test_another_user_since(older: str) -> None:
    """A conversation whose user changed upstream is reported, and its new messages are quarantined."""
    fill(older, conversations=2, messages=2)
    adopt(older)
    execute(older, "update conversations set user_id = 'else' where id = 1")
    add(older, a_message(1, "else"))
    report = adopt(older)
    assert (report.changed_users, report.aside) == (1, {"its user is not its conversation's": Counts(0, 1)})


def test_nobody_else_may_read(older: str) -> None:
    """Quarantined rows are private, even if default privileges grant new tables to everybody."""
    execute(older, "alter default privileges grant all on tables to public", "drop role if exists chatdb_test_reader")
    fill(older, conversations=1, messages=1)
    adopt(older)
    execute(older, "create role chatdb_test_reader login password 'chatdb_test_reader'")
    try:
        assert one(older, "select has_schema_privilege('chatdb_test_reader', 'chatdb_adopt', 'usage')") is False
        tables = "select bool_or(has_table_privilege('chatdb_test_reader', oid, 'select, insert')) from pg_class "
        assert one(older, f"{tables} where relnamespace = 'chatdb_adopt'::regnamespace and relkind = 'r'") is False
        with pytest.raises(ConfigurationError, match="privilege"):
            adopt(as_role(older, "chatdb_test_reader"))
    finally:
        execute(older, "drop role chatdb_test_reader")


def test_rows_that_a_policy_hides(older: str) -> None:
    """A role that cannot see all rows is refused; it would take the hidden ones for deleted."""
    fill(older, conversations=1, messages=1)
    execute(
        older,
        "drop role if exists chatdb_test_operator",
        "create role chatdb_test_operator login password 'chatdb_test_operator'",
    )
    try:
        execute(
            older,
            f"grant create on database {one(older, 'select current_database()')} to chatdb_test_operator",
            "grant usage on schema chatdb to chatdb_test_operator",
            "grant all on all tables in schema chatdb, public to chatdb_test_operator",
            "grant all on all sequences in schema chatdb to chatdb_test_operator",
        )
        assert adopt(as_role(older, "chatdb_test_operator"), dry_run=True).adopted == Counts(1, 1)
        execute(older, "alter table messages enable row level security")
        with pytest.raises(ConfigurationError, match="BYPASSRLS"):
            adopt(as_role(older, "chatdb_test_operator"))
    finally:
        execute(older, "drop owned by chatdb_test_operator", "drop role chatdb_test_operator")


def test_writers_that_have_not_ended(older: str) -> None:
    """While a transaction that has written is open, the report does not say that nothing is left."""
    fill(older, conversations=1, messages=1)
    with psycopg.connect(older) as writing:
        writing.execute("insert into messages select 100, 1, 'u0', 'user', 'not yet', now()")
        report = adopt(older)
        assert (report.writers, report.is_complete, report.remaining) == (1, False, Counts(0, 0))
        assert "1 open transactions have written to the original tables" in report.described()
        assert "nothing is left" not in report.described()
        writing.commit()
    assert adopt(older).adopted == Counts(0, 1)


def test_a_busy_conversation(older: str) -> None:
    """The wait for a conversation that another transaction has locked is bounded."""
    fill(older, conversations=2, messages=2)
    adopt(older)
    add(older, a_message(1, "u0"))
    with psycopg.connect(older) as busy:
        busy.execute("update chatdb.conversations set title = 'x' where id = 1")
        with pytest.raises(UnavailableError, match="55P03"):
            adopt(older, wait=0.2)
        with ThreadPoolExecutor() as pool:
            done = pool.submit(adopt, older)
            wait_until(older, BLOCKED)
            busy.commit()  # changes the row after the snapshot
            assert done.result(60).adopted == Counts(0, 1)


@pytest.mark.chaos
def test_appends_all_the_time(older: str) -> None:
    """An adoption ends although others append to the same conversations without a pause, and seq has no gaps."""
    fill(older, conversations=1, messages=2)
    adopt(older)
    script = (
        "import psycopg, sys\n"
        "with psycopg.connect(sys.argv[1], autocommit=True) as c:\n"
        "    print(flush=True)\n"
        '    while True: c.execute("with n as (update chatdb.conversations set last_seq = last_seq + 1 '
        "where id = 1 returning *) insert into chatdb.messages (conversation_id, user_id, seq, role, content, "
        "created_at) select id, user_id, last_seq, 'user', 'own', now() from n\")\n"
    )
    busy = [subprocess.Popen([sys.executable, "-c", script, older], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for each in busy:
            assert each.stdout is not None
            each.stdout.readline()
        for _ in range(2):
            add(older, a_message(1, "u0"))
            assert adopt(older).adopted == Counts(0, 1)
    finally:
        for each in busy:
            each.kill()
            each.communicate()
    wait_until(older, "select count(*) = 1 from pg_stat_activity where datname = current_database()")
    assert one(older, "select count(*) = max(seq) from chatdb.messages") is True
    assert one(older, "select max(seq) = (select last_seq from chatdb.conversations) from chatdb.messages") is True


BLOCKED = (
    "select exists (select from pg_stat_activity where application_name = 'chatdb operator' "
    "and wait_event_type = 'Lock' and datname = current_database())"
)


def wait_until(dsn: str, condition: str) -> None:
    """Wait until a statement returns true."""
    deadline = time.monotonic() + 60
    while not one(dsn, condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.01)


SCRIPT = """
import sys
from chatdb.admin.adopt import adopt

def told(done, total):
    print(done, flush=True)
    sys.stdin.readline()

adopt(sys.argv[1], batch=20, progress=told)
"""


@contextmanager
def adopting(dsn: str, batches: int) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that has finished a number of batches and waits; kill it when the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, dsn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for number in range(batches):
                assert process.stdout.readline()
                if number < batches - 1:
                    process.stdin.write("\n")
                    process.stdin.flush()
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


INSIDE = ("chatdb.messages", "chatdb_adopt.messages", "chatdb_adopt.quarantine_messages")


@pytest.mark.chaos
async def test_killed_inside_a_batch(older: str) -> None:
    """A run killed in the middle of a batch leaves only whole batches, and the next run adopts the rest."""
    fill(older, conversations=4, messages=5)
    adopt(older)
    for place, table in enumerate(INSIDE):
        new = add(older, *(a_conversation("u0") for _ in range(12)))
        ids = add(older, *(a_message(each, "u0", minute) for minute in range(4) for each in new))
        add(older, a_message(place + 1, f"u{place % 3}", -9))  # the first batch renumbers
        bad = add(older, a_message(new[0], "u1"), *(a_message(each, "x") for each in new[-4:]))
        with adopting(older, batches=1) as process, psycopg.connect(older) as blocking:
            blocking.execute(f"lock table {table} in share mode")
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            wait_until(older, BLOCKED)
            process.send_signal(signal.SIGKILL)
            process.wait()
        report = adopt(older)  # waits for the killed run's lock
        assert 0 < report.adopted.messages < len(ids) + 1, "some batches were committed, some were not"
        assert report.is_complete
        assert set(bad) <= set(aside(older))
    assert await stored(older) == expected(older, without=set(aside(older)))


@pytest.mark.chaos
@pytest.mark.parametrize("batches", [1, 3])
async def test_killed_between_batches(older: str, batches: int) -> None:
    """The next run continues one killed after some batches, with the same result as an uninterrupted run."""
    fill(older, conversations=12, messages=9)
    with adopting(older, batches=batches):
        pass
    report = adopt(older)
    assert 0 < report.adopted_before.messages < 108
    assert Counts(*map(sum, zip(report.adopted, report.adopted_before, strict=True))) == Counts(12, 108)
    assert await stored(older) == expected(older)


async def test_two_at_once(older: str) -> None:
    """Of concurrent runs one works; the others wait and find nothing to do."""
    fill(older)
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(adopt, [older] * 3))
    assert sorted(report.adopted for report in reports) == [Counts(0, 0), Counts(0, 0), Counts(12, 108)]
    assert await stored(older) == expected(older)
    with psycopg.connect(older) as other:
        other.execute("select pg_advisory_lock(%s)", [0x636861746462])
        with pytest.raises(UnavailableError, match="another operator command"):
            adopt(older, wait=0.1)


async def test_while_the_older_service_writes(older: str) -> None:
    """The documented cut-over loses nothing while a service writes without a pause."""
    role = "older_service"
    script = DOCUMENT.partition("```sql\n")[2].partition("```")[0]
    assert role in script
    fill(older)
    execute(older, f"drop role if exists {role}", f"create role {role} login password '{role}'")
    try:
        execute(
            older,
            f"grant select, insert, update, delete on conversations, messages to {role}",
            f"grant usage on all sequences in schema public to {role}",
        )
        with Writers(as_role(older, role)) as service:
            for _ in range(4):
                service.wait_for(20)
                found = adopt(older, batch=30)
                assert found.aside == {}
            service.wait_for(20)
            with psycopg.connect(older, autocommit=True) as operator:
                operator.execute(script)
            report = adopt(older)
            service._thread.join(30)
            assert report.is_complete, report.described()
            assert adopt(older).adopted == Counts(0, 0)
        assert len(service.refused) == 4
        assert all("permission denied" in str(error) for error in service.refused)
        assert await stored(older) == expected(older)
        kept = {message[0] for each in (await stored(older)).values() for message in each[4]}
        assert service.acknowledged <= kept
        assert len(service.acknowledged) >= 100
    finally:
        execute(older, f"drop owned by {role}", f"drop role {role}")


@pytest.mark.chaos
def test_a_large_table(older: str, pytestconfig: pytest.Config) -> None:
    """A hundred thousand messages are adopted in batches and in order, without an index on the older table."""
    total = 40_000 if pytestconfig.getoption("--quick") else 100_000
    conversations = total // 20
    execute(
        older,
        "drop index ix_messages_conversation_id, ix_messages_user_id",
        f"insert into conversations select n, 'u' || n % 97, '2026-01-01', '2026-01-02' "
        f"from generate_series(1, {conversations}) as n",
        "insert into messages select n, c, 'u' || c % 97, 'user', 'text ' || n, timestamp '2026-01-01' + n % 1000 * "
        f"interval '1 minute' from generate_series(1, {total}) as n, "
        f"lateral (select 1 + n * 7919 % {conversations} as c)",
    )
    done: list[tuple[int, int]] = []
    report = adopt(older, progress=lambda *counts: done.append(counts))
    assert (report.adopted, report.is_complete) == (Counts(conversations, total), True)
    assert len(done) == total // 20_000 + 1
    assert done[-1] == (total, total)
    wanted = "select id, conversation_id, user_id, role, content, created_at at time zone 'UTC' as created_at, "
    wanted += "row_number() over (partition by conversation_id order by created_at, id) as seq from messages"
    stored_rows = "select id, conversation_id, user_id, role, content, created_at, seq from chatdb.messages"
    assert one(older, f"select count(*) from ({wanted} except {stored_rows}) as missing") == 0
    assert one(older, "select bool_and(last_seq = 20) from chatdb.conversations") is True


def test_the_command(older: str) -> None:
    """The command reports as text or JSON and never shows a message's text."""
    fill(older, conversations=2, messages=2)
    add(older, a_message(1, "else", content="a secret"))
    env = {"DATABASE_URL": "postgresql://127.0.0.1:1/none", "CHATDB_MIGRATE_URL": older}
    assert "would adopt 2 conversations, 4 messages\nwould quarantine" in command("adopt", "--dry-run", env=env)
    said = command("adopt", env=env)
    assert re.match(r"adopted 2 conversations, 4 messages in \d+\.\d s", said)
    assert "quarantined 0 conversations, 1 messages: its user is not its conversation's\nnothing is left" in said
    execute(older, "delete from conversations where id = 2")
    assert "--yes" in command("adopt", "--delete-gone", env=env, code=1)
    report = json.loads(command("adopt", "--delete-gone", "--yes", "--json", env=env))
    assert report["gone"] == report["deleted"] == {"conversations": 1, "messages": 2}
    assert report["aside"] == [{"reason": "its user is not its conversation's", "conversations": 0, "messages": 1}]
    assert report["complete"] is True
    assert "secret" not in said + json.dumps(report)
    assert set(report) == {*vars(AdoptReport()), "complete"}


async def test_with_the_search_index(older: str) -> None:
    """An adoption fills the search index as well, which then finds what was adopted."""
    create_search_index(older)
    fill(older)
    report = adopt(older)
    assert report.is_complete
    assert await stored(older) == expected(older)
    async with chatdb.create_pool(older) as db:
        found = await chatdb.search_messages(db, user_id="u1", query="text of", mode="words", limit=100)
    wanted = "select count(*) from messages where user_id = 'u1' and content like 'text%'"
    assert len(found) == one(older, wanted)
    assert found
    assert search_index_status(older).is_valid


async def test_tables_made_anew_since(older: str) -> None:
    """If chatdb's tables were rolled back and recreated, an adoption says so instead of reporting success."""
    fill(older)
    adopt(older)
    before = await stored(older)
    rollback_migrations(older, to="0002")
    apply_migrations(older)
    with pytest.raises(SchemaError, match="empty, although"):
        adopt(older)
    rollback_migrations(older, to="0001")
    apply_migrations(older)
    execute(older, "drop schema chatdb_adopt cascade")
    adopt(older)
    assert await stored(older) == before


def test_the_files_are_numbered_in_the_order_of_the_steps() -> None:
    """Every file belongs to a step, and steps run in file order; some run again in a later phase."""
    phases = [each for each in vars(steps).values() if isinstance(each, tuple)]
    files = [steps.FIND_COLUMNS, *dict.fromkeys(step.file for phase in phases for step in phase)]
    assert files == sorted(path.stem for path in (ROOT / "sql" / "adopt").glob("*.sql"))


async def test_the_tables_of_an_older_build(older: str) -> None:
    """An adoption begun when the quarantine tables had other names continues and loses no row."""
    fill(older, conversations=3, messages=2)
    add(older, a_message(1, "else"))
    adopt(older)
    for name in ("conversations", "messages"):
        execute(older, f"alter table chatdb_adopt.quarantine_{name} rename to aside_{name}")
    tried = adopt(older, dry_run=True)
    assert one(older, "select to_regclass('chatdb_adopt.quarantine_messages')") is None
    report = adopt(older)
    assert report.aside == tried.aside == {"its user is not its conversation's": Counts(0, 1)}
    assert (report.adopted, report.is_complete, len(aside(older))) == (Counts(0, 0), True, 1)
