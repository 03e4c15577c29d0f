"""Print chatdb's results with an asyncpg that lacks a private name: `dsn folder|- [class name]`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import threading
from typing import Any

DSN, FOLDER, *HIDDEN = sys.argv[1:]

warnings: list[str] = []


class _Collect(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if "asyncpg's public API" in record.getMessage():
            warnings.append(record.getMessage())


logging.getLogger("chatdb").addHandler(_Collect())
if FOLDER != "-":
    sys.path.insert(0, FOLDER)

import asyncpg  # noqa: E402
import asyncpg.protocol  # noqa: E402

if HIDDEN == ["Connection", "_cancel_current_command"]:
    hidden = asyncpg.Connection._cancel_current_command
    del asyncpg.Connection._cancel_current_command
    import chatdb

    asyncpg.Connection._cancel_current_command = hidden
elif HIDDEN:
    protocol = asyncpg.protocol.Protocol
    parts = {name: None for name in dir(protocol) if name != HIDDEN[1] and not name.startswith("__")}
    asyncpg.protocol.Protocol = type("Protocol", (), parts)
    import chatdb

    asyncpg.protocol.Protocol = protocol
else:
    import chatdb
from chatdb._core import asyncpg_private  # noqa: E402
from chatdb._core.dsn import connect_arguments  # noqa: E402

USER = "ada"


async def error_of(call: Any) -> str:
    """Return the class name of the error that a call raises, or `none`."""
    try:
        await call
    except Exception as error:  # noqa: BLE001 - any error
        return type(error).__name__
    return "none"


async def state_of(pool: Any) -> str:
    """Return `whole` if all connections can be used at once and none is in a transaction."""
    lent = [await pool.acquire() for _ in range(pool.get_max_size())]
    async with asyncio.timeout(10):
        pids = {await each.fetchval("select pg_backend_pid()") for each in lent}
        for each in lent:
            async with each.transaction():
                assert await each.fetchval("select 1") == 1
    for each in lent:
        await pool.release(each)
    return "whole" if len(pids) == len(lent) else "broken"


async def cancelled(call: Any, steps: int = 0) -> None:
    """Start a call, and cancel it after `steps` steps of the event loop or during its long statement."""
    task = asyncio.ensure_future(call)
    for _ in range(steps):
        await asyncio.sleep(0)
    await asyncio.sleep(0 if steps else 0.05)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def with_a_codec(connection: Any) -> None:
    """Decode times as lists."""
    options: dict[str, Any] = {"encoder": str, "decoder": lambda value: [value]}
    await connection.set_type_codec("timestamptz", schema="pg_catalog", **options)


async def in_order(pool: Any) -> bool:
    """Return whether tasks get connections in the order of their requests."""
    order: list[int] = []

    async def use(number: int) -> None:
        async with pool.acquire() as connection:
            order.append(number)
            await connection.fetchval("select 1")

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(use(number))
    return order == list(range(20))


def elsewhere(calls: list[Any]) -> list[str]:
    """Return the errors of calls in another thread's event loop."""
    found: list[str] = []

    def run() -> None:
        found.extend(asyncio.run(error_of(call())) for call in calls)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


def in_a_child(call: Any) -> str:
    """Return the error of a call in a forked process."""
    read, write = os.pipe()
    if not os.fork():
        asyncio._set_running_loop(None)  # type: ignore[arg-type]
        os.write(write, asyncio.run(error_of(call())).encode())
        os._exit(0)
    os.close(write)
    return os.read(read, 100).decode()


async def main() -> dict[str, Any]:
    """Return the result of each use."""
    found: dict[str, Any] = {"missing": asyncpg_private.MISSING, "warnings": len(warnings)}
    async with chatdb.create_pool(DSN, max_size=2, command_timeout=5) as pool:
        await chatdb.delete_user(pool, user_id=USER)
        at = {"user_id": USER, "conversation_id": (await chatdb.create_conversation(pool, user_id=USER)).id}

        async def say(db: Any, content: str) -> None:
            await chatdb.append_message(db, role="user", content=content, **at)

        async def contents(db: Any, **options: Any) -> list[str]:
            return [message.content for message in await chatdb.get_history(db, **at, **options)]

        for content in ("one", "two", "three"):
            await say(pool, content)
        found["history"], found["last"] = await contents(pool), await contents(pool, limit=1)

        async with chatdb.transaction(pool) as inside:
            await say(inside, "four")
        found["committed"] = len(await contents(pool)) == 4

        async def fails(*, error: type[Exception] | None = None, wait: float = 0) -> None:
            async with chatdb.transaction(pool) as inside:
                await chatdb.delete_messages_after(inside, after_seq=0, **at)
                if error:
                    raise error
                if wait:
                    await inside.execute(f"select pg_sleep({wait})")
                with contextlib.suppress(asyncpg.DivisionByZeroError):
                    await inside.execute("select 1 / 0")

        async def idle() -> None:
            async with chatdb.transaction(pool):
                await asyncio.sleep(9)

        found["rolled back"] = await error_of(fails(error=KeyError)) == "KeyError" and len(await contents(pool)) == 4
        found["swallowed"] = await error_of(fails())

        async with chatdb.transaction(pool) as inside:
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                async with chatdb.transaction(inside):
                    await say(inside, "gone")
                    await inside.execute("select 1 / 0")
            async with chatdb.transaction(inside, user_id=USER):
                await chatdb.delete_messages_after(inside, after_seq=3, **at)
        found["savepoint"] = await contents(pool) == ["one", "two", "three"]
        async with chatdb.transaction(pool) as inside, inside.transaction():
            found["nested"] = inside.is_in_transaction()
        async with chatdb.transaction(pool, user_id=USER) as inside:
            found["named user"] = await inside.fetchval("select current_setting('chatdb.user_id')") == USER

        await cancelled(pool.fetch("select pg_sleep(9)"))
        found["cancelled"] = await state_of(pool)
        await cancelled(fails(wait=9))
        found["cancelled in a transaction"] = await state_of(pool)
        for steps in range(2, 9):
            await cancelled(idle(), steps=steps)
        found["begin cancelled"] = await state_of(pool)
        found["too slow"] = await error_of(chatdb.delete_user(pool, user_id="b", timeout=1e-6))

        found["order"] = await in_order(pool)
        one, two = await pool.acquire(), await pool.acquire()
        found["exhausted"] = await error_of(pool.acquire(timeout=0.05))
        await one.execute("set statement_timeout = '9s'")
        await pool.release(one)
        await pool.release(two)
        shown = [await pool.fetchval("show statement_timeout") for _ in range(4)]
        found["reset"] = set(shown) == {"0"}

        async with pool.acquire() as lent:
            await pool.fetch("select pg_terminate_backend($1, 5000)", lent.get_server_pid())
        found["lost"] = await contents(pool) == ["one", "two", "three"]
        async with pool.acquire() as lent:
            await contents(lent)
            await lent.execute("deallocate all")
            found["dropped statements"] = len(await contents(lent)) == 3

        calls = [lambda: contents(pool), pool.acquire, lambda: pool.fetch("select 1")]
        found["another loop"] = elsewhere(calls)
        found["another process"] = in_a_child(lambda: contents(pool))

        bare = await asyncpg.connect(**connect_arguments(DSN))
        found["bare connection"] = await contents(bare)
        await bare.close()
        async with asyncpg.create_pool(**connect_arguments(DSN)) as plain:
            found["asyncpg's pool"] = await contents(plain)
    async with chatdb.create_pool(DSN, init=with_a_codec) as coded:
        found["codec"] = await error_of(chatdb.list_conversations(coded, user_id=USER))
    found["closed"] = await error_of(pool.fetch("select 1"))
    return found


print(json.dumps(asyncio.run(main())))
