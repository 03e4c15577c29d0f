"""Reads on a replica: what it answers, what goes on to the primary, and which replicas are not used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import chatdb
from chatdb import (
    ConfigurationError,
    ConversationNotFoundError,
    InvalidInputError,
    MessageNotFoundError,
    Pool,
    Reader,
    UnavailableError,
    telemetry,
)
from chatdb import replicas as replicas_module
from chatdb.admin.check import replicas as check_module
from chatdb.admin.check.inspection import inspect
from chatdb.admin.check.replicas import check_replicas
from chatdb.admin.migrate import apply_migrations
from chatdb.admin.row_security import protect_tables
from chatdb.embedded.server import EmbeddedServer
from tests.support.calls import CALLS, SIGNATURES, STREAM, Counting, call, conversation_with_a_message
from tests.support.command import chatdb as command
from tests.support.databases import as_role, database_of, execute
from tests.support.embedded import temporary_server
from tests.support.proxy import Proxy
from tests.support.replication import Replica, dsn_of, replica_of

BY_REPLICA = {
    *("get_conversation", "load_conversation", "get_history", "list_messages", "get_message"),
    *("list_conversations", "list_previews", "list_pinned", "search_messages", "export_user"),
}
BY_PRIMARY = {"iter_messages", "get_branch", "list_versions", "get_context", "read_message", "list_streaming"}
USER = {"user_id": "alice"}


class Servers(NamedTuple):
    """A primary and its replica."""

    primary: EmbeddedServer
    dsn: str
    replica: Replica


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """Yield a migrated primary and a replica that replays at once."""
    with temporary_server() as server:
        execute(server.dsn, "alter system set fsync = off", "select pg_reload_conf()")
        apply_migrations(server.dsn)
        with replica_of(server) as replica:
            yield Servers(server, server.dsn, replica)


@pytest.fixture
async def pool(servers: Servers) -> AsyncIterator[Pool]:
    """Yield a pool with the replica, in an empty database, and delete what the test has written."""
    async with chatdb.create_pool(servers.dsn, replicas=[servers.replica.dsn]) as pool:
        yield pool
        with contextlib.suppress(psycopg.errors.ObjectNotInPrerequisiteState):
            servers.replica.resume()
        await pool.execute("truncate chatdb.conversations cascade")
        await caught_up(pool, servers.replica)


async def caught_up(pool: Any, replica: Replica) -> None:
    """Wait until the replica has replayed all that is written."""
    reached = await pool.fetchval("select pg_current_wal_lsn()::text")
    statement = f"select pg_last_wal_replay_lsn() >= '{reached}'"
    async with asyncio.timeout(60):
        with psycopg.connect(replica.dsn, autocommit=True) as connection:
            while not connection.execute(statement.encode()).fetchone()[0]:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.005)


async def state_of(pool: Pool, **expected: object) -> chatdb.ReplicaState:
    """Wait until the state of the only replica has these values."""
    async with asyncio.timeout(60):
        while True:
            [state] = pool.replica_states()
            if all(getattr(state, name) == value for name, value in expected.items()):
                return state
            await asyncio.sleep(0.02)


def counting(pool: Pool) -> tuple[Reader, Counting]:
    """Return a reader, and its primary, which records statements."""
    primary = Counting(pool)
    return Reader(primary, pool._replicas, 0), primary


async def with_messages(pool: Pool, count: int = 3, **options: Any) -> dict[str, Any]:
    """Store a conversation with messages, and return its address."""
    messages = [{"role": "user", "content": f"text {number}"} for number in range(count)]
    stored = await chatdb.create_conversation(pool, **USER, messages=messages, **options)
    return USER | {"conversation_id": stored.id}


# who answers


@pytest.mark.parametrize("name", [*dict.fromkeys(name for name, _ in CALLS if name in BY_REPLICA)])
async def test_the_replica_answers(pool: Pool, servers: Servers, name: str) -> None:
    """The same records in the same order as from the primary, which gets no statement."""
    conversation = await conversation_with_a_message(pool)
    await chatdb.update_conversation(pool, **USER, conversation_id=conversation.id, pinned=True)
    await chatdb.create_conversation(pool, **USER, messages=[{"role": "user", "content": "first of others"}])
    await chatdb.upsert_conversation(pool, **USER, key="archived", archived=True)
    await chatdb.append_message(pool, **USER, conversation_key="thread", role="user", content="third")
    await caught_up(pool, servers.replica)
    reader, primary = counting(pool)
    used = 0
    for called, arguments in CALLS:
        if called != name:
            continue
        [before] = pool.replica_states()
        expected = await call(pool, name, arguments, conversation)
        if expected:
            assert await call(reader, name, arguments, conversation) == expected
            [after] = pool.replica_states()
            is_empty = primary.statements and after.passed_on > before.passed_on
            assert after.answered > before.answered or is_empty
            used += after.answered > before.answered
    assert used > 0
    assert len(primary.statements) < used


async def test_the_primary_answers(pool: Pool) -> None:
    """Other reads are not sent to the replica."""
    conversation = await conversation_with_a_message(pool)
    reader, primary = counting(pool)
    calls = [(name, arguments) for name, arguments in CALLS if name in BY_PRIMARY]
    for name, arguments in calls:
        await call(reader, name, arguments, conversation)
    assert {name for name, _ in calls} == BY_PRIMARY
    assert len(primary.statements) == len(calls)
    assert pool.replica_states()[0].answered == pool.replica_states()[0].passed_on == 0


async def test_a_write_is_refused(pool: Pool) -> None:
    """A function that writes is named in the error, and nothing is sent, even if it would change nothing."""
    conversation = await conversation_with_a_message(pool)
    reader, primary = counting(pool)
    calls = [(name, given) for name, given in [*CALLS, STREAM] if name not in BY_REPLICA | BY_PRIMARY]
    for name, arguments in calls:
        with pytest.raises(ConfigurationError) as caught:
            await call(reader, name, arguments, conversation)
        function = "start_message" if name == "stream_message" else name
        assert str(caught.value) == (
            f"{function} writes, which a reader cannot do: pass the pool instead of pool.reader()"
        )
    assert {name for name, _ in calls} == SIGNATURES.keys() - BY_REPLICA - BY_PRIMARY
    assert primary.statements == []
    assert pool.replica_states()[0].answered == pool.replica_states()[0].passed_on == 0


async def test_other_uses_of_a_reader(pool: Pool) -> None:
    """A statement of the caller, a transaction and a watcher are refused; `check_schema` asks the primary."""
    reader = pool.reader()
    with pytest.raises(ConfigurationError, match="runs only the functions of chatdb"):
        await reader.fetch("select 1")
    with pytest.raises(InvalidInputError, match="must be a pool or an asyncpg connection"):
        async with chatdb.transaction(reader):
            pass
    with pytest.raises(InvalidInputError, match="must be a pool"):
        chatdb.Watcher(reader)
    await chatdb.check_schema(reader)
    assert pool.replica_states()[0].answered == 0


async def test_listeners(pool: Pool, servers: Servers) -> None:
    """A call through a reader is one call for the pool's listeners, also if it goes on to the primary."""
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    calls: list[chatdb.Call] = []
    pool.add_call_listener(calls.append)
    await chatdb.get_history(pool.reader(), **at)
    await chatdb.get_history(pool.reader(), **at, at_least=4)
    assert [(call.operation, call.rows, call.retries) for call in calls] == [("get_history", 3, 0)] * 2


async def test_metrics(pool: Pool, servers: Servers) -> None:
    """An instrumented pool exports the lag, the role and the calls of each replica."""
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    exported = InMemoryMetricReader()
    meters = MeterProvider([exported])
    telemetry.instrument(pool, name="p", meter_provider=meters)
    await chatdb.get_history(pool.reader(), **at)
    await chatdb.get_history(pool.reader(), **at, at_least=4)
    [scope] = exported.get_metrics_data().resource_metrics[0].scope_metrics
    found = {
        (metric.name, *(value for name, value in sorted(point.attributes.items()) if "replica." in name)): point.value
        for metric in scope.metrics
        if "replica." in metric.name
        for point in metric.data.data_points
    }
    [state] = pool.replica_states()
    assert found["chatdb.replica.in_use", "replica", state.server] == 1
    assert found["chatdb.replica.lag", state.server] == state.lag
    assert found["chatdb.replica.calls", "answered", state.server] == 1
    assert found["chatdb.replica.calls", "passed on", state.server] == 1
    meters.shutdown()


async def test_without_replicas(servers: Servers) -> None:
    """The reader of a pool without replicas reads on the primary, and still writes nothing."""
    async with chatdb.create_pool(servers.dsn) as pool:
        at = await with_messages(pool)
        assert len(await chatdb.get_history(pool.reader(), **at, at_least=9)) == 3
        assert pool.replica_states() == []
        with pytest.raises(ConfigurationError, match="delete_user writes"):
            await chatdb.delete_user(pool.reader(), **USER)
        await chatdb.delete_user(pool, **USER)


# old answers


async def test_a_replica_that_is_behind(pool: Pool, servers: Servers) -> None:
    """With `at_least` no answer is old, and without it nothing looks missing."""
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    servers.replica.pause()
    stored = await chatdb.append_message(pool, **at, role="user", content="new", key="new")
    new = await with_messages(pool, key="new")
    reader, primary = counting(pool)

    # old answers, which the caller has allowed
    assert (await chatdb.get_conversation(reader, **at)).last_seq == 3
    assert [each.seq for each in await chatdb.get_history(reader, **at)] == [1, 2, 3]
    assert [each.seq for each in await chatdb.list_messages(reader, **at)] == [1, 2, 3]
    assert len((await chatdb.load_conversation(reader, **at))[1]) == 3
    assert len(await chatdb.list_conversations(reader, **USER)) == 1
    assert primary.statements == []

    # new enough
    assert [each.seq for each in await chatdb.get_history(reader, **at, at_least=3)] == [1, 2, 3]
    assert [each.seq for each in await chatdb.get_history(reader, **at, before_seq=3, at_least=4)] == [1, 2]
    assert [each.seq for each in await chatdb.list_messages(reader, **at, limit=2, at_least=4)] == [1, 2]
    assert (await chatdb.get_conversation(reader, **at, at_least=0)).last_seq == 3
    assert primary.statements == []

    # too old, or missing
    assert (await chatdb.get_conversation(reader, **at, at_least=4)).last_seq == 4
    conversation, messages = await chatdb.load_conversation(reader, **at, at_least=4)
    assert (conversation.last_seq, messages[-1].seq) == (4, 4)
    assert [each.seq for each in await chatdb.get_history(reader, **at, at_least=4)] == [1, 2, 3, 4]
    assert [each.seq for each in await chatdb.get_history(reader, **at, limit=2, at_least=4)] == [3, 4]
    assert [each.seq for each in await chatdb.list_messages(reader, **at, at_least=4)] == [1, 2, 3, 4]
    assert [each.seq for each in await chatdb.list_messages(reader, **at, after_seq=3)] == [4]
    assert [each.seq for each in await chatdb.get_history(reader, **at, before_key="new")] == [1, 2, 3]
    assert (await chatdb.get_message(reader, **at, seq=4)) == stored
    assert (await chatdb.get_message(reader, **at, key="new")) == stored
    assert (await chatdb.get_conversation(reader, **USER, conversation_key="new")).id == new["conversation_id"]
    assert len(await chatdb.get_history(reader, **USER, conversation_key="new", at_least=3)) == 3
    assert len(await chatdb.list_messages(reader, **USER, conversation_key="new", after_seq=2)) == 1
    assert len(await chatdb.search_messages(reader, **USER, conversation_key="new", query="text")) == 3
    assert len(primary.statements) == 13
    assert [each.seq async for each in chatdb.iter_messages(reader, **at)] == [1, 2, 3, 4]

    servers.replica.resume()
    await caught_up(pool, servers.replica)
    primary.statements.clear()
    assert [each.seq for each in await chatdb.get_history(reader, **at, at_least=4)] == [1, 2, 3, 4]
    by_key = USER | {"conversation_key": "new"}
    assert [each.seq for each in await chatdb.list_messages(reader, **by_key, at_least=3)] == [1, 2, 3]
    assert primary.statements == []


async def test_a_new_user(pool: Pool, servers: Servers) -> None:
    """An empty list of the replica is asked of the primary."""
    servers.replica.pause()
    await with_messages(pool)
    assert len(await chatdb.list_conversations(pool.reader(), **USER)) == 1
    assert len(await chatdb.list_previews(pool.reader(), **USER)) == 1
    assert len([each async for each in chatdb.export_user(pool.reader(), **USER)]) == 4


async def test_an_export_across_servers(pool: Pool, servers: Servers) -> None:
    """An export whose pages come from different servers has every message of the conversations it names."""
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    servers.replica.pause()
    await chatdb.append_message(pool, **at, role="user", content="new")
    found = [each async for each in chatdb.export_user(pool.reader(), **USER)]
    assert len(found) == 4
    assert found[0].last_seq == 3


async def test_what_is_nowhere(pool: Pool, servers: Servers) -> None:
    """What neither server has is the primary's error, and a future `at_least` the primary's answer."""
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    reader, primary = counting(pool)
    with pytest.raises(ConversationNotFoundError):
        await chatdb.get_history(reader, **USER, conversation_id=-1, at_least=1)
    with pytest.raises(MessageNotFoundError):
        await chatdb.get_message(reader, **at, seq=9)
    with pytest.raises(MessageNotFoundError):
        await chatdb.list_messages(reader, **at, after_key="none", at_least=1)
    assert len(await chatdb.get_history(reader, **at, at_least=2**63 - 1)) == 3
    assert len(primary.statements) == 4


async def test_a_wrong_at_least(pool: Pool) -> None:
    """A reader refuses what is no seq, as every other handle does."""
    for name in (name for name, given in SIGNATURES.items() if "at_least" in given):
        for wrong in (-1, 2**63, True, "1", 1.0):
            with pytest.raises(InvalidInputError) as caught:
                await getattr(chatdb, name)(pool.reader(), **USER, conversation_id=1, at_least=wrong)
            assert caught.value.parameter == "at_least"


async def test_round_trips(pool: Pool, servers: Servers) -> None:
    """A fresh answer costs one round trip, on the replica, and one that is behind costs one more, on the primary."""
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    with Proxy(servers.dsn) as primary, Proxy(servers.replica.dsn) as replica:
        async with chatdb.create_pool(primary.dsn, replicas=[replica.dsn]) as counted:
            reader = counted.reader()
            checks = counted._replicas
            assert checks is not None
            checks._end_checks()  # they would be counted too
            checks._replicas[0].in_use = True
            for db in (reader, counted):
                await chatdb.get_history(db, **at)  # prepares the statement
            primary.clear()
            replica.clear()
            await chatdb.get_history(reader, **at, at_least=3)
            assert (primary.round_trips, replica.round_trips) == (0, 1)
            await chatdb.get_history(reader, **at, at_least=4)
            assert (primary.round_trips, replica.round_trips) == (1, 2)
            await chatdb.get_history(counted, **at, at_least=4)
            assert (primary.round_trips, replica.round_trips) == (2, 2)


# replicas that are not used


async def test_a_promoted_replica(pool: Pool, servers: Servers) -> None:
    """The connections to a replica that is promoted while the primary lives answer nothing any more."""
    at = await with_messages(pool)
    with replica_of(servers.primary, name="promoted") as replica:
        async with chatdb.create_pool(servers.dsn, replicas=[replica.dsn]) as other:
            reader = other.reader()
            await caught_up(pool, replica)
            assert len(await chatdb.get_history(reader, **at, at_least=3)) == 3
            assert (await state_of(other, role="replica", in_use=True)).answered == 1
            await asyncio.to_thread(replica.promote)
            async with chatdb.create_pool(replica.dsn) as there:
                await chatdb.append_message(there, **at, role="user", content="not on the primary")
            answers = [await chatdb.get_history(reader, **at) for _ in range(20)]
            assert {len(answer) for answer in answers} == {3}
            assert (await state_of(other, role="primary", in_use=False)).answered == 1
            assert len(await chatdb.get_history(reader, **at)) == 3


async def test_a_replica_of_the_promoted_one(pool: Pool, servers: Servers) -> None:
    """A replica on another timeline is not used, and no connection to it, even if the address led to it just now."""
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    with Proxy(servers.replica.dsn) as address, replica_of(servers.primary, name="promoted") as promoted:
        await caught_up(pool, promoted)
        await asyncio.to_thread(promoted.promote)
        async with chatdb.create_pool(promoted.dsn) as there:
            await chatdb.append_message(there, **at, role="user", content="not on the primary")
        with replica_of(servers.primary, upstream=promoted, name="below") as below:
            async with chatdb.create_pool(servers.dsn, replicas=[address.dsn]) as other:
                assert len(await chatdb.get_history(other.reader(), **at)) == 3
                assert other._replicas is not None
                replica = other._replicas._replicas[0]
                address._target = str(below.folder / ".s.PGSQL.5432")
                assert replica.pool is not None
                await replica.pool.expire_connections()
                assert len(await chatdb.get_history(other.reader(), **at)) == 3
                assert (replica.answered, replica.passed_on) == (1, 1)
                address.cut()
                state = await state_of(other, role="replica", in_use=False)
                assert state.problem == "follows timeline 2, but the primary is on 1"


async def test_too_far_behind(pool: Pool, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is further behind than the limit is not used until it has caught up."""
    monkeypatch.setattr(replicas_module, "MAX_LAG", 0.5)
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    await state_of(pool, in_use=True)
    servers.replica.pause()
    await chatdb.append_message(pool, **at, role="user", content="new")
    state = await state_of(pool, in_use=False)
    assert state.role == "replica"
    assert state.lag > 0.5
    assert state.problem.endswith("s behind")
    assert len(await chatdb.get_history(pool.reader(), **at)) == 4
    assert pool.replica_states()[0].passed_on == 0
    servers.replica.resume()
    assert (await state_of(pool, in_use=True)).lag == 0


async def test_replicas_that_are_none(pool: Pool, servers: Servers, server: str) -> None:
    """An unreachable server, the primary itself, another database and another cluster are told and not used."""
    at = await with_messages(pool)
    execute(servers.dsn, "create database another")
    await caught_up(pool, servers.replica)
    nobody = "postgresql://127.0.0.1:1/chatdb?user=postgres&password=secret"
    dsns = [nobody, servers.dsn, database_of(servers.replica.dsn, "another"), server]
    async with chatdb.create_pool(servers.dsn, replicas=dsns) as other:
        states = other.replica_states()
        assert [state.problem for state in states] == [
            "cannot be reached (ConnectionRefusedError)",
            "is not in recovery: it was promoted, or is the primary itself",
            "is not a copy of the primary's database",
            "is not a copy of the primary's database",
        ]
        assert [state.role for state in states] == [None, "primary", "replica", "primary"]
        assert states[0].server == "127.0.0.1:1"
        assert len(await chatdb.get_history(other.reader(), **at, at_least=3)) == 3
    execute(servers.dsn, "drop database another")


async def test_a_silent_replica(pool: Pool, servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that accepts connections and never answers delays neither calls nor, for long, the opening."""
    monkeypatch.setattr(replicas_module, "ANSWER_TIMEOUT", 0.3)
    monkeypatch.setattr(replicas_module, "CONNECT_TIMEOUT", 0.5)
    at = await with_messages(pool)
    tasks = asyncio.all_tasks()
    with Proxy(servers.replica.dsn) as silent:
        silent.pause()
        opening = asyncio.create_task(chatdb.create_pool(servers.dsn, replicas=[silent.dsn])._open())
        await asyncio.sleep(0.1)
        opening.cancel()
        await asyncio.wait([opening])
        async with asyncio.timeout(5):
            while asyncio.all_tasks() != tasks:  # noqa: ASYNC110 - connections are closed meanwhile
                await asyncio.sleep(0.02)
        async with chatdb.create_pool(servers.dsn, replicas=[silent.dsn]) as other:
            assert len(await chatdb.get_history(other.reader(), **at, at_least=3)) == 3
            state = await state_of(other, problem="cannot be reached (TimeoutError)")
            assert (state.role, state.in_use, state.answered) == (None, False, 0)


async def test_a_dead_replica(pool: Pool, servers: Servers) -> None:
    """A replica that dies during the calls is noticed by the first of them, and used again when it is back."""
    at = await with_messages(pool)
    await caught_up(pool, servers.replica)
    reader, _ = counting(pool)  # without retries
    await chatdb.get_history(reader, **at)
    await asyncio.to_thread(servers.replica.kill)
    answers = await asyncio.gather(*(chatdb.get_history(reader, **at) for _ in range(20)))
    assert {len(answer) for answer in answers} == {3}
    assert (await state_of(pool, in_use=False)).answered == 1
    await asyncio.to_thread(servers.replica.start)
    await state_of(pool, in_use=True)
    assert len(await chatdb.get_history(reader, **at)) == 3
    assert pool.replica_states()[0].answered == 2


async def test_a_dead_primary(servers: Servers) -> None:
    """While the primary cannot be reached, the replica answers what it has, and the rest is an error."""
    with Proxy(servers.dsn) as primary:
        async with chatdb.create_pool(primary.dsn, replicas=[servers.replica.dsn], retries=0) as pool:
            at = await with_messages(pool)
            await caught_up(pool, servers.replica)
            primary.close()
            assert len(await chatdb.get_history(pool.reader(), **at, at_least=3)) == 3
            with pytest.raises(UnavailableError):
                await chatdb.get_history(pool.reader(), **at, at_least=4)
    async with chatdb.create_pool(servers.dsn) as pool:
        await chatdb.delete_user(pool, **USER)


async def test_two_replicas(pool: Pool, servers: Servers) -> None:
    """Users are spread over the replicas, and each reads on the same one as long as it is in use."""
    with replica_of(servers.primary, name="second") as second:
        dsns = [servers.replica.dsn, second.dsn]
        async with chatdb.create_pool(servers.dsn, replicas=dsns) as both:
            for user in range(20):
                await chatdb.create_conversation(both, user_id=f"user {user}", key="one")
            for replica in (servers.replica, second):
                await caught_up(both, replica)
            for user in range(20):
                before = [state.answered for state in both.replica_states()]
                for _ in range(5):
                    await chatdb.get_conversation(both.reader(), user_id=f"user {user}", conversation_key="one")
                after = [state.answered for state in both.replica_states()]
                assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0, 5]
            assert min(state.answered for state in both.replica_states()) > 10


def test_the_command(servers: Servers, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chatdb check --replica` tells each replica's role and lag, and what is none or too far behind is a problem."""
    dsns = [servers.replica.dsn, servers.dsn, server, "postgresql://127.0.0.1:1/chatdb?user=postgres&sslmode=disable"]
    found = [each for each in inspect(servers.dsn, replicas=dsns) if each.what.startswith("replica ")]
    assert [(each.state, each.detail.partition(", ")[0]) for each in found] == [
        ("ok", "a replica"),
        ("different", "is not in recovery: it was promoted"),
        ("different", "is not a copy of the primary's database"),
        ("missing", found[-1].detail),
    ]
    assert "127.0.0.1:1 cannot be reached" in found[-1].detail
    monkeypatch.setattr(check_module, "MAX_LAG", 0.2)
    servers.replica.pause()
    execute(servers.dsn, "create table public.behind ()", "drop table public.behind")
    [(_, state, detail, _)] = check_replicas(servers.dsn, dsns[:1])
    servers.replica.resume()
    assert state == "different"
    assert detail.startswith("a replica, more than 0.2 s behind (")
    environment = {"DATABASE_URL": servers.dsn}
    assert "s behind at most" in command("check", "--replica", servers.replica.dsn, env=environment)
    command("check", "--replica", servers.dsn, env=environment, code=1)


# options and connections


async def test_row_level_security(pool: Pool, servers: Servers) -> None:
    """Behind row-level security, a read takes three round trips on the replica, and sees only its user's rows."""
    at = await with_messages(pool)
    execute(
        servers.dsn,
        "create role app login",
        "grant usage on schema chatdb to app",
        "grant select, insert, update, delete on all tables in schema chatdb to app",
    )
    protect_tables(servers.dsn)
    await caught_up(pool, servers.replica)
    try:
        with Proxy(as_role(servers.replica.dsn, "app")) as replica:
            options: dict[str, Any] = {"replicas": [replica.dsn], "row_level_security": True}
            async with chatdb.create_pool(as_role(servers.dsn, "app"), **options) as protected:
                reader, primary = counting(protected)
                checks = protected._replicas
                assert checks is not None
                checks._end_checks()
                checks._replicas[0].in_use = True
                await chatdb.get_history(reader, **at)
                replica.clear()
                assert len(await chatdb.get_history(reader, **at, at_least=3)) == 3
                assert replica.round_trips == 3
                assert primary.statements == []
                with pytest.raises(ConversationNotFoundError):
                    await chatdb.get_history(reader, **at | {"user_id": "bob"})
    finally:
        protect_tables(servers.dsn, off=True)
        execute(servers.dsn, "drop owned by app", "drop role app")


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("postgresql://a", "replicas must be a list of DSNs, not str"),
        ([1], "replicas[0] must be a str or an object that holds one"),
        (["postgresql://a", "mysql://secret@a"], "DSN"),
        (None, "replicas must be a list of DSNs, not None"),
    ],
)
def test_wrong_replicas(wrong: Any, problem: str) -> None:
    """A wrong list is refused by name before anything connects."""
    with pytest.raises(ConfigurationError) as caught:
        chatdb.create_pool("postgresql://a", replicas=wrong)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("terminate", [False, True])
async def test_the_end(servers: Servers, terminate: bool) -> None:
    """A closed or terminated pool leaves no connection to a replica and no task."""
    others = "select count(*) from pg_stat_activity where datname = 'chatdb' and pid <> pg_backend_pid()"

    def sessions() -> int:
        with psycopg.connect(servers.replica.dsn) as connection:
            return int(connection.execute(others).fetchone()[0])

    tasks = asyncio.all_tasks()
    pool = await chatdb.create_pool(servers.dsn, replicas=[servers.replica.dsn])
    assert sessions() == 2
    if terminate:
        pool.terminate()
    else:
        await pool.close()
    async with asyncio.timeout(5):
        while sessions() or asyncio.all_tasks() != tasks:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def test_the_hook_of_new_connections(servers: Servers) -> None:
    """An `init` hook also runs on the connections to replicas."""
    hosts: list[object] = []

    async def init(connection: Any) -> None:
        hosts.append(await connection.fetchval("select pg_is_in_recovery()"))

    async with chatdb.create_pool(servers.dsn, replicas=[servers.replica.dsn], init=init):
        assert hosts == [False, True]


async def test_several_hosts(servers: Servers) -> None:
    """A DSN with both hosts finds the primary, and the same hosts find the replica."""
    hosts = f"{dsn_of(servers.replica.folder)}".split("host=")[1].split("&")[0]
    both = servers.dsn.replace("host=", f"host={hosts},").replace("port=5432", "port=5432,5432")
    primary = both.replace("target_session_attrs=any", "target_session_attrs=primary")
    standby = both.replace("target_session_attrs=any", "target_session_attrs=standby")
    async with chatdb.create_pool(primary, replicas=[standby]) as pool:
        assert await pool.fetchval("select pg_is_in_recovery()") is False
        assert pool.replica_states()[0].in_use
