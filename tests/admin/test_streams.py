"""`chatdb abort-streams`: what a crash left streaming is aborted with its text, and a stream that is alive is not."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

import chatdb
from chatdb.admin import streams
from chatdb.admin.row_security import protect_tables
from chatdb.admin.streams import AbortReport, abort_idle_streams, count_idle_streams
from chatdb.cli.durations import parse_duration
from chatdb.pool import Pool
from tests.support.command import PROGRAM, chatdb_process, environment
from tests.support.command import chatdb as run_chatdb
from tests.support.databases import as_role, execute

pytestmark = pytest.mark.owner

HOUR = timedelta(hours=1)


async def started(db: Pool, user: str, *texts: str, hours: float = 2, count: int = 1) -> list[dict[str, Any]]:
    """Start messages in a conversation, extend each by these texts, and return the addresses. They are `hours` old."""
    made = await chatdb.create_conversation(db, user_id=user)
    at = {"user_id": user, "conversation_id": made.id}
    addresses: list[dict[str, Any]] = []
    for _ in range(count):
        message = await chatdb.start_message(db, **at)
        offset = 0
        for text in texts:
            offset = await chatdb.extend_message(db, **at, seq=message.seq, offset=offset, text=text)
        addresses.append(at | {"seq": message.seq})
    await db.execute(
        "update chatdb.message_parts set flushed_at = flushed_at - $1::interval "
        "where conversation_id = $2 and start = -1",
        timedelta(hours=hours),
        made.id,
    )
    return addresses


async def states(db: Pool, addresses: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """Return the text and the state of each message."""
    messages = [await chatdb.get_message(db, **address) for address in addresses]
    return [(message.content, message.state) for message in messages]


async def aborted(db: Pool, older_than: timedelta = HOUR) -> AbortReport:
    """Abort the messages that are idle now."""
    found = await count_idle_streams(db, older_than=older_than)
    return await abort_idle_streams(db, found)


@pytest.mark.parametrize("batch", [1, 3, 500])
async def test_what_is_idle_is_aborted(db: Pool, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Messages of all users are aborted with the text that was stored; younger and finished ones are left."""
    monkeypatch.setattr(streams, "BATCH_SIZE", batch)
    idle = [*await started(db, "ann", "äb", "c", count=4), *await started(db, "bob"), *await started(db, "ann", "x")]
    others = [*await started(db, "ann", "young", hours=0.9), *await started(db, "eve", "now", hours=0)]
    done = await started(db, "zoe", "done")
    await chatdb.finish_message(db, **done[0])
    found = await count_idle_streams(db, older_than=HOUR)
    assert (found.messages, found.users) == (6, 2)
    progress: list[int] = []
    report = await abort_idle_streams(db, found, progress=progress.append)
    assert report == AbortReport(messages=6, users=2)
    assert progress == [1, 2, 3, 4, 5, 6]
    assert await states(db, idle) == [("äbc", "aborted")] * 4 + [("", "aborted"), ("x", "aborted")]
    assert await states(db, others) == [("young", "streaming"), ("now", "streaming")]
    assert await states(db, done) == [("done", None)]
    assert await db.fetchval("select count(*) from chatdb.message_parts where user_id in ('bob', 'zoe')") == 0
    assert await aborted(db) == AbortReport()


async def test_a_stream_that_is_alive_is_left_alone(db: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is extended, finished or deleted after the list was read keeps what its writer stored."""
    extended, finished, deleted, idle = await started(db, "ann", "a", count=4)
    await started(db, "bob", "gone")
    listed = streams._abort

    async def later(pool: Pool, user: str, conversation: int, seq: int, *rest: Any) -> bool | None:
        if seq == 1 and user == "ann":
            await chatdb.extend_message(db, **extended, offset=1, text="b")
            await chatdb.finish_message(db, **finished, content="whole")
            await chatdb.delete_message(db, **deleted)
            await chatdb.delete_user(db, user_id="bob")
        return await listed(pool, user, conversation, seq, *rest)

    monkeypatch.setattr(streams, "_abort", later)
    assert await aborted(db) == AbortReport(messages=1, users=1, left_alone=4)
    assert await states(db, [extended, finished, idle]) == [("ab", "streaming"), ("whole", None), ("a", "aborted")]


async def test_a_flush_that_is_under_way_wins(db: Pool) -> None:
    """A message whose flush has not committed yet is not aborted, and the flush is not lost."""
    [address] = await started(db, "ann", "a")
    found = await count_idle_streams(db, older_than=HOUR)
    async with chatdb.transaction(db) as connection:
        await chatdb.extend_message(connection, **address, offset=1, text="b")
        work = asyncio.create_task(abort_idle_streams(db, found))
        await asyncio.sleep(0.3)
        assert not work.done()
    assert await work == AbortReport(left_alone=1)
    assert await states(db, [address]) == [("ab", "streaming")]


async def test_a_locked_conversation_is_counted(db: Pool, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that another transaction keeps locked delays the others only for a moment; the status is 1."""
    monkeypatch.setattr(streams, "_PAUSE", 0.01)
    [locked], [idle] = await started(db, "ann", "a"), await started(db, "bob", "b")
    arguments = ("abort-streams", "--older-than", "1h", "--yes", "--json", "--database", dsn)
    async with chatdb.transaction(db) as connection:
        await connection.execute("select from chatdb.conversations where user_id = 'ann' for update")
        process = await asyncio.create_subprocess_exec(
            PROGRAM, *arguments, env=environment({}), stdout=asyncio.subprocess.PIPE
        )
        shown, _ = await process.communicate()
        assert process.returncode == 1
        expected = {"aborted": {"messages": 1, "users": 1}, "left_alone": 0, "locked": 1}
        assert json.loads(shown) == expected
    assert await states(db, [locked, idle]) == [("a", "streaming"), ("b", "aborted")]
    assert await aborted(db) == AbortReport(messages=1, users=1)


async def test_against_writers(db: Pool) -> None:
    """Against 200 writers that extend and finish at the same time, no text is lost and every number adds up."""
    addresses = await started(db, "ann", "a", count=200)
    found = await count_idle_streams(db, older_than=HOUR)
    acknowledged = dict.fromkeys(range(1, 201), "a")
    finished: set[int] = set()

    async def write(address: dict[str, Any]) -> None:
        try:
            await chatdb.extend_message(db, **address, offset=1, text="b")
            acknowledged[address["seq"]] += "b"
            if address["seq"] % 2:
                await chatdb.finish_message(db, **address)
                finished.add(address["seq"])
        except chatdb.ConflictError:
            pass  # aborted before

    begun = asyncio.Event()
    work = asyncio.create_task(abort_idle_streams(db, found, progress=lambda _: begun.set()))
    await begun.wait()
    for address in reversed(addresses):
        await write(address)
    report = await work
    stored = await states(db, addresses)
    assert [text for text, _ in stored] == [*acknowledged.values()]
    assert report.messages == [state for _, state in stored].count("aborted") > 0
    assert report.left_alone == list(acknowledged.values()).count("ab") > 0
    assert report.messages + report.left_alone == 200
    print(f"figure: 200 streams against their writers: {report.messages} aborted, {report.left_alone} left alone")


async def test_the_command(db: Pool, dsn: str) -> None:
    """It says how many messages of how many users and where, asks, and prints what it did."""
    env = {"CHATDB_MIGRATE_URL": dsn, "DATABASE_URL": "postgresql://127.0.0.1:1/other"}

    async def run(*arguments: str, code: int = 0) -> str:
        return await asyncio.to_thread(chatdb_process, "abort-streams", *arguments, env=env, code=code)

    addresses = [*await started(db, "ann", "a", count=2), *await started(db, "bob", "b")]
    said = await run("--older-than", "90s", code=1)
    name = chatdb._core.dsn.database_of(dsn)
    assert f"Abort 3 streaming messages of 2 users of {name}, to which nothing was added for 90s?" in said
    assert "Pass --yes to confirm" in said
    assert await run("--older-than", "1h", "--dry-run") == "would abort 3 streaming messages of 2 users\n"
    numbers = {"messages": 3, "users": 2}
    assert json.loads(await run("--older-than", "1h", "--dry-run", "--json")) == {"would_abort": numbers}
    assert [state for _, state in await states(db, addresses)] == ["streaming"] * 3
    assert await run("--older-than", "1d", "--yes") == "aborted 0 streaming messages of 0 users\n"
    assert await run("--older-than", "1h", "--yes") == "aborted 3 streaming messages of 2 users\n"
    assert await states(db, addresses) == [("a", "aborted"), ("a", "aborted"), ("b", "aborted")]
    zero = {"aborted": {"messages": 0, "users": 0}, "left_alone": 0, "locked": 0}
    assert json.loads(await run("--older-than", "1h", "--yes", "--json")) == zero


async def test_a_watcher_hears_of_it(db: Pool, dsn: str) -> None:
    """A watcher that listens gets an aborted message long before its next poll."""
    [address] = await started(db, "ann", "a")
    async with chatdb.Watcher(db, listen_dsn=dsn, poll=3_600) as watcher:
        messages = watcher.watch(user_id="ann", conversation_id=address["conversation_id"])
        assert (await anext(messages)).state == "streaming"
        upcoming = asyncio.create_task(messages.__anext__())
        await asyncio.sleep(0.5)
        arguments = ("--older-than", "1h", "--yes", "--database", dsn)
        await asyncio.to_thread(chatdb_process, "abort-streams", *arguments, env={})
        async with asyncio.timeout(20):
            assert (await upcoming).state == "aborted"
        await messages.aclose()


@pytest.mark.parametrize(
    "text", ["", "1", "h", "0s", "00d", "-1h", "1.5h", "1 h", " 1h", "1h\n", "1H", "1w", "\uff11h"]
)
def test_a_wrong_duration(text: str) -> None:
    """A duration without a number above 0 or a unit is refused with the forms."""
    with pytest.raises(chatdb.InvalidInputError, match=r"^older_than: must be .* 90s, 30m, 1h or 7d$"):
        parse_duration("older_than", text)
    said = run_chatdb("abort-streams", f"--older-than={text}", env={"DATABASE_URL": "postgresql://h:1/d"}, code=1)
    assert "90s, 30m, 1h or 7d" in said


def test_durations() -> None:
    """Seconds, minutes, hours and days are understood, up to 10,000 days."""
    found = [parse_duration("older_than", text) for text in ("90s", "30m", "1h", "7d", "10000d")]
    assert found == [timedelta(seconds=90), timedelta(minutes=30), HOUR, timedelta(days=7), timedelta(days=10_000)]
    for text in ("10001d", "999999999d"):
        with pytest.raises(chatdb.InvalidInputError, match="10,000 days"):
            parse_duration("older_than", text)


async def test_behind_row_level_security(db: Pool, dsn: str) -> None:
    """A role that row-level security restricts is refused in a clear sentence; one that bypasses it aborts all."""
    addresses = await started(db, "ann", "a")
    await asyncio.to_thread(protect_tables, dsn)
    name = f"restricted_{urlsplit(dsn).path[1:]}"
    execute(dsn, f"create role {name} login password '{name}'", f"grant usage on schema chatdb to {name}")
    try:
        execute(dsn, f"grant select, insert, update, delete on all tables in schema chatdb to {name}")
        arguments = ("abort-streams", "--older-than", "1h", "--yes")
        for more in ((), ("--dry-run",)):
            restricted = {"DATABASE_URL": as_role(dsn, name)}
            said = await asyncio.to_thread(chatdb_process, *arguments, *more, env=restricted, code=1)
            assert "run this as a superuser or a role with BYPASSRLS" in said
        assert await states(db, addresses) == [("a", "streaming")]
        execute(dsn, f"alter role {name} bypassrls")
        await asyncio.to_thread(chatdb_process, *arguments, env={"DATABASE_URL": as_role(dsn, name)})
        assert await states(db, addresses) == [("a", "aborted")]
    finally:
        execute(dsn, f"drop owned by {name}", f"drop role {name}")


async def test_a_server_that_is_read_only(db: Pool, dsn: str) -> None:
    """On a server that refuses writes the command says so and changes nothing; a dry run works."""
    addresses = await started(db, "ann", "a")
    env = {"DATABASE_URL": f"{dsn}{'&' if '?' in dsn else '?'}options=-c%20default_transaction_read_only%3Don"}
    said = await asyncio.to_thread(chatdb_process, "abort-streams", "--older-than", "1h", "--yes", env=env, code=1)
    assert "read-only" in said
    said = await asyncio.to_thread(chatdb_process, "abort-streams", "--older-than", "1h", "--dry-run", env=env)
    assert said == "would abort 1 streaming messages of 1 users\n"
    assert await states(db, addresses) == [("a", "streaming")]


def test_a_database_without_the_tables(empty_dsn: str) -> None:
    """It says to run chatdb migrate."""
    said = run_chatdb("abort-streams", "--older-than", "1h", env={"DATABASE_URL": empty_dsn}, code=1)
    assert "chatdb migrate" in said
