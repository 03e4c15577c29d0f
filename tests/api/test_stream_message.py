"""The helper that streams a message: batches, failures, cancellation, crashes and a server that does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest

import chatdb
from chatdb import ConflictError, InvalidInputError, MessageNotFoundError, MessageStream, UnavailableError, streaming
from chatdb.streaming import MAX_UNFLUSHED
from tests.support.pools import loop_errors, until
from tests.support.proxy import Proxy, Statement
from tests.support.talk import Talk

SECRET = "XYZZY"
RARELY = 3600.0
"""A time between two flushes that no test waits for."""
LOCK = "select from chatdb.message_parts where start = -1 for update"
LOCK_CONVERSATION = "select from chatdb.conversations for no key update"


@pytest.fixture(autouse=True)
async def _no_loop_errors() -> AsyncIterator[None]:
    """Fail if a task ends with an error that nobody has seen."""
    with loop_errors() as errors:
        yield
        await asyncio.sleep(0)
    assert errors == []


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    """Yield a proxy to the test's own database."""
    with Proxy(dsn) as found:
        yield found


@pytest.fixture
async def far(committed: Talk, proxy: Proxy) -> AsyncIterator[Talk]:
    """Yield the conversation through the proxy, by a pool that does not repeat calls."""
    async with chatdb.create_pool(proxy.dsn, retries=0, acquire_timeout=1) as pool:
        yield committed.through(pool)


async def parts(talk: Talk) -> list[str]:
    """Return the texts of the stored parts: one for each flush."""
    rows = await talk.db.fetch("select content from chatdb.message_parts where start >= 0 order by start")
    return [row["content"] for row in rows]


async def text_of(talk: Talk) -> str:
    """Return the text that is stored so far."""
    return str((await talk.read_message(seq=1)).text)


async def until_stored(talk: Talk, text: str) -> None:
    """Wait until the text so far is this one."""
    async with asyncio.timeout(20):
        while await text_of(talk) != text:  # noqa: ASYNC110 - it changes in the server
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def locked(talk: Talk, statement: str = LOCK) -> AsyncGenerator[None]:
    """Hold a lock, so that extensions, or with another statement finishes, wait during the block."""
    async with chatdb.transaction(talk.db, user_id="alice") as connection:
        await connection.execute(statement)
        yield


async def waiting(talk: Talk, name: str) -> None:
    """Wait until a statement waits for a lock."""
    question = (
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%chatdb.' || $1 || '%'"
    )
    async with asyncio.timeout(20):
        while not await talk.db.fetchval(question, name):  # noqa: ASYNC110 - it changes in the server
            await asyncio.sleep(0.02)


# batches


async def test_a_stream(committed: Talk) -> None:
    """The block writes, and afterwards the message is stored and finished."""
    async with committed.stream_message(key="k", metadata={"a": 1}) as stream:
        started = stream.message
        assert (started.state, stream.offset) == ("streaming", 0)
        for text in ("Hel", "", "lo", ", wörld 👍"):
            await stream.write(text)
        assert stream.offset == 0

    assert stream.message == started.model_copy(update={"content": "Hello, wörld 👍", "state": None})
    assert await committed.messages() == [stream.message]
    assert stream.offset == len("Hello, wörld 👍")
    assert await parts(committed) == []


async def test_batches_by_time(committed: Talk) -> None:
    """Tokens are gathered for `flush_every` seconds, and a reader sees them after that."""
    async with committed.stream_message(flush_every=0.3) as stream:
        begun = time.monotonic()
        for _ in range(60):
            await stream.write("token ")
            await asyncio.sleep(0.02)
        took = time.monotonic() - begun
        await until_stored(committed, "token " * 60)
        flushes = len(await parts(committed))
        assert stream.offset == 360
    assert 2 <= flushes <= took / 0.3 + 1


async def test_batches_by_size(committed: Talk) -> None:
    """Text that fills a batch is stored at once."""
    async with committed.stream_message(flush_every=RARELY) as stream:
        for number in range(200):
            await stream.write("x" * 1024)
            assert len("x" * 1024) * (number + 1) - stream.offset < MAX_UNFLUSHED
        assert [len(part) for part in await parts(committed)] == [MAX_UNFLUSHED] * 3
    assert stream.message.content == "x" * 1024 * 200


async def test_no_flush_without_text(committed: Talk) -> None:
    """Empty texts, and flushes of nothing, send no statement."""
    async with committed.stream_message(flush_every=0.01) as stream:
        for _ in range(20):
            await stream.write("")
            await stream.flush()
            await asyncio.sleep(0.01)
        assert await parts(committed) == []
    assert stream.message.content == ""


async def test_flush(committed: Talk) -> None:
    """A flush stores the text that has gathered now."""
    async with committed.stream_message(flush_every=RARELY) as stream:
        for text in ("abc", "👍", "def"):
            await stream.write(text)
            await stream.flush()
        assert await parts(committed) == ["abc", "👍", "def"]
        assert stream.offset == 7


async def test_text_written_during_a_flush(committed: Talk) -> None:
    """What is written while a flush is under way is stored by the next one, even if the block writes no more."""
    async with committed.stream_message(flush_every=0.05) as stream:
        async with locked(committed):
            await stream.write("abc")
            await waiting(committed, "extend_message")
            await stream.write("def")
        await until_stored(committed, "abcdef")
    assert stream.message.content == "abcdef"


async def test_the_values_of_finish(committed: Talk) -> None:
    """finish() sets what is stored at the end; the last call counts."""
    async with committed.stream_message() as stream:
        await stream.write("draft")
        stream.finish(content="other", token_count=1)
        stream.finish(content="whole", payload={"p": 1}, metadata={"b": 2}, token_count=7)
    message = stream.message
    assert (message.content, message.payload, message.metadata) == ("whole", '{"p": 1}', {"b": 2})
    assert (message.token_count, message.state) == (7, None)


@pytest.mark.parametrize(
    "values", [{"content": 1}, {"content": "\ud83d"}, {"payload": object()}, {"metadata": 1}, {"token_count": -1}]
)
async def test_invalid_values_of_finish(committed: Talk, values: dict[str, Any]) -> None:
    """A value that the message cannot have is refused in the block, where the caller can still react."""
    async with committed.stream_message() as stream:
        await stream.write("abc")
        with pytest.raises(InvalidInputError):
            stream.finish(**values)
    assert (stream.message.content, stream.message.state) == ("abc", None)


@pytest.mark.parametrize("flush_every", [0, 0.001, -1, 3601, float("nan"), float("inf"), True, "1", None])
def test_invalid_flush_every(flush_every: Any) -> None:
    """An invalid time is refused before anything is stored."""
    with pytest.raises(InvalidInputError, match="flush_every"):
        chatdb.stream_message(object(), user_id="alice", conversation_id=1, flush_every=flush_every)  # type: ignore[arg-type]


async def test_write_outside_the_block(committed: Talk) -> None:
    """A stream accepts text only in its block."""
    stream = committed.stream_message()
    with pytest.raises(ConflictError, match="not open"):
        await stream.write(SECRET)
    async with stream:
        await stream.write("abc")
    with pytest.raises(ConflictError, match="not open"):
        await stream.write(SECRET)
    assert stream.message.content == "abc"


# surrogate pairs


async def test_halves_of_surrogate_pairs(committed: Talk) -> None:
    """The halves of a surrogate pair may come in two writes, with flushes between them."""
    async with committed.stream_message() as stream:
        for text in ("a\ud83d", "", "\udc4db", "\ud83d", "\udc4d\ud83d", "\udc4d"):
            await stream.write(text)
            await stream.flush()
        assert stream.offset == 5
    assert stream.message.content == "a👍b👍👍"


@pytest.mark.parametrize("texts", [["a", "\udc4d"], ["a\ud83d", "b"], ["a", "\ud83d\ud83d", "b"], ["a", "", "\ud83d"]])
async def test_half_a_surrogate_pair(committed: Talk, texts: list[str]) -> None:
    """A half that stays alone is an InvalidInputError, at the latest at the end, and the message is aborted."""
    stream = committed.stream_message()

    async def write() -> None:
        async with stream:
            for text in texts:
                await stream.write(text)

    with pytest.raises(InvalidInputError, match="surrogate") as raised:
        await write()
    assert raised.value.parameter in ("content", "text")
    assert (stream.message.content, stream.message.state) == ("a", "aborted")


# failures


@pytest.mark.parametrize("flushed", [False, True])
async def test_a_block_that_fails(committed: Talk, *, flushed: bool) -> None:
    """The message of a block that fails is aborted, with all that was written and without finish's values."""
    stream = committed.stream_message(flush_every=RARELY)

    async def write() -> None:
        async with stream:
            await stream.write("abc")
            if flushed:
                await stream.flush()
            await stream.write("def\ud83d")
            stream.finish(content="whole", token_count=7)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await write()
    message = stream.message
    assert (message.content, message.state, message.token_count) == ("abcdef", "aborted", None)
    assert await committed.messages() == [message]


async def test_text_beyond_four_mebibytes(committed: Talk) -> None:
    """Text that would pass 4 MiB is refused, and the message is aborted with what was stored before."""
    stream = committed.stream_message(flush_every=RARELY)

    async def write() -> None:
        async with stream:
            for _ in range(5):
                await stream.write("x" * (1024 * 1024 - 1))
            await stream.write("y" * MAX_UNFLUSHED)

    with pytest.raises(InvalidInputError, match="4 MiB"):
        await write()
    assert (stream.message.content, stream.message.state) == ("x" * (4 * (1024 * 1024 - 1)), "aborted")


async def test_a_failed_flush_surfaces_at_the_next_write(far: Talk, committed: Talk, proxy: Proxy) -> None:
    """The next write raises the error of the flush in the background; if the block goes on, nothing is lost."""
    cuts = 0

    def cut(statement: Statement) -> bool:
        nonlocal cuts
        hit = "chatdb.extend_message" in statement.sql
        cuts += hit
        return hit

    async with far.stream_message(flush_every=0.05) as stream:
        proxy.watch = cut
        proxy.cut()
        await stream.write("abc")
        await until(lambda: cuts > 0)
        await asyncio.sleep(0.3)
        with pytest.raises(UnavailableError) as raised:
            await stream.write("👍def")
        assert "def" not in str(raised.value)
        assert stream.offset == 0
        proxy.watch = None
        proxy.cut()
        await stream.write("ghi")
        await until_stored(committed, "abc👍defghi")
    assert (stream.message.content, stream.message.state) == ("abc👍defghi", None)


@pytest.mark.parametrize("answered", [False, True], ids=["request lost", "answer lost"])
async def test_a_flush_whose_outcome_is_unknown(far: Talk, committed: Talk, proxy: Proxy, *, answered: bool) -> None:
    """A flush that failed is repeated with the same text: it may reach the server later, and nothing is lost then."""

    def cut(statement: Statement) -> bool:
        return "chatdb.extend_message" in statement.sql and statement.answered == answered

    async with far.stream_message(flush_every=RARELY) as stream:
        await stream.write("abc")
        proxy.watch = cut
        proxy.cut()
        with pytest.raises(UnavailableError):
            await stream.flush()
        proxy.watch = None
        proxy.cut()
        await stream.write("def")
        await stream.flush()
        assert stream.offset == 6
        with contextlib.suppress(ConflictError):  # the first request arrives now
            await committed.extend_message(seq=1, offset=0, text="abc")
        assert await text_of(committed) == "abcdef"
    assert stream.message.content == "abcdef"


async def test_a_message_that_is_finished_elsewhere(committed: Talk) -> None:
    """The stream of a message that another process finishes fails, and the message stays as it is."""
    stream = committed.stream_message(flush_every=RARELY)

    async def write() -> None:
        async with stream:
            await stream.write("abc")
            await stream.flush()
            await committed.finish_message(seq=1)
            await stream.write("def")

    with pytest.raises(ConflictError, match="not streaming"):
        await write()
    [message] = await committed.messages()
    assert (message.content, message.state) == ("abc", None)


async def test_a_message_that_is_deleted(committed: Talk, caplog: pytest.LogCaptureFixture) -> None:
    """The stream of a message that was deleted fails, and no warning says that it is still streaming."""
    stream = committed.stream_message(flush_every=RARELY)

    async def write() -> None:
        async with stream:
            await stream.write(SECRET)
            await committed.delete_message(seq=1)

    with pytest.raises(MessageNotFoundError):
        await write()
    assert caplog.text == ""


async def test_a_stream_that_another_process_has_taken_over(committed: Talk) -> None:
    """A writer that comes back after its successor has continued does not mix its text into the successor's."""
    zombie = committed.stream_message(key="k", flush_every=RARELY)

    async def write() -> None:
        async with zombie:
            await zombie.write("abc")
            await zombie.flush()
            async with committed.stream_message(key="k", flush_every=RARELY) as successor:
                assert successor.offset == 3
                for text in ("d", "e"):
                    await successor.write(text)
                    await successor.flush()
                await zombie.write("zombie")
                with pytest.raises(ConflictError, match="offset"):
                    await zombie.flush()
                assert await text_of(committed) == "abcde"
                await successor.write("f")

    with pytest.raises(ConflictError, match="not streaming"):
        await write()
    [message] = await committed.messages()
    assert (message.content, message.state) == ("abcdef", None)


# after a crash


async def test_continue_by_key(committed: Talk) -> None:
    """After a crash, the same key continues the message where the stored text ends."""
    crashed: MessageStream = committed.stream_message(key="k", flush_every=RARELY)
    await crashed.__aenter__()
    await crashed.write("Hello 👍")
    await crashed.flush()
    await crashed.write(" is lost")
    crashed._timer.cancel()  # type: ignore[union-attr]

    async with committed.stream_message(key="k") as stream:
        assert (stream.offset, stream.message.content) == (7, "Hello 👍")
        answer = "Hello 👍, world"
        await stream.write(answer[stream.offset :])
    assert (stream.message.seq, stream.message.content, stream.message.state) == (1, "Hello 👍, world", None)


@pytest.mark.parametrize("aborted", [False, True])
async def test_a_finished_key(committed: Talk, *, aborted: bool) -> None:
    """A key that is finished or aborted is a ConflictError, and the message stays as it is."""
    await committed.start_message(key="k")
    message = await committed.finish_message(key="k", content="abc", aborted=aborted)
    with pytest.raises(ConflictError, match="already finished"):
        async with committed.stream_message(key="k"):
            pytest.fail("the block ran")
    with pytest.raises(ConflictError, match="another role"):
        async with committed.stream_message(key="k", role="tool"):
            pytest.fail("the block ran")
    assert await committed.messages() == [message]


# cancellation


async def write_forever(talk: Talk, written: list[str], **arguments: Any) -> None:
    """Stream until cancelled."""
    async with talk.stream_message(**arguments) as stream:
        for number in range(1_000_000):
            written.append(f"{number} ")
            await stream.write(written[-1])
            await asyncio.sleep(0.01)


async def cancel(task: asyncio.Task[Any], times: int) -> None:
    """Cancel a task so many times, once in each round of the loop, as anyio does; expect that it is cancelled."""
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("times", [1, 2, 10_000])
@pytest.mark.parametrize("flush_every", [0.02, RARELY])
async def test_cancellation(committed: Talk, times: int, flush_every: float) -> None:
    """A block that is cancelled, once or again and again, aborts its message with all that was written."""
    written: list[str] = []
    task = asyncio.create_task(write_forever(committed, written, flush_every=flush_every))
    await asyncio.sleep(0.3)
    await cancel(task, times)
    [message] = await committed.messages()
    assert (message.content, message.state) == ("".join(written), "aborted")


@pytest.mark.parametrize("times", [1, 2, 10_000])
@pytest.mark.parametrize("size", [1, MAX_UNFLUSHED], ids=["of the timer", "of the block"])
async def test_cancellation_during_a_flush(committed: Talk, times: int, size: int) -> None:
    """A flush that is under way when the block is cancelled is completed or repeated: its text is there once."""

    async def write() -> None:
        async with committed.stream_message(flush_every=0.05) as stream:
            await stream.write("a")
            await stream.flush()
            begun.set()
            await holding.wait()
            await stream.write("x" * size)
            await asyncio.sleep(1000)

    begun, holding = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(write())
    await begun.wait()
    async with locked(committed):
        holding.set()
        await waiting(committed, "extend_message")
        cancelling = asyncio.create_task(cancel(task, times))
        await asyncio.sleep(0.3)
    await cancelling
    [message] = await committed.messages()
    assert (message.content, message.state) == ("a" + "x" * size, "aborted")


@pytest.mark.parametrize("times", [1, 2, 10_000])
async def test_cancellation_during_the_finish(committed: Talk, times: int) -> None:
    """A block that is cancelled while its end waits for the server aborts its message."""

    async def write() -> None:
        async with committed.stream_message() as stream:
            begun.set()
            await holding.wait()
            await stream.write("abc")

    begun, holding = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(write())
    await begun.wait()
    async with locked(committed, LOCK_CONVERSATION):
        holding.set()
        await waiting(committed, "finish_message")
        cancelling = asyncio.create_task(cancel(task, times))
        await asyncio.sleep(0.3)
    await cancelling
    [message] = await committed.messages()
    assert (message.content, message.state) == ("abc", "aborted")


async def test_a_timeout_around_the_block(committed: Talk) -> None:
    """asyncio.timeout ends a block as usual, and the message is aborted."""
    written: list[str] = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await write_forever(committed, written)
    [message] = await committed.messages()
    assert (message.content, message.state) == ("".join(written), "aborted")


# a server that does not answer


@pytest.mark.parametrize("cause", ["error", "cancelled", "cancelled again and again"])
@pytest.mark.parametrize("flushing", [False, True])
async def test_a_silent_server(
    far: Talk,
    committed: Talk,
    proxy: Proxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    cause: str,
    *,
    flushing: bool,
) -> None:
    """A block that fails while the server is silent ends in bounded time, and a warning says what to do."""
    monkeypatch.setattr(streaming, "_ABORT_TIMEOUT", 1.0)
    caplog.set_level(logging.WARNING, logger="chatdb")
    paused = asyncio.Event()

    async def write() -> None:
        async with far.stream_message(flush_every=0.05 if flushing else RARELY) as stream:
            await stream.write("abc")
            await stream.flush()
            proxy.pause()
            await stream.write(SECRET)
            await asyncio.sleep(0.3)
            paused.set()
            if cause == "error":
                raise ZeroDivisionError
            await asyncio.sleep(1000)

    task = asyncio.create_task(write())
    await paused.wait()
    begun = time.monotonic()
    if cause == "error":
        with pytest.raises(ZeroDivisionError):
            await task
    else:
        await cancel(task, 1 if cause == "cancelled" else 10_000)
    took = time.monotonic() - begun
    proxy.cut()
    proxy.resume()

    assert 0.9 < took < 5
    [record] = [record for record in caplog.records if record.name == "chatdb"]
    assert (record.levelno, "list_streaming finds it: no answer in time" in record.getMessage()) == (
        logging.WARNING,
        True,
    )
    assert SECRET not in caplog.text
    [left] = await chatdb.list_streaming(committed.db, user_id="alice", older_than=timedelta(0))
    assert left.content in ("abc", "abc" + SECRET)


async def test_memory_while_the_server_is_slow(far: Talk, committed: Talk, proxy: Proxy) -> None:
    """A block that writes faster than the server stores is held up: little more than two batches are in memory."""
    written = 0

    async def write(stream: MessageStream) -> None:
        nonlocal written
        for _ in range(1000):
            await stream.write("x" * 1000)
            written += 1000
            await asyncio.sleep(0)

    async with far.stream_message(flush_every=0.05) as stream:
        proxy.pause()
        writing = asyncio.create_task(write(stream))
        await asyncio.sleep(1)
        assert MAX_UNFLUSHED - 1000 <= written <= 2 * MAX_UNFLUSHED
        proxy.resume()
        await writing
    assert stream.message.content == "x" * 1_000_000


async def test_a_slow_server(committed: Talk, dsn: str) -> None:
    """With 50 ms in each direction, a writer of many tokens does not wait for flushes, and nothing is lost."""
    with Proxy(dsn, delay=0.05) as slow:
        async with chatdb.create_pool(slow.dsn) as pool:
            begun = time.monotonic()
            async with committed.through(pool).stream_message(flush_every=0.1) as stream:
                started = time.monotonic()
                for number in range(1000):
                    await stream.write(f"{number} ")
                    await asyncio.sleep(0)
                wrote = time.monotonic() - started
            took = time.monotonic() - begun
    assert stream.message.content == "".join(f"{number} " for number in range(1000))
    assert wrote < took
