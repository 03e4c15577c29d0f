"""`chatdb repack` with pg_repack, on an installed PostgreSQL: under appends, interrupted, killed and refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

import chatdb
from chatdb.admin.check.inspection import inspect
from chatdb.admin.locality import (
    CLEAN_UP,
    Method,
    RepackReport,
    find_program,
    plan_repack,
    read_leftovers,
    read_scatter,
    repack_messages,
)
from chatdb.admin.search_index import create_search_index
from tests.support.chaos import figure
from tests.support.command import PROGRAM, environment
from tests.support.databases import as_role, execute
from tests.support.migrations import value
from tests.support.repacking import fill

pytestmark = [pytest.mark.repack, pytest.mark.owner]

WRITERS, SESSIONS = 400, 60


@pytest.fixture
def packed_dsn(dsn: str) -> str:
    """Return a database with the extension pg_repack and 20,000 messages that were written in turn."""
    if find_program() is None or not value(
        dsn, "select count(*) from pg_available_extensions where name = 'pg_repack'"
    ):
        pytest.skip("pg_repack is not installed: apt-get install postgresql-15-repack")
    execute(dsn, "create extension pg_repack")
    fill(dsn, 200)
    return dsn


def started(dsn: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """Start `chatdb repack`."""
    command = [PROGRAM, "repack", "--yes", *arguments]
    return subprocess.Popen(
        command, env=environment({"DATABASE_URL": dsn} | env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def child(process: subprocess.Popen[str], seconds: float = 20) -> int:
    """Return the process ID of the pg_repack that a command runs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if found and b"pg_repack" in Path(f"/proc/{found[0]}/cmdline").read_bytes():
            return int(found[0])
        time.sleep(0.02)
    raise AssertionError("no pg_repack")


@contextmanager
def held(dsn: str) -> Generator[tuple[subprocess.Popen[str], int]]:
    """Run `chatdb repack` while a transaction is open that pg_repack waits for. Yields it, and its pg_repack."""
    with psycopg.connect(dsn) as connection:
        connection.execute("select pg_current_xact_id()")  # without a lock on chatdb's tables
        process = started(dsn)
        try:
            pid = child(process)
            deadline = time.monotonic() + 20
            while not left(dsn):
                assert time.monotonic() < deadline
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            time.sleep(1.5)  # it looks for older transactions once a second
            yield process, pid
        finally:
            process.kill()
            process.communicate()
            connection.rollback()
            while value(dsn, _RUNNING):
                time.sleep(0.05)


_RUNNING = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'pg_repack'"


def left(dsn: str) -> tuple[str, ...]:
    """Return the objects that pg_repack has in the database."""
    with psycopg.connect(dsn) as connection:
        return read_leftovers(connection).objects


def blocks(dsn: str) -> float:
    """Return the mean number of blocks of a history."""
    with psycopg.connect(dsn) as connection:
        return read_scatter(connection).per_history


def state(dsn: str) -> str | None:
    """Return what `chatdb check` says about pg_repack."""
    return next((each.state for each in inspect(dsn) if each.what == "repack"), None)


async def test_under_appends(packed_dsn: str) -> None:
    """While 400 tasks append, the table is rewritten: no error, no lost message, and every history in order."""
    create_search_index(packed_dsn)
    plan = plan_repack(packed_dsn)
    assert plan.method is Method.PG_REPACK
    assert plan.scatter.per_history > 90
    done = asyncio.Event()
    stored: dict[int, int] = {}
    calls: list[float] = []
    clock = time.perf_counter

    async with chatdb.create_pool(packed_dsn, max_size=SESSIONS) as pool:

        async def write(number: int) -> None:
            made = await chatdb.create_conversation(pool, user_id=f"writer {number}")
            while not done.is_set():
                begun = clock()
                message = await chatdb.append_message(
                    pool, user_id=f"writer {number}", conversation_id=made.id, role="user", content="x" * 700
                )
                calls.append(clock() - begun)
                stored[made.id] = message.seq
                await asyncio.sleep(0.05)

        async def read() -> None:
            while not done.is_set():
                history = await chatdb.get_history(pool, user_id="user 1", conversation_id=1)
                assert [message.seq for message in history] == [*range(1, 101)]
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as group:
            for number in range(WRITERS):
                group.create_task(write(number))
            group.create_task(read())
            await asyncio.sleep(3)
            alone, calls = max(calls), []
            report = await asyncio.to_thread(repack_messages, packed_dsn)
            during, calls = max(calls), []
            await asyncio.sleep(1)
            done.set()
    with psycopg.connect(packed_dsn) as connection:
        rows = connection.execute(
            "select conversation_id, count(*), max(seq) from chatdb.messages where user_id like 'writer%' group by 1"
        ).fetchall()
    assert {conversation: (count, last) for conversation, count, last in rows} == {
        conversation: (seq, seq) for conversation, seq in stored.items()
    }
    assert len(stored) == WRITERS
    assert report.scatter.conversations > 5
    old = "chatdb.conversations where user_id like 'user %'"
    per_history = value(
        packed_dsn,
        "select avg(blocks)::float8 from (select count(distinct (ctid::text::point)[0]) as blocks from chatdb.messages "
        f"where user_id in (select user_id from {old}) group by user_id, conversation_id) as history",
    )
    assert per_history <= 20
    assert left(packed_dsn) == ()
    assert [each.what for each in inspect(packed_dsn) if each.state in {"missing", "different"}] == []
    figure(
        f"repack of {plan.messages:,} messages under {WRITERS} appending tasks: {report.seconds:.1f} s, "
        f"{plan.scatter.per_history:.0f} to {per_history:.1f} blocks a history, {sum(stored.values()):,} messages "
        f"appended, 0 lost, 0 errors, slowest append {during:.2f} s, before it {alone:.2f} s"
    )


def test_the_command(packed_dsn: str) -> None:
    """It says what it would do, asks, and tells what it did."""
    process = started(packed_dsn, "--dry-run")
    said, _ = process.communicate()
    assert said.startswith("would rewrite chatdb.messages: pg_repack rewrites about 20,000 messages, needs up to ")
    command = [PROGRAM, "repack", "--database", packed_dsn]
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert asked.returncode == 1
    assert "Rewrite chatdb.messages of " in asked.stderr
    assert "Pass --yes to confirm" in asked.stderr
    assert blocks(packed_dsn) > 90
    said, errors = started(packed_dsn, "--json").communicate()
    result = json.loads(said)
    assert (result["repacked"], result["method"]) == (True, "pg_repack"), errors
    assert result["blocks_before"] > 90
    assert result["blocks"] < 20
    said, _ = started(packed_dsn).communicate()
    assert re.match(r"rewrote chatdb\.messages in \d+\.\d s, from \d+ MB to \d+ MB\nbefore: .*\nnow: .*\n", said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(packed_dsn: str, number: signal.Signals) -> None:
    """A signal ends the command and pg_repack, which drops its trigger and its tables."""
    with held(packed_dsn) as (process, pid):
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "chatdb: interrupted"
        assert "waiting for the transaction of server process " in errors
        assert not Path(f"/proc/{pid}").exists()
    assert left(packed_dsn) == ()
    assert state(packed_dsn) is None
    assert blocks(packed_dsn) > 90


def test_a_killed_pg_repack(packed_dsn: str) -> None:
    """After a kill -9, the command and check name what is left and how to drop it; then it works again."""
    with held(packed_dsn) as (process, pid):
        os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "pg_repack ended with status -9; the table was not rewritten. It left table repack.log_" in errors
        assert CLEAN_UP in errors
    with pytest.raises(chatdb.ConfigurationError, match="a pg_repack that was killed left"):
        plan_repack(packed_dsn)
    assert state(packed_dsn) == "different"
    execute(packed_dsn, *CLEAN_UP.split("; "))
    assert state(packed_dsn) is None
    assert repack_messages(packed_dsn).scatter.per_history < 20


def test_a_killed_command(packed_dsn: str) -> None:
    """If only the command is killed, pg_repack works on, which another run and check report."""
    with held(packed_dsn) as (process, pid):
        process.kill()
        process.communicate()
        assert state(packed_dsn) == "note"
        with pytest.raises(chatdb.UnavailableError, match="pg_repack is running on this database"):
            plan_repack(packed_dsn)
    deadline = time.monotonic() + 30
    while blocks(packed_dsn) > 20 or state(packed_dsn):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not Path(f"/proc/{pid}/exe").exists()


def test_other_commands_wait(packed_dsn: str) -> None:
    """An index for words is not built at the same time."""
    with held(packed_dsn), pytest.raises(chatdb.UnavailableError, match="another operator command is still running"):
        create_search_index(packed_dsn, wait=0)


def test_a_locked_table(packed_dsn: str) -> None:
    """If another session keeps the table locked, nothing is changed and no session is ended."""
    with psycopg.connect(packed_dsn) as connection:
        connection.execute("lock table chatdb.messages in share mode")
        with pytest.raises(chatdb.UnavailableError, match=r"did not get a lock on .* within 1 s") as caught:
            repack_messages(packed_dsn, wait=1)
        assert caught.value.sent is False
        connection.execute("select 1")
    assert left(packed_dsn) == ()


def test_a_password(packed_dsn: str) -> None:
    """The password is in the environment of pg_repack, never in its arguments."""
    name, password = f"super_{os.getpid()}", "it's a \\ secret"
    execute(packed_dsn, f"create role {name} superuser login password $p${password}$p$")
    try:
        dsn = as_role(packed_dsn, name).replace(f"{name}:{name}", f"{name}:it%27s%20a%20%5C%20secret")
        with psycopg.connect(packed_dsn) as connection:
            connection.execute("select pg_current_xact_id()")
            process = started(dsn)
            pid = child(process)
            assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert f"PGPASSWORD={password}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        said, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "secret" not in said + errors
    finally:
        execute(packed_dsn, f"drop role {name}")


@pytest.fixture
def owner_of_tables(packed_dsn: str) -> Iterator[str]:
    """Yield the DSN of the owner of chatdb's tables, who is no superuser."""
    name = f"tables_{os.getpid()}"
    execute(
        packed_dsn, f"create role {name} login password '{name}'", f"grant usage, create on schema chatdb to {name}"
    )
    execute(packed_dsn, *(f"alter table chatdb.{each} owner to {name}" for each in ("conversations", "messages")))
    yield as_role(packed_dsn, name)
    execute(packed_dsn, f"reassign owned by {name} to current_user", f"drop owned by {name}", f"drop role {name}")


def test_an_owner(owner_of_tables: str, packed_dsn: str) -> None:
    """Before pg_repack 1.5, the owner of the table learns that only a superuser can use it."""
    if value(packed_dsn, "select extversion >= '1.5' from pg_extension where extname = 'pg_repack'"):
        assert isinstance(repack_messages(owner_of_tables), RepackReport)
        return
    with pytest.raises(chatdb.ConfigurationError, match=r"works only for a superuser: run this as a superuser, or "):
        repack_messages(owner_of_tables)
    assert left(packed_dsn) == ()
