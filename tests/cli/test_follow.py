"""`chatdb show --follow`: what is stored, then new messages and the text of those that are streamed, until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import chatdb
from chatdb.admin.row_security import protect_tables
from chatdb.pool import Pool
from tests.support.command import PROGRAM, chatdb_process, environment
from tests.support.databases import as_role, execute
from tests.support.pgbouncer import VERSIONS, pgbouncer

pytestmark = pytest.mark.server_independent

TIME = re.compile(r" \d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
LISTENING = "select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen%'"


class Followed:
    """A running `chatdb show --follow`, and what it has printed so far."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.shown = b""

    async def until(self, text: str) -> None:
        """Wait until it has printed a text."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while text not in TIME.sub("", self.shown.decode(errors="ignore")):
                more = await self.process.stdout.read(4096)
                assert more, (self.shown, self.process.returncode)
                self.shown += more

    async def interrupted(self) -> str:
        """Press Ctrl-C, and return all it has printed, without the times."""
        self.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            shown, said = await self.process.communicate()
        assert self.process.returncode == 130
        assert [line for line in said.decode().splitlines() if not line.startswith("database: ")] == [
            "chatdb: interrupted"
        ]
        self.shown += shown
        return TIME.sub("", self.shown.decode())


@asynccontextmanager
async def following(dsn: str, conversation: int, *options: str, **env: str) -> AsyncGenerator[Followed]:
    """Yield a running command."""
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "show", str(conversation), "--user", "ann", "--follow", *options),
        env=environment({"DATABASE_URL": dsn} | env),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        yield Followed(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def talk(db: Pool, *texts: str) -> dict[str, Any]:
    """Store a conversation with these messages, and return its address."""
    messages = [{"role": "user", "content": text} for text in texts]
    made = await chatdb.create_conversation(db, user_id="ann", title="t", messages=messages)
    return {"user_id": "ann", "conversation_id": made.id}


async def test_messages_and_growing_text(db: Pool, dsn: str) -> None:
    """Stored messages come first, then new ones, and the text of a streaming one piece by piece."""
    at = await talk(db, "one", "two")
    await chatdb.start_message(db, **at)
    await chatdb.extend_message(db, **at, seq=3, offset=0, text="It ")
    async with following(dsn, at["conversation_id"]) as shown:
        await shown.until("#3 assistant streaming\nIt ")
        await chatdb.extend_message(db, **at, seq=3, offset=3, text="grows\n")
        await shown.until("It grows\n")
        await chatdb.extend_message(db, **at, seq=3, offset=9, text="on 👋")
        await chatdb.finish_message(db, **at, seq=3)
        await shown.until("#3 finished\n")
        await chatdb.append_message(db, **at, role="user", content="next")
        await shown.until("#4 user\nnext\n")
        await chatdb.append_message(db, **at, role="user", content="other", parent_seq=1)
        await shown.until("other\n")
        printed = await shown.interrupted()
    assert printed == (
        f"conversation {at['conversation_id']}: t\n\n#1 user\none\n\n#2 user\ntwo\n\n#3 assistant streaming\n"
        "It grows\non 👋\n#3 finished\n\n#4 user\nnext\n\n#5 user after #1\nother\n"
    )


async def test_two_streams_at_once(db: Pool, dsn: str) -> None:
    """A title says whose text goes on, and each ends with how it ended."""
    at = await talk(db, "q")
    async with following(dsn, at["conversation_id"], "--last", "1") as shown:
        await shown.until("q\n")
        for seq, text in ((2, "a"), (3, "b")):
            await chatdb.start_message(db, **at)
            await chatdb.extend_message(db, **at, seq=seq, offset=0, text=text)
            await shown.until(text)
        await chatdb.extend_message(db, **at, seq=2, offset=1, text="A")
        await shown.until("#2 assistant continues\nA")
        await chatdb.finish_message(db, **at, seq=3, content="something else")
        await shown.until("something else\n")
        await chatdb.finish_message(db, **at, seq=2, aborted=True)
        await shown.until("#2 aborted\n")
        await chatdb.start_message(db, **at)
        await shown.until("#4 assistant streaming\n")
        await chatdb.delete_message(db, **at, seq=4)
        await shown.until("#4 deleted\n")
        printed = await shown.interrupted()
    lines = printed.splitlines()[2:]
    titles = ["#2 assistant streaming", "#3 assistant streaming", "#2 assistant continues"]
    titles += ["#3 assistant finished, with this text instead", "#2 aborted", "#4 assistant streaming", "#4 deleted"]
    assert [line for line in lines if line.startswith("#")] == ["#1 user", *titles]
    assert [line for line in lines if line and not line.startswith("#")] == ["q", "a", "b", "A", "something else"]


@pytest.mark.parametrize("pieces", [1, 400])
async def test_no_text_is_lost(db: Pool, dsn: str, pieces: int) -> None:
    """The printed text is the stored text, in however many pieces it came."""
    at = await talk(db)
    text = "".join(f"{number} äß👋 \n" for number in range(pieces * 4))
    size = len(text) // pieces
    async with following(dsn, at["conversation_id"]) as shown:
        await shown.until("t\n")
        async with chatdb.stream_message(db, **at, flush_every=0.01) as stream:
            await shown.until("#1 assistant streaming\n")
            for start in range(0, len(text), size):
                await stream.write(text[start : start + size])
                await asyncio.sleep(0.005)
        await shown.until("#1 finished\n")
        printed = await shown.interrupted()
    assert printed == f"conversation {at['conversation_id']}: t\n\n#1 assistant streaming\n{text}\n#1 finished\n"


async def test_json(db: Pool, dsn: str) -> None:
    """Each message has a line of an export at its start, and a streaming one another at its end."""
    at = await talk(db, "one")
    await chatdb.start_message(db, **at)
    await chatdb.extend_message(db, **at, seq=2, offset=0, text="It")
    async with following(dsn, at["conversation_id"], "--json") as shown:
        await shown.until('"streaming"')
        await chatdb.extend_message(db, **at, seq=2, offset=2, text=" grows")
        await chatdb.append_message(db, **at, role="user", content="next")
        await shown.until('"next"')
        await chatdb.finish_message(db, **at, seq=2, aborted=True)
        await shown.until('"aborted"')
        await chatdb.start_message(db, **at)
        await shown.until('"seq":4')
        await chatdb.finish_message(db, **at, seq=4, content="whole")
        await shown.until('"whole"')
        printed = await shown.interrupted()
    head, *lines = map(json.loads, printed.splitlines())
    assert (head["type"], head["id"]) == ("conversation", at["conversation_id"])
    found = [(line["seq"], line["content"], line["state"]) for line in lines]
    assert found == [
        *((1, "one", None), (2, "It", "streaming"), (3, "next", None), (2, "It grows", "aborted")),
        *((4, "", "streaming"), (4, "whole", None)),
    ]


async def test_hints_are_heard(db: Pool, dsn: str) -> None:
    """On a direct connection, one session listens on the same server."""
    at = await talk(db, "one")
    async with following(dsn, at["conversation_id"]) as shown:
        await shown.until("one\n")
        found = 0
        for _ in range(200):
            found = await db.fetchval(LISTENING)
            if found:
                break
            await asyncio.sleep(0.1)
        assert found == 1
        await shown.interrupted()


@pytest.mark.parametrize("version", VERSIONS)
async def test_through_a_pooler(db: Pool, dsn: str, tmp_path: Path, version: str) -> None:
    """Through PgBouncer in transaction mode it polls, and leaves no LISTEN in a session of the pooler."""
    at = await talk(db, "one")
    with pgbouncer(dsn, tmp_path, version) as pooled:
        async with following(pooled, at["conversation_id"]) as shown:
            await shown.until("one\n")
            async with chatdb.stream_message(db, **at, flush_every=0.05) as stream:
                await stream.write("It ")
                await shown.until("It ")
                await stream.write("grows")
            await shown.until("It grows\n#2 finished\n")
            assert await db.fetchval(LISTENING) == 0
            await shown.interrupted()
        await chatdb.start_message(db, **at)
        await db.execute("update chatdb.message_parts set flushed_at = flushed_at - interval '2 hours'")
        arguments = ("abort-streams", "--older-than", "1h", "--yes")
        said = await asyncio.to_thread(chatdb_process, *arguments, env={"DATABASE_URL": pooled})
        assert said == "aborted 1 streaming messages of 1 users\n"


@pytest.mark.parametrize("change", ["conversation", "nobody's"])
async def test_a_conversation_that_is_gone(db: Pool, dsn: str, change: str) -> None:
    """A deleted or foreign conversation ends the command with status 1 and one sentence."""
    at = await talk(db, "one")
    identifier = at["conversation_id"] + (change == "nobody's")
    async with following(dsn, identifier) as shown:
        if change == "conversation":
            await shown.until("one\n")
            await chatdb.delete_conversation(db, **at)
        async with asyncio.timeout(30):
            _, said = await shown.process.communicate()
    assert shown.process.returncode == 1
    assert said.decode().splitlines()[-1].startswith("chatdb: the user has no such conversation")


async def test_a_terminal_is_not_controlled(db: Pool, dsn: str) -> None:
    """Control characters in text that grows are replaced, as everywhere."""
    at = await talk(db, "q")
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "show", str(at["conversation_id"]), "--user", "ann", "--follow"),
        env=environment({"DATABASE_URL": dsn, "COLUMNS": "200"}),
        stdin=DEVNULL,
        stdout=theirs,
        stderr=DEVNULL,
    )
    os.close(theirs)
    shown = b""

    async def until(text: str) -> None:
        nonlocal shown
        kill = asyncio.get_running_loop().call_later(30, process.kill)  # ends the read
        while text.encode() not in shown:
            shown += await asyncio.to_thread(os.read, ours, 1024)
        kill.cancel()

    await until("#1")
    await chatdb.start_message(db, **at)
    await until("#2")
    await chatdb.extend_message(db, **at, seq=2, offset=0, text="a[/red]\x1b]0;t\x07\u202eb")
    await until("\u202eb".replace("\u202e", "\N{REPLACEMENT CHARACTER}"))
    process.send_signal(signal.SIGINT)
    await process.wait()
    os.close(ours)
    assert process.returncode == 130
    assert b"a[/red]\xef\xbf\xbd]0;t\xef\xbf\xbd\xef\xbf\xbdb" in shown


@pytest.mark.owner
async def test_behind_row_level_security(db: Pool, dsn: str) -> None:
    """A role that row-level security restricts follows its user's conversation."""
    at = await talk(db, "one")
    await asyncio.to_thread(protect_tables, dsn)
    name = f"restricted_{urlsplit(dsn).path[1:]}"
    execute(dsn, f"create role {name} login password '{name}'", f"grant usage on schema chatdb to {name}")
    try:
        execute(dsn, f"grant select, insert, update, delete on all tables in schema chatdb to {name}")
        async with following(as_role(dsn, name), at["conversation_id"]) as shown:
            await shown.until("one\n")
            async with chatdb.stream_message(db, **at, flush_every=0.05) as stream:
                await shown.until("#2 assistant streaming\n")
                await stream.write("It ")
                await shown.until("It ")
                await stream.write("grows")
            await shown.until("It grows\n#2 finished\n")
            await shown.interrupted()
    finally:
        execute(dsn, f"drop owned by {name}", f"drop role {name}")


def test_what_does_not_go_together(dsn: str) -> None:
    """--follow shows the log, so --branch and --versions are refused."""
    for option in ("--branch", "--versions"):
        said = chatdb_process("show", "1", "--user", "ann", "--follow", option, env={"DATABASE_URL": dsn}, code=2)
        assert "--follow" in said


async def test_on_the_embedded_server(tmp_path: Path) -> None:
    """It follows a conversation on the embedded server, which another process uses as well."""
    async with chatdb.open_embedded(tmp_path / "home") as db:
        at = await talk(db, "one")
        env = {name: value for name, value in environment({}).items() if name != "DATABASE_URL"}
        process = await asyncio.create_subprocess_exec(
            *(PROGRAM, "show", str(at["conversation_id"]), "--user", "ann", "--follow"),
            env=env | {"CHATDB_HOME": str(tmp_path / "home")},
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
        )
        shown = Followed(process)
        await shown.until("one\n")
        async with chatdb.stream_message(db, **at, flush_every=0.05) as stream:
            await stream.write("It ")
            await shown.until("It ")
            await stream.write("grows")
        await shown.until("It grows\n#2 finished\n")
        await shown.interrupted()
