"""`chatdb search-index`: the index is built while writers go on, also after a kill, and refused where it cannot be."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import chatdb
from chatdb._core.dsn import database_of
from chatdb.admin import search_index
from chatdb.admin.check.inspection import inspect
from chatdb.admin.migrate import apply_migrations, rollback_migrations
from chatdb.admin.row_security import protect_tables
from chatdb.admin.search_index import (
    SEARCH_INDEX,
    Step,
    create_search_index,
    drop_search_index,
    estimate_search_index,
    search_index_status,
)
from chatdb.pool import Pool
from tests.support.command import PROGRAM, chatdb_process, environment
from tests.support.command import chatdb as run_chatdb
from tests.support.databases import as_role, execute
from tests.support.embedded import standby
from tests.support.migrations import value

pytestmark = pytest.mark.owner

FILL = (
    "insert into chatdb.conversations (user_id, id, last_seq) select 'user ' || n % 10, n, 100 "
    "from generate_series(1, {conversations}) as n",
    "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
    "select c.user_id, c.id, n, 'user', "
    "(select string_agg(md5(c.id::text || n || w), ' ') from generate_series(1, 20) as w), now() "
    "from chatdb.conversations as c, generate_series(1, 100) as n",
    "analyze chatdb.messages",
)
QUERY = (
    "select count(*) from chatdb.messages where user_id = '{user}' and to_tsvector('simple', "
    "translate(\"left\"(content, 100000), '_-+./:@~&<', '          ')) @@ websearch_to_tsquery('simple', '{words}')"
)


def fill(dsn: str, conversations: int = 60) -> None:
    """Store conversations of 100 messages of 20 words."""
    execute(dsn, *(statement.format(conversations=conversations) for statement in FILL))


def states(dsn: str) -> dict[str, str]:
    """Return what `chatdb check` says about the search index."""
    return {each.what: each.state for each in inspect(dsn) if each.what in {f"index {SEARCH_INDEX}", "search"}}


def uses_index(dsn: str, words: str = "hello") -> bool:
    """Return whether a search for words uses the index."""
    with psycopg.connect(dsn) as connection:
        connection.execute("set enable_seqscan = off")
        connection.execute("set enable_indexscan = off")
        plan = connection.execute(f"explain {QUERY.format(user='user 1', words=words)}".encode()).fetchall()
    return any(SEARCH_INDEX in line for (line,) in plan)


@contextmanager
def open_transaction(dsn: str, *statements: str) -> Generator[psycopg.Connection[Any]]:
    """Hold a transaction open that has written to the messages, so that a build waits for it."""
    with psycopg.connect(dsn) as connection:
        for statement in statements or ("update chatdb.messages set token_count = 1 where seq = 1",):
            connection.execute(statement.encode())
        yield connection


def wait_for(dsn: str, phase: str, seconds: float = 60) -> int:
    """Wait until a build is in a phase, and return the PID of its server process."""
    deadline = time.monotonic() + seconds
    statement = "select pid from pg_stat_progress_create_index where datname = current_database() and phase like %s"
    with psycopg.connect(dsn, autocommit=True) as connection:
        while time.monotonic() < deadline:
            row = connection.execute(statement, [phase]).fetchone()
            if row:
                pid: int = row[0]
                return pid
            time.sleep(0.02)
    raise AssertionError(phase)


def started(dsn: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `chatdb search-index`."""
    command = [str(PROGRAM), "search-index", *arguments, "--database", dsn]
    return subprocess.Popen(
        command, env=environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_the_command(dsn: str) -> None:
    """It says what the index costs, builds it, shows its state, and drops it after a question."""
    fill(dsn, 5)
    env = {"CHATDB_MIGRATE_URL": dsn, "DATABASE_URL": "postgresql://127.0.0.1:1/other"}

    def run(*arguments: str, code: int = 0) -> str:
        return run_chatdb("search-index", *arguments, env=env, code=code)

    assert run("status") == "there is no search index: chatdb search-index create\n"
    assert json.loads(run("status", "--json")) == {"exists": False, "valid": False, "building": False, "size": 0}
    said = run("create", "--dry-run")
    assert said.startswith("would create the search index: about 500 messages in ")
    would = json.loads(run("create", "--dry-run", "--json"))
    assert would["would_create"] is True
    assert would["messages"] == 500
    assert would["index_bytes"] < would["table_bytes"]
    assert not search_index_status(dsn).exists
    assert "created the search index in " in run("create")
    size = search_index_status(dsn).size
    assert json.loads(run("status", "--json")) == {"exists": True, "valid": True, "building": False, "size": size}
    assert run("status").startswith("valid, ")
    assert run("create").startswith("nothing to do: the search index is valid, ")
    assert json.loads(run("create", "--json"))["created"] is False
    assert json.loads(run("create", "--dry-run", "--json")) == {"would_create": False}
    assert run("drop", "--dry-run").startswith("would drop the search index, ")
    said = run("drop", code=1)
    assert f"Drop the search index of {database_of(dsn)}, " in said
    assert "Pass --yes to confirm" in said
    assert search_index_status(dsn).is_valid
    assert json.loads(run("drop", "--yes", "--json")) == {"dropped": True, "size": size}
    assert run("drop", "--yes") == "nothing to do: there is no search index\n"
    assert value(dsn, "select count(*) from pg_extension where extname = 'btree_gin'") == 1


def test_the_cost_is_said_before_the_build(dsn: str) -> None:
    """Before it starts, the command prints how much it reads, and what an append costs afterwards."""
    fill(dsn, 5)
    process = started(dsn, "create")
    said, errors = process.communicate()
    assert process.returncode == 0
    assert "building the search index: about 500 messages in " in errors
    assert "an append takes about " in errors
    assert said.startswith("created the search index in ")


def test_the_index_serves_words(dsn: str) -> None:
    """The planner uses the index for words of one user, and addresses and paths are found by their parts."""
    fill(dsn, 5)
    texts = ("mail ann.lee@example.com", "see https://example.org/a-b/c_d?x=1&y", "snake_case and kebab-case", "a.b/c")
    for seq, text in enumerate(texts, 101):
        execute(
            dsn,
            "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
            f"values ('user 1', 1, {seq}, 'user', '{text}', now())",
        )
    assert not uses_index(dsn)
    create_search_index(dsn)
    assert uses_index(dsn)
    for words in ("lee", "example lee", "example org", "snake", "kebab case", "c", "EXAMPLE"):
        assert value(dsn, QUERY.format(user="user 1", words=words)), words
        assert value(dsn, QUERY.format(user="user 2", words=words)) == 0, words


@pytest.mark.chaos
@pytest.mark.parametrize("phase", ["building index%", "waiting for writers before validation"])
def test_killed(dsn: str, phase: str) -> None:
    """After a kill -9 during the build the server stops, and the next run drops what is left and builds it again."""
    # the server notices the kill after up to a second, and must not be done by then
    fill(dsn, 60 if phase.startswith("waiting") else 300)
    process = started(dsn, "create")
    if phase.startswith("waiting"):
        wait_for(dsn, "building index%")
        with open_transaction(dsn):
            pid = wait_for(dsn, phase)
            process.kill()
            process.communicate()
            deadline = time.monotonic() + 20
            while value(dsn, f"select count(*) from pg_stat_activity where pid = {pid}"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
    else:
        wait_for(dsn, phase)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    build = create_search_index(dsn)
    assert build.created
    assert build.dropped_invalid
    assert search_index_status(dsn).is_valid
    assert value(dsn, "select count(*) from pg_indexes where indexname like 'ix_messages_search%'") == 1
    assert states(dsn) == {f"index {SEARCH_INDEX}": "ok"}


def test_what_a_killed_run_leaves(dsn: str) -> None:
    """A leftover is reported by status and check, is left alone by migrate, and can be dropped."""
    fill(dsn, 5)
    create_search_index(dsn)
    execute(dsn, f"update pg_index set indisvalid = false where indexrelid = 'chatdb.{SEARCH_INDEX}'::regclass")
    env = {"DATABASE_URL": dsn}
    assert chatdb_process("search-index", "status", env=env).startswith("is invalid, because a build ended early")
    assert states(dsn) == {f"index {SEARCH_INDEX}": "different"}
    assert apply_migrations(dsn) == []
    assert not search_index_status(dsn).is_valid
    assert drop_search_index(dsn).exists
    assert not search_index_status(dsn).exists
    assert states(dsn) == {}


@pytest.mark.chaos
def test_two_at_once(dsn: str) -> None:
    """Of two runs one builds; the other waits for it and finds nothing to do, or gives up after --wait."""
    fill(dsn)
    with open_transaction(dsn):
        first = started(dsn, "create", "--json")
        wait_for(dsn, "waiting for writers before build")
        late = started(dsn, "create", "--wait", "0")
        _, errors = late.communicate()
        assert late.returncode == 1
        assert "another operator command is still running on this database after 0 s (server process " in errors
        second = started(dsn, "create", "--json")
        third = started(dsn, "drop", "--wait", "0", "--yes")
        third.communicate()
        assert third.returncode == 1
        assert states(dsn) == {f"index {SEARCH_INDEX}": "note"}
        assert "is being built: waiting for writers before build" in chatdb_process(
            "search-index", "status", env={"DATABASE_URL": dsn}
        )
        time.sleep(1)
    results = [json.loads(each.communicate()[0]) for each in (first, second)]
    assert [each["created"] for each in results] == [True, False]
    assert search_index_status(dsn).is_valid


def test_a_deployment_does_not_wait(dsn: str) -> None:
    """`chatdb migrate` with nothing to apply goes on while the index is built."""
    fill(dsn, 5)
    with open_transaction(dsn):
        process = started(dsn, "create")
        wait_for(dsn, "waiting for writers before build")
        assert apply_migrations(dsn, wait=0) == []
    process.communicate()
    assert process.returncode == 0


def test_a_long_transaction_is_named(dsn: str) -> None:
    """A build that waits for a transaction names its server process, and ends after it, however short --wait is."""
    fill(dsn, 5)
    with open_transaction(dsn) as connection:
        process = started(dsn, "create", "--wait", "1")
        wait_for(dsn, "waiting for writers before build")
        time.sleep(3)
        assert process.poll() is None
        pid = connection.info.backend_pid
    _, errors = process.communicate()
    assert process.returncode == 0
    assert errors.count(f"waiting for the transaction of server process {pid} to end") == 1


@pytest.mark.parametrize("action", ["create", "drop"])
def test_a_drop_names_the_transaction_that_it_waits_for(dsn: str, action: str) -> None:
    """While an index is dropped, also an invalid one before a build, the transaction that this waits for is named."""
    fill(dsn, 5)
    create_search_index(dsn)
    execute(dsn, f"update pg_index set indisvalid = false where indexrelid = 'chatdb.{SEARCH_INDEX}'::regclass")
    with open_transaction(dsn) as connection:
        process = started(dsn, action, "--yes")
        pid = connection.info.backend_pid
        waits = f"select count(*) from pg_stat_activity where {pid} = any(pg_blocking_pids(pid))"
        deadline = time.monotonic() + 20
        while not value(dsn, waits):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)
        assert process.poll() is None
    _, errors = process.communicate()
    assert process.returncode == 0
    assert errors.count(f"waiting for the transaction of server process {pid} to end") == 1
    assert search_index_status(dsn).exists == (action == "create")


def test_a_locked_table(dsn: str) -> None:
    """If another session keeps the table locked, the command ends after --wait with a sentence."""
    with open_transaction(dsn, "lock table chatdb.messages in share mode"):
        start = time.monotonic()
        with pytest.raises(chatdb.UnavailableError, match="a lock, a timeout or a deadlock"):
            create_search_index(dsn, wait=1)
        assert time.monotonic() - start < 20
    assert not search_index_status(dsn).exists
    assert create_search_index(dsn).created


def test_an_interrupt(dsn: str) -> None:
    """Ctrl-C ends the command and the build; the next run starts again."""
    fill(dsn, 5)
    with open_transaction(dsn):
        process = started(dsn, "create")
        pid = wait_for(dsn, "waiting for writers before build")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "chatdb: interrupted"
        deadline = time.monotonic() + 20
        while value(dsn, f"select count(*) from pg_stat_activity where pid = {pid}"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert create_search_index(dsn).dropped_invalid


def test_progress(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress of a build is reported in blocks of the table."""
    monkeypatch.setattr(search_index, "_POLL", 0.02)
    fill(dsn)
    steps: list[Step] = []
    assert create_search_index(dsn, progress=steps.append).created
    blocks = [step for step in steps if step.phase.startswith("building index") and step.total]
    assert any(0 < step.done <= step.total for step in blocks), steps


@pytest.mark.chaos
async def test_under_writers(db: Pool, dsn: str) -> None:
    """While the index is built, dropped and built, writers get no error, and all that they stored is found."""
    await asyncio.to_thread(fill, dsn)
    done = asyncio.Event()
    stored: dict[int, int] = {}
    slowest = 0.0

    async def write(number: int) -> None:
        nonlocal slowest
        made = await chatdb.create_conversation(db, user_id=f"writer {number}")
        at: dict[str, Any] = {"user_id": f"writer {number}", "conversation_id": made.id}
        count = 0
        while not done.is_set():
            start = time.perf_counter()
            await chatdb.append_message(db, **at, role="user", content=f"needle{number} {count} foo-bar")
            slowest = max(slowest, time.perf_counter() - start)
            count += 1
        stored[number] = count

    async with asyncio.TaskGroup() as tasks:
        for number in range(8):
            tasks.create_task(write(number))
        await asyncio.sleep(0.2)
        assert (await asyncio.to_thread(create_search_index, dsn)).created
        assert (await asyncio.to_thread(drop_search_index, dsn)).is_valid
        assert (await asyncio.to_thread(create_search_index, dsn)).created
        await asyncio.sleep(0.2)
        done.set()
    with psycopg.connect(dsn) as connection:
        connection.execute("set enable_seqscan = off")
        connection.execute("set enable_indexscan = off")
        for number, count in stored.items():
            # without the user, so that no other index can answer
            _, _, condition = QUERY.format(user="", words=f"needle{number} foo").partition(" and ")
            statement = f"select count(*) from chatdb.messages where {condition}".encode()
            plan = connection.execute(b"explain " + statement).fetchall()
            assert any(SEARCH_INDEX in line for (line,) in plan)
            assert connection.execute(statement).fetchone() == (count,)
    print(f"figure: {sum(stored.values())} appends beside two builds: 0 errors, 0 lost, the slowest {slowest:.2f} s")
    assert sum(stored.values()) > 50


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a_" * 65_536, id="a_"),
        pytest.param("lorem ipsum " * 349_525, id="4 MiB"),
        pytest.param(" ".join(f"w{number}" for number in range(600_000))[: 4 << 20], id="4 MiB of distinct words"),
        pytest.param("w" * (4 << 20), id="one word of 4 MiB"),
        pytest.param("\U0001f600 " * 50_000, id="100,000 characters of which half have four bytes"),
        pytest.param("".join(map(chr, range(0x4E00, 0x9FA6))) * 4, id="without blanks"),
        pytest.param("http://a.b/c?d=e&f@g.h:80/" * 5_000, id="addresses"),
        pytest.param("<a b='c'>&amp;" * 8_000, id="tags"),
    ],
)
async def test_long_texts(db: Pool, dsn: str, text: str) -> None:
    """Any text is stored within a second or so although the index exists."""
    await asyncio.to_thread(create_search_index, dsn)
    made = await chatdb.create_conversation(db, user_id="ann")
    start = time.perf_counter()
    await chatdb.append_message(db, user_id="ann", conversation_id=made.id, role="user", content=text)
    seconds = time.perf_counter() - start
    print(f"figure: {len(text):,} characters with the search index: {seconds:.2f} s")
    assert seconds < 5
    [message] = await chatdb.get_history(db, user_id="ann", conversation_id=made.id)
    assert message.content == text


def test_a_role_that_does_not_own_the_table(dsn: str) -> None:
    """A role that does not own the table is refused before anything is created."""
    name = f"stranger_{os.getpid()}"
    execute(dsn, f"create role {name} login password '{name}'", f"grant usage on schema chatdb to {name}")
    try:
        execute(dsn, f"grant select on all tables in schema chatdb to {name}")
        stranger = as_role(dsn, name)
        for call in (create_search_index, drop_search_index, estimate_search_index):
            with pytest.raises(chatdb.ConfigurationError, match="does not own the table"):
                call(stranger)
        assert not search_index_status(stranger).exists
        assert value(dsn, "select count(*) from pg_extension where extname = 'btree_gin'") == 0
    finally:
        execute(dsn, f"drop owned by {name}", f"drop role {name}")


def test_an_owner_who_may_not_create_extensions(dsn: str) -> None:
    """The owner of the table without CREATE on the database learns who has to create the extension."""
    name = f"tables_{os.getpid()}"
    execute(dsn, f"create role {name} login password '{name}'", f"grant usage, create on schema chatdb to {name}")
    try:
        execute(dsn, f"alter table chatdb.messages owner to {name}")
        with pytest.raises(chatdb.ConfigurationError, match="may not create the extension btree_gin: run create ext"):
            create_search_index(as_role(dsn, name))
        execute(dsn, "create extension btree_gin")
        assert create_search_index(as_role(dsn, name)).created
        assert states(as_role(dsn, name))[f"index {SEARCH_INDEX}"] == "ok"
    finally:
        execute(dsn, "alter table chatdb.messages owner to current_user", f"drop owned by {name}", f"drop role {name}")


def test_the_databases_owner(owner: str) -> None:
    """The database's owner, who is no superuser, can create the index and the extension, also behind protect."""
    apply_migrations(owner)
    protect_tables(owner)
    assert estimate_search_index(owner)[1].messages == 0
    assert create_search_index(owner).created
    assert states(owner) == {f"index {SEARCH_INDEX}": "ok", "search": "note"}
    protect_tables(owner, off=True)
    assert states(owner) == {f"index {SEARCH_INDEX}": "ok"}


def test_without_the_extension(dsn: str) -> None:
    """A server without btree_gin is refused with the package to install, before anything is done."""
    with psycopg.connect(dsn) as connection:
        if connection.info.server_version < 180_000:
            pytest.skip("older servers cannot be told to look for extensions elsewhere")
    execute(dsn, f"alter database {urlsplit(dsn).path[1:]} set extension_control_path = '/nowhere'")
    for call in (create_search_index, estimate_search_index):
        with pytest.raises(chatdb.ConfigurationError, match=r"lacks the extension btree_gin.*postgresql-contrib"):
            call(dsn)
    assert not search_index_status(dsn).exists


def test_another_definition(dsn: str) -> None:
    """An index of the same name that no statement can use is reported, and replaced by drop and create."""
    execute(dsn, f"create index {SEARCH_INDEX} on chatdb.messages (created_at)")
    for call in (create_search_index, estimate_search_index):
        with pytest.raises(chatdb.ConfigurationError, match="defined differently"):
            call(dsn)
    assert states(dsn) == {f"index {SEARCH_INDEX}": "different"}
    assert chatdb_process("search-index", "status", env={"DATABASE_URL": dsn}).startswith("is defined differently")
    drop_search_index(dsn)
    create_search_index(dsn)
    assert states(dsn) == {f"index {SEARCH_INDEX}": "ok"}
    execute(dsn, f"alter database {urlsplit(dsn).path[1:]} set quote_all_identifiers = on")
    execute(dsn, f"alter index chatdb.{SEARCH_INDEX} set (gin_pending_list_limit = 4096)")
    assert states(dsn) == {f"index {SEARCH_INDEX}": "ok"}


def test_on_a_standby() -> None:
    """A standby is refused with a sentence by create and drop; status and a dry run answer."""
    with standby() as dsn:
        assert value(dsn, "select pg_is_in_recovery()") is True
        for call in (create_search_index, drop_search_index):
            with pytest.raises(chatdb.ConfigurationError, match="the server is a standby, which is read-only"):
                call(dsn)
        assert not search_index_status(dsn).exists
        assert not estimate_search_index(dsn)[0].is_valid


def test_without_tables(empty_dsn: str) -> None:
    """Without chatdb's tables every action says what to run."""
    for call in (create_search_index, drop_search_index, estimate_search_index, search_index_status):
        with pytest.raises(chatdb.SchemaError, match="run chatdb migrate or yoyo apply"):
            call(empty_dsn)


async def test_other_commands_with_the_index(dsn: str) -> None:
    """check_schema, migrate and rollback work with the index; rolling back the table takes it along."""
    await asyncio.to_thread(create_search_index, dsn)
    async with chatdb.create_pool(dsn) as pool:
        await chatdb.check_schema(pool)
    assert await asyncio.to_thread(apply_migrations, dsn) == []
    await asyncio.to_thread(rollback_migrations, dsn, to="0003")
    await asyncio.to_thread(apply_migrations, dsn)
    assert (await asyncio.to_thread(search_index_status, dsn)).is_valid
    await asyncio.to_thread(rollback_migrations, dsn, to="0")
    await asyncio.to_thread(apply_migrations, dsn)
    assert not (await asyncio.to_thread(search_index_status, dsn)).exists
    assert (await asyncio.to_thread(create_search_index, dsn)).created
