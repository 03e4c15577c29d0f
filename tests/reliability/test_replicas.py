"""Reads on replicas that are paused, stopped, killed, promoted and copied again under load, and a fail-over."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

import chatdb
from chatdb import Message, NotFoundError, Pool, UnavailableError
from chatdb.admin.migrate import apply_migrations
from chatdb.embedded.server import EmbeddedServer
from chatdb.replicas import ANSWER_TIMEOUT, CHECK_EVERY
from tests.support.chaos import figure, kill_server, query, sized
from tests.support.databases import execute
from tests.support.embedded import temporary_server
from tests.support.replication import Replica, dsn_of, replica_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.usefixtures("repetitions")]

CALLERS = 16
LONGEST = CHECK_EVERY + ANSWER_TIMEOUT + 2.0
"""Seconds that a call may take while its replica stands still, on a busy machine."""
HOME = "home"
FIRST = [{"role": "user", "content": "first"}]
ELSEWHERE = "not on the primary"
Address = dict[str, Any]


@pytest.fixture
def primary() -> Iterator[EmbeddedServer]:
    """Yield the test's own migrated server, which can be killed."""
    with temporary_server() as server:
        apply_migrations(server.dsn)
        yield server


async def of_conversation(reader: Any, at: Address, seq: int) -> int:
    """Return the `last_seq` that a read shows."""
    return (await chatdb.get_conversation(reader, **at, at_least=seq)).last_seq


async def of_loaded(reader: Any, at: Address, seq: int) -> int:
    """Return the `seq` of the newest message that a read shows."""
    conversation, messages = await chatdb.load_conversation(reader, **at, limit=5, at_least=seq)
    return min(conversation.last_seq, messages[-1].seq)


async def of_history(reader: Any, at: Address, seq: int) -> int:
    """Return the `seq` of the newest message that a read shows."""
    return (await chatdb.get_history(reader, **at, limit=5, at_least=seq))[-1].seq


async def of_page(reader: Any, at: Address, seq: int) -> int:
    """Return the `seq` of the newest message that a read shows."""
    return (await chatdb.list_messages(reader, **at, after_seq=max(0, seq - 5), at_least=seq))[-1].seq


FRESH: list[Callable[[Any, Address, int], Any]] = [of_conversation, of_loaded, of_history, of_page]


class Load:
    """Callers that append through the pool, read through its reader, and count what the answers lack."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.reader = pool.reader()
        self.reads = self.asked = self.old = self.missing = self.foreign = self.failed = 0
        self.longest = 0.0
        self.acknowledged: dict[tuple[int, int], str] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the callers during the block."""
        self._ends = False
        async with asyncio.TaskGroup() as group:
            for caller in range(CALLERS):
                group.create_task(self._call(f"user {caller}"))
            try:
                yield
            finally:
                self._ends = True

    async def _call(self, user: str) -> None:
        chance = random.Random(user)
        while not self._ends:
            try:
                await chatdb.create_conversation(self.pool, user_id=user, key=HOME, messages=FIRST)
                made = await chatdb.create_conversation(self.pool, user_id=user)
                at = {"user_id": user, "conversation_id": made.id}
                await self._found(chatdb.get_conversation(self.reader, **at))
                for old in (
                    await self._found(chatdb.get_history(self.reader, user_id=user, conversation_key=HOME)) or ()
                ):
                    self.foreign += old.content == ELSEWHERE
                for _ in range(5):
                    message = await self._append(at, chance)
                    if chance.random() < 0.2:
                        await self._found(chatdb.get_message(self.reader, **at, seq=message.seq))
                    for pause in (0.0, 0.01, 0.05):
                        await asyncio.sleep(pause)
                        await self._ask(chance.choice(FRESH), at, message.seq)
            except UnavailableError:
                self.failed += 1
                await asyncio.sleep(0.05)

    async def _append(self, at: Address, chance: random.Random) -> Message:
        text = f"{chance.random()}"
        message = await chatdb.append_message(self.pool, **at, role="user", content=text)
        self.acknowledged[at["conversation_id"], message.seq] = text
        return message

    async def _ask(self, read: Callable[[Any, Address, int], Any], at: Address, seq: int) -> None:
        begin = time.monotonic()
        self.reads += 1
        try:
            shown = await read(self.reader, at, seq)
        except (NotFoundError, IndexError):
            self.missing += 1
            return
        self.longest = max(self.longest, time.monotonic() - begin)
        self.asked += 1
        self.old += shown < seq
        self.foreign += shown > seq  # only this caller appends

    async def _found(self, call: Any) -> Any:
        self.reads += 1
        try:
            return await call
        except NotFoundError:
            self.missing += 1
            return None

    async def until(self, asked: int) -> None:
        """Wait until so many more answers have come."""
        end = self.asked + asked
        async with asyncio.timeout(120):
            while self.asked < end:  # noqa: ASYNC110 - the callers count
                await asyncio.sleep(0.02)


async def in_use(pool: Pool, expected: bool) -> None:
    """Wait until the only replica is in use, or is not."""
    async with asyncio.timeout(60):
        while pool.replica_states()[0].in_use != expected:  # noqa: ASYNC110 - the checks run in the pool
            await asyncio.sleep(0.02)


async def append_elsewhere(replica: Replica) -> None:
    """Append to each caller's first conversation on a promoted replica, which the callers read all the time."""
    async with chatdb.create_pool(replica.dsn) as there:
        for [user] in await there.fetch("select user_id from chatdb.conversations where key = $1", HOME):
            at = {"user_id": user, "conversation_key": HOME}
            await chatdb.append_message(there, **at, role="user", content=ELSEWHERE)


async def test_no_answer_is_old(request: pytest.FixtureRequest, primary: EmbeddedServer) -> None:
    """Whatever a replica does, no answer is older than asked, and nothing that is stored looks missing."""
    each = sized(request, 1500, 40)
    shares: dict[str, float] = {}
    with replica_of(primary) as replica:
        async with chatdb.create_pool(primary.dsn, replicas=[replica.dsn], max_size=CALLERS) as pool:
            load = Load(pool)

            async def measure(phase: str, count: int) -> None:
                before, reads = pool.replica_states()[0].answered, load.reads
                await load.until(count)
                shares[phase] = min(1, (pool.replica_states()[0].answered - before) / (load.reads - reads))

            async with load.running():
                await measure("streaming", 2 * each)
                await asyncio.to_thread(replica.pause)
                await measure("replay paused", each)
                await asyncio.to_thread(replica.resume)
                replica.signal(signal.SIGSTOP)
                await in_use(pool, expected=False)
                await measure("stopped", each)
                replica.signal(signal.SIGCONT)
                await in_use(pool, expected=True)
                await asyncio.to_thread(replica.kill)
                await measure("killed", each)
                await asyncio.to_thread(replica.start)
                await in_use(pool, expected=True)
                await measure("started again", each)
                await asyncio.to_thread(replica.promote)
                await append_elsewhere(replica)
                await measure("promoted", each)
                await in_use(pool, expected=False)
                await asyncio.to_thread(replica.copy_again, primary._folder.socket)
                await in_use(pool, expected=True)
                await measure("copied again", each)
    told = ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items())
    figure(
        f"reads on a replica that is paused, stopped, killed, promoted and copied again: {load.old} of {load.asked:,} "
        f"answers older than asked, {load.missing} missing, {load.foreign} of another history, {load.failed} failed; "
        f"longest {load.longest:.2f} s; answered by the replica: {told}"
    )
    assert (load.old, load.missing, load.foreign, load.failed) == (0, 0, 0, 0)
    assert load.asked >= 8 * each
    assert shares["promoted"] < 0.01
    if not request.config.getoption("--quick"):  # other work may share the cores then
        assert load.longest < LONGEST
        assert min(shares["streaming"], shares["copied again"]) > 0.3


@pytest.mark.parametrize("is_synchronous", [True, False], ids=["synchronous", "asynchronous"])
async def test_a_fail_over(request: pytest.FixtureRequest, primary: EmbeddedServer, is_synchronous: bool) -> None:
    """After a promotion, the pool finds the new primary, the former one answers nothing, and a new replica is used."""
    if request.config.getoption("--quick"):
        pytest.skip("the sample has another fail-over")
    socket = primary._folder.socket
    with replica_of(primary, name="standby") as standby:
        if is_synchronous:
            execute(primary.dsn, "alter system set synchronous_standby_names = 'standby'", "select pg_reload_conf()")
        hosts = ",".join(quote(str(folder), safe="") for folder in (socket, standby.folder))
        both = f"postgresql://postgres@/chatdb?host={hosts}&port=5432"
        replicas = [dsn_of(socket), standby.dsn]
        dsn = f"{both}&target_session_attrs=primary"
        options: dict[str, Any] = {"max_size": CALLERS, "acquire_timeout": 2.0, "command_timeout": 2.0}
        async with chatdb.create_pool(dsn, replicas=replicas, **options) as pool:
            load = Load(pool)
            async with load.running():
                await load.until(1000)
                if not is_synchronous:
                    execute(standby.dsn, "alter system set primary_conninfo = ''", "select pg_reload_conf()")
                    await asyncio.sleep(0.3)
                kill_server(primary.path / "data")
                kept = dict(load.acknowledged)
                load._ends = True
            before = load.failed
            load = Load(pool)
            begin = time.monotonic()
            await asyncio.to_thread(standby.promote)
            promoted = time.monotonic()
            if is_synchronous:
                execute(standby.dsn, "alter system set synchronous_standby_names = ''", "select pg_reload_conf()")
            async with load.running():
                await load.until(1)
                again = time.monotonic() - promoted
                await load.until(500)
            stored = {
                (conversation, seq): text
                for conversation, seq, text in query(
                    standby.dsn, "select conversation_id, seq, content from chatdb.messages"
                )
            }
            lost = sum(stored.get(place) != text for place, text in kept.items())
            lost_since = sum(stored.get(place) != text for place, text in load.acknowledged.items())
        primary.stop()
        primary.start()
        with replica_of(primary, upstream=standby, name="second") as second:
            # with both hosts in the DSN, the pool could find the former primary: it must be fenced
            async with chatdb.create_pool(standby.dsn, replicas=[dsn_of(socket), second.dsn], **options) as pool:
                later = Load(pool)
                async with later.running():
                    await later.until(500)
                former, new = pool.replica_states()
                assert (former.role, former.in_use) == ("primary", False)
                assert (new.role, new.in_use) == ("replica", True)
                assert new.answered > 0
    kind = "synchronous" if is_synchronous else "asynchronous, 0.3 s behind"
    figure(
        f"fail-over to a replica ({kind}): {lost} of {len(kept):,} acknowledged messages lost, {lost_since} of "
        f"{len(load.acknowledged):,} after it; service again {again:.2f} s after the promotion, which took "
        f"{promoted - begin:.2f} s; {before} calls failed meanwhile"
    )
    assert again < 4
    assert lost_since == 0
    for each in (load, later):
        assert (each.old, each.missing, each.foreign) == (0, 0, 0)
    assert lost == 0 if is_synchronous else lost > 0
