"""ChatDBHistoryProvider under a real Agent, next to the in-memory provider, with replays, lost answers and races."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest
from agent_framework import (
    Agent,
    AgentSession,
    BaseChatClient,
    ChatResponse,
    Content,
    FunctionInvocationLayer,
    InMemoryHistoryProvider,
    Message,
)

import chatdb
from chatdb.adapters.agent_framework import ChatDBHistoryProvider
from chatdb.admin.row_security import protect_tables
from chatdb.testing.databases import Databases
from tests.support.databases import as_role, cloned
from tests.support.pages import run_blocks
from tests.support.proxy import Proxy, Statement
from tests.support.roles import Roles

KEY = "agent-framework:s"


class Model(FunctionInvocationLayer[Any], BaseChatClient[Any]):
    """A model that keeps what it was sent, calls a tool for a question, and gives every answer the same id."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[list[Any]] = []

    def _inner_get_response(
        self, *, messages: Sequence[Message], stream: bool, options: Mapping[str, Any], **kwargs: Any
    ) -> Awaitable[ChatResponse[Any]]:
        async def answer() -> ChatResponse[Any]:
            self.inputs.append([one.to_dict(exclude={"additional_properties", "id"}) for one in messages])
            call = Content.from_function_call("c1", "weather", arguments={"city": "Köln"})
            said: list[Any] = [call] if messages[-1].text == "weather?" else [f"answer to {messages[-1].text}"]
            return ChatResponse(messages=[Message("assistant", said, message_id="same")])

        assert not stream
        return answer()


def weather(city: str) -> str:
    """Return the weather."""
    return f"rain in {city}"


def dumped(messages: Sequence[Message]) -> list[str]:
    """Return the JSON of messages."""
    return [json.dumps(one.to_dict()) for one in messages]


async def stored(db: chatdb.Pool, key: str = KEY) -> list[tuple[str, str]]:
    """Return roles and texts of what is stored."""
    history = await chatdb.get_history(db, user_id="alice", conversation_key=key)
    return [(one.role, one.content) for one in history]


async def test_an_agent_sees_what_it_sees_in_memory(db: chatdb.Pool) -> None:
    """The inputs of the model are the same at every step, with tools and repeated questions."""
    models = Model(), Model()
    ours, theirs = (
        Agent(client=model, tools=[weather], context_providers=[provider])
        for model, provider in zip(
            models, (ChatDBHistoryProvider(db, user_id="alice"), InMemoryHistoryProvider()), strict=True
        )
    )
    sessions = ours.create_session(session_id="s"), theirs.create_session(session_id="s")
    for text in ("hi", "weather?", "weather?", "why?", "hi"):
        await ours.run(text, session=sessions[0])
        await theirs.run(text, session=sessions[1])
        assert models[0].inputs == models[1].inputs
    fresh = ours.create_session(session_id="s")
    await ours.run("again", session=fresh)
    await theirs.run("again", session=sessions[1])
    assert models[0].inputs == models[1].inputs
    turn = [("user", "weather?"), ("assistant", ""), ("tool", "rain in Köln"), ("assistant", "answer to ")]
    assert (await stored(db))[:10] == [("user", "hi"), ("assistant", "answer to hi"), *turn, *turn]


async def test_a_replayed_transcript_is_stored_once(db: chatdb.Pool) -> None:
    """Each batch holds everything so far, as new objects, with a new session each time."""
    transcript: list[Message] = []
    for number in range(6):
        provider = ChatDBHistoryProvider(db, user_id="alice", load_messages=bool(number % 2))
        agent = Agent(client=Model(), tools=[weather], context_providers=[provider])
        transcript.append(Message("user", [["hi", "weather?"][number % 2]]))
        replay = [Message.from_dict(json.loads(text)) for text in dumped(transcript)]
        result = await agent.run(replay, session=AgentSession(session_id="s"))
        transcript += result.messages
    loaded = await ChatDBHistoryProvider(db, user_id="alice").get_messages("s")
    assert dumped(loaded) == dumped(transcript)


async def test_equal_turns_are_all_stored(db: chatdb.Pool) -> None:
    """The same question with the same answer and id is a new turn, for this session and for a new one."""
    agent = Agent(client=Model(), context_providers=[ChatDBHistoryProvider(db, user_id="alice")])
    session = agent.create_session(session_id="s")
    for number in range(6):
        await agent.run("hi", session=session if number % 2 else AgentSession(session_id="s"))
    assert await stored(db) == [("user", "hi"), ("assistant", "answer to hi")] * 6


NASTY = ["a\0b", "\ud83d", "", "é" * 300, "x" * 5_000_000, "\U0001f600", '"\\u0000']


async def test_what_is_dumped_is_what_was_stored(db: chatdb.Pool) -> None:
    """Equal JSON comes back, in order, whatever the limit; the content is what a person reads."""
    messages = [Message("user", [text]) for text in NASTY]
    messages += [
        Message(
            "assistant",
            [Content.from_text("x"), Content.from_uri("https://e/x.png", media_type="image/png")],
            author_name="bot",
            message_id="1",
            additional_properties={"z": [1, {"n": None}], "a": 1.0},
        ),
        Message("assistant", [Content.from_function_call("c", "f", arguments={"b": 1, "a": "\ud83d"})]),
        Message("tool", [Content.from_function_result("c", result={"a": [1], "n": None})]),
        Message("assistant", [Content.from_data(b"\xff\x00", media_type="image/png")]),
        Message("critic", ["own role"], additional_properties={"x": [float("nan"), float("inf"), 1e400]}),
        Message("user", []),
    ]
    provider = ChatDBHistoryProvider(db, user_id="alice")
    state: dict[str, Any] = {}
    for message in messages:
        await provider.save_messages("s", [message], state=state)
    assert dumped(await provider.get_messages("s")) == dumped(messages)
    for limit in (0, 1, 5, 100):
        some = await ChatDBHistoryProvider(db, user_id="alice", limit=limit).get_messages("s")
        assert dumped(some) == dumped(messages)[len(messages) - min(limit, len(messages)) :]
    contents = [content for _, content in await stored(db)]
    assert contents[:2] == ["a\ufffdb", "\ufffd"]
    assert len(contents[4]) == 4 * 1024 * 1024
    assert contents[7:10] == ["x", "", '{"a": [1], "n": null}']
    history = await chatdb.get_history(db, user_id="alice", conversation_key=KEY)
    assert history[7].metadata == {"framework": "agent-framework", "name": "bot"}


async def test_pages(db: chatdb.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A history of three pages is loaded whole, and its newest messages with any limit."""
    monkeypatch.setattr("chatdb.adapters._pages.PAGE", 7)
    messages = [Message("user", [str(number)]) for number in range(21)]
    await ChatDBHistoryProvider(db, user_id="alice").save_messages("s", messages)
    for limit in (None, 6, 7, 8, 14, 20, 21, 22):
        loaded = await ChatDBHistoryProvider(db, user_id="alice", limit=limit).get_messages("s")
        assert [one.text for one in loaded] == [str(number) for number in range(21)][-(limit or 0) :]


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    """Yield a proxy before the test's database."""
    with Proxy(dsn) as made:
        yield made


async def test_round_trips(proxy: Proxy) -> None:
    """A run takes one round trip to load, and one to store."""
    async with chatdb.create_pool(proxy.dsn, max_size=1) as pool:
        provider = ChatDBHistoryProvider(pool, user_id="alice")
        for _ in range(3):
            counted: list[int] = []
            state: dict[str, Any] = {}
            for call in (
                provider.get_messages("s", state=state),
                provider.save_messages("s", [Message("user", ["hi"])], state=state),
            ):
                proxy.clear()
                await call
                counted.append(proxy.round_trips)
        agent = Agent(client=Model(), context_providers=[provider])
        proxy.clear()
        await agent.run("hi", session=AgentSession(session_id="s"))
        assert (proxy.round_trips, proxy.sent) == (2, ["B", "E", "S"] * 2)
    assert counted == [1, 1]


@pytest.mark.parametrize("answered", [False, True])
async def test_a_lost_connection_stores_nothing_twice(dsn: str, *, answered: bool) -> None:
    """The save is repeated, and the messages are stored once."""
    cut: list[Statement] = []

    def lose(statement: Statement) -> bool:
        if "insert into chatdb.messages" in statement.sql and statement.answered == answered and not cut:
            cut.append(statement)
            return True
        return False

    with Proxy(dsn, watch=lose) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1) as pool:
            provider = ChatDBHistoryProvider(pool, user_id="alice")
            await provider.save_messages("s", [Message("user", ["hi"]), Message("user", ["hi"])])
            assert cut
            assert await stored(pool) == [("user", "hi")] * 2


async def test_a_cancelled_save_settles(dsn: str) -> None:
    """The caller gets CancelledError only after the messages are stored."""
    sent, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell(statement: Statement) -> bool:
        if "insert into chatdb.messages" in statement.sql and not statement.answered:
            loop.call_soon_threadsafe(sent.set)
            time.sleep(0.2)
        return False

    with Proxy(dsn, watch=tell) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=2) as pool:
            provider = ChatDBHistoryProvider(pool, user_id="alice")
            task = asyncio.create_task(provider.save_messages("s", [Message("user", ["hi"])]))
            await asyncio.wait_for(sent.wait(), 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await stored(pool) == [("user", "hi")]


async def test_two_providers_on_one_session_and_a_clear(dsn: str) -> None:
    """Concurrent saves lose nothing and keep the order of each batch, also while the conversation is deleted."""
    async with chatdb.create_pool(dsn, max_size=4) as pool:
        providers = [ChatDBHistoryProvider(pool, user_id="alice") for _ in range(4)]
        states: list[dict[str, Any]] = [{} for _ in providers]
        for round_ in range(10):
            await asyncio.gather(
                *(
                    provider.save_messages(
                        "s", [Message("user", [f"{round_} {place} {part}"]) for part in "ab"], state=states[place]
                    )
                    for place, provider in enumerate(providers)
                )
            )
        said = [content for _, content in await stored(pool)]
        assert len(said) == 80
        assert all(said[at][:-1] == said[at + 1][:-1] for at in range(0, 80, 2))
        choose = random.Random(1)
        for round_ in range(10):

            async def clear() -> None:
                await asyncio.sleep(choose.random() / 100)
                with suppress(chatdb.NotFoundError):
                    await chatdb.delete_conversation(pool, user_id="alice", conversation_key=KEY)

            batch = [Message("user", [f"{round_} {part}"]) for part in "abc"]
            await asyncio.gather(clear(), providers[0].save_messages("s", batch, state=states[0]))
            await providers[0].save_messages("s", batch[:1], state=states[0])
            assert (await stored(pool))[-1] == ("user", f"{round_} a")


async def test_other_programs_and_users(db: chatdb.Pool) -> None:
    """Messages of others are read as text, without tools' results; another user sees nothing."""
    provider = ChatDBHistoryProvider(db, user_id="alice")
    await provider.save_messages("s", [Message("user", ["a"])])
    here: Any = {"user_id": "alice", "conversation_key": KEY}
    others = [("assistant", "b"), ("developer", "c"), ("tool", "d"), ("assistant", "")]
    await chatdb.append_messages(db, **here, messages=[{"role": role, "content": text} for role, text in others])
    loaded = await provider.get_messages("s")
    assert [(one.role, one.text) for one in loaded] == [("user", "a"), ("assistant", "b"), ("system", "c")]
    state: dict[str, Any] = {}
    await provider.get_messages("s", state=state)
    await provider.save_messages("s", [Message("user", ["a"])], state=state)
    assert (await stored(db))[-1] == ("user", "a")
    assert await ChatDBHistoryProvider(db, user_id="bob").get_messages("s") == []


async def test_ids_of_sessions(db: chatdb.Pool) -> None:
    """An id of any length and with any character works, and none at all."""
    provider = ChatDBHistoryProvider(db, user_id="alice")
    for session_id in ("x" * 5_000, "a\0b", "\ud83d", "", None):
        await provider.save_messages(session_id, [Message("user", [repr(session_id)])])
        assert [one.text for one in await provider.get_messages(session_id)] == [repr(session_id)]


async def test_bad_input_is_refused_before_anything_is_written(db: chatdb.Pool) -> None:
    """A value without JSON is an InvalidInputError."""
    provider = ChatDBHistoryProvider(db, user_id="alice")
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    with pytest.raises(chatdb.InvalidInputError):
        await provider.save_messages(
            "s", [Message("user", ["a"]), Message("user", ["b"], additional_properties={"x": deep})]
        )
    with pytest.raises(chatdb.InvalidInputError):
        ChatDBHistoryProvider(db, user_id="alice", limit=-1)
    assert await provider.get_messages("s") == []


async def test_the_page(db: chatdb.Pool) -> None:
    """The blocks of the page run, twice."""
    names = {"db": db, "client": Model()}
    for _ in range(2):
        await run_blocks("agent-framework", names)
    assert await stored(db, "agent-framework:t1") == [("user", "Hello"), ("assistant", "answer to Hello")] * 2
    assert await stored(db, "agent-framework:t2") == [("user", "Hi"), ("assistant", "Hello!")]


async def test_behind_row_level_security(databases: Databases, roles: Roles) -> None:
    """An agent continues its session, and another user sees nothing."""
    with cloned(databases, roles) as dsn:
        protect_tables(as_role(dsn, roles.owner))
        async with chatdb.create_pool(as_role(dsn, roles.app), row_level_security=True, max_size=2) as pool:
            agent = Agent(client=Model(), context_providers=[ChatDBHistoryProvider(pool, user_id="alice")])
            for _ in range(2):
                await agent.run("hi", session=AgentSession(session_id="s"))
            assert await stored(pool) == [("user", "hi"), ("assistant", "answer to hi")] * 2
            assert await ChatDBHistoryProvider(pool, user_id="bob").get_messages("s") == []
