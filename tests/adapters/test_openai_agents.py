"""openai-agents on ChatDBSession: everything that SQLiteSession gives it, in one round trip each."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from typing import Any

import agents
import asyncpg
import httpx
import openai
import pytest
from agents import Agent, RunConfig, RunContextWrapper, Runner, SessionSettings, SQLiteSession, Usage
from agents.extensions.memory import EncryptedSession
from agents.items import ModelResponse
from agents.memory import OpenAIResponsesCompactionSession, Session
from agents.models.interface import Model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
)

import chatdb
from chatdb.adapters.openai_agents import ChatDBSession
from chatdb.admin.row_security import protect_tables
from chatdb.pool import Pool
from chatdb.testing.databases import Databases
from chatdb.transfer import tables
from chatdb.transfer.importer import import_conversations
from tests.support.command import chatdb_process
from tests.support.databases import as_role, cloned
from tests.support.frameworks import agent_session
from tests.support.paths import ROOT
from tests.support.proxy import Proxy, Statement
from tests.support.roles import Roles

USER = "alice"
KEY = "openai-agents:s1"


def session_of(db: Any, name: str = "s1", **options: Any) -> ChatDBSession:
    """Return a session of alice's."""
    return ChatDBSession(name, db=db, **({"user_id": USER} | options))


def said(*words: str) -> list[Any]:
    """Return items of a user."""
    return [{"role": "user", "content": word} for word in words]


async def stored(db: Pool, key: str = KEY, user: str = USER) -> list[chatdb.Message]:
    """Return the messages of a conversation."""
    return await chatdb.get_history(db, user_id=user, conversation_key=key, limit=10_000)


NASTY: list[Any] = [
    {"role": "user", "content": "nul \0 and half \ud83d and é 🌧"},
    {"z": 1, "a": {"y": [1.0, 1, -0.0, 1e300, 10**40, True, None]}, "role": "user", "content": ""},
    {"type": "message", "role": "assistant", "id": "__fake_id__", "content": [{"type": "output_text", "text": "a"}]},
    {"type": "function_call", "call_id": "c1", "name": "\0", "arguments": '{"city": "K\\u00f6ln"}'},
    {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "x"}]},
    {"type": "of a newer version", "unknown": {"": ""}},
    {"__enc__": 1, "v": 1, "kid": "k", "payload": "x"},
    {"role": "wizard", "content": {"not": "a list"}},
    {"type": ["list"], "name": 7},
    {},
]
"""Items that must come out as they went in."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
WORDS = st.sampled_from(["user", "assistant", "message", "function_call", "reasoning", "tool"])
ITEMS = st.dictionaries(
    st.sampled_from(["role", "type", "content", "summary", "output", "name", "__enc__"]) | st.text(max_size=3),
    WORDS | JSON,
    max_size=5,
)


async def test_nasty_items_come_back(db: Pool) -> None:
    """Equal objects with equal JSON come back, in order, whatever the limit."""
    session = session_of(db)
    await session.add_items(NASTY[:4])
    await session.add_items(NASTY[4:])
    for limit in (None, -1, 1, 3, len(NASTY), 2_147_483_647):
        wanted = NASTY if limit in (None, -1) else NASTY[-limit:]
        assert json.dumps(await session.get_items(limit)) == json.dumps(wanted)
    assert await session.get_items(0) == []
    popped = [await session.pop_item() for _ in NASTY]
    assert json.dumps(popped[::-1]) == json.dumps(NASTY)
    assert await session.pop_item() is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(ITEMS, max_size=4))
async def test_any_json_comes_back(tx: asyncpg.Connection, items: list[Any]) -> None:
    """Any JSON objects come back as they went in."""
    session = session_of(tx)
    await session.clear_session()
    await session.add_items(items)
    assert json.dumps(await session.get_items()) == json.dumps(items)


async def test_what_is_stored(db: Pool) -> None:
    """A message has what a person would read, the item as payload, and the framework's mark."""
    await session_of(db).add_items(NASTY[:5])
    first, *_, call, result = await stored(db)
    assert (first.role, first.content) == ("user", "nul \ufffd and half \ufffd and é 🌧")
    assert first.payload == json.dumps(NASTY[0], separators=(",", ":"))
    assert first.metadata == {"framework": "openai-agents"}
    assert (call.role, call.content) == ("assistant", "")
    assert call.metadata == {"framework": "openai-agents", "type": "function_call", "name": "\ufffd"}
    assert (result.role, result.content) == ("tool", "x")


async def test_a_long_text(db: Pool) -> None:
    """The content is cut at 4 MiB; the item comes back whole."""
    items = said("é" * 2_500_000)
    await session_of(db).add_items(items)
    [message] = await stored(db)
    assert message.content == "é" * (2 * 1024 * 1024)
    assert await session_of(db).get_items() == items


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("text", r"items\[1\]: must be a dict, not str"),
        ({"x": object()}, r"items\[1\]: is not JSON"),
        ({"x": float("nan")}, r"items\[1\]: is not JSON"),
        ({"x": "x" * 16 * 1024 * 1024}, "16 MiB"),
    ],
)
async def test_what_cannot_be_stored(db: Pool, item: Any, problem: str) -> None:
    """Items that are not JSON objects, or too large, are refused, and nothing is stored."""
    session = session_of(db)
    with pytest.raises(chatdb.InvalidInputError, match=problem):
        await session.add_items([*said("before"), item])
    assert await session.get_items() == []


def test_wrong_arguments() -> None:
    """A session needs an id, and a prefix that leaves room for it."""
    with pytest.raises(chatdb.InvalidInputError, match="session_id: must be a str"):
        session_of(None, "")
    with pytest.raises(chatdb.InvalidInputError, match="prefix: must have at most"):
        session_of(None, prefix="x" * 56)


async def test_keys(db: Pool) -> None:
    """Two frameworks' sessions of one name are two conversations; without a prefix they are one."""
    await session_of(db).add_items(said("a"))
    await session_of(db, prefix="").add_items(said("b"))
    assert [m.content for m in await stored(db, "s1")] == ["b"]
    assert [m.content for m in await stored(db)] == ["a"]


@pytest.mark.parametrize("name", ["x" * 201, "x" * 100_000, "nul \0", "half \ud83d"])
async def test_long_ids(db: Pool, name: str) -> None:
    """An id that does not fit into a key is hashed, and kept in the metadata."""
    session = session_of(db, name)
    await session.add_items(said("a"))
    await session.add_items(said("b"))
    assert await session.get_items() == said("a", "b")
    assert await session_of(db, name + "x").get_items() == []
    [conversation] = await chatdb.list_conversations(db, user_id=USER)
    assert conversation.metadata == {"openai-agents-id": json.dumps(name[:10_000])}
    await session.clear_session()
    assert await session.get_items() == []


async def test_messages_of_others(db: Pool) -> None:
    """A message of another framework, or of chatdb's own functions, is read as text; tool results are left out."""
    session = session_of(db)
    await session.add_items(said("mine"))
    address: dict[str, Any] = {"user_id": USER, "conversation_key": KEY}
    for role in ("user", "assistant", "system", "developer", "tool"):
        other = {"framework": "chatkit"}
        await chatdb.append_message(db, **address, role=role, content=role, payload={"x": 1}, metadata=other)
    for _ in range(150):
        await chatdb.append_message(db, **address, role="assistant", content="")
    roles = ("user", "assistant", "system", "developer")
    items: list[Any] = said("mine") + [{"role": role, "content": role} for role in roles]
    assert await session.get_items() == items
    for limit in range(1, 7):
        assert await session.get_items(limit) == items[-limit:]
    assert await session.pop_item() == items[-1]
    assert await session.get_items() == items[:-1]


async def test_the_current_line(db: Pool) -> None:
    """A session reads and pops the line that a user interface has selected."""
    session = session_of(db)
    await session.add_items(said("a", "b", "c"))
    address: dict[str, Any] = {"user_id": USER, "conversation_key": KEY}
    await chatdb.append_message(db, **address, role="user", content="B", parent_seq=1)
    await session.add_items(said("D"))
    assert await session.get_items() == said("a", "B", "D")
    await chatdb.switch_branch(db, **address, seq=2)
    assert await session.get_items() == said("a", "b", "c")
    assert await session.pop_item() == said("c")[0]


async def test_next_to_sqlite(db: Pool) -> None:
    """Random operations on two sessions have the results that SQLiteSession gives."""
    await _play_randomly(db, seed=20, operations=400)


async def _play_randomly(db: Pool, seed: int, operations: int) -> None:
    chance = random.Random(seed)
    pairs = [(session_of(db, name), SQLiteSession(name)) for name in ("s1", "s2")]
    for number in range(operations):
        name = chance.choice(["add", "add", "get", "get", "limit", "pop", "pop", "clear" if number % 7 == 0 else "get"])
        ours, theirs = chance.choice(pairs)
        if chance.random() < 0.3:
            ours = session_of(db, ours.session_id, session_settings=ours.session_settings)  # another instance
            pairs[[pair[1] for pair in pairs].index(theirs)] = (ours, theirs)
        items = copy.deepcopy(chance.choices(NASTY, k=chance.randrange(4)))
        limit = chance.choice([None, None, 0, 1, 2, 5, -1])

        async def call(session: Any, name: str = name, items: list[Any] = items, limit: int | None = limit) -> Any:
            if name == "add":
                return await session.add_items(items)
            if name == "get":
                return await session.get_items(limit)
            if name == "limit":
                session.session_settings = SessionSettings(limit=limit)
                return await session.get_items()
            return await (session.pop_item() if name == "pop" else session.clear_session())

        assert json.dumps(await call(ours)) == json.dumps(await call(theirs)), (number, name)
    for _, theirs in pairs:
        theirs.close()


@pytest.mark.parametrize("given_settings", [None, {"limit": 2}, SessionSettings(limit=2)])
async def test_settings(db: Pool, given_settings: Any) -> None:
    """The settings' limit holds unless a call names its own."""
    session = session_of(db, session_settings=given_settings)
    theirs = SQLiteSession("s1", session_settings=given_settings)
    assert session.session_settings == theirs.session_settings
    theirs.close()
    await session.add_items(said("a", "b", "c"))
    assert await session.get_items() == said("a", "b", "c")[-2 if given_settings else 0 :]
    assert await session.get_items(limit=3) == said("a", "b", "c")
    assert isinstance(session, Session)


async def test_more_than_a_page(db: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More items than a page or a batch of chatdb's are stored in one transaction and read in pages."""
    monkeypatch.setattr("chatdb.adapters._pages.PAGE", 100)
    session = session_of(db)
    items = said(*map(str, range(201)))
    await session.add_items(items)
    assert await session.get_items() == items
    for limit in (99, 100, 101, 200, 201, 202, 2_147_483_647):
        assert await session.get_items(limit) == items[-limit:]
    with pytest.raises(chatdb.InvalidInputError):
        await session.add_items([*items, {"x": "x" * 16 * 1024 * 1024}])
    assert await session.get_items() == items


async def test_more_than_a_batch_of_bytes(db: Pool) -> None:
    """Items of more than 64 MiB together are stored."""
    session = session_of(db)
    large = said(*("x" * 4_000_000 for _ in range(9)))
    await session.add_items(large)
    assert await session.get_items() == large


class ScriptedModel(Model):
    """A model that answers with one list of outputs after the other, or raises, and keeps its inputs."""

    def __init__(self, *turns: Any) -> None:
        self.turns = list(turns)
        self.inputs: list[Any] = []

    async def _answer(self, given: Any) -> list[Any]:
        self.inputs.append(copy.deepcopy(given))
        turn = self.turns.pop(0)
        if isinstance(turn, Exception):
            raise turn
        if callable(turn):
            turn = await turn()
        return list(turn)

    async def get_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> ModelResponse:  # noqa: A002
        """Return the next answer."""
        return ModelResponse(output=await self._answer(input), usage=Usage(), response_id=None)

    async def stream_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:  # noqa: A002
        """Stream the next answer as one event."""
        response = Response(
            id="r",
            created_at=0,
            model="m",
            object="response",
            output=await self._answer(input),
            parallel_tool_calls=True,
            tool_choice="auto",
            tools=[],
        )
        yield ResponseCompletedEvent(type="response.completed", sequence_number=0, response=response)


def text(words: str) -> ResponseOutputMessage:
    """Return a model's answer; each has the same id, as Chat Completions give them."""
    parts: list[Any] = [ResponseOutputText(type="output_text", text=words, annotations=[])]
    return ResponseOutputMessage(id="__fake_id__", type="message", role="assistant", status="completed", content=parts)


def call(name: str, call_id: str, /, **arguments: Any) -> ResponseFunctionToolCall:
    """Return a model's call of a tool."""
    return ResponseFunctionToolCall(
        type="function_call", name=name, call_id=call_id, id="__fake_id__", arguments=json.dumps(arguments)
    )


def thought(words: str) -> ResponseReasoningItem:
    """Return a model's reasoning."""
    return ResponseReasoningItem.model_validate(
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": words}]}
    )


@agents.function_tool
def weather(city: str) -> str:
    """Return the weather."""
    return f"rain in {city} \0"


@agents.function_tool
def broken() -> str:
    """Raise an error."""
    raise ValueError("broken")


@agents.function_tool(needs_approval=True)
def delete(name: str) -> str:
    """Need an approval."""
    return f"deleted {name}"


class Play:
    """The run of a scenario on one session: what the models were asked, and what was stored at each step."""

    def __init__(self, session: Any, *, is_streamed: bool) -> None:
        self.session, self.is_streamed = session, is_streamed
        self.seen: list[Any] = []
        self.models: list[ScriptedModel] = []

    def agent(self, *turns: Any, **options: Any) -> Agent[Any]:
        """Return an agent with a model of its own."""
        model = ScriptedModel(*(self._watched(turn) for turn in turns))
        self.models.append(model)
        return Agent(name=options.pop("name", "a"), model=model, tools=[weather, broken, delete], **options)

    def _watched(self, turn: Any) -> Any:
        """Note what is stored when the model is asked."""
        if isinstance(turn, Exception):
            return turn

        async def answer() -> Any:
            await self.note()
            return await turn() if callable(turn) else turn

        return answer

    async def note(self) -> None:
        """Note what is stored."""
        self.seen.append(json.loads(json.dumps(await self.session.get_items(1_000))))

    async def run(self, agent: Agent[Any], given: Any, **options: Any) -> Any:
        """Run an agent and note the outcome."""
        result = None
        try:
            if self.is_streamed:
                result = Runner.run_streamed(agent, given, session=self.session, **options)
                async for _ in result.stream_events():
                    pass
            else:
                result = await Runner.run(agent, given, session=self.session, **options)
            self.seen.append(str(result.final_output))
        except (agents.AgentsException, openai.OpenAIError, RuntimeError) as error:
            self.seen.append(type(error).__name__)
        await self.note()
        return result

    def told(self) -> Any:
        """Return everything noted, as JSON."""
        return json.loads(json.dumps([self.seen, [model.inputs for model in self.models]]))


async def tools_in_parallel(play: Play) -> None:
    """Play a turn with reasoning and parallel calls, one of which fails, then two more turns."""
    agent = play.agent(
        [thought("hm"), call("weather", "c1", city="Köln"), call("weather", "c2", city="Bonn"), call("broken", "c3")],
        [text("It rains.")],
        [text("Still.")],
        [call("weather", "c4", city="Ulm")],
        [text("Also.")],
    )
    await play.run(agent, "And the weather?")
    await play.run(agent, "And now?")
    await play.run(agent, [{"role": "user", "content": [{"type": "input_text", "text": "And Ulm?"}]}])


async def handoff(play: Play) -> None:
    """Hand off to another agent, with the history nested or not."""
    for nested in (False, True):
        expert = play.agent([call("weather", "c2", city="Bonn")], [text("I know.")], name="expert")
        first = play.agent([text("Ask."), call("transfer_to_expert", "c1")], handoffs=[expert])
        await play.run(first, "Who knows?", run_config=RunConfig(nest_handoff_history=nested))


async def guardrails(play: Play) -> None:
    """Guardrails that refuse the input, at once and late, or the output; the session goes on afterwards."""

    @agents.input_guardrail
    async def refuse(context: Any, agent: Any, given: Any) -> agents.GuardrailFunctionOutput:
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered="bad" in str(given))

    @agents.output_guardrail
    async def refuse_output(context: Any, agent: Any, output: Any) -> agents.GuardrailFunctionOutput:
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered="secret" in str(output))

    options = {"input_guardrails": [refuse], "output_guardrails": [refuse_output]}
    await play.run(play.agent([text("one")], **options), "good")
    blocking = agents.InputGuardrail(guardrail_function=refuse.guardrail_function, run_in_parallel=False)
    await play.run(play.agent([text("two")], input_guardrails=[blocking]), "bad")
    await play.run(play.agent([text("a secret")], **options), "tell")
    await play.run(play.agent([text("four")], **options), "good again")


async def limits(play: Play) -> None:
    """Set limits of the session and of the run, which cut a tool's result off from its call."""
    play.session.session_settings = SessionSettings(limit=3)
    agent = play.agent([call("weather", "c1", city="Köln")], [text("one")], [text("two")], [text("three")])
    await play.run(agent, "a")
    await play.run(agent, "b")
    await play.run(agent, "c", run_config=RunConfig(session_settings=SessionSettings(limit=2)))


async def callback(play: Play) -> None:
    """Let a callback choose from the history."""
    agent = play.agent([text("one")], [text("two")], [text("three")])
    await play.run(agent, "a")

    def merge(history: list[Any], new: list[Any]) -> list[Any]:
        return [*history[-1:], {"role": "user", "content": "between"}, *new]

    await play.run(agent, said("b"), run_config=RunConfig(session_input_callback=merge))
    await play.run(agent, "c")


async def approval(play: Play) -> None:
    """Let a call wait for an approval, resumed from the state as JSON, approved and rejected."""
    for number, approve in enumerate((True, False)):
        agent = play.agent(
            [call("delete", f"c{number}", name="x"), call("weather", f"d{number}", city="Ulm")], [text("ok")]
        )
        result = await play.run(agent, "delete x")
        state = await agents.RunState.from_json(agent, result.to_state().to_json())
        [interruption] = state.get_interruptions()
        (state.approve if approve else state.reject)(interruption)
        await play.run(agent, state)


async def failures(play: Play) -> None:
    """Let the model fail, at once and after a tool, and take too many turns; the next turn continues."""
    agent = play.agent(
        RuntimeError("down"),
        [call("weather", "c1", city="Ulm")],
        RuntimeError("down"),
        [call("weather", "c2", city="Ulm")],
        [text("back")],
    )
    await play.run(agent, "a")
    await play.run(agent, "b")
    await play.run(agent, "c", max_turns=1)
    await play.run(agent, "d")


async def rewind(play: Play) -> None:
    """Meet a locked conversation, for which the runner takes its items back before it tries again."""
    answer = httpx.Response(400, request=httpx.Request("POST", "http://model"))
    locked = openai.BadRequestError("locked", response=answer, body={"code": "conversation_locked"})
    agent = play.agent([text("zero")], locked, [call("weather", "c1", city="Ulm")], locked, [text("two")])
    await play.run(agent, "same")
    await play.run(agent, "same")
    assert len(play.models[-1].inputs) == 5


SCENARIOS = [tools_in_parallel, handoff, guardrails, limits, callback, approval, failures, rewind]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["run", "streamed"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_agents(db: Pool, scenario: Callable[[Play], Awaitable[None]], is_streamed: bool) -> None:
    """Items and the inputs of models are those of SQLiteSession at every step."""
    with closing(SQLiteSession("s1")) as theirs:
        expected, actual = Play(theirs, is_streamed=is_streamed), Play(session_of(db), is_streamed=is_streamed)
        await scenario(expected)
        await scenario(actual)
    assert actual.told() == expected.told()
    assert len(expected.seen) > 3
    assert expected.seen[-1]


async def test_a_cancelled_stream(db: Pool) -> None:
    """A stream that is cancelled, at once or after the turn, leaves what SQLiteSession keeps."""

    async def play(play: Play, mode: Any) -> None:
        agent = play.agent([call("weather", "c1", city="Ulm")], [text("one")], [text("two")])
        result = Runner.run_streamed(agent, "a", session=play.session)
        async for event in result.stream_events():
            if event.type == "run_item_stream_event":
                result.cancel(mode)
        await play.note()
        await play.run(agent, "b")

    for mode in ("immediate", "after_turn"):
        with closing(SQLiteSession(mode)) as theirs:
            expected, actual = Play(theirs, is_streamed=True), Play(session_of(db, mode), is_streamed=True)
            await play(expected, mode)
            await play(actual, mode)
        assert actual.told() == expected.told()


async def test_a_cancelled_run(db: Pool) -> None:
    """A run that is cancelled while the model or a tool works leaves what SQLiteSession keeps."""

    async def play(play: Play, place: str) -> None:
        working = asyncio.Event()

        async def work() -> Any:
            working.set()
            await asyncio.sleep(60)

        tool = agents.function_tool(work, name_override="work")
        agent = play.agent([call("work", "c1")] if place == "tool" else work, [text("after")])
        agent.tools.append(tool)
        run = asyncio.create_task(Runner.run(agent, "a", session=play.session))
        await working.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await play.note()
        await play.run(agent, "b")

    for place in ("model", "tool"):
        with closing(SQLiteSession(place)) as theirs:
            expected, actual = Play(theirs, is_streamed=False), Play(session_of(db, place), is_streamed=False)
            await play(expected, place)
            await play(actual, place)
        assert actual.told() == expected.told()


async def test_the_context_names_the_user(db: Pool) -> None:
    """With a function as user_id, each run is of the user that its context names."""

    def user_of(context: Any) -> str:
        return str(context["user"])

    play = Play(session_of(db, user_id=user_of), is_streamed=False)
    play.note = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    for number, user in enumerate(("alice", "bob", "alice")):
        agent = play.agent([call("weather", f"c{number}", city="Ulm")], [text(user)])
        await play.run(agent, f"I am {user}", context={"user": user})
    assert [m.content for m in await stored(db) if m.content and m.role != "tool"] == ["I am alice", "alice"] * 2
    assert [m.content for m in await stored(db, user="bob") if m.content and m.role != "tool"] == ["I am bob", "bob"]
    context = RunContextWrapper({"user": "bob"})
    assert len(await play.session.get_items(wrapper=context)) == 4
    await play.session.add_items(said("x"), wrapper=context)
    assert await play.session.pop_item(wrapper=context) == said("x")[0]
    await play.session.clear_session(wrapper=context)
    assert await play.session.get_items(wrapper=context) == []
    for call_of in (play.session.get_items, play.session.pop_item, play.session.clear_session):
        with pytest.raises(chatdb.InvalidInputError, match="wrapper: is required"):
            await call_of()


class Compacting:
    """The part of OpenAI's client that compacts; it answers with a summary, nothing, or an error."""

    def __init__(self, output: Any) -> None:
        self.output = output
        self.responses = self

    async def compact(self, **_: Any) -> Any:
        """Return the output."""
        if isinstance(self.output, Exception):
            raise self.output
        return type("Compacted", (), {"output": self.output, "usage": None})()


@pytest.mark.parametrize("output", [[{"type": "compaction", "encrypted_content": "x"}], [], RuntimeError("down")])
async def test_compaction(db: Pool, output: Any) -> None:
    """Inside the framework's compaction session, items are those of SQLiteSession, whatever the compaction gives."""

    async def play(inner: Any) -> Any:
        client: Any = Compacting(output)
        session = OpenAIResponsesCompactionSession(
            "s1", inner, client=client, compaction_mode="input", should_trigger_compaction=lambda _: True
        )
        play = Play(session, is_streamed=False)
        await play.run(play.agent([call("weather", "c1", city="Ulm")], [text("one")]), "a")
        with suppress(RuntimeError):
            await session.run_compaction({"force": True})
        await play.note()
        await play.run(play.agent([text("two")]), "b")
        return play.told()

    with closing(SQLiteSession("s1")) as theirs:
        assert await play(session_of(db)) == await play(theirs)


async def test_a_compaction_that_cannot_be_stored(db: Pool) -> None:
    """If the compacted items are refused, the session has its items back."""
    session = session_of(db)
    await session.add_items(said("a", "b"))
    client: Any = Compacting([{"role": "assistant", "content": "x" * 17 * 1024 * 1024}])
    compacting = OpenAIResponsesCompactionSession("s1", session, client=client, compaction_mode="input")
    with pytest.raises(chatdb.InvalidInputError):
        await compacting.run_compaction({"force": True})
    assert await session.get_items() == said("a", "b")


async def test_encrypted(db: Pool, empty_dsn: str) -> None:
    """Inside EncryptedSession nothing readable is stored, and an encrypted session can be imported."""
    async with agent_session(empty_dsn) as theirs:
        await EncryptedSession("s1", theirs, encryption_key="k").add_items(said("secret"))
    with closing(tables.read(empty_dsn)) as items:
        await import_conversations(db, user_id=USER, items=items)
    session = EncryptedSession("s1", session_of(db), encryption_key="k")
    await session.add_items(said("also secret"))
    assert await session.get_items() == said("secret", "also secret")
    assert [m.content for m in await stored(db)] == ["", ""]
    assert not any("secret" in (m.payload or "") for m in await stored(db))
    assert await session.pop_item() == said("also secret")[0]


async def test_an_import_brings_equal_messages(db: Pool, empty_dsn: str) -> None:
    """What the import stores and what a session stores are equal, but for the keys of the messages."""
    names = ["s1", "x" * 300]
    for name in names:
        async with agent_session(empty_dsn, name) as theirs:
            await theirs.add_items(copy.deepcopy(NASTY))
        await session_of(db, name, user_id="bob").add_items(NASTY)
    with closing(tables.read(empty_dsn)) as items:
        report = await import_conversations(db, user_id=USER, items=items)
    assert (report.conversations, report.skipped) == (2, {})

    async def records(user: str) -> list[Any]:
        result: list[Any] = []
        for c in sorted(await chatdb.list_conversations(db, user_id=user), key=lambda c: c.key or ""):
            history = await chatdb.get_history(db, user_id=user, conversation_id=c.id)
            result.append((c.key, c.title, c.metadata, c.last_seq))
            result += [(m.seq, m.role, m.content, m.payload, m.metadata, m.token_count, m.state) for m in history]
        return result

    assert await records(USER) == await records("bob")
    for name in names:
        assert json.dumps(await session_of(db, name).get_items()) == json.dumps(NASTY)


async def test_importing_again_after_the_switch(db: Pool, empty_dsn: str) -> None:
    """After an import and the switch to this class, further imports create no duplicates and lose nothing."""

    async def import_all() -> Any:
        with closing(tables.read(empty_dsn)) as items:
            return await import_conversations(db, user_id=USER, items=items)

    async with agent_session(empty_dsn) as theirs:
        await theirs.add_items(said("a", "b"))
        await import_all()
        await theirs.add_items(said("c"))  # an old process still runs
        assert (await import_all()).messages == 1
        session = session_of(db)
        await session.add_items(said("d"))
        assert (await import_all()).messages == 0
        assert await session.get_items() == said("a", "b", "c", "d")

        await theirs.add_items(said("too late"))
        report = await import_all()
        assert report.messages == 0
        assert list(report.skipped) == ["the stored conversation differs from the start of the imported one"]
        await session.pop_item()
        await session.pop_item()
        assert (await import_all()).messages == 0
        assert await session.get_items() == said("a", "b")

        await session.clear_session()
        await session.add_items(said("new"))
        report = await import_all()
        assert list(report.skipped) == ["the user has a different conversation with this key"]
        assert await session.get_items() == said("new")


async def _trips(proxy: Proxy, db: Any) -> dict[str, int]:
    """Return the round trips of each method, on warm connections and with a new session object for each call."""
    counts: dict[str, int] = {}
    for _ in range(8):
        for name, arguments in (
            ("get_items", ()),
            ("add_items", (said("a", "b", "c"),)),
            ("get_items", (2,)),
            ("pop_item", ()),
            ("clear_session", ()),
            ("pop_item", ()),
            ("clear_session", ()),
            ("add_items", ([],)),
        ):
            proxy.clear()
            await getattr(session_of(db), name)(*arguments)
            counts[f"{name}{len(arguments and arguments[0]) if name == 'add_items' else ''}"] = proxy.round_trips
    return counts


async def test_round_trips(dsn: str) -> None:
    """Each method is one round trip, and no items are none."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1) as db:
            counts = await _trips(proxy, db)
    assert counts == {"get_items": 1, "add_items3": 1, "pop_item": 1, "clear_session": 1, "add_items0": 0}


async def test_behind_row_level_security(databases: Databases, roles: Roles) -> None:
    """Behind row-level security each method is three round trips, and another user sees nothing."""
    with cloned(databases, roles) as dsn:
        protect_tables(as_role(dsn, roles.owner))
        with Proxy(as_role(dsn, roles.app)) as proxy:
            async with chatdb.create_pool(proxy.dsn, max_size=1, row_level_security=True) as db:
                counts = await _trips(proxy, db)
                assert set(counts.values()) == {0, 3}
                await _see_only_ones_own(db)
                await _play_randomly(db, seed=3, operations=60)


async def _see_only_ones_own(db: Any) -> None:
    mine, foreign = session_of(db), session_of(db, user_id="bob")
    await mine.add_items(said("mine"))
    assert await foreign.get_items() == []
    assert await foreign.pop_item() is None
    await foreign.clear_session()
    await foreign.add_items(said("bob's"))
    assert await mine.get_items() == said("mine")
    assert await foreign.get_items() == said("bob's")
    await foreign.clear_session()
    assert await mine.get_items() == said("mine")
    await mine.clear_session()


async def test_a_foreign_user(db: Pool) -> None:
    """Another user's session of the same name is another conversation."""
    await _see_only_ones_own(db)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_lost_answer(dsn: str, count: int) -> None:
    """If the answer to an append is lost, chatdb sends it again, and each item is stored once."""
    lost: list[str] = []

    def watch(statement: Statement) -> bool:
        if "chatdb.messages" in statement.sql and statement.answered and "insert" in statement.sql and len(lost) < 2:
            lost.append(statement.sql)
            return True
        return False

    items = said(*"abc"[:count])
    async with chatdb.create_pool(dsn) as direct:
        await session_of(direct).add_items(said("before"))
        with Proxy(dsn, watch=watch) as proxy:
            # without a statement cache, each call sends its text, by which the proxy knows it
            async with chatdb.create_pool(proxy.dsn, statement_cache_size=0, max_size=1) as db:
                await session_of(db).add_items(items)
        assert await session_of(direct).get_items() == said("before") + items
    assert len(lost) == 2


@pytest.mark.parametrize("name", ["add_items", "pop_item", "clear_session"])
async def test_a_cancelled_change(dsn: str, name: str) -> None:
    """A change whose caller is cancelled, repeatedly, is settled before the cancellation goes on."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(dsn) as direct, chatdb.create_pool(proxy.dsn, max_size=1) as db:
            session = session_of(db)
            for pause in (0.0, 0.001, 0.05):
                await session.clear_session()
                await session.add_items(said("a", "b"))
                expected = {"add_items": said("a", "b", "c"), "pop_item": said("a"), "clear_session": []}[name]
                proxy.pause()
                change = asyncio.create_task(getattr(session, name)(*([said("c")] if name == "add_items" else [])))
                for _ in range(3):
                    await asyncio.sleep(pause)
                    change.cancel()
                await asyncio.sleep(0.05)
                assert change.done() == (pause == 0.0 and change.cancelled())
                proxy.resume()
                with pytest.raises(asyncio.CancelledError):
                    await change
                found = await session_of(direct).get_items()
                assert found == expected or pause == 0.0  # before its first step, nothing was sent


async def test_a_change_that_fails_after_a_cancellation(dsn: str) -> None:
    """If the change then fails, the cancellation is raised, and nothing is left to warn about."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1, retries=0) as db:
            session = session_of(db)
            await session.add_items(said("a"))
            proxy.pause()
            change = asyncio.create_task(session.add_items(said("b")))
            await asyncio.sleep(0.05)
            change.cancel()
            await asyncio.sleep(0.01)
            proxy.cut()
            proxy.resume()
            with pytest.raises(asyncio.CancelledError):
                await change


async def test_two_instances(db: Pool) -> None:
    """Batches of concurrent instances stay together and in the order of each."""

    async def write(name: str) -> None:
        session = session_of(db)
        for number in range(10):
            await session.add_items(said(*(f"{name} {number} {part}" for part in range(3))))

    await asyncio.gather(*map(write, "abc"))
    contents = [item["content"] for item in await session_of(db).get_items()]  # type: ignore[typeddict-item]
    assert len(contents) == 90
    for at in range(0, 90, 3):
        assert contents[at : at + 3] == [f"{contents[at][:-2]} {part}" for part in range(3)]
    for name in "abc":
        own = [each for each in contents if each[0] == name]
        assert own == sorted(own, key=lambda each: (int(each.split()[1]), each))


async def test_clear_against_add(db: Pool) -> None:
    """While one instance clears and pops, the other adds and reads: no error, and every batch is whole."""
    deadline = asyncio.get_running_loop().time() + 3

    async def repeat(change: Callable[[ChatDBSession], Awaitable[Any]]) -> None:
        while asyncio.get_running_loop().time() < deadline:
            await change(session_of(db))

    async def read(session: ChatDBSession) -> None:
        items = [item["content"] for item in await session.get_items()]  # type: ignore[typeddict-item]
        assert items == ["a", "b"] * (len(items) // 2)

    await asyncio.gather(
        repeat(lambda session: session.add_items(said("a", "b"))),
        repeat(lambda session: session.add_items(said("a", "b"))),
        repeat(lambda session: session.clear_session()),
        repeat(read),
    )
    await session_of(db).clear_session()
    await session_of(db).add_items(said("after"))
    assert await session_of(db).get_items() == said("after")


async def test_cleared_between_two_pages(db: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is cleared, or cleared and filled, while its pages are read is read again."""
    monkeypatch.setattr("chatdb.adapters._pages.PAGE", 5)
    items = said(*map(str, range(12)))
    get_branch = chatdb.get_branch
    for then in ([], said("x"), said(*"0123456789")):
        await session_of(db).clear_session()
        await session_of(db).add_items(items)
        assert await session_of(db).get_items() == items
        pages = 0

        async def disturbed(*arguments: Any, **options: Any) -> Any:
            nonlocal pages
            pages += 1
            if pages == 1:  # the second page of three
                await session_of(db).clear_session()
                await session_of(db).add_items(then)  # noqa: B023
            return await get_branch(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr("chatdb.adapters._pages.get_branch", disturbed)
            assert await session_of(db).get_items() == then


async def test_on_a_connection(tx: asyncpg.Connection) -> None:
    """A session works on a connection, inside its transaction."""
    session = session_of(tx)
    await session.add_items(said("a"))
    block = tx.transaction()
    await block.start()
    await session.add_items(said("b"))
    await block.rollback()
    assert await session.get_items() == said("a")


PAGE = (ROOT / "docs" / "adapters" / "openai-agents.md").read_text(encoding="utf-8")


async def test_the_page(db: Pool, dsn: str, empty_dsn: str) -> None:
    """The programs and the command on the adapter's page work as they are."""
    programs: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "page", "exec", dont_inherit=True), programs)
    agent = Agent(name="a", model=ScriptedModel(*([text(word)] for word in ("one", "two", "three"))))
    assert await programs["answer"](db, agent, USER, "thread-1", "first") == "one"
    assert await programs["answer"](db, agent, USER, "thread-1", "second") == "two"
    assert len(agent.model.inputs[1]) == 3
    assert await programs["ask"](db, agent, "bob", "third") == 2
    assert len(await session_of(db, "support", user_id="bob").get_items()) == 2
    assert await session_of(db, "support").get_items() == []

    agent = Agent(name="a", model=ScriptedModel([text("from a thread")]))
    assert await asyncio.to_thread(programs["main"], dsn, agent) == "from a thread"
    assert len(await session_of(db, "thread-1").get_items()) == 6

    async with agent_session(empty_dsn, "thread-1") as theirs:
        await theirs.add_items(said("old"))
    await session_of(db, "thread-1").clear_session()
    [line] = re.findall(r"^chatdb (import .*)$", PAGE, re.MULTILINE)
    arguments = [empty_dsn if "://" in word else word for word in line.split()]
    await asyncio.to_thread(chatdb_process, *arguments, env={"DATABASE_URL": dsn})
    assert await session_of(db, "thread-1").get_items() == said("old")


def test_without_the_framework() -> None:
    """Without openai-agents, the error names the extra."""
    program = "import sys; sys.modules['agents'] = None; import chatdb.adapters.openai_agents"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ConfigurationError: openai-agents is not installed: run pip install 'chatdb[openai-agents]'" in done.stderr
