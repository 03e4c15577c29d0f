"""ChatDBConversationStore next to the in-memory store of pydantic-ai, races, lost answers, and other programs."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.conversation import Conversation
from pydantic_ai.conversation_store import ConversationConflict, ConversationEntry, InMemoryConversationStore
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel

import chatdb
from chatdb.adapters.pydantic_ai import ChatDBConversationStore, load, save
from chatdb.admin.row_security import protect_tables
from chatdb.testing.databases import Databases
from tests.support.databases import as_role, cloned, execute
from tests.support.pages import run_blocks
from tests.support.proxy import Proxy, Statement
from tests.support.roles import Roles


def message(choose: random.Random) -> ModelMessage:
    """Return one of a few texts, so that equal messages are frequent."""
    text = choose.choice(["a", "b", "c\0", "d\ud83d"])
    messages: list[ModelMessage] = [
        ModelRequest([UserPromptPart(text, timestamp=MOMENT)]),
        ModelRequest([ToolReturnPart("t", {"x": text}, "1", timestamp=MOMENT)]),
        ModelResponse([TextPart(text), ToolCallPart("t", {"x": text}, "1")], timestamp=MOMENT),
        ModelRequest([SystemPromptPart(text, timestamp=MOMENT)]),
    ]
    return choose.choice(messages)


APPEND = "insert into chatdb.messages"
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


class Twins:
    """Does the same with both stores and compares what comes back. Ids of entries are compared by their order."""

    def __init__(self, ours: ChatDBConversationStore, seed: int) -> None:
        self.ours, self.theirs = ours, InMemoryConversationStore()
        self.choose = random.Random(seed)
        self.held: list[tuple[Conversation, Conversation]] = []
        self.names = [f"c{number}" for number in range(3)]
        self.ids: dict[str, str] = {}

    async def both(self, call: Callable[[Any, int], Any]) -> tuple[Any, Any]:
        """Return both results, or both exceptions, which are equal."""
        results: list[Any] = []
        for index, store in enumerate((self.ours, self.theirs)):
            try:
                results.append(await call(store, index))
            except (ConversationConflict, UserError) as error:
                results.append(error)
        if any(isinstance(result, Exception) for result in results):
            assert type(results[0]) is type(results[1]), results
            assert isinstance(results[0], ConversationConflict) or len(str(results[0])) > 0
        return results[0], results[1]

    def same_entries(self, ours: list[ConversationEntry], theirs: list[ConversationEntry]) -> None:
        """Compare messages and the links between entries."""
        assert [entry.message for entry in ours] == [entry.message for entry in theirs]
        assert list(map(self.named, ours)) == [(entry.parent_id, entry.id) for entry in theirs]

    def named(self, entry: ConversationEntry) -> tuple[str | None, str]:
        """Return the other store's ids of an entry."""
        return entry.parent_id and self.ids[entry.parent_id], self.ids[entry.id]

    def hold(self, pair: tuple[Any, Any]) -> None:
        """Keep loaded conversations for a later save."""
        if isinstance(pair[0], Conversation):
            assert pair[0].messages == pair[1].messages
            assert pair[0].usage == pair[1].usage
            self.held.append(pair)

    async def step(self) -> str:
        """Do something random, and return what it was."""
        choose = self.choose
        name, limit = choose.choice(self.names), choose.choice([None, None, 0, 1, 2, 5])
        scope = choose.choice([None, None, None, "s", "other"])
        match choose.choice(["new", "load", "save", "save", "save", "rewrite", "branch", "back", "fork", "delete"]):
            case "new":
                messages = [message(choose) for _ in range(choose.randrange(4))]
                one, two = (Conversation(conversation_id=name, messages=list(messages)) for _ in range(2))
                self.held.append((one, two))
                return f"new {name}"
            case "load":
                self.hold(await self.both(lambda store, _: store.load(name, limit=limit, scope=scope)))
                return f"load {name} {limit} {scope}"
            case "save" if self.held:
                pair = choose.choice(self.held)
                more = [message(choose) for _ in range(choose.randrange(3))]
                for one in pair:
                    one.messages.extend(more)
                    one.usage.requests += len(more)
            case "rewrite" if self.held:
                pair = choose.choice(self.held)
                at, more = choose.randrange(len(pair[0].messages) + 1), [message(choose)]
                for one in pair:
                    one.messages[at : at + choose.choice([1])] = more
                    if at % 2:
                        one.new_message_index = None
            case "branch" | "back" as kind:
                entries = await self.both(lambda store, _: store.load_entries(name))
                records = await self.both(lambda store, _: store.read_record(name))
                if entries[0] is None:
                    return "nothing"
                options: list[dict[str, Any]] = [{"at": choose.randrange(len(entries[1]) + 2)}] * 2
                tips = [tip for tip in self.ids if self.ids[tip] in records[1].branches]
                if kind == "back" and tips:
                    tip = choose.choice(tips)
                    options = [{"from_entry": tip}, {"from_entry": self.ids[tip]}]
                revisions = [record.revision for record in records]
                self.hold(
                    await self.both(
                        lambda store, index: store.branch(
                            name, **options[index], expected_revision=revisions[index], scope=scope
                        )
                    )
                )
                return f"{kind} {name} {options[0]} {scope}"
            case "fork":
                other = choose.choice(self.names)
                until = choose.choice([None, 0, 1, 2])
                self.hold(
                    await self.both(
                        lambda store, _: store.fork(
                            name, at=until, new_conversation_id=other, scope=scope and "s", source_scope=scope
                        )
                    )
                )
                return f"fork {name} {until} {other}"
            case "delete":
                await self.both(lambda store, _: store.delete(name, scope=scope))
                return f"delete {name} {scope}"
            case _:
                return "nothing"
        pair_now = pair
        ours, theirs = await self.both(lambda store, index: store.save(pair_now[index], scope=scope))
        if isinstance(ours, list):
            self.ids |= {one.id: two.id for one, two in zip(ours, theirs, strict=True)}
            self.same_entries(ours, theirs)
        return f"save {pair_now[0].conversation_id} {scope} {ours}"

    async def compare(self) -> None:
        """Compare everything that is stored."""
        records = await self.both(lambda store, _: store.list_conversations())
        assert [record.conversation_id for record in records[0]] == [record.conversation_id for record in records[1]]
        for ours, theirs in zip(*records, strict=True):
            assert (ours.usage, ours.scope, ours.forked_from) == (theirs.usage, theirs.scope, theirs.forked_from)
            assert (ours.head_id and self.ids[ours.head_id]) == theirs.head_id
            assert [self.ids[tip] for tip in ours.branches] == theirs.branches
            assert (ours.forked_at and self.ids[ours.forked_at]) == theirs.forked_at
        for name in self.names:
            for limit in (None, 0, 1, 3):
                pair = await self.both(lambda store, _: store.load_entries(name, limit=limit))  # noqa: B023
                assert (pair[0] is None) == (pair[1] is None)
                if pair[0] is not None:
                    self.same_entries(*pair)


@pytest.mark.parametrize("seed", range(4))
async def test_the_same_calls_give_the_same_results_as_in_memory(db: chatdb.Pool, seed: int) -> None:
    """A random sequence of saves, rewrites, branches, forks and deletions leaves the same conversations."""
    twins = Twins(ChatDBConversationStore(db, user_id="alice"), seed)
    done: list[str] = []
    for _ in range(100):
        done.append(await twins.step())
        await twins.compare()
    assert len({step.split()[0] for step in done}) > 6


async def test_what_is_dumped_is_what_was_stored(db: chatdb.Pool) -> None:
    """The JSON of messages is the same after a load."""
    store = ChatDBConversationStore(db, user_id="alice")
    messages = [message(random.Random(seed)) for seed in range(30)]
    image = BinaryContent(b"\xff\x00", media_type="image/png")
    messages.append(ModelRequest([UserPromptPart(["\ud83d", image], timestamp=MOMENT)]))
    await store.save(Conversation(conversation_id="c", messages=messages))
    loaded = await store.load("c")
    assert loaded is not None
    assert ModelMessagesTypeAdapter.dump_python(loaded.messages, mode="json") == ModelMessagesTypeAdapter.dump_python(
        messages, mode="json"
    )


def talk(name: str = "c", *texts: str) -> Conversation:
    """Return a conversation with prompts."""
    return Conversation(conversation_id=name, messages=[prompt(text) for text in texts])


def prompt(text: str) -> ModelRequest:
    """Return a prompt."""
    return ModelRequest([UserPromptPart(text, timestamp=MOMENT)])


def texts(messages: Sequence[ModelMessage]) -> list[str]:
    """Return the text of the only part of each message."""
    return [str(getattr(one.parts[0], "content", None)) for one in messages]


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    """Yield a proxy before the test's database."""
    with Proxy(dsn) as made:
        yield made


async def test_round_trips(proxy: Proxy) -> None:
    """A load takes one round trip and a change two; with a branch that is not the line of chatdb's head, one more."""
    async with chatdb.create_pool(proxy.dsn, max_size=1) as pool:
        store = ChatDBConversationStore(pool, user_id="alice")
        where: Any = {"user_id": "alice", "conversation_key": "plain"}

        async def revision() -> str:
            record = await store.read_record("c")
            assert record is not None
            return record.revision

        counted: list[dict[str, int]] = []
        for _ in range(2):
            counted.append({})

            async def count(name: str, call: Awaitable[Any]) -> Any:
                proxy.clear()
                result = await call
                counted[-1][name] = proxy.round_trips
                return result

            conversation = talk("c", "a", "b")
            await count("create", store.save(conversation))
            conversation = await count("load", store.load("c"))
            await count("load a window", store.load("c", limit=1))
            conversation.messages.append(prompt("c"))
            await count("save", store.save(conversation))
            conversation.messages[0] = prompt("d")
            await count("rewrite", store.save(conversation))
            again = ChatDBConversationStore(pool, user_id="alice")
            copied = Conversation(**{one.name: getattr(conversation, one.name) for one in fields(conversation)})
            await count("compare", again.save(copied))
            rewritten = await store.read_record("c")
            assert rewritten is not None
            left: Any = {"from_entry": rewritten.branches[-1], "expected_revision": rewritten.revision}
            conversation = await count("back to another line", again.branch("c", **left))
            await count("load another line", again.load("c"))
            conversation.messages.append(prompt("d"))
            await again.save(conversation)
            now = await revision()
            await count("branch", store.branch("c", at=0, expected_revision=now))
            now = await revision()
            tips = await store.read_record("c")
            assert tips is not None
            await count("load a branched one", store.load("c"))
            await count("back", store.branch("c", from_entry=tips.branches[-1], expected_revision=now))
            await count("fork", store.fork("c", new_conversation_id="d"))
            await count("list", store.list_conversations())
            await count("delete", store.delete("c"))
            await store.delete("d")
            await count("plain save", save(pool, **where, messages=[prompt("a")]))
            await count("plain load", load(pool, **where))
    assert counted[1] == {
        "create": 2, "load": 1, "load a window": 1, "save": 2, "rewrite": 2, "compare": 2, "back to another line": 3,
        "load another line": 2, "branch": 2, "load a branched one": 1, "back": 2, "fork": 2, "list": 1, "delete": 2,
        "plain save": 1, "plain load": 1,
    }  # fmt: skip


@pytest.mark.parametrize("action", ["save", "create", "rewrite", "branch", "fork", "delete"])
async def test_of_concurrent_writers_one_wins(dsn: str, action: str) -> None:
    """One of eight succeeds, and the others get the framework's conflict."""
    async with chatdb.create_pool(dsn, max_size=8) as pool:
        stores = [ChatDBConversationStore(pool, user_id="alice") for _ in range(8)]
        for number in range(6):
            name = f"c{number}"
            if action != "create":
                await stores[0].save(talk(name, "a", "b"))

            async def change(writer: int) -> object:
                store = stores[writer]
                if action == "create":
                    return await store.save(talk(name, "a"))  # noqa: B023
                record = await store.read_record(name)  # noqa: B023
                loaded = await store.load(name)  # noqa: B023
                assert record is not None
                assert loaded is not None
                await ready.wait()  # noqa: B023
                match action:
                    case "save":
                        loaded.messages.append(prompt(str(writer)))
                        return await store.save(loaded)
                    case "rewrite":
                        loaded.messages[1:] = [prompt(str(writer))]
                        return await store.save(loaded)
                    case "branch":
                        return await store.branch(name, at=1, expected_revision=loaded.revision)  # noqa: B023
                    case "fork":
                        return await store.fork(name, new_conversation_id=f"new {name}")  # noqa: B023
                    case _:
                        await store.delete_record(name, expected_revision=record.revision)  # noqa: B023
                        return None

            ready = asyncio.Barrier(8)
            results = await asyncio.gather(*map(change, range(8)), return_exceptions=True)
            lost = [one for one in results if isinstance(one, ConversationConflict)]
            assert len(lost) == 7, results
            entries = await stores[0].load_entries(name)
            assert (entries is None) == (action == "delete")


async def test_renaming_and_pinning_are_no_conflict(db: chatdb.Pool) -> None:
    """What a sidebar changes between load and save does not lose the turn, and is kept."""
    store = ChatDBConversationStore(db, user_id="alice")
    await store.save(talk("c", "a"))
    loaded = await store.load("c")
    assert loaded is not None
    await chatdb.update_conversation(
        db, user_id="alice", conversation_key="pydantic-ai:c", title="A", pinned=True, metadata_patch={"x": 1}
    )
    loaded.messages.append(prompt("b"))
    await store.save(loaded)
    stored = await chatdb.get_conversation(db, user_id="alice", conversation_key="pydantic-ai:c")
    assert (stored.title, (stored.metadata or {})["x"], stored.last_seq) == ("A", 1, 2)


@pytest.mark.parametrize("is_rewritten", [False, True])
async def test_a_rename_between_the_read_and_the_write_of_a_save(dsn: str, *, is_rewritten: bool) -> None:
    """The save reads again and succeeds."""
    renamed: list[Statement] = []

    def rename(statement: Statement) -> bool:
        if armed.is_set() and APPEND in statement.sql and not statement.answered and not renamed:
            renamed.append(statement)
            execute(dsn, "update chatdb.conversations set title = 'new', edits = edits + 1")
        return False

    armed = asyncio.Event()
    with Proxy(dsn, watch=rename) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1, statement_cache_size=0) as pool:
            store = ChatDBConversationStore(pool, user_id="alice")
            conversation = talk("c", "a", "x", "x")
            await store.save(conversation)
            conversation.messages[1 if is_rewritten else 3 :] = [prompt("b")]
            armed.set()
            await store.save(conversation)
            loaded = await store.load("c")
    assert renamed
    assert loaded is not None
    assert texts(loaded.messages) == (["a", "b"] if is_rewritten else ["a", "x", "x", "b"])


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("action", ["save", "create", "empty", "branch", "fork", "delete", "plain"])
async def test_a_lost_connection_stores_nothing_twice(dsn: str, action: str, *, answered: bool) -> None:
    """With the connection cut before or after the write, it succeeds once, or fails and left nothing."""
    cut: list[Statement] = []
    words = "delete from chatdb.conversations" if action == "delete" else APPEND

    def lose(statement: Statement) -> bool:
        if words in statement.sql and statement.answered == answered and not cut:
            cut.append(statement)
            return True
        return False

    conversation = talk("c", "a", "b")
    if action != "create":
        async with chatdb.create_pool(dsn, max_size=1) as pool:
            await ChatDBConversationStore(pool, user_id="alice").save(conversation)
    with Proxy(dsn, watch=lose) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1) as pool:
            store = ChatDBConversationStore(pool, user_id="alice")
            failed = False
            try:
                match action:
                    case "save":
                        conversation.messages.append(prompt("c"))
                        await store.save(conversation)
                    case "create" | "empty":
                        await store.save(conversation)
                    case "branch":
                        await store.branch("c", at=1, expected_revision=conversation.revision)
                    case "fork":
                        await store.fork("c", new_conversation_id="d")
                    case "delete":
                        await store.delete("c")
                    case _:
                        await save(pool, user_id="alice", conversation_key="c", messages=[prompt("c")])
            except chatdb.UnavailableError as error:
                failed = error.sent is not False
            assert cut
            assert not (failed and answered)
            loaded = {name: await store.load_entries(name) for name in "cd"}
    stored = {name: entries and texts([entry.message for entry in entries]) for name, entries in loaded.items()}
    expected: dict[str, Any] = {
        "save": {"c": ["a", "b", "c"], "d": None},
        "plain": {"c": ["a", "b", "c"], "d": None},
        "create": {"c": None if failed else ["a", "b"], "d": None},
        "empty": {"c": ["a", "b"], "d": None},
        "branch": {"c": ["a", "b"] if failed else ["a"], "d": None},
        "fork": {"c": ["a", "b"], "d": None if failed else ["a", "b"]},
        "delete": {"c": ["a", "b"] if failed else None, "d": None},
    }
    assert stored == expected[action]


async def test_a_cancelled_save_settles(dsn: str) -> None:
    """The caller gets CancelledError only after the change is stored."""
    sent, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell(statement: Statement) -> bool:
        if APPEND in statement.sql and not statement.answered:
            loop.call_soon_threadsafe(sent.set)
            time.sleep(0.2)
        return False

    with Proxy(dsn, watch=tell) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=2) as pool:
            store = ChatDBConversationStore(pool, user_id="alice")
            task = asyncio.create_task(store.save(talk("c", "a")))
            await asyncio.wait_for(sent.wait(), 20)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            entries = await store.load_entries("c")
            assert entries is not None
            assert len(entries) == 1


async def test_another_program_writes_to_the_same_conversation(db: chatdb.Pool) -> None:
    """Its texts are read, its tools' results are left out, and a save after them is a conflict or follows them."""
    store = ChatDBConversationStore(db, user_id="alice")
    here: Any = {"user_id": "alice", "conversation_key": "pydantic-ai:c"}
    await store.save(talk("c", "a"))
    before = await store.load("c")
    assert before is not None
    await chatdb.append_message(db, **here, role="assistant", content="b", key="theirs")
    await chatdb.append_message(db, **here, role="developer", content="c")
    await chatdb.append_message(db, **here, role="tool", content="d")
    await chatdb.append_message(db, **here, role="assistant", content="")
    before.messages.append(prompt("late"))
    with pytest.raises(ConversationConflict):
        await store.save(before)
    for limit in (10, 3):
        window = await store.load("c", limit=limit)
        assert window is not None
        assert texts(window.messages) == ["a", "b", "c"]
    loaded = await store.load("c")
    assert loaded is not None
    assert texts(loaded.messages) == ["a", "b", "c"]
    assert isinstance(loaded.messages[1], ModelResponse)
    assert loaded.messages[1].timestamp.tzinfo is not None
    loaded.messages.append(prompt("e"))
    await store.save(loaded)
    history = await chatdb.get_branch(db, **here)
    assert [one.content for one in history] == ["a", "b", "c", "d", "", "e"]
    fork = await store.fork("c", new_conversation_id="f")
    assert texts(fork.messages) == ["a", "b", "c", "e"]
    ours, theirs = await store.load_entries("c"), await store.load_entries("f")
    assert ours is not None
    assert theirs is not None
    assert [one.id for one in ours] == [one.id for one in theirs]
    branched = await store.branch("c", from_entry=ours[1].id, expected_revision=loaded.revision)
    branched.messages.append(prompt("g"))
    await store.save(branched)
    assert [one.content for one in await chatdb.get_branch(db, **here)] == ["a", "b", "g"]


async def test_a_conversation_of_another_program(db: chatdb.Pool) -> None:
    """What chatdb's functions created is listed, loaded, continued and branched."""
    store = ChatDBConversationStore(db, user_id="alice", prefix="")
    await chatdb.create_conversation(
        db, user_id="alice", key="c", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    await chatdb.create_conversation(db, user_id="alice", messages=[{"role": "user", "content": "no key"}])
    assert [one.conversation_id for one in await store.list_conversations()] == ["c"]
    loaded = await store.load("c")
    assert loaded is not None
    assert texts(loaded.messages) == ["a", "b"]
    branched = await store.branch("c", at=1, expected_revision=loaded.revision)
    assert texts(branched.messages) == ["a"]
    branched.messages.append(prompt("c"))
    await store.save(branched)
    versions = await chatdb.list_versions(db, user_id="alice", conversation_key="c")
    assert versions == {3: [2, 3]}
    record = (await store.list_conversations())[0]
    back = await store.branch("c", from_entry=record.branches[0], expected_revision=record.revision)
    assert texts(back.messages) == ["a", "b"]


async def test_no_other_user_sees_it(db: chatdb.Pool) -> None:
    """Another user's store has neither the conversation nor its entries, and may use the same id."""
    alice, bob = (ChatDBConversationStore(db, user_id=user) for user in ("alice", "bob"))
    entries = await alice.save(talk("c", "a"))
    assert await bob.load("c") is None
    assert await bob.list_conversations() == []
    with pytest.raises(LookupError):
        await bob.read_entry(entries[0].id)
    with pytest.raises(UserError):
        await bob.fork("c")
    await bob.save(talk("c", "b"))
    assert (await alice.read_entry(entries[0].id)).message == prompt("a")
    assert texts(await load(db, user_id="alice", conversation_key="c")) == ["a"]


async def test_entries_are_found_in_every_conversation(db: chatdb.Pool) -> None:
    """An entry is read by its id alone, whatever was read last."""
    store = ChatDBConversationStore(db, user_id="alice")
    entries = await store.save(talk("c", "a", "b", "c"))
    await store.save(talk("d", "x"))
    assert await store.read_entry(entries[2].id) == entries[2]
    assert await store.read_history(entries[2].id) == entries
    await store.load("c", limit=1)
    assert await store.read_history(entries[2].id) == entries
    with pytest.raises(LookupError):
        await store.read_entry("unknown")


async def test_one_store_in_many_tasks(db: chatdb.Pool) -> None:
    """Tasks that share a store do not mix up their conversations."""
    store = ChatDBConversationStore(db, user_id="alice")

    async def work(name: str) -> None:
        await store.save(talk(name, *(f"{name}{number}" for number in range(4))))
        for turn in range(4):
            conversation = await store.load(name, limit=3 if turn % 2 else None)
            assert conversation is not None
            conversation.messages.append(prompt(f"{name} turn {turn}"))
            conversation.new_message_index = None if turn == 2 else conversation.new_message_index
            await store.save(conversation)
            fork = await store.fork(name, at=2)
            assert texts(fork.messages) == [f"{name}0", f"{name}1"]
        branched = await store.branch(name, at=1, expected_revision=conversation.revision)
        branched.messages.append(prompt("new"))
        await store.save(branched)
        record = await store.read_record(name)
        assert record is not None
        back = await store.branch(name, from_entry=record.branches[-1], expected_revision=record.revision)
        assert texts(back.messages) == [f"{name}{n}" for n in range(4)] + [f"{name} turn {n}" for n in range(4)]

    await asyncio.gather(*(work(f"c{number}") for number in range(6)))


async def test_long_ids(db: chatdb.Pool) -> None:
    """An id of any length and with any character comes back."""
    store = ChatDBConversationStore(db, user_id="alice")
    names = ["x" * 5_000, "a\0b", "\ud83d", "", "d" * 500]
    for name in names[:4]:
        await store.save(talk(name, "a"))
    await save(db, user_id="alice", conversation_key=names[4], messages=[prompt("a")])
    assert {one.conversation_id for one in await store.list_conversations()} == set(names)
    for name in names:
        loaded = await store.load(name)
        assert loaded is not None
        assert loaded.conversation_id == name


async def test_bad_input_is_refused_before_anything_is_written(db: chatdb.Pool) -> None:
    """Values without JSON and records that are too large get an InvalidInputError."""
    store = ChatDBConversationStore(db, user_id="alice")
    call = ToolCallPart("t", {"x": object()}, "1")
    with pytest.raises(chatdb.InvalidInputError):
        await store.save(Conversation(conversation_id="c", messages=[ModelResponse([call], timestamp=MOMENT)]))
    large = talk("c", "a")
    large.usage.details = {"x" * 2_000_000: 1}
    with pytest.raises(chatdb.InvalidInputError):
        await store.save(large)
    assert await store.load("c") is None


async def test_more_messages_than_a_page(db: chatdb.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation of three pages is loaded whole, and its last messages with any limit."""
    monkeypatch.setattr("chatdb.adapters._pydantic_ai_conversation._PAGE", 7)
    store = ChatDBConversationStore(db, user_id="alice")
    all_texts = [str(number) for number in range(21)]
    await store.save(talk("c", *all_texts))
    for limit in (None, 6, 7, 8, 14, 20, 21, 22):
        loaded = await store.load("c", limit=limit)
        assert loaded is not None
        assert texts(loaded.messages) == all_texts[-(limit or 0) :]
    for number in range(20):
        await store.save(talk(f"d{number}", "a"))
    assert len(await store.list_conversations()) == 21


async def test_an_agent_with_tools(db: chatdb.Pool) -> None:
    """An agent continues from what was stored, with both ways to store it; the texts are what a person reads."""

    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        last = messages[-1].parts[-1]
        if isinstance(last, UserPromptPart) and last.content == "weather?":
            return ModelResponse([ToolCallPart("weather", {"city": "Köln"}), ToolCallPart("weather", {"city": "Bonn"})])
        return ModelResponse([TextPart(f"{len(messages)} messages")])

    agent = Agent(FunctionModel(answer), system_prompt="Be brief.")

    @agent.tool_plain
    def weather(city: str) -> str:
        return f"rain in {city}"

    store = ChatDBConversationStore(db, user_id="alice")
    for text in ("weather?", "thanks"):
        conversation = await store.load("c") or Conversation(conversation_id="c")
        result = await agent.run(text, conversation=conversation)
        await store.save(result)
        history = await load(db, user_id="alice", conversation_key="p")
        plain = await agent.run(text, message_history=history)
        await save(db, user_id="alice", conversation_key="p", messages=plain.new_messages())
        assert result.output == plain.output
    loaded = await store.load("c")
    assert loaded is not None
    assert loaded.usage.requests == 3
    assert loaded.messages == result.all_messages()
    assert await load(db, user_id="alice", conversation_key="p") == plain.all_messages()
    for key in ("pydantic-ai:c", "pydantic-ai:p"):
        stored = await chatdb.get_history(db, user_id="alice", conversation_key=key)
        assert [(one.role, one.content) for one in stored] == [
            ("user", "weather?"),
            ("assistant", ""),
            ("tool", "rain in Köln\nrain in Bonn"),
            ("assistant", "3 messages"),
            ("user", "thanks"),
            ("assistant", "5 messages"),
        ]
        assert stored[2].metadata == {"framework": "pydantic-ai", "name": "weather"}


async def test_the_page(db: chatdb.Pool) -> None:
    """The blocks of the page run, twice."""
    names: dict[str, object] = {"db": db, "agent": Agent(TestModel())}
    for _ in range(2):
        await run_blocks("pydantic-ai", names)
    for name in ("t1", "t2"):
        messages = await load(db, user_id="alice", conversation_key=name)
        assert texts(messages) == ["Hello", "success (no tool calls)"] * 2


@pytest.fixture
def protected(databases: Databases, roles: Roles) -> Iterator[str]:
    """Yield the application's DSN of a database with row-level security."""
    with cloned(databases, roles) as dsn:
        protect_tables(as_role(dsn, roles.owner))
        yield as_role(dsn, roles.app)


async def test_behind_row_level_security(protected: str) -> None:
    """The same random sequence gives the same results as in memory, and another user sees nothing."""
    async with chatdb.create_pool(protected, row_level_security=True, max_size=2) as pool:
        twins = Twins(ChatDBConversationStore(pool, user_id="alice"), 11)
        for _ in range(30):
            await twins.step()
            await twins.compare()
        assert await ChatDBConversationStore(pool, user_id="alice").list_conversations()
        assert not await ChatDBConversationStore(pool, user_id="bob").list_conversations()
