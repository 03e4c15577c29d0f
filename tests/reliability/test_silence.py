"""A server that accepts everything and never answers: no call hangs, and each error names what it waited for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

import chatdb
from chatdb import AcquireTimeoutError, CommandTimeoutError
from tests.support.chaos import figure
from tests.support.pools import CALLS
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

ACQUIRE, COMMAND = 1.0, 1.5
MOST = ACQUIRE + COMMAND + 1
HANG = 30


async def _begin(db: Any, at: dict[str, Any], _: int) -> None:
    async with chatdb.transaction(db):
        pass


EVERY: dict[str, Callable[[Any, dict[str, Any], int], Any]] = {**CALLS, "transaction": _begin}


NO_CALLS = {"create_pool", "migrate", "open_embedded", "stream_message"}
"""The functions that send nothing, or what others in the list send."""


def test_every_function_is_called():
    """The calls cover every public function that uses a pool."""
    functions = {name for name in chatdb.__all__ if inspect.isfunction(getattr(chatdb, name))}
    assert {name.partition(",")[0] for name in EVERY} == functions - NO_CALLS


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    """Yield a proxy to the test's own database."""
    with Proxy(dsn) as found:
        yield found


def pool_on(proxy: Proxy, **options: Any) -> chatdb.pool.Pool:
    """Return a pool with short timeouts."""
    return chatdb.create_pool(proxy.dsn, acquire_timeout=ACQUIRE, command_timeout=COMMAND, **options)


async def timed(call: Coroutine[Any, Any, Any]) -> tuple[float, BaseException | None]:
    """Return a call's duration and error."""
    clock = asyncio.get_running_loop().time
    begun = clock()
    error: BaseException | None = None
    async with asyncio.timeout(HANG):
        try:
            await call
        except Exception as found:  # noqa: BLE001 - the tests check it
            error = found
    return clock() - begun, error


def judge(what: str, answers: list[tuple[float, BaseException | None]], kind: type[Exception], words: str) -> None:
    """Print the longest call, and check that each ended in time with the expected error."""
    longest = max(seconds for seconds, _ in answers)
    right = sum(type(error) is kind and words in str(error) for _, error in answers)
    figure(
        f"{what}: {right} of {len(answers)} calls ended by {kind.__name__}, "
        f"the longest after {longest:.2f} s, at most {MOST:g}"
    )
    assert [error for _, error in answers if type(error) is not kind or words not in str(error)] == []
    assert longest <= MOST


AT = {"user_id": "ada", "conversation_id": 1}


async def test_a_server_that_never_answers_the_connect(proxy):
    """Every call, and opening a pool, ends with AcquireTimeoutError that names the server."""
    async with pool_on(proxy, max_size=len(EVERY)) as pool:
        proxy.pause()
        proxy.cut()
        await asyncio.sleep(0.1)
        answers = await asyncio.gather(*(timed(call(pool, AT, 1)) for call in EVERY.values()))

        async def make() -> None:
            await pool_on(proxy)

        answers.append(await timed(make()))
        pool.terminate()
    judge("connect never answered", answers, AcquireTimeoutError, "could not connect to")


async def test_a_server_that_goes_silent_on_statements(proxy):
    """Every call on an open connection ends with CommandTimeoutError that says that the server did not answer."""
    async with pool_on(proxy, min_size=len(EVERY), max_size=len(EVERY)) as pool:
        proxy.pause()
        answers = await asyncio.gather(*(timed(call(pool, AT, 1)) for call in EVERY.values()))
        pool.terminate()
    judge("statement never answered", answers, CommandTimeoutError, "within the command timeout")


async def test_silence_after_a_wait_for_the_connection(proxy):
    """A call that waits for a connection and then for an answer takes at most both timeouts."""
    async with pool_on(proxy, min_size=len(EVERY), max_size=len(EVERY)) as pool:
        held = [await pool.acquire() for _ in EVERY]
        waiting = [asyncio.create_task(timed(call(pool, AT, 1))) for call in EVERY.values()]
        await asyncio.sleep(0.8 * ACQUIRE)
        proxy.pause()
        for connection in held:
            await pool.release(connection)
        answers = await asyncio.gather(*waiting)
        pool.terminate()
    judge("statement never answered after a wait", answers, CommandTimeoutError, "within the command timeout")


async def test_silence_inside_a_transaction(proxy):
    """COMMIT, a statement in the block, and the exit from the block end with the same error as a call."""
    async with pool_on(proxy, min_size=2, max_size=2) as pool:

        async def run(statement: bool) -> None:
            async with chatdb.transaction(pool) as outer, chatdb.transaction(outer) as connection:
                ready.release()
                await silent.wait()
                if statement:
                    await chatdb.list_conversations(connection, user_id="ada")

        ready, silent = asyncio.Semaphore(0), asyncio.Event()
        tasks = [asyncio.create_task(run(statement)) for statement in (False, True)]
        for _ in tasks:
            await ready.acquire()
        proxy.pause()
        silent.set()
        answers = await asyncio.gather(*(timed(asyncio.wait_for(task, HANG)) for task in tasks))
        pool.terminate()
    judge("silence in a transaction", answers, CommandTimeoutError, "within the command timeout")
