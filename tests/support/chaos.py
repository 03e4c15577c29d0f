"""Kills, waits and figures for the reliability tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvloop

import chatdb
from chatdb.embedded.server import EmbeddedServer

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def figure(text: str) -> None:
    """Print a result of a test."""
    print(f"figure: {text}")


def sized(request: pytest.FixtureRequest, full: int, quick: int) -> int:
    """Return the size of a test: `full`, or `quick` with --quick."""
    return quick if request.config.getoption("--quick") else full


def kill_server(data: Path) -> None:
    """Kill all processes of the server with this data folder."""
    postmaster = int((data / "postmaster.pid").read_text().split()[0])
    os.kill(postmaster, signal.SIGSTOP)  # so that it starts no other process
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    for pid in (*map(int, children), postmaster):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def restart(server: EmbeddedServer) -> None:
    """Kill all processes of a server, and restart it."""
    kill_server(server.path / "data")
    server.stop()
    server.start()


def query(dsn: str, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
    """Run a statement in a new session, and return its rows."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(statement, arguments or None).fetchall()


OTHERS = """
    from pg_stat_activity
    where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
"""
"""The other sessions of the database."""


def sessions(dsn: str) -> int:
    """Return how many other sessions the database has."""
    return query(dsn, f"select count(*) {OTHERS}")[0][0]


def kill_sessions(dsn: str) -> int:
    """End every other session of the database."""
    return query(dsn, f"select count(pg_terminate_backend(pid, 10000)) {OTHERS}")[0][0]


async def until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for a condition, and return the seconds it took. Raise TimeoutError after `seconds`."""
    clock = asyncio.get_running_loop().time
    begun = clock()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - it changes outside the loop
            await asyncio.sleep(0.01)
    return clock() - begun


async def outcome(call: Coroutine[Any, Any, Any], *expected: type[BaseException]) -> Any:
    """Return the result of a call, or its error if that is expected."""
    try:
        return await call
    except expected as error:
        return error


async def assert_whole(pool: chatdb.pool.Pool, dsn: str, others: int = 0) -> None:
    """Assert that all connections of the pool work, none is in a transaction, and no other session is left."""
    async with asyncio.timeout(30), contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(pool.acquire()) for _ in range(pool.get_max_size())]
        pids = [await connection.fetchval("select pg_backend_pid()") for connection in connections]
        assert len(set(pids)) == pool.get_max_size()
        assert not any(connection.is_in_transaction() for connection in connections)
    await until(lambda: sessions(dsn) == pool.get_max_size() + others, 10)
    idle = f"select count(*) {OTHERS} and (state like 'idle in%%' or xact_start is not null)"
    assert await asyncio.to_thread(query, dsn, idle) == [(0,)]


@contextlib.asynccontextmanager
async def in_background(*calls: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """Run calls while a block runs, then cancel them."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
