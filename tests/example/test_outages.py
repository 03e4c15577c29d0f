"""Processes and servers that are stopped or killed while an answer is written."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from uuid import uuid4

import httpx
import pytest

from chatdb.admin.migrate import apply_migrations
from chatdb.embedded import EmbeddedServer
from tests.support.chaos import kill_server, query
from tests.support.embedded import temporary_server
from tests.support.service import (
    STORY,
    Line,
    Service,
    ask,
    events,
    exchange,
    load,
    new_conversation,
    settled,
    stored,
    token,
    until_finished,
)


@pytest.fixture(scope="module")
def own(start_service: Callable[..., Service]) -> Service:
    """Return a service that these tests stop."""
    return start_service(TOY_DELAY="0.03")


@pytest.fixture
async def carol(own: Service) -> AsyncGenerator[httpx.AsyncClient]:
    """Yield a client of that service, for a new user."""
    async with own.client(token(f"user-carol-{uuid4()}")) as client:
        yield client
    own.check_log("an answer failed|Child process|could not be marked|died|watcher")


@pytest.fixture
def database() -> Iterator[EmbeddedServer]:
    """Yield a server of the test's own, with chatdb's tables."""
    with temporary_server() as server:
        apply_migrations(server.dsn)
        yield server


async def test_terminated_in_the_middle(own: Service, carol: httpx.AsyncClient) -> None:
    """SIGTERM ends the streams at once and the service within 10 s; the text is stored, and a reader resumes."""
    conversation = (await new_conversation(carol))["id"]
    start = (await load(carol, conversation))["events"]
    await ask(carol, conversation, STORY)
    line, last, names = Line(), start, []
    stream = events(carol, conversation, start)
    stopping: asyncio.Task[int | None] | None = None
    begun = ended = 0.0
    async with asyncio.timeout(20):
        async for event in stream:
            names.append(event.name)
            if event.name == "end":
                ended = time.monotonic()
                break
            line.take(event)
            last = event.id
            if stopping is None and line.deltas == 5:
                begun = time.monotonic()
                stopping = asyncio.create_task(asyncio.to_thread(own.stop))
    await stream.aclose()
    assert stopping is not None
    assert await stopping == 0
    assert time.monotonic() - begun < 10
    assert ended - begun < 2
    assert names[-1] == "end"
    (_, (seq, text, state)) = stored(own.dsn, conversation)
    assert (seq, state) in ((2, "aborted"), (2, None))
    assert text.startswith(line.texts[2])
    assert query(own.dsn, "select count(*) from chatdb.message_parts") == [(0,)]
    await asyncio.to_thread(own.start)
    resumed, _ = await until_finished(carol, conversation, 2, last, line)
    assert resumed.texts == {1: STORY, 2: text}


async def test_short_answers_survive_a_shutdown(own: Service, carol: httpx.AsyncClient) -> None:
    """An answer that needs less than five seconds is completed during the shutdown."""
    conversation = (await new_conversation(carol))["id"]
    await ask(carol, conversation)
    assert await asyncio.to_thread(own.stop) == 0
    await asyncio.to_thread(own.start)
    assert [row[2] for row in stored(own.dsn, conversation)] == [None, None]


async def test_killed_worker(own: Service, carol: httpx.AsyncClient) -> None:
    """The text that a killed worker has stored is there, and its answer is completed as aborted after 30 s."""
    bearer = carol.headers["Authorization"].removeprefix("Bearer ")
    conversation = (await new_conversation(carol))["id"]
    async with own.client(bearer, 0) as writer:
        await ask(writer, conversation, STORY)
        await asyncio.sleep(1)
        shown = (await load(carol, conversation))["messages"][1]["content"]
        assert shown
        os.kill(own.workers()[0], signal.SIGKILL)
    async with asyncio.timeout(20):
        while len(own.workers()) < 2:  # noqa: ASYNC110 - another process starts it
            await asyncio.sleep(0.1)
    text, state = stored(own.dsn, conversation)[1][1:]
    assert (text[: len(shown)], state) == (shown, "streaming")
    async with own.client(bearer) as client:  # carol's connection may be one to the killed process
        message = (await load(client, conversation))["messages"][1]
        assert (message["content"], message["state"]) == (text, "streaming")
        # as if it had been 29 and 31 s ago
        for seconds, expected in ((25, "streaming"), (31, "aborted")):
            query_flushed(own.dsn, seconds)
            message = (await load(client, conversation))["messages"][1]
            assert (message["content"], message["state"]) == (text, expected)
        assert await exchange(client)


def query_flushed(dsn: str, seconds: int) -> None:
    """Set the time of the last flush of all streams."""
    query(
        dsn,
        "update chatdb.message_parts set flushed_at = now() - make_interval(secs => %s)"
        " where flushed_at is not null returning 1",
        seconds,
    )


async def test_killed_database(database: EmbeddedServer, start_service: Callable[..., Service]) -> None:
    """A database that is killed in the middle of an answer and comes back costs no text, and no restart."""
    service = start_service(database.dsn, TOY_DELAY="0.02")
    async with service.client(token("user-x")) as client:
        short = await exchange(client)
        conversation = (await new_conversation(client))["id"]
        start = (await load(client, conversation))["events"]
        await ask(client, conversation, STORY)
        line, last = Line(), start
        stream = events(client, conversation, start)
        async with asyncio.timeout(10):
            async for event in stream:
                line.take(event)
                last = event.id
                if line.deltas == 5:
                    break
        await asyncio.to_thread(kill_server, database.path / "data")
        for path in ("/ready", f"/api/conversations/{short}", "/api/conversations", f"/api/search?q={STORY[:5]}"):
            answer = await client.get(path)
            assert answer.status_code == 503, path
        assert (await client.post(f"/api/conversations/{short}/messages", json={"content": STORY})).status_code == 503
        assert (await client.get("/health")).status_code == 200
        await asyncio.sleep(1)
        await asyncio.to_thread(database.stop)
        await asyncio.to_thread(database.start)
        async with asyncio.timeout(10):
            while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.1)
        messages = await settled(client, conversation)
        await stream.aclose()
        resumed, _ = await until_finished(client, conversation, 2, last, line)
        assert resumed.texts == {1: STORY, 2: messages[1]["content"]}
        assert messages[1]["state"] is None
        assert len(messages[1]["content"].split()) >= 190
        assert len((await load(client, short))["messages"]) == 2
        assert await exchange(client)
    assert await asyncio.to_thread(service.stop) == 0
    service.check_log("Unavailable|watcher|could not be marked|an answer failed")
