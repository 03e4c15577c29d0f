"""The pool recovers by itself from terminated sessions, a silent network, a restart, and a failover."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest

import chatdb
from chatdb import UnavailableError
from tests.support.chaos import (
    assert_whole,
    figure,
    kill_server,
    kill_sessions,
    query,
    restart,
    sized,
)
from tests.support.databases import execute
from tests.support.proxy import Proxy
from tests.support.replication import replica_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.usefixtures("repetitions")]

USER = "ada"
COMMAND = 2.0
CALLERS = 16


class Traffic:
    """Callers that read and write on one pool continuously and record when each call is answered."""

    def __init__(self, pool: chatdb.pool.Pool) -> None:
        self.pool = pool
        self.answered: list[float] = []
        self.failed = 0
        self.stored: dict[int, str] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the callers during the block."""
        conversation = await chatdb.create_conversation(self.pool, user_id=USER)
        self.at: dict[str, Any] = {"user_id": USER, "conversation_id": conversation.id}
        self._end = False
        async with asyncio.TaskGroup() as group:
            for caller in range(CALLERS):
                group.create_task(self._call(caller))
            try:
                await asyncio.sleep(0.3)
                yield
            finally:
                self._end = True

    async def _call(self, caller: int) -> None:
        for number in itertools.count():
            if self._end:
                return
            content = f"{caller} {number}"
            try:
                if number % 2:
                    await chatdb.get_history(self.pool, limit=10, **self.at)
                else:
                    message = await chatdb.append_message(
                        self.pool, role="user", content=content, key=content if caller % 2 else None, **self.at
                    )
                    self.stored[message.seq] = content
            except UnavailableError:
                self.failed += 1
                await asyncio.sleep(0.05)
            else:
                self.answered.append(time.monotonic())
                await asyncio.sleep(0.002)

    async def service_again(self, since: float) -> float:
        """Wait until many calls in a row succeed; return the seconds from `since` to the first of them."""
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + 30):
            while True:
                failed, number = self.failed, len(self.answered)
                began = time.monotonic()
                await asyncio.sleep(0.3)
                answered = self.answered[number:]
                if self.failed == failed and len(answered) >= CALLERS:
                    return max(began, answered[0]) - since


def report(what: str, again: float, traffic: Traffic, times: int = 1) -> None:
    """Print the recovery time and check it against the limit."""
    rounds = f" ({times} times)" if times > 1 else ""
    figure(
        f"{what}{rounds}: service again after {max(again, 0):.2f} s, at most {2 * COMMAND:g}; 0 connections leaked, "
        f"calls answered {len(traffic.answered):,}, failed meanwhile {traffic.failed:,}"
    )
    assert again <= 2 * COMMAND


def pool_on(dsn: str) -> chatdb.pool.Pool:
    """Return the pool that must recover."""
    return chatdb.create_pool(dsn, max_size=8, acquire_timeout=COMMAND, command_timeout=COMMAND)


async def test_ended_sessions(request, dsn):
    """After pg_terminate_backend of all backends, the same pool works and no extra session remains."""
    times = sized(request, 20, 3)
    again = 0.0
    async with pool_on(dsn) as pool:
        traffic = Traffic(pool)
        async with traffic.running():
            for _ in range(times):
                assert await asyncio.to_thread(kill_sessions, dsn) >= 1
                again = max(again, await traffic.service_again(time.monotonic()))
        await assert_whole(pool, dsn)
    report("all backends terminated", again, traffic, times)


@pytest.mark.parametrize("held", ["held back", "lost"])
async def test_a_silent_network(request, dsn, held):
    """After a 5 s network silence, whether the data then arrives or is lost, the same pool works."""
    silence = 5.0 if held == "held back" or not request.config.getoption("--quick") else COMMAND
    with Proxy(dsn) as proxy:
        async with pool_on(proxy.dsn) as pool:
            traffic = Traffic(pool)
            async with traffic.running():
                proxy.pause()
                await asyncio.sleep(silence)
                if held == "lost":
                    proxy.cut()
                proxy.resume()
                again = await traffic.service_again(time.monotonic())
            await assert_whole(pool, dsn)
    assert traffic.failed > 0
    report(f"network silent for {silence:g} s, what was sent {held}", again, traffic)


async def test_a_restarted_server(request, durable, durable_dsn):
    """After a kill and restart of the server, the same pool works."""
    times = sized(request, 3, 1)
    again = 0.0
    async with pool_on(durable_dsn) as pool:
        traffic = Traffic(pool)
        async with traffic.running():
            for _ in range(times):
                await asyncio.to_thread(restart, durable)
                again = max(again, await traffic.service_again(time.monotonic()))
        await assert_whole(pool, durable_dsn)
    assert traffic.failed > 0
    report("server killed and started again", again, traffic, times)


# --- failover --------------------------------------------------------------------------------------------------------


async def test_a_fail_over(durable):
    """A pool with a multi-host DSN finds the promoted replica, which has every acknowledged message."""
    hosts: list[str] = []
    with replica_of(durable, name="standby") as standby:
        execute(durable.dsn, "alter system set synchronous_standby_names = 'standby'", "select pg_reload_conf()")
        hosts = [quote(str(host), safe="") for host in (durable._folder.socket, standby.folder)]
        dsn = f"postgresql://postgres@/chatdb?host={','.join(hosts)}&port=5432&target_session_attrs=read-write"
        replica = f"postgresql://postgres@/chatdb?host={hosts[1]}&port=5432"
        async with pool_on(dsn) as pool:
            traffic = Traffic(pool)
            async with traffic.running():
                kill_server(durable.path / "data")
                before = dict(traffic.stored)
                await asyncio.sleep(0.5)
                await asyncio.to_thread(standby.promote)
                promoted = time.monotonic()
                await asyncio.to_thread(
                    execute, replica, "alter system set synchronous_standby_names = ''", "select pg_reload_conf()"
                )
                again = await traffic.service_again(promoted)
            await assert_whole(pool, replica)
            assert await pool.fetchval("select pg_is_in_recovery()") is False
        stored = dict(query(replica, "select seq, content from chatdb.messages where user_id = %s", USER))
        lost = sum(stored.get(seq) != content for seq, content in before.items())
    assert traffic.failed > 0
    assert lost == 0
    report(f"fail-over to a replica (acknowledged messages lost: 0 of {len(before):,})", again, traffic)
