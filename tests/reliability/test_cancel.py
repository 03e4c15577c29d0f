"""Tasks cancelled at any await, each followed by another task's call on the same pool."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import chatdb
from tests.support.chaos import LOOPS, assert_whole, figure, sized
from tests.support.pgbouncer import OPTIONS, VERSIONS, pgbouncer

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

USER = "ada"
HANG = 30


async def cancel_at_random(dsn: str, direct: str, rounds: int, options: dict[str, int]) -> tuple[int, int]:
    """Cancel calls and check after each what another task gets; return the number of cancelled calls and of checks."""
    chance = random.Random(rounds)
    cancelled = 0
    victims: list[object] = []
    errors: list[dict[str, Any]] = []
    returned: dict[int, str] = {}
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    tested = chatdb.create_pool(dsn, min_size=2, max_size=2, **options)
    async with tested as pool, chatdb.create_pool(direct, max_size=1) as other:
        one = await chatdb.create_conversation(pool, user_id=USER)
        at = {"user_id": USER, "conversation_id": one.id}
        bystander = await chatdb.create_conversation(pool, user_id="bystander")
        beside = {"user_id": "bystander", "conversation_id": bystander.id}
        await chatdb.append_message(pool, role="user", content="mine", **beside)

        async def in_transaction(content: str) -> None:
            async with chatdb.transaction(pool) as connection:
                await chatdb.append_message(connection, role="user", content=content, **at)
                async with chatdb.transaction(connection) as inner:
                    await chatdb.append_message(inner, role="user", content=content, **at)

        async def read_all(_: str) -> None:
            async with contextlib.aclosing(chatdb.iter_messages(pool, batch=3, **at)) as messages:
                async for message in messages:
                    if message.seq > 20:
                        return

        kinds: tuple[Callable[[str], Coroutine[Any, Any, Any]], ...] = (
            lambda content: chatdb.append_message(pool, role="user", content=content, **at),
            lambda content: chatdb.append_message(pool, role="user", content=content, key=content, **at),
            lambda content: chatdb.append_messages(pool, messages=[{"role": "user", "content": content}] * 2, **at),
            lambda _: chatdb.get_history(pool, **at),
            lambda _: chatdb.list_conversations(pool, user_id=USER),
            lambda content: chatdb.create_conversation(pool, user_id="third", key=content),
            in_transaction,
            read_all,
        )

        async def look(number: int) -> None:
            content = f"after {number}"
            found = await chatdb.list_messages(pool, **beside)
            assert "mine" in {message.content for message in found}
            assert {message.user_id for message in found} == {"bystander"}
            if number % 10 == 0:
                assert (await chatdb.append_message(pool, role="user", content=content, **beside)).content == content

        for number in range(rounds):
            chosen = random.Random(number).choices(kinds, k=chance.randint(1, 4))
            tasks = [asyncio.create_task(kind(f"{number} {place}")) for place, kind in enumerate(chosen)]
            if number % 2:
                for _ in range(chance.randrange(15)):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(chance.uniform(0, 0.003))
            for task in tasks:
                task.cancel()
            try:
                async with asyncio.timeout(HANG):
                    await asyncio.create_task(look(number))
                    answers = await asyncio.gather(*tasks, return_exceptions=True)
            except BaseException:  # any error here comes from another task's cancellation
                pool.terminate()  # close() would wait for connections that were not released
                raise
            cancelled += sum(isinstance(answer, asyncio.CancelledError) for answer in answers)
            for answer in answers:
                if isinstance(answer, Exception):
                    victims.append(answer)
                for message in answer if isinstance(answer, list) else [answer]:
                    if isinstance(message, chatdb.Message):
                        returned[message.seq] = message.content
        stored = [message async for message in chatdb.iter_messages(other, **at)]
        assert [message.seq for message in stored] == list(range(1, len(stored) + 1))
        assert returned.items() <= {message.seq: message.content for message in stored}.items()
        if dsn == direct:
            await assert_whole(pool, direct, others=1)
    assert errors == []
    assert victims == []
    return cancelled, rounds


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("way", ["direct", *VERSIONS])
def test_a_cancelled_task_harms_nobody_else(request, dsn, tmp_path, loop, way):
    """Calls cancelled at any await cause no error, open transaction or wrong answer for others."""
    rounds = sized(request, 3_000, 200)
    with contextlib.ExitStack() as stack:
        through = dsn if way == "direct" else stack.enter_context(pgbouncer(dsn, Path(tmp_path), way))
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            limit = sized(request, 400, 60)
            work = cancel_at_random(through, dsn, rounds, OPTIONS.get(way, {}))
            cancelled, looks = runner.run(asyncio.wait_for(work, limit))
    figure(f"victims of {cancelled:,} cancelled calls: 0 of {looks:,} calls of others ({loop}, {way})")
    assert cancelled > rounds / 2
