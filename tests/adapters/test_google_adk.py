"""ChatDBSessionService next to ADK's in-memory service, under a Runner, and with lost answers and other programs."""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import ast
import asyncio
import copy
import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any

import asyncpg
import pytest
from google.adk.agents import LlmAgent
from google.adk.errors import StaleSessionError
from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events import Event, EventActions
from google.adk.models import BaseLlm, LlmCapabilities
from google.adk.models.llm_request import LlmRequest
from google.adk.models.llm_response import LlmResponse
from google.adk.runners import Runner
from google.adk.sessions import BaseSessionService, DatabaseSessionService, InMemorySessionService, Session
from google.adk.sessions.base_session_service import GetSessionConfig
from google.genai import types
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import chatdb
from chatdb._core.dsn import connect_arguments
from chatdb.adapters.google_adk import ChatDBSessionService
from chatdb.admin.row_security import protect_tables
from chatdb.formats import google_adk
from chatdb.pool import Pool
from chatdb.testing.databases import Databases
from chatdb.transfer import tables
from chatdb.transfer.importer import ImportReport, import_conversations
from tests.support.command import PROGRAM
from tests.support.databases import as_role, cloned, execute
from tests.support.paths import ROOT
from tests.support.proxy import Proxy, Statement
from tests.support.roles import Roles

KEY = "google-adk:app:s1"


def said(text: str = "Hello", author: str = "user", **fields: Any) -> Event:
    """Return an event with a text."""
    role = "user" if author == "user" else "model"
    content = types.Content(role=role, parts=[types.Part(text=text)])
    return Event(author=author, invocation_id="i1", content=content, **fields)


def changed(**delta: Any) -> Event:
    """Return an event that changes the state; `user__x` stands for `user:x`."""
    state = {name.replace("__", ":"): value for name, value in delta.items()}
    return Event(author="agent", invocation_id="i1", actions=EventActions(state_delta=state))


async def texts(service: BaseSessionService, session_id: str = "s1", user: str = "alice") -> list[str | None]:
    """Return the texts of a stored session's events."""
    session = await service.get_session(app_name="app", user_id=user, session_id=session_id)
    assert session is not None
    return [event.content.parts[0].text if event.content and event.content.parts else None for event in session.events]


async def read_session(service: BaseSessionService, session_id: str = "s1", user: str = "alice") -> Session:
    """Return a stored session of the app."""
    session = await service.get_session(app_name="app", user_id=user, session_id=session_id)
    assert session is not None
    return session


@pytest.fixture
def service(db: Pool) -> ChatDBSessionService:
    """Return a service."""
    return ChatDBSessionService(db)


@pytest.fixture
async def session(service: ChatDBSessionService) -> Session:
    """Return Alice's session s1 of the app."""
    return await service.create_session(app_name="app", user_id="alice", session_id="s1")


# round trips


@pytest.mark.parametrize("shared", [(), ("user:",), ("user:", "app:")], ids=["no", "user", "all"])
async def test_round_trips(dsn: str, shared: tuple[str, ...]) -> None:
    """Each method is one round trip, and one more for each shared state that it reads; writes are a transaction."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, min_size=1, max_size=1) as db:
            service = ChatDBSessionService(db, shared_states=shared)
            counts: dict[str, int] = {}

            async def measure(state: dict[str, Any], delta: dict[str, Any]) -> dict[str, int]:
                for _ in range(4):  # the first ones prepare the statements
                    before = proxy.round_trips

                    def count(name: str) -> None:
                        nonlocal before
                        counts[name], before = proxy.round_trips - before, proxy.round_trips

                    session = await service.create_session(app_name="app", user_id="alice", state=dict(state))
                    count("create")
                    await service.append_event(session, Event(author="agent", actions=EventActions(state_delta=delta)))
                    count("append")
                    assert await read_session(service, session.id) == session
                    count("get")
                    await service.list_sessions(app_name="app", user_id="alice")
                    count("list")
                    await service.delete_session(app_name="app", user_id="alice", session_id=session.id)
                    count("delete")
                return counts

            # the list has the user: state
            others = len(shared)
            reads = {"create": 1 + others, "get": 1 + others, "list": 1 + len({"app:"} & {*shared}), "delete": 1}
            assert await measure({}, {}) == reads | {"append": 1}
            assert await measure({"x": 1}, {"y": 2}) == reads | {"append": 1}
            values = {f"{scope}x": 1 for scope in shared}
            writes = 3 + others if others else 1
            assert await measure(values, values) == reads | {"create": writes, "append": writes}
            before = proxy.round_trips
            await service.create_session(app_name="other", user_id="bob", state=values)
            assert proxy.round_trips - before == writes  # the first keys of the states


async def test_a_shared_state_is_seen_at_once(db: Pool) -> None:
    """What another process stores first in a shared state is there when a session is read again."""
    here, there = ChatDBSessionService(db), ChatDBSessionService(db)
    session = await here.create_session(app_name="app", user_id="alice", session_id="s1")
    assert (await read_session(there)).state == {}
    await here.append_event(session, changed(user__x=1, app__y=2))
    got = await read_session(there)
    assert got.state == {"user:x": 1, "app:y": 2}


async def test_shared_states_are_read_together(db: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pool, the shared states are read at the same time; on a connection, one after the other."""
    state = {"user:x": 1, "app:y": 2}
    async with db.acquire() as connection:
        service = ChatDBSessionService(connection)
        created = await service.create_session(app_name="app", user_id="alice", session_id="s1", state=dict(state))
        assert await read_session(service) == created
        assert created.state == state
    both = asyncio.Barrier(2)

    async def get_together(db: Pool, **address: Any) -> chatdb.Conversation:
        async with asyncio.timeout(5):
            await both.wait()
        return await chatdb.get_conversation(db, **address)

    monkeypatch.setattr("chatdb.adapters._google_adk_states.get_conversation", get_together)
    assert (await read_session(ChatDBSessionService(db))).state == state


async def test_without_shared_states(db: Pool, service: ChatDBSessionService) -> None:
    """A key of a shared state that the service is not to use is refused before anything is stored."""
    await service.create_session(app_name="app", user_id="alice", session_id="s1", state={"user:x": 1, "app:x": 1})
    for shared in ((), ("user:",), ("app:",)):
        narrow = ChatDBSessionService(db, shared_states=shared)
        session = await read_session(narrow)
        assert session.state == {f"{scope}x": 1 for scope in shared}
        for scope in {"user:", "app:"} - {*shared}:
            with pytest.raises(chatdb.InvalidInputError, match=f"has a {scope} key"):
                await narrow.append_event(session, changed(**{f"{scope}x": 2}))
            with pytest.raises(chatdb.InvalidInputError, match=f"has a {scope} key"):
                await narrow.create_session(app_name="app", user_id="alice", session_id="s2", state={f"{scope}x": 2})
    assert await texts(service) == []
    assert [each.id for each in (await service.list_sessions(app_name="app", user_id="alice")).sessions] == ["s1"]
    for wrong in ("user:", ("user",)):
        with pytest.raises(chatdb.InvalidInputError, match="shared_states"):
            ChatDBSessionService(db, shared_states=wrong)


# events and state come back as they were

NASTY = ["", "plain", "NUL \0 inside", "lone \ud83d", "Köln 🌧", "\u2028", "x" * 100_000, '{"a": 1}', "\\u0000"]

EVENTS = [
    *(said(text) for text in NASTY),
    Event(author="user"),
    Event(
        author="weather",
        invocation_id="i2",
        branch="a.b",
        turn_complete=True,
        error_code="E",
        error_message="failed",
        long_running_tool_ids={"t1", "t0"},
        custom_metadata={"z": None, "a": {"y": [1, 1.0, 1e300, -0.0], "b": "\0"}},
        actions=EventActions(
            state_delta={"z": 1, "a": None, "\0": "\ud83d", "": [], "state:x": {"b": 1, "a": 2}},
            artifact_delta={"f": 0},
            transfer_to_agent="other",
            escalate=True,
        ),
        timestamp=1700000000.123456,
        output={"b": 1, "a": [None]},
    ),
    Event(
        author="weather",
        content=types.Content(
            role="model",
            parts=[
                types.Part(text="I ask the tool.", thought=True, thought_signature=b"\xff\x00"),
                types.Part(function_call=types.FunctionCall(id="c1", name="weather", args={"z": 1, "a": None})),
                types.Part.from_bytes(data=b"\x00\xff", mime_type="image/png"),
            ],
        ),
    ),
    Event(
        author="weather",
        content=types.Content(
            role="user",
            parts=[
                types.Part(
                    function_response=types.FunctionResponse(id="c1", name="weather", response={"result": "rain \0"})
                )
            ],
        ),
    ),
]


def dumped(event: Event) -> str:
    """Return the JSON of an event."""
    return json.dumps(event.model_dump(mode="json"))


async def test_events_come_back_equal(service: ChatDBSessionService, session: Session) -> None:
    """Events and state come back equal, with equal JSON, in order."""
    events = [event.model_copy(deep=True) for event in EVENTS]
    for event in events:
        assert await service.append_event(session, event) is event
    got = await read_session(service)
    assert got == session
    assert got.events == EVENTS
    assert list(map(dumped, got.events)) == list(map(dumped, EVENTS))
    assert got.state == EVENTS[len(NASTY) + 1].actions.state_delta
    assert repr(got.state["state:x"]) == "{'b': 1, 'a': 2}"


async def test_what_a_person_reads(db: Pool, service: ChatDBSessionService, session: Session) -> None:
    """The content is what was said, the role who said it, and the metadata names the framework."""
    for event in EVENTS:
        await service.append_event(session, event.model_copy(deep=True))
    await service.append_event(session, said("It rains.", "weather"))
    stored = await chatdb.get_history(db, user_id="alice", conversation_key=KEY)
    assert [(message.role, message.content) for message in stored[: len(NASTY)]] == [
        ("user", text.replace("\0", "\ufffd").replace("\ud83d", "\ufffd")) for text in NASTY
    ]
    assert [(each.role, each.content, each.metadata) for each in stored[len(NASTY) :]] == [
        ("user", "", {"framework": "google-adk"}),
        ("assistant", "failed", {"framework": "google-adk", "name": "weather"}),
        ("assistant", "I ask the tool.", {"framework": "google-adk", "type": "function_call", "name": "weather"}),
        ("tool", "rain \ufffd", {"framework": "google-adk", "type": "function_response", "name": "weather"}),
        ("assistant", "It rains.", {"framework": "google-adk", "name": "weather"}),
    ]
    assert stored[0].key == EVENTS[0].id


async def test_a_long_text(db: Pool, service: ChatDBSessionService, session: Session) -> None:
    """The content is cut at 4 MiB, the event is whole."""
    text = "ä" * (2 * 1024 * 1024) + "b"
    await service.append_event(session, said(text))
    assert await texts(service) == [text]
    (stored,) = await chatdb.get_history(db, user_id="alice", conversation_key=KEY)
    assert stored.content == text[:-1]


async def test_what_json_cannot_hold(db: Pool, service: ChatDBSessionService, session: Session) -> None:
    """NaN in the state is refused before anything is written; a callable is stored as text, as ADK's services do."""
    for number in (float("nan"), float("inf")):
        for name in ("x", "user__x", "app__x"):
            with pytest.raises(chatdb.InvalidInputError):
                await service.append_event(session, changed(**{name: number}))
            with pytest.raises(chatdb.InvalidInputError, match="state: is not JSON"):
                await service.create_session(
                    app_name="app", user_id="bob", state={name.replace("__", ":"): number}, session_id="s2"
                )
    assert await chatdb.list_conversations(db, user_id="bob", archived=None) == []
    assert await texts(service) == []
    created = await service.create_session(app_name="app", user_id="bob", state={"when": {1: (2, 3)}, "f": len})
    assert created.state == {"when": {"1": [2, 3]}, "f": "<built-in function len>"}


async def test_a_large_state(service: ChatDBSessionService, session: Session) -> None:
    """The state can have most of 1 MiB, in total; above, a clear error, and nothing is stored."""
    await service.append_event(session, changed(x="a" * 600_000))
    with pytest.raises(chatdb.InvalidInputError, match="metadata"):
        await service.append_event(session, changed(y="a" * 600_000))
    with pytest.raises(chatdb.InvalidInputError, match="metadata"):
        await service.append_event(session, changed(y="a" * 1_600_000))
    with pytest.raises(chatdb.InvalidInputError, match="metadata"):
        await service.create_session(app_name="app", user_id="alice", state={"x": "a" * 1_600_000})
    await service.append_event(session, changed(y=1))
    got = await read_session(service)
    assert got == session
    assert len(got.events) == 2


async def check_large_shared_states(service: ChatDBSessionService) -> None:
    """Check that a shared state that is too large is refused with the event or session, and what follows is stored."""
    for scope in ("user", "app"):
        place: dict[str, Any] = {"app_name": "app", "user_id": "alice", "session_id": scope}
        for size in (1_600_000, 1_048_576):  # the second is refused by the server
            with pytest.raises(chatdb.InvalidInputError, match="metadata"):
                await service.create_session(**place, state={"x": 1, f"{scope}:x": "a" * size})
            assert await service.get_session(**place) is None
        session = await service.create_session(**place, state={"user:x": scope, f"{scope}:x": "a" * 600_000})
        large = changed(**{"user__z": "lost", "x": "lost", f"{scope}__y": "a" * 600_000})
        for _ in range(2):
            with pytest.raises(chatdb.InvalidInputError, match="metadata"):
                await service.append_event(session, large.model_copy(deep=True))
        assert await read_session(service, scope) == session
        await service.append_event(session, changed(**{f"{scope}__x": "small"}))
        got = await read_session(service, scope)
        assert got == session
        assert len(got.events) == 1
        assert got.state == {"user:x": "small" if scope == "user" else scope} | (
            {"app:x": "small"} if scope == "app" else {}
        )


async def test_a_large_shared_state(service: ChatDBSessionService) -> None:
    """A shared state above 1 MiB is a clear error, nothing is stored, and the session object stays usable."""
    await check_large_shared_states(service)


async def test_pages(service: ChatDBSessionService, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """More events or sessions than a page are read in several statements."""
    monkeypatch.setattr("chatdb.adapters._pages.PAGE", 3)
    for number in range(10):
        await service.append_event(session, said(str(number), timestamp=number + 1.0))
    for count in (None, 0, 1, 2, 3, 4, 6, 9, 10, 11):
        config = None if count is None else GetSessionConfig(num_recent_events=count)
        got = await service.get_session(app_name="app", user_id="alice", session_id="s1", config=config)
        assert got is not None
        assert got.events == session.events[len(session.events) - min(count, 10) if count is not None else 0 :]
        assert got.last_update_time == 10
    recent = GetSessionConfig(after_timestamp=4.0)
    got = await service.get_session(app_name="app", user_id="alice", session_id="s1", config=recent)
    assert got is not None
    assert [event.timestamp for event in got.events] == [4, 5, 6, 7, 8, 9, 10]
    for number in range(5):
        await service.create_session(app_name="app", user_id="alice", session_id=f"t{number}")
    listed = await service.list_sessions(app_name="app", user_id="alice")
    assert [each.id for each in listed.sessions] == ["s1", "t0", "t1", "t2", "t3", "t4"]


# next to the in-memory service


class Twins:
    """Does the same with both services, and compares what comes back."""

    def __init__(self, service: ChatDBSessionService, seed: int) -> None:
        self.services: list[BaseSessionService] = [service, InMemorySessionService()]
        self.choose = random.Random(seed)

    async def both(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of both services; both return, or both raise the same error."""
        results: list[Any] = []
        for service in self.services:
            try:
                results.append(await getattr(service, method)(**copy.deepcopy(arguments)))
            except (AlreadyExistsError, SessionNotFoundError) as error:
                results.append(error)
        ours, theirs = results
        assert type(ours) is type(theirs), (method, arguments)
        if isinstance(ours, Session):
            self.compare(ours, theirs)
        return results

    def compare(self, ours: Session, theirs: Session) -> None:
        """Compare two sessions; the time of one without events is that of its creation."""
        assert ours.model_dump(exclude={"last_update_time"}) == theirs.model_dump(exclude={"last_update_time"})
        if theirs.last_update_time < 1_000_000:
            assert ours.last_update_time == theirs.last_update_time

    def state(self) -> dict[str, Any]:
        """Return some state."""
        names = ["x", "y", "user:x", "user:y", "app:x", "temp:x", "user:", "state:x", "framework"]
        values: list[Any] = [None, 1, 1.5, "a\0", {"b": 1, "a": [None]}, [], True]
        return {self.choose.choice(names): self.choose.choice(values) for _ in range(self.choose.randint(0, 3))}

    def event(self) -> Event:
        """Return an event, sometimes a partial one."""
        content = types.Content(role="user", parts=[types.Part(text=self.choose.choice(NASTY[:5]))])
        return Event(
            author=self.choose.choice(["user", "agent"]),
            content=self.choose.choice([None, content]),
            partial=self.choose.choice([None, None, None, False, True]),
            actions=EventActions(state_delta=self.state()),
            timestamp=float(self.choose.randint(1, 100_000)),
        )

    async def step(self) -> None:
        """Do one random operation."""
        pick = self.choose.choice
        place: dict[str, Any] = {"app_name": pick(["a", "a:b", "%3A"]), "user_id": pick(["alice", "bob"])}
        name = pick(["s1", "s2", "b:s1", " s1 ", "x" * 300, "ünï"])
        match pick(["create", "append", "append", "append", "get", "get", "list", "delete", "user"]):
            case "create":
                await self.both("create_session", **place, session_id=name, state=pick([None, self.state()]))
            case "append":
                held = await self.both("get_session", **place, session_id=name)
                if held[0] is None:
                    return
                for _ in range(self.choose.randint(1, 3)):
                    event = self.event()
                    for _ in range(pick([1, 1, 2])):  # the same event again is stored once
                        for service, session in zip(self.services, held, strict=True):
                            appended = event.model_copy(deep=True)
                            appended = service._trim_temp_delta_state(appended)
                            await service.append_event(session, appended)
                        self.compare(*held)
            case "get":
                count, after = pick([None, 0, 1, 2, 5]), pick([None, float(self.choose.randint(1, 100_000))])
                config = GetSessionConfig(num_recent_events=count, after_timestamp=after)
                await self.both("get_session", **place, session_id=name, config=config)
            case "list":
                ours, theirs = (each.sessions for each in await self.both("list_sessions", **place))
                assert ours == sorted(ours, key=lambda each: (each.last_update_time, each.id))
                for pair in zip(
                    *(sorted(each, key=lambda session: session.id) for each in (ours, theirs)), strict=True
                ):
                    self.compare(*pair)
            case "delete":
                await self.both("delete_session", **place, session_id=name)
            case _:
                ours, theirs = await self.both("get_user_state", **place)
                assert ours == theirs


@pytest.mark.parametrize("seed", range(3))
async def test_random_sequences(service: ChatDBSessionService, seed: int) -> None:
    """Random operations give what they give with the in-memory service."""
    twins = Twins(service, seed)
    for _ in range(150):
        await twins.step()


# a Runner


class Weatherman(BaseLlm):
    """A model that asks its tool, then says what came back, and keeps what it was given."""

    model: str = "weatherman"
    seen: list[Any]

    @property
    def capabilities(self) -> LlmCapabilities:
        """Say what it can."""
        return LlmCapabilities(output_schema_and_tools=True)

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        """Answer the newest content."""
        self.seen.append([re.sub("adk-[-0-9a-f]+", "adk-id", str(each)) for each in llm_request.contents])
        newest = (llm_request.contents[-1].parts or [])[-1]
        if newest.function_response is not None:
            for word in ("It ", "rains."):
                yield LlmResponse(content=types.ModelContent(word), partial=True)
            yield LlmResponse(content=types.ModelContent("It rains."))
        else:
            call = types.Part(function_call=types.FunctionCall(name="weather", args={"city": newest.text}))
            yield LlmResponse(content=types.Content(role="model", parts=[call, call]))


async def weather(city: str, tool_context: Any) -> dict[str, Any]:
    """Return the weather, and note in each state that somebody asked."""
    for name in ("asked", "user:asked", "app:asked", "temp:asked"):
        tool_context.state[name] = tool_context.state.get(name, 0) + 1
    return {"weather": f"rain in {city}"}


async def test_a_runner(db: Pool) -> None:
    """An agent with parallel tools, an output key and a rewind: equal events, states and inputs of the model."""
    services = ChatDBSessionService(db), InMemorySessionService()
    outcomes: list[Any] = []
    for service in services:
        model = Weatherman(seen=[])
        agent = LlmAgent(name="reporter", model=model, tools=[weather], output_key="report")
        runner = Runner(agent=agent, app_name="app", session_service=service, auto_create_session=True)
        invocations: list[str] = []
        for city in ("Köln", "Bonn\0", "Ulm"):
            message = types.UserContent(city)
            run = runner.run_async(user_id="alice", session_id="s1", new_message=message)
            invocations.extend([event.invocation_id async for event in run])
        await runner.rewind_async(user_id="alice", session_id="s1", rewind_before_invocation_id=invocations[-1])
        async for _ in runner.run_async(user_id="alice", session_id="s2", new_message=types.UserContent("Rom")):
            pass
        got = [await service.get_session(app_name="app", user_id="alice", session_id=name) for name in ("s1", "s2")]
        sessions = [each for each in got if each]
        events = [list(map(shape, each.events)) for each in sessions]
        outcomes.append((model.seen, [each.state for each in sessions], events))
        await runner.close()
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1][0]["report"] == "It rains."
    assert len(outcomes[0][0]) == 8


def shape(event: Event) -> str:
    """Return an event as text without its ids and times."""
    fields = event.model_dump(exclude={"id", "timestamp", "invocation_id"}, exclude_none=True)
    return re.sub("(adk|e)-?[-0-9a-f]{30,}", "id", str(fields))


# other writers


async def test_a_stale_session(service: ChatDBSessionService, session: Session) -> None:
    """A session to which somebody else has appended is refused, until it is read again."""
    other = await read_session(service)
    assert other is not None
    await service.append_event(other, said("first"))
    with pytest.raises(StaleSessionError, match="modified in storage"):
        await service.append_event(session, changed(x=1))
    assert (session.events, session.state) == ([], {})
    session._storage_update_marker = None
    session.last_update_time = 1
    with pytest.raises(StaleSessionError):
        await service.append_event(session, said("second"))
    other._storage_update_marker = None
    await service.append_event(other, said("second"))
    session._storage_update_marker = None
    session.last_update_time = other.last_update_time  # a session read without events
    await service.append_event(session, said("third"))
    assert await texts(service) == ["first", "second", "third"]


async def test_one_of_two_wins(db: Pool, session: Session) -> None:
    """Of two services that append to one session at the same time, one wins, and the other is told."""
    services = ChatDBSessionService(db), ChatDBSessionService(db)
    for number in range(10):
        held = [await each.get_session(app_name="app", user_id="alice", session_id="s1") for each in services]
        results = await asyncio.gather(
            *(one.append_event(own, said(f"{number}")) for one, own in zip(services, held, strict=True) if own),
            return_exceptions=True,
        )
        assert sorted(type(result).__name__ for result in results) == ["Event", "StaleSessionError"]
    assert await texts(services[0]) == [str(number) for number in range(10)]


async def test_tasks_share_a_session(service: ChatDBSessionService, session: Session) -> None:
    """Tasks that append to one session object take turns, as parallel agents do."""
    await asyncio.gather(*(service.append_event(session, changed(**{f"k{number}": number})) for number in range(20)))
    got = await read_session(service)
    assert got == session
    assert len(got.events) == len(got.state) == 20
    assert not service._locks


async def test_an_edit_is_not_stale(db: Pool, service: ChatDBSessionService, session: Session) -> None:
    """A new title between two appends does not disturb the session; a deleted and created one is stale."""
    await service.append_event(session, said("first"))
    await chatdb.update_conversation(db, user_id="alice", conversation_key=KEY, title="Weather")
    await service.append_event(session, said("second"))
    assert await texts(service) == ["first", "second"]
    await service.delete_session(app_name="app", user_id="alice", session_id="s1")
    with pytest.raises(SessionNotFoundError):
        await service.append_event(session, said("third"))
    session._storage_update_marker = None
    with pytest.raises(SessionNotFoundError):
        await service.append_event(session, said("third"))
    fresh = await service.create_session(app_name="app", user_id="alice", session_id="s1")
    with pytest.raises(StaleSessionError):
        await service.append_event(await stale_copy(db, fresh), said("third"))
    await service.append_event(fresh, said("new"))
    assert await texts(service) == ["new"]


async def stale_copy(db: Pool, session: Session) -> Session:
    """Return a session as it was before its conversation was deleted and created again."""
    held = session.model_copy(deep=True)
    held._storage_update_marker = "1 2 2"
    return held


async def test_events_with_equal_ids(service: ChatDBSessionService, session: Session) -> None:
    """Different events with the same id are all kept, an equal one is not stored again."""
    for text in ("a", "b", "a", "c"):
        await service.append_event(session, said(text, id="fixed", timestamp=1.0))
    assert await texts(service) == ["a", "b", "c"]
    assert len(session.events) == 3


async def test_a_foreign_user(db: Pool, service: ChatDBSessionService, session: Session) -> None:
    """Another user neither sees nor changes a session, nor the user: state, and nobody is the owner of app: state."""
    await service.append_event(session, changed(user__x=1, app__y=2))
    place: dict[str, Any] = {"app_name": "app", "user_id": "mallory"}
    assert await service.get_session(**place, session_id="s1") is None
    assert (await service.list_sessions(**place)).sessions == []
    assert await service.get_user_state(**place) == {}
    await service.delete_session(**place, session_id="s1")
    with pytest.raises(SessionNotFoundError):
        await service.append_event(session.model_copy(update={"user_id": "mallory"}), said())
    created = await service.create_session(**place, session_id="s1")
    assert created.state == {"app:y": 2}
    assert (await read_session(service)) == session
    for call in (
        service.create_session(app_name="app", user_id="google-adk:app"),
        service.get_session(app_name="app", user_id="google-adk:app", session_id="s1"),
        service.list_sessions(app_name="app", user_id="google-adk:app"),
        service.delete_session(app_name="app", user_id="google-adk:app", session_id="s1"),
        service.get_user_state(app_name="app", user_id="google-adk:app"),
        service.append_event(session.model_copy(update={"user_id": "google-adk:app"}), said()),
    ):
        with pytest.raises(chatdb.InvalidInputError, match="reserved for the app: state"):
            await call
    with pytest.raises(chatdb.InvalidInputError, match="across users"):
        await service.list_sessions(app_name="app")


async def test_names(db: Pool, service: ChatDBSessionService) -> None:
    """Apps and ids with colons, spaces, NUL or 1,000 characters are all different; no session has an empty id."""
    names = [("a", "b:c"), ("a:b", "c"), ("a%3Ab", "c"), ("a", "x" * 1000), ("a", "x" * 999), ("a\0", "\0"), ("", "a")]
    for app, name in names:
        await service.create_session(app_name=app, user_id="alice", session_id=f" {name} ", state={"at": [app, name]})
        with pytest.raises(AlreadyExistsError):
            await service.create_session(app_name=app, user_id="alice", session_id=name)
    for app, name in names:
        got = await service.get_session(app_name=app, user_id="alice", session_id=name)
        assert got is not None
        assert (got.app_name, got.id, got.state) == (app, name, {"at": [app, name]})
        listed = (await service.list_sessions(app_name=app, user_id="alice")).sessions
        assert sorted(each.id for each in listed) == sorted(own for owner, own in names if owner == app)
    await service.create_session(app_name="a", user_id="alice", state={"user:x": 1})
    for blank in ("", "  "):
        assert await service.get_session(app_name="a", user_id="alice", session_id=blank) is None
        await service.delete_session(app_name="a", user_id="alice", session_id=blank)
    assert await service.get_user_state(app_name="a", user_id="alice") == {"x": 1}
    assert await chatdb.list_conversations(db, user_id="google-adk:app", archived=None) == []


async def test_shared_states_are_archived(db: Pool, service: ChatDBSessionService, session: Session) -> None:
    """The conversations of the shared states are not in a user's list, and go with the user."""
    await service.append_event(session, changed(user__x=1, app__y=2))
    assert [each.key for each in await chatdb.list_conversations(db, user_id="alice")] == [KEY]
    await chatdb.delete_user(db, user_id="alice")
    assert await service.get_user_state(app_name="app", user_id="alice") == {}
    created = await service.create_session(app_name="app", user_id="alice")
    assert created.state == {"app:y": 2}


async def test_concurrent_changes_of_a_shared_state(db: Pool) -> None:
    """Sessions of several services that change the same shared states lose nothing."""
    services = [ChatDBSessionService(db) for _ in range(3)]

    async def work(number: int) -> None:
        service = services[number % 3]
        session = await service.create_session(app_name="app", user_id="alice", state={f"user:{number}": number})
        await service.append_event(session, changed(**{f"app__{number}": number}))

    await asyncio.gather(*map(work, range(12)))
    (session, *_) = (await ChatDBSessionService(db).list_sessions(app_name="app", user_id="alice")).sessions
    assert session.state == {f"{scope}:{number}": number for scope in ("user", "app") for number in range(12)}


async def test_shared_states_in_any_order(dsn: str) -> None:
    """Events that change the shared states in different orders never wait for each other in a circle."""
    async with chatdb.create_pool(dsn, retries=0) as db:
        service = ChatDBSessionService(db)

        async def work(number: int) -> None:
            session = await service.create_session(app_name="app", user_id="alice", session_id=f"s{number}")
            names = ["user__x", "app__x"][:: 1 - number % 2 * 2]
            for _ in range(10):
                await service.append_event(session, changed(**dict.fromkeys(names, number)))

        await asyncio.gather(*map(work, range(8)))


async def test_another_frameworks_messages(db: Pool, service: ChatDBSessionService, session: Session) -> None:
    """Messages of others are read as text; tool results and empty ones are left out."""
    await service.append_event(session, said("from ADK"))
    others: list[tuple[chatdb.Role, str]]
    others = [("user", "u"), ("assistant", "a"), ("system", "s"), ("tool", "t"), ("assistant", "")]
    for role, content in others:
        metadata = {"framework": "openai-agents"} if role == "assistant" else None
        await chatdb.append_message(
            db, user_id="alice", conversation_key=KEY, role=role, content=content, payload={"x": 1}, metadata=metadata
        )
    got = await read_session(service)
    assert got is not None
    contents = [event.content or types.Content() for event in got.events]
    assert [
        (event.author, content.role, (content.parts or [types.Part()])[0].text)
        for event, content in zip(got.events, contents, strict=True)
    ] == [
        ("user", "user", "from ADK"),
        ("user", "user", "u"),
        ("assistant", "model", "a"),
        ("system", "user", "s"),
    ]
    again = await read_session(service)
    assert again == got
    await service.append_event(got, said("more"))
    plain = ChatDBSessionService(db, prefix="")
    await chatdb.create_conversation(db, user_id="alice", key="app:mine")
    listed = await plain.list_sessions(app_name="app", user_id="alice")
    assert [each.id for each in listed.sessions] == ["mine"]


# lost answers and cancellation


@pytest.mark.parametrize("what", ["create_conversation_keyed", "append_message_conditional", "upsert_conversation"])
@pytest.mark.parametrize("answered", [False, True], ids=["request lost", "answer lost"])
async def test_a_lost_connection(dsn: str, db: Pool, what: str, *, answered: bool) -> None:
    """A statement that is lost, or whose answer is, is repeated without doubling anything."""
    lost: list[str] = []

    def watch(statement: Statement) -> bool:
        if f"chatdb.{what} " in statement.sql and statement.answered == answered and not lost:
            lost.append(statement.sql)
            return True
        return False

    await ChatDBSessionService(db).create_session(app_name="app", user_id="alice", state={"user:y": 1})
    with Proxy(dsn, watch=watch) as proxy:
        async with chatdb.create_pool(proxy.dsn, min_size=1, max_size=1) as far:
            service = ChatDBSessionService(far)
            session = await service.create_session(
                app_name="app", user_id="alice", session_id="s1", state={"user:x": 1}
            )
            await service.append_event(session, changed(z=1))
            await service.append_event(session, said("twice"))
    assert lost
    got = await read_session(ChatDBSessionService(db))
    assert got == session
    assert got.state == {"user:x": 1, "user:y": 1, "z": 1}
    assert len(got.events) == 2


@pytest.mark.parametrize("answered", [False, True], ids=["request lost", "answer lost"])
async def test_a_lost_commit(dsn: str, db: Pool, *, answered: bool) -> None:
    """A transaction whose COMMIT is lost runs again without doubling anything, even events with equal ids."""
    lost: list[str] = []
    places = [1]

    def watch(statement: Statement) -> bool:
        if statement.sql.lower().startswith("commit") and statement.answered == answered:
            lost.append(statement.sql)
            return len(lost) in places
        return False

    with Proxy(dsn, watch=watch) as proxy:
        async with chatdb.create_pool(proxy.dsn, min_size=1, max_size=1) as far:
            service = ChatDBSessionService(far)
            session = await service.create_session(
                app_name="app", user_id="alice", session_id="s1", state={"user:x": 1}
            )
            event = said("first", id="fixed", actions=EventActions(state_delta={"app:y": 1}))
            await service.append_event(session, event)
            places.append(len(lost) + 1)
            session._storage_update_marker = None
            event = said("second", id="fixed", actions=EventActions(state_delta={"app:z": 2}))
            await service.append_event(session, event)
            await service.append_event(session, said("third"))
    assert len(lost) == 5
    got = await read_session(ChatDBSessionService(db))
    assert got == session
    assert got.state == {"user:x": 1, "app:y": 1, "app:z": 2}
    assert len(got.events) == 3


async def test_cancellation(dsn: str) -> None:
    """A cancelled append is waited for: the session object and the stored session agree."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, min_size=1, max_size=2) as db:
            service = ChatDBSessionService(db)
            session = await service.create_session(app_name="app", user_id="alice", session_id="s1")
            await service.append_event(session, said("0"))
            for number in range(1, 6):
                proxy.pause()
                task = asyncio.create_task(service.append_event(session, said(str(number))))
                await asyncio.sleep(0.02)
                task.cancel()
                await asyncio.sleep(0.02)
                task.cancel()
                assert not task.done()
                proxy.resume()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await texts(service) == [str(number) for number in range(6)]
            got = await read_session(service)
            assert got == session


# row-level security


@pytest.fixture
def protected_dsn(databases: Databases, roles: Roles) -> Iterator[str]:
    """Yield a service's DSN behind `chatdb protect`."""
    with cloned(databases, roles) as dsn:
        protect_tables(as_role(dsn, roles.owner))
        yield as_role(dsn, roles.app)


@pytest.fixture
async def protected(protected_dsn: str) -> AsyncIterator[Pool]:
    """Yield a service's pool behind `chatdb protect`."""
    async with chatdb.create_pool(protected_dsn, row_level_security=True) as db:
        yield db


async def test_behind_row_level_security(protected: Pool) -> None:
    """A service behind row-level security changes no code."""
    twins = Twins(ChatDBSessionService(protected), 7)
    for _ in range(60):
        await twins.step()
    await check_large_shared_states(ChatDBSessionService(protected))


async def test_on_a_connection_of_the_user(protected: Pool) -> None:
    """In a transaction of the user, the app: state is refused, and not missing."""
    await ChatDBSessionService(protected).create_session(app_name="app", user_id="alice", state={"app:x": 1})
    async with chatdb.transaction(protected, user_id="alice") as connection:
        service = ChatDBSessionService(connection)
        with pytest.raises(chatdb.ConfigurationError, match="names another user"):
            await service.create_session(app_name="app", user_id="alice")
    async with chatdb.transaction(protected, user_id="alice") as connection:
        await ChatDBSessionService(connection, shared_states=()).create_session(app_name="app", user_id="alice")


async def test_round_trips_behind_row_level_security(protected_dsn: str) -> None:
    """A change of the app: state names each user in a savepoint."""
    with Proxy(protected_dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1, row_level_security=True) as db:
            service = ChatDBSessionService(db)
            session = await service.create_session(app_name="app", user_id="alice")
            counts: list[int] = []
            states: tuple[dict[str, int], ...] = ({}, {"user:x": 1}, {"user:x": 1, "app:x": 1})
            for state in states * 3:
                before = proxy.round_trips
                await service.append_event(session, changed(**state))
                counts.append(proxy.round_trips - before)
            assert counts[-3:] == [3, 4, 17]


# import of google-adk's own tables


@asynccontextmanager
async def database_service(dsn: str) -> AsyncGenerator[DatabaseSessionService]:
    """Yield ADK's own service, which creates its tables."""
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(**connect_arguments(dsn)), poolclass=NullPool
    )
    yield DatabaseSessionService(db_engine=engine)
    await engine.dispose()


def read(dsn: str, chosen: str = "auto", **options: Any) -> list[Any]:
    """Return all items read from a database."""
    with closing(tables.read(dsn, chosen, **options)) as items:
        return list(items)


async def import_all(db: Pool, dsn: str, user: str = "alice", **options: Any) -> ImportReport:
    """Import everything of a user."""
    with closing(tables.read(dsn, user=user, **options)) as items:
        return await import_conversations(db, user_id=user, items=items)


STORABLE = [event for event in EVENTS if "\\x00" not in (text := repr(event)) and "\\ud83d" not in text]
"""Events that ADK's own service can store."""


async def fill(service: BaseSessionService) -> None:
    """Store two sessions of Alice, with all states, and one of Bob."""
    started = [
        await service.create_session(
            app_name="app", user_id=user, session_id=name, state={"x": [1], "user:x": user, f"app:{user}": 1}
        )
        for user, name in (("alice", "s1"), ("alice", "empty"), ("bob", "s1"))
    ]
    for number, event in enumerate(STORABLE):
        await service.append_event(started[0], event.model_copy(deep=True, update={"timestamp": 1000.0 + number}))
    await service.append_event(started[0], changed(y={"b": None}, user__y=2))
    await service.append_event(started[2], said("of Bob"))


async def views_of(*services: BaseSessionService) -> list[Any]:
    """Return what each service has, without its own marks."""
    views: list[Any] = []
    for service in services:
        listed = [await service.list_sessions(app_name="app", user_id=user) for user in ("alice", "bob")]
        sessions = [each for users in listed for each in users.sessions]
        got = [await service.get_session(app_name="app", user_id=each.user_id, session_id=each.id) for each in sessions]
        views.append([each.model_dump() for each in got if each])
    return views


async def test_moving_over(db: Pool, dsn: str, empty_dsn: str, service: ChatDBSessionService) -> None:
    """After an import, the adapter has what ADK's own service has, and another import adds nothing."""
    async with database_service(empty_dsn) as before:
        await fill(before)
        report = await import_all(db, empty_dsn)
        assert (report.conversations, report.messages, report.skipped) == (3, len(STORABLE) + 1, {})
        assert (await import_all(db, empty_dsn, "bob")).conversations == 2
        assert (await import_all(db, empty_dsn, google_adk.APP_OWNER)).conversations == 1
        ours, theirs = await views_of(service, before)
        in_order = [sorted(sessions, key=lambda each: (each["user_id"], each["id"])) for sessions in (ours, theirs)]
        for our, their in zip(*in_order, strict=True):
            # a column keeps microseconds
            assert our == their | {"last_update_time": pytest.approx(their["last_update_time"], abs=1e-5)}
        assert ours[1]["id"] == "s1"
        assert ours[1]["state"] == {
            "x": [1], "y": {"b": None}, "user:x": "alice", "user:y": 2, "app:alice": 1, "app:bob": 1
        }  # fmt: skip
        assert len(await chatdb.list_conversations(db, user_id="alice")) == 2

        again = await import_all(db, empty_dsn)
        assert (again.conversations, again.messages, again.stored_conversations) == (0, 0, 3)
        late = await before.get_session(app_name="app", user_id="bob", session_id="s1")
        assert late is not None
        await before.append_event(late, said("late"))
        assert (await import_all(db, empty_dsn, "bob")).messages == 1
    session = await read_session(service)
    assert session is not None
    await service.append_event(session, changed(x=3))
    for user in ("alice", "bob", google_adk.APP_OWNER):
        report = await import_all(db, empty_dsn, user)
        assert (report.conversations, report.messages, report.skipped) == (0, 0, {})
    assert await read_session(service) == session


async def test_a_user_of_the_owners_name(db: Pool, empty_dsn: str) -> None:
    """The state of a user who has the name of the app: state's owner does not become that of all users."""
    async with database_service(empty_dsn) as before:
        await before.create_session(app_name="app", user_id=google_adk.APP_OWNER, state={"user:x": "mine"})
    with pytest.raises(chatdb.InvalidInputError, match="rename that user"):
        await import_all(db, empty_dsn, google_adk.APP_OWNER)


async def test_an_imported_event_equals_a_stored_one(
    db: Pool, empty_dsn: str, service: ChatDBSessionService, session: Session
) -> None:
    """The adapter and the import make equal messages of an event."""
    async with database_service(empty_dsn) as before:
        other = await before.create_session(app_name="app", user_id="alice", session_id="s2")
        for number, event in enumerate(STORABLE):
            for each, target in ((service, session), (before, other)):
                await each.append_event(target, event.model_copy(deep=True, update={"timestamp": float(number)}))
    await import_all(db, empty_dsn)
    stored, imported = [
        await chatdb.get_history(db, user_id="alice", conversation_key=f"google-adk:app:{name}")
        for name in ("s1", "s2")
    ]
    assert len(stored) == len(imported) == len(STORABLE)
    for one, other_one in zip(stored, imported, strict=True):
        for name in ("role", "content", "metadata", "key", "seq", "token_count"):
            assert getattr(one, name) == getattr(other_one, name)
        assert one.payload is not None
        assert other_one.payload is not None
        assert one.payload.parsed() == other_one.payload.parsed()


async def test_which_tables(empty_dsn: str) -> None:
    """The tables are detected; the user is needed; an older schema, and a choice between frameworks, are errors."""
    with pytest.raises(chatdb.InvalidInputError, match=r"looked for .*adk_internal_metadata"):
        read(empty_dsn, "google-adk", user="alice")
    async with database_service(empty_dsn) as before:
        await fill(before)
    with pytest.raises(chatdb.InvalidInputError, match="user: is needed"):
        read(empty_dsn)
    with pytest.raises(chatdb.InvalidInputError, match="table: applies only to langchain: google-adk has"):
        read(empty_dsn, "google-adk", table="events", user="alice")
    assert read(empty_dsn, user="nobody") == []
    chosen = read(empty_dsn, user="alice", sessions=["empty", "missing"])
    assert [type(item).__name__ for item in chosen] == ["SourceConversation", "Skipped"]
    execute(empty_dsn, "create table agent_sessions (x int)", "create table agent_messages (x int)")
    with pytest.raises(chatdb.InvalidInputError, match=r"among agent_messages, adk_internal_metadata$"):
        read(empty_dsn, user="alice")
    assert len(read(empty_dsn, "google-adk", user="bob")) == 3
    execute(empty_dsn, "update adk_internal_metadata set value = '0'")
    with pytest.raises(chatdb.InvalidInputError, match="does not have google-adk's schema 1"):
        read(empty_dsn, "google-adk", user="alice")


async def test_what_cannot_be_imported(db: Pool, empty_dsn: str) -> None:
    """A state that is too large is reported; an event without data keeps its id and time."""
    async with database_service(empty_dsn) as before:
        await fill(before)
    large = "jsonb_build_object('x', repeat('a', 1100000))"
    execute(
        empty_dsn,
        f"update user_states set state = {large} where user_id = 'alice'",
        f"update sessions set state = {large} where id = 'empty'",
        "update events set event_data = null where user_id = 'bob'",
    )
    report = await import_all(db, empty_dsn)
    assert report.skipped == {"state larger than 1 MiB": (2, 0)}
    assert report.conversations == 1
    await import_all(db, empty_dsn, "bob")
    (stored,) = await chatdb.get_history(db, user_id="bob", conversation_key=KEY)
    assert stored.payload is not None
    assert set(json.loads(stored.payload)) == {"id", "timestamp", "invocation_id"}
    async with database_service(empty_dsn) as before:
        ours, theirs = [
            await each.get_session(app_name="app", user_id="bob", session_id="s1")
            for each in (ChatDBSessionService(db), before)
        ]
    assert ours is not None
    assert theirs is not None
    assert ours.events == theirs.events


def test_names_of_formats() -> None:
    """A name in the metadata that is not that of the key's hash is no session of the app."""
    long = "x" * 300
    metadata = google_adk.session_metadata("app", long, {})
    key = "p:" + google_adk.session_name("app", long)
    assert google_adk.session_id_of(key, metadata, "p:", "app") == long
    for other in (
        google_adk.session_id_of(key, metadata, "p:", "other"),
        google_adk.session_id_of(key, None, "p:", "app"),
        google_adk.session_id_of("p:sha256-0", metadata, "p:", "app"),
        google_adk.session_id_of(key, metadata, "q:", "app"),
        google_adk.session_id_of(None, metadata, "p:", "app"),
    ):
        assert other is None


# the page


PAGE = (ROOT / "docs" / "adapters" / "google-adk.md").read_text(encoding="utf-8")


async def test_the_page(
    dsn: str, empty_dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's programs print what the agent said, and its imports work."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    scope = {
        "agent": LlmAgent(name="reporter", model=Weatherman(seen=[]), tools=[weather]),
        "message": types.UserContent("Ulm"),
    }
    first, second, third = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for code in (first, second):
        body = compile(code, "google-adk.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        await eval(body, scope)
    exec(third, scope)
    assert capsys.readouterr().out.splitlines()[-2:] == ["rain in Ulm", "assistant It rains."]
    async with database_service(empty_dsn) as before:
        await fill(before)
    *_, commands = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        arguments = line.replace("postgresql://localhost/adk", empty_dsn).split()[1:]
        done = await asyncio.create_subprocess_exec(PROGRAM, *arguments, stdout=asyncio.subprocess.PIPE)
        assert (await done.communicate())[0].startswith(b"imported ")
    async with chatdb.create_pool(dsn) as db:
        assert (await read_session(ChatDBSessionService(db))).state["app:bob"] == 1
