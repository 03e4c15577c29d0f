"""`chatdb migrate` and `chatdb rollback`, and what they add to yoyo."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

import chatdb
from chatdb._core.dsn import connect_arguments
from chatdb.admin import migrate
from chatdb.admin.connection import advisory_lock, connected, is_pooled
from chatdb.admin.migrate import (
    apply_migrations,
    last_migrations,
    migration_files,
    missing_migrations,
    rollback_migrations,
)
from tests.support.command import PROGRAM
from tests.support.command import chatdb as command
from tests.support.databases import as_role, execute
from tests.support.forked import processes
from tests.support.migrating import migrate_at
from tests.support.migrations import CONCURRENTLY, NAMES, add, objects, release, transaction, value, yoyo
from tests.support.paths import ROOT
from tests.support.pgbouncer import VERSIONS, pgbouncer

pytestmark = pytest.mark.owner


def test_twenty_at_once(empty_dsn: str) -> None:
    """Twenty processes that start at once on an empty database all succeed and apply each migration once."""
    barrier, queue = processes.Barrier(20), processes.Queue()
    started = [processes.Process(target=migrate_at, args=(barrier, queue, empty_dsn)) for _ in range(20)]
    for process in started:
        process.start()
    results = [queue.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 20
    assert sorted(name for names in results for name in names) == NAMES
    assert value(empty_dsn, "select count(*) from chatdb._chatdb_migration") == len(NAMES)


def test_one_that_waits(empty_dsn: str) -> None:
    """A second command waits at most `wait` seconds for the first, and names the server process that it waits for."""
    with advisory_lock(empty_dsn, wait=0) as connection:
        with pytest.raises(chatdb.UnavailableError, match=f"server process {connection.info.backend_pid}"):
            apply_migrations(empty_dsn, wait=0)
        timer = threading.Timer(0.5, connection.execute, ["select pg_advisory_unlock_all()"])
        timer.start()
        assert apply_migrations(empty_dsn, wait=30) == NAMES
        timer.join()


SEEN = [name for name in NAMES if name != "0013.chatdb-create-functions"]
"""The migrations that leave something in a database without Citus, by which a lost one is noticed."""


@pytest.mark.parametrize("version", VERSIONS)
def test_through_poolers(empty_dsn: str, tmp_path: Path, version: str) -> None:
    """A transaction pooler is refused with a fix; a session pooler works."""
    with pgbouncer(empty_dsn, tmp_path, version) as dsn:
        said = command("migrate", env={"DATABASE_URL": dsn}, code=1)
        assert "CHATDB_MIGRATE_URL" in said
        assert objects(empty_dsn) == []
        assert "applied" in command("migrate", env={"DATABASE_URL": dsn, "CHATDB_MIGRATE_URL": empty_dsn})
        with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection:
            assert is_pooled(dsn, connection)
    with pgbouncer(empty_dsn, tmp_path, version, mode="session") as dsn:
        assert rollback_migrations(dsn, to="0") == NAMES[::-1]
        assert apply_migrations(dsn) == NAMES


def test_an_edited_file(empty_dsn: str, folder: Path) -> None:
    """An edited, missing or unreleased file is named, and nothing is applied."""
    edited = folder / f"{NAMES[1]}.sql"
    edited.write_text(edited.read_text() + "-- a word\n")
    (folder / f"{NAMES[2]}.rollback.sql").unlink()
    with pytest.raises(chatdb.ConfigurationError, match=f"{NAMES[1]}.sql does not match its checksum"):
        apply_migrations(empty_dsn, folder=folder)
    shutil.copy(ROOT / "migrations" / edited.name, edited)
    with pytest.raises(chatdb.ConfigurationError, match=f"{NAMES[2]}.rollback.sql is missing"):
        apply_migrations(empty_dsn, folder=folder)
    shutil.copy(ROOT / "migrations" / f"{NAMES[2]}.rollback.sql", folder)
    (folder / "0009.mine.sql").write_text("select 1;")
    with pytest.raises(chatdb.ConfigurationError, match=r"0009.mine.sql does not match its checksum"):
        apply_migrations(empty_dsn, folder=folder)
    assert objects(empty_dsn) == []


def test_line_ends_of_windows(folder: Path) -> None:
    """Windows line endings in a checkout do not count as an edit."""
    for path in folder.glob("*.sql"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert migration_files(folder) == [file._replace(path=folder / file.path.name) for file in migration_files()]


def test_another_content_was_applied(empty_dsn: str, folder: Path) -> None:
    """A release whose file differs from the applied migration of the same name is refused."""
    apply_migrations(empty_dsn)
    edited = folder / f"{NAMES[2]}.sql"
    edited.write_text(edited.read_text() + "-- a word\n")
    release(folder)
    for call in (apply_migrations, missing_migrations):
        with pytest.raises(chatdb.SchemaError, match=f"{NAMES[2]} was applied to this database with different content"):
            call(empty_dsn, folder=folder)
    yoyo(empty_dsn, "apply", "--batch")
    yoyo(empty_dsn, "rollback", "--batch", "--revision", NAMES[2])
    assert apply_migrations(empty_dsn, folder=folder) == SEEN[2:]
    with pytest.raises(chatdb.SchemaError, match=NAMES[2]):
        apply_migrations(empty_dsn)


def test_yoyos_own_are_remembered(empty_dsn: str) -> None:
    """The first `chatdb migrate` records what yoyo applied, and later applies again what yoyo rolled back."""
    yoyo(empty_dsn, "apply", "--batch")
    assert migrate.applied_migrations(empty_dsn) == dict.fromkeys(NAMES)
    assert apply_migrations(empty_dsn) == []
    assert migrate.applied_migrations(empty_dsn) == {file.name: file.checksum for file in migration_files()}
    yoyo(empty_dsn, "rollback", "--batch", "--revision", NAMES[2])
    assert NAMES[2] not in migrate.applied_migrations(empty_dsn)
    assert apply_migrations(empty_dsn) == SEEN[2:]
    assert rollback_migrations(empty_dsn, to="0") == NAMES[::-1]
    assert value(empty_dsn, "select count(*) from _yoyo_migration") == 0
    yoyo(empty_dsn, "apply", "--batch")
    assert apply_migrations(empty_dsn) == []


def test_a_hosts_own_migrations(empty_dsn: str) -> None:
    """A host's own migrations in yoyo's tables stay untouched."""
    yoyo(empty_dsn, "apply", "--batch")
    execute(empty_dsn, "insert into _yoyo_migration values ('h', '20260101_01_host', now())")
    assert apply_migrations(empty_dsn) == []
    rollback_migrations(empty_dsn, to="0")
    assert value(empty_dsn, "select string_agg(migration_id, ',') from _yoyo_migration") == "20260101_01_host"


def test_dry_run(empty_dsn: str) -> None:
    """--dry-run prints the SQL and writes nothing, not even the bookkeeping table."""
    env = {"DATABASE_URL": empty_dsn}
    said = command("migrate", "--dry-run", env=env)
    for name in NAMES:
        assert (ROOT / "migrations" / f"{name}.sql").read_text() in said
    assert json.loads(command("migrate", "--dry-run", "--json", "--to", "0002", env=env)) == {"would_apply": NAMES[:2]}
    assert value(empty_dsn, "select count(*) from pg_class where relnamespace = 'public'::regnamespace") == 0
    command("migrate", env=env)
    assert command("migrate", "--dry-run", env=env) == "nothing to apply\n"
    said = json.loads(command("rollback", "--dry-run", "--to", "0002", "--json", env=env))
    assert said == {"would_take_back": NAMES[:1:-1], "rows": {"chatdb.message_parts": 0, "chatdb.messages": 0}}
    assert command("migrate", env=env) == "nothing to apply\n"


def test_to(empty_dsn: str) -> None:
    """--to names the last migration to apply or to keep, by name or number."""
    env = {"DATABASE_URL": empty_dsn}
    assert json.loads(command("migrate", "--to", "0001", "--json", env=env)) == {"applied": NAMES[:1]}
    assert json.loads(command("migrate", "--to", NAMES[1], "--json", env=env)) == {"applied": NAMES[1:2]}
    assert "must be one of 0001.chatdb-create-schema" in command("migrate", "--to", "0042", env=env, code=1)
    assert "chatdb rollback --to" in command("migrate", "--to", "0001", env=env, code=1)
    command("migrate", env=env)
    said = json.loads(command("rollback", "--to", "0001", "--yes", "--json", env=env))
    assert said["taken_back"] == NAMES[:0:-1]
    assert command("rollback", "--to", "0001", env=env) == "nothing to roll back\n"
    assert json.loads(command("rollback", "--to", "0", "--yes", "--json", env=env))["taken_back"] == [NAMES[0]]


def test_rollback_asks(dsn: str) -> None:
    """A rollback says what it deletes and how many rows, and does nothing without a confirmation."""
    execute(
        dsn,
        "insert into chatdb.conversations (user_id, id, last_seq) values ('alice', 1, 2)",
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
        "select 'alice', 1, n, 'user', 'hi', now() from generate_series(1, 2) as n",
    )
    env = {"DATABASE_URL": dsn}
    said = command("rollback", "--to", NAMES[2], env=env, code=1)
    assert f"{NAMES[4]}: Keeps all rows; the lists get slower." in said
    rollback_migrations(dsn, to=NAMES[2])
    said = command("rollback", env=env, code=1)
    assert f"{NAMES[2]}: Deletes every message of every user. Deletes 2 rows of chatdb.messages." in said
    assert "--yes" in said
    assert "nothing was changed" in answered("n\n", "rollback", env=env)
    assert value(dsn, "select count(*) from chatdb.messages") == 2
    assert f"rolled back {NAMES[2]}" in answered("y\n", "rollback", env=env)
    said = json.loads(command("rollback", "--yes", "--json", env=env))
    assert said == {"taken_back": [NAMES[1]], "rows": {"chatdb.conversations": 1}}


def answered(answer: str, *arguments: str, env: dict[str, str]) -> str:
    """Run `chatdb` on a terminal that answers its question, and return its output."""
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    done = subprocess.run(
        [PROGRAM, *arguments],
        env=os.environ | env,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.close(ours)
    os.close(theirs)
    return done.stdout


def test_something_else_in_the_schema(dsn: str) -> None:
    """The last rollback fails while chatdb's schema holds a table of the host."""
    execute(dsn, "create table chatdb.mine (id int)")
    with pytest.raises(chatdb.ChatDBError, match="2BP01"):
        rollback_migrations(dsn, to="0")
    assert value(dsn, "select to_regclass('chatdb.mine') is not null")
    assert apply_migrations(dsn) == NAMES[1:]


def test_a_busy_table(dsn: str) -> None:
    """A migration that hits lock_timeout is retried until `wait` is over, and loses nothing."""
    with transaction(dsn, "select * from chatdb.messages") as connection:
        with pytest.raises(chatdb.UnavailableError, match="55P03"):
            rollback_migrations(dsn, to="0002", wait=0)
        assert last_migrations(dsn)[0][0].name == NAMES[9]  # the last two need no lock that conflicts with reading
        threading.Timer(2.5, connection.rollback).start()
        assert rollback_migrations(dsn, to="0002", wait=60) == NAMES[9:1:-1]


def test_yoyos_lock(empty_dsn: str) -> None:
    """Yoyo's lock is respected, and removed only if its process has certainly ended."""
    yoyo(empty_dsn, "apply", "--batch", "--revision", NAMES[0])
    with psycopg.connect(empty_dsn) as yoyos:
        yoyos.execute("insert into yoyo_lock (locked, ctime, pid) values (1, now() at time zone 'UTC', 4711)")
        yoyos.commit()
        with pytest.raises(chatdb.UnavailableError, match="break-lock"):
            apply_migrations(empty_dsn, to="0002", wait=0.5)
    while value(empty_dsn, "select count(*) from pg_stat_activity where datname = current_database()") != 1:
        time.sleep(0.01)
    assert apply_migrations(empty_dsn, to="0002") == [NAMES[1]]
    with transaction(empty_dsn):
        execute(empty_dsn, "insert into yoyo_lock (locked, ctime, pid) values (1, now() at time zone 'UTC', -4711)")
        assert apply_migrations(empty_dsn) == NAMES[2:]
    assert value(empty_dsn, "select count(*) from yoyo_lock") == 0


def test_yoyo_waits(empty_dsn: str) -> None:
    """`yoyo apply` waits for a running `chatdb migrate`, then applies the same files again."""
    yoyo(empty_dsn, "apply", "--batch", "--revision", NAMES[0])
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query ~* '^\\s*{}'"
    with transaction(empty_dsn, "create table chatdb.conversations ()") as blocker, ThreadPoolExecutor() as threads:
        ours = threads.submit(apply_migrations, empty_dsn, to=NAMES[2])
        while value(empty_dsn, waiting.format("create table")) != 1:
            time.sleep(0.01)
        theirs = threads.submit(yoyo, empty_dsn, "apply", "--batch")
        while value(empty_dsn, waiting.format('insert into "yoyo_lock')) != 1:
            time.sleep(0.01)
        blocker.rollback()
        assert ours.result() == NAMES[1:3]
        theirs.result()
    assert apply_migrations(empty_dsn) == []


def test_yoyo_waits_for_an_index(dsn: str) -> None:
    """While `chatdb migrate` builds an index, `yoyo apply` waits outside a transaction, which would block the build."""
    yoyo(dsn, "apply", "--batch")
    rollback_migrations(dsn, to="0007")
    building = "select count(*) from pg_stat_activity where query ~* '^create index' and wait_event_type = 'Lock'"
    with (
        transaction(
            dsn,
            "insert into chatdb.conversations (user_id, id) values ('a', 1)",
            "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
            "values ('a', 1, 1, 'user', '', now())",
        ) as writer,
        ThreadPoolExecutor() as threads,
    ):
        ours = threads.submit(apply_migrations, dsn)
        while value(dsn, building) != 1:
            time.sleep(0.01)
        theirs = threads.submit(yoyo, dsn, "apply", "--batch")
        time.sleep(1.5)
        assert not theirs.done()
        writer.rollback()
        assert ours.result(timeout=60) == NAMES[7:]
        theirs.result(timeout=60)
    assert apply_migrations(dsn) == []


@pytest.mark.parametrize("place", range(1, len(NAMES)))
def test_yoyo_has_rolled_back(dsn: str, place: int) -> None:
    """`chatdb migrate` applies again what `yoyo rollback` dropped: tables, columns, indexes and parameters."""
    whole = objects(dsn)
    yoyo(dsn, "apply", "--batch")
    assert apply_migrations(dsn) == []
    yoyo(dsn, "rollback", "--batch", "--revision", NAMES[place])
    # the rollback of 0011 keeps what it validated, unless the constraint goes as well
    missing = [name for name in SEEN[place:] if place < 9 or name != NAMES[10]]
    assert [file.name for file in missing_migrations(dsn)] == missing
    assert apply_migrations(dsn) == missing
    assert objects(dsn) == whole
    assert apply_migrations(dsn) == []


def test_an_index_that_was_dropped(dsn: str) -> None:
    """`chatdb migrate` builds an index that somebody dropped."""
    whole = objects(dsn)
    execute(dsn, "drop index chatdb.ix_conversations_user_id_pinned_at")
    assert apply_migrations(dsn) == [NAMES[4]]
    assert objects(dsn) == whole


def test_invalid_indexes(dsn: str, folder: Path) -> None:
    """An invalid index from CREATE INDEX CONCURRENTLY is rebuilt, and the leftover of a REINDEX is dropped."""
    add(folder, "0099.index-created-at", CONCURRENTLY, "drop index if exists chatdb.ix_messages_created_at;")
    with (
        transaction(dsn, "lock chatdb.messages in share update exclusive mode"),
        pytest.raises(chatdb.UnavailableError, match="55P03"),
    ):
        apply_migrations(dsn, wait=0, folder=folder)
    with (
        transaction(dsn, "insert into chatdb.conversations (user_id) values ('a')"),  # the index build waits for it
        psycopg.connect(dsn, autocommit=True) as connection,
    ):
        connection.execute("set lock_timeout = '300ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            connection.execute(CONCURRENTLY.splitlines()[2].replace("messages", "conversations").encode())
    execute(dsn, "create index ix_messages_created_at_ccnew on chatdb.messages (created_at)")
    make_invalid(dsn, "ix_messages_created_at_ccnew")
    execute(dsn, "create index ix_messages_created_at on chatdb.messages (created_at)")
    make_invalid(dsn, "ix_messages_created_at")
    assert value(dsn, "select count(*) from pg_index where not indisvalid") == 3
    assert apply_migrations(dsn, folder=folder) == ["0099.index-created-at"]
    assert value(dsn, "select count(*) from pg_index where not indisvalid") == 0
    assert value(dsn, "select to_regclass('chatdb.ix_messages_created_at_ccnew')") is None
    make_invalid(dsn, "uq_messages_user_id_conversation_id_key")
    assert apply_migrations(dsn, folder=folder) == []
    assert value(dsn, "select count(*) from pg_index where not indisvalid") == 0


def make_invalid(dsn: str, index: str) -> None:
    """Make an index invalid, as a failed CREATE INDEX CONCURRENTLY does."""
    execute(dsn, f"update pg_index set indisvalid = false where indexrelid = 'chatdb.{index}'::regclass")


def test_a_newer_releases_migrations(dsn: str, folder: Path) -> None:
    """An older release refuses to roll back below a newer release's migrations."""
    add(folder, "0099.later", "create table if not exists chatdb.later (id int);", "drop table if exists chatdb.later;")
    assert apply_migrations(dsn, folder=folder) == ["0099.later"]
    for call in (rollback_migrations, last_migrations):
        with pytest.raises(chatdb.SchemaError, match=r"a newer release has applied 0099\.later"):
            call(dsn)
    assert rollback_migrations(dsn, folder=folder) == ["0099.later"]
    assert rollback_migrations(dsn) == [NAMES[-1]]


def test_what_was_agreed_to(dsn: str) -> None:
    """A rollback does nothing if the migrations are no longer those in `expected`."""
    assert rollback_migrations(dsn, expected=[NAMES[-1]]) == [NAMES[-1]]
    with pytest.raises(chatdb.SchemaError, match="migrated this database in the meantime"):
        rollback_migrations(dsn, expected=[NAMES[-1]])
    assert value(dsn, "select to_regclass('chatdb.conversations') is not null")


def test_a_role_named_chatdb(empty_dsn: str) -> None:
    """The bookkeeping stays in one schema, although the first migration creates one with the role's name."""
    execute(empty_dsn, "drop role if exists chatdb", "create role chatdb login superuser password 'chatdb'")
    dsn = as_role(empty_dsn, "chatdb")
    try:
        assert apply_migrations(dsn) == NAMES
        assert None not in migrate.applied_migrations(empty_dsn).values()
        assert value(dsn, "select to_regclass('chatdb._chatdb_migration') is not null")
        assert rollback_migrations(dsn, to="0") == NAMES[::-1]
    finally:
        execute(empty_dsn, "drop owned by chatdb", "drop role chatdb")


def test_another_search_path(empty_dsn: str) -> None:
    """The bookkeeping is in chatdb's schema whatever the role's search_path."""
    execute(empty_dsn, "create schema app")
    joint = "&" if "?" in empty_dsn else "?"
    other = f"{empty_dsn}{joint}options=-csearch_path%3Dapp,public"
    assert apply_migrations(empty_dsn, to="0002") == NAMES[:2]
    assert apply_migrations(other) == NAMES[2:]
    assert rollback_migrations(other, to="0002") == NAMES[:1:-1]
    assert apply_migrations(empty_dsn) == NAMES[2:]
    assert value(empty_dsn, "select count(*) from pg_class where relnamespace = 'app'::regnamespace") == 0
    rollback_migrations(other, to="0")
    assert apply_migrations(f"{empty_dsn}{joint}options=-csearch_path%3Dnowhere") == NAMES
    assert apply_migrations(empty_dsn) == []


def test_another_roles_session(owner: str, empty_dsn: str) -> None:
    """Another role's yoyo and CREATE INDEX are respected, though the owner sees little of their sessions."""
    yoyo(owner, "apply", "--batch")
    assert apply_migrations(owner) == []
    with psycopg.connect(empty_dsn) as yoyos:
        yoyos.execute("insert into yoyo_lock (locked, ctime, pid) values (1, now() at time zone 'UTC', 4711)")
        yoyos.commit()
        with pytest.raises(chatdb.UnavailableError, match="break-lock"):
            rollback_migrations(owner, wait=0)
        yoyos.execute("delete from yoyo_lock")
    with (
        transaction(empty_dsn, "insert into chatdb.conversations (user_id) values ('a')") as writer,
        ThreadPoolExecutor() as threads,
    ):
        building = threads.submit(execute, empty_dsn, CONCURRENTLY.splitlines()[2].replace("messages", "conversations"))
        while value(empty_dsn, "select count(*) from pg_index where not indisvalid") != 1:
            time.sleep(0.01)
        assert apply_migrations(owner, wait=0) == []
        writer.rollback()
        building.result()


def test_an_index_that_cannot_be_rebuilt_now(dsn: str) -> None:
    """Rebuilding an index waits at most `wait` seconds, and its attempts leave nothing behind."""
    make_invalid(dsn, "uq_messages_user_id_conversation_id_key")
    with (
        transaction(dsn, "select from chatdb.messages"),
        pytest.raises(chatdb.UnavailableError, match="55P03"),
    ):
        apply_migrations(dsn, wait=0)
    assert apply_migrations(dsn) == []
    assert value(dsn, "select count(*) from pg_index where not indisvalid") == 0
    assert value(dsn, "select count(*) from pg_class where relname ~ '_cc(new|old)'") == 0


def test_timeouts_of_a_role(owner: str, empty_dsn: str) -> None:
    """Timeouts set on a role do not end the session that holds the locks."""
    role = f"owner_{os.getpid()}"
    for name in ("idle_session_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"):
        if value(empty_dsn, f"select count(*) from pg_settings where name = '{name}'"):
            execute(empty_dsn, f"alter role {role} set {name} = '300ms'")
    with advisory_lock(owner, wait=0) as connection:
        connection.execute("begin")
        time.sleep(0.6)
        connection.execute("commit")
        time.sleep(0.6)
        connection.execute("select 1")


def test_tables_that_are_not_there(dsn: str) -> None:
    """Migrations whose tables were dropped are applied again, even if yoyo has recorded them."""
    yoyo(dsn, "apply", "--batch")
    execute(dsn, "drop table chatdb.message_parts, chatdb.messages")
    assert apply_migrations(dsn) == [NAMES[2], *SEEN[6:]]
    execute(dsn, "drop schema chatdb cascade")
    assert apply_migrations(dsn) == NAMES


def test_a_dsn_of_several_hosts(empty_dsn: str) -> None:
    """A DSN may have several hosts and percent-encoded names, as in libpq."""
    arguments = connect_arguments(empty_dsn)
    host, port = arguments["host"][0], arguments.get("port", 5432)
    user, password = arguments["user"], arguments.get("password", "")
    execute(empty_dsn, 'drop database if exists "we ird%"', 'create database "we ird%" template template0')
    try:
        place = f"{quote(host, safe='')}:{port}"
        dsn = f"postgresql://{user}:{password}@127.0.0.1:1,{place}/we%20ird%25?sslmode=disable"
        assert apply_migrations(dsn) == NAMES
        assert rollback_migrations(dsn, to="0") == NAMES[::-1]
    finally:
        execute(empty_dsn, 'drop database "we ird%" with (force)')


def test_no_row_in_a_traceback(dsn: str) -> None:
    """A row that the server quotes appears nowhere in the traceback, not even as the cause of chatdb's error."""
    secret = "a private word"
    execute(dsn, f"alter table chatdb.conversations add check (title <> '{secret}')")

    def insert() -> None:
        with connected(dsn) as connection:
            connection.execute("insert into chatdb.conversations (user_id, title) values ('a', %s)", [secret])

    with pytest.raises(chatdb.ChatDBError) as caught:
        insert()
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_a_role_without_privileges(dsn: str) -> None:
    """A role that may not create objects succeeds if there is nothing to do."""
    execute(
        dsn,
        "drop role if exists chatdb_test_looker",
        "create role chatdb_test_looker login password 'chatdb_test_looker'",
    )
    try:
        execute(dsn, "grant usage on schema chatdb to chatdb_test_looker")
        with pytest.raises(chatdb.ConfigurationError, match="run this as its owner"):
            apply_migrations(as_role(dsn, "chatdb_test_looker"))
        execute(dsn, "grant select on chatdb._chatdb_migration to chatdb_test_looker")
        assert apply_migrations(as_role(dsn, "chatdb_test_looker")) == []
    finally:
        execute(dsn, "drop owned by chatdb_test_looker", "drop role chatdb_test_looker")


def test_a_user_without_a_name(empty_dsn: str) -> None:
    """A container's user without a name can migrate, although yoyo asks for the name."""
    code = f"from chatdb.admin.migrate import apply_migrations; print(apply_migrations({empty_dsn!r}))"
    nameless = {name: text for name, text in os.environ.items() if name not in {"LOGNAME", "USER", "LNAME", "USERNAME"}}
    code = "import os, pwd; pwd.getpwuid = lambda uid: {}[uid]; " + code
    done = subprocess.run([sys.executable, "-c", code], env=nameless, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert NAMES[0] in done.stdout
