"""ChatDBStore under ChatKit's server, beside a store in memory, with lost answers, cancellations and other users."""

from __future__ import annotations

import asyncio
import json
import random
import re
import runpy
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta, timezone
from itertools import count, product
from textwrap import indent
from typing import Any

import httpx
import pytest
from agents import Agent, Model, ModelResponse, RunConfig, Runner
from agents.items import TResponseStreamEvent
from chatkit.agents import AgentContext, ThreadItemConverter, stream_agent_response
from chatkit.server import ChatKitServer, StreamingResult
from chatkit.store import NotFoundError, Store
from chatkit.types import (
    ActiveStatus,
    AssistantMessageContent,
    AssistantMessageItem,
    Attachment,
    ClosedStatus,
    FileAttachment,
    HiddenContextItem,
    ImageAttachment,
    InferenceOptions,
    LockedStatus,
    Page,
    SDKHiddenContextItem,
    Thread,
    ThreadItem,
    ThreadMetadata,
    ThreadStreamEvent,
    UserMessageItem,
    UserMessageTextContent,
)
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from openai.types.responses import (
    Response as ModelOutput,
)
from openai.types.responses import (
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseInputTextParam,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
)
from pydantic import TypeAdapter

import chatdb
from chatdb import ConflictError, InvalidInputError, NewMessage
from chatdb.adapters.chatkit import ChatDBStore
from chatdb.admin.row_security import protect_tables
from chatdb.formats.chatkit import parse_item, title_of
from chatdb.formats.items import readable
from chatdb.testing.databases import Databases
from tests.support.databases import as_role, cloned
from tests.support.paths import ROOT
from tests.support.pools import until
from tests.support.proxy import Proxy, Statement
from tests.support.roles import Roles

ITEM: TypeAdapter[ThreadItem] = TypeAdapter(ThreadItem)
NOW = datetime(2026, 11, 29, 12, 30, 15, 123456)  # noqa: DTZ001 - as ChatKit's server makes them
_serial = count()


def thread(name: str = "t1", **fields: Any) -> ThreadMetadata:
    """Return a thread."""
    return ThreadMetadata(**{"id": name, "title": "Trip", "created_at": NOW, **fields})


def user_message(name: str, text: str = "Hello", **fields: Any) -> UserMessageItem:
    """Return a message of the user."""
    content = [UserMessageTextContent(text=text)]
    base = {"id": name, "thread_id": "t1", "created_at": NOW, "inference_options": InferenceOptions()}
    return UserMessageItem(content=content, **(base | fields))


def answer(name: str, text: str = "Hi") -> AssistantMessageItem:
    """Return a message of the assistant."""
    content = [AssistantMessageContent(text=text)]
    return AssistantMessageItem(id=name, thread_id="t1", created_at=NOW, content=content)


def file(name: str, **fields: Any) -> FileAttachment:
    """Return an attachment."""
    return FileAttachment(**{"id": name, "name": f"{name}.txt", "mime_type": "text/plain", **fields})


def store_of(db: chatdb.Pool, **options: Any) -> ChatDBStore[str]:
    """Return a store whose context is the user."""
    return ChatDBStore(db, user_id=str, **options)


@pytest.fixture
def store(db: chatdb.Pool) -> ChatDBStore[str]:
    """Return a store on the test's own database."""
    return store_of(db)


def base(**fields: Any) -> dict[str, Any]:
    """Return the JSON of an item with these fields."""
    return {"id": f"i{next(_serial)}", "thread_id": "t1", "created_at": NOW.isoformat(), **fields}


WIDGET = {
    "type": "Card",
    "children": [
        {"type": "Title", "value": "Weather"},
        {"type": "Col", "children": [{"type": "Text", "value": "Rain"}, {"type": "Button", "label": "More"}]},
    ],
}
OPTIONS: dict[str, Any] = {"inference_options": {"tool_choice": {"id": "search"}, "model": "m"}}
TAG = {"type": "input_tag", "id": "p1", "text": "Ann", "data": {"n": 1}}
ENTITY = {"type": "entity", "title": "Ann", "id": "p1", "preview": "lazy"}
ITEMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "user": (
        base(
            type="user_message",
            content=[{"type": "input_text", "text": "Ask "}, TAG],
            attachments=[
                {"type": "file", "id": "a1", "name": "a.txt", "mime_type": "text/plain", "metadata": {"k": 1}}
            ],
            quoted_text="Before",
            **OPTIONS,
        ),
        "user",
        "Before\nAsk Ann\na.txt",
    ),
    "assistant": (
        base(
            type="assistant_message",
            content=[
                {"type": "output_text", "text": "One", "annotations": [{"source": ENTITY, "index": 3}]},
                {"type": "output_text", "text": "Two"},
            ],
        ),
        "assistant",
        "One\nTwo",
    ),
    "pending call": (
        base(type="client_tool_call", call_id="c1", name="weather", arguments={"city": "Köln"}),
        "tool",
        "",
    ),
    "call": (
        base(type="client_tool_call", call_id="c1", name="weather", arguments={}, status="completed", output={"mm": 3}),
        "tool",
        '{"mm": 3}',
    ),
    "widget": (base(type="widget", widget=WIDGET), "assistant", "Weather\nRain\nMore"),
    "widget with text": (base(type="widget", widget=WIDGET, copy_text="Rain"), "assistant", "Rain"),
    "basic widget": (
        base(type="widget", widget={"type": "Basic", "children": {"type": "Text", "value": "x", "new": [1]}}),
        "assistant",
        "x",
    ),
    "image": (base(type="generated_image", image={"id": "g1", "url": "https://host/g1"}), "assistant", ""),
    "questions": (
        base(
            type="structured_input",
            status="answered",
            inputs=[
                {"type": "freeform", "id": "q1", "question": "Where?", "answer": {"values": ["Rome", "Ostia"]}},
                {"type": "multiple_choice", "id": "q2", "question": "When?", "options": [{"value": "now"}]},
            ],
        ),
        "assistant",
        "Where?\nRome, Ostia\nWhen?",
    ),
    "task": (
        base(type="task", task={"type": "custom", "title": "Search", "content": "done"}),
        "assistant",
        "Search\ndone",
    ),
    "workflow": (
        base(
            type="workflow",
            workflow={
                "type": "reasoning",
                "summary": {"title": "Thought"},
                "tasks": [{"type": "thought", "content": "It rains"}, {"type": "web_search", "title_query": "rain"}],
            },
        ),
        "assistant",
        "Thought\nIt rains\nrain",
    ),
    "end": (base(type="end_of_turn"), "assistant", ""),
    "hidden": (base(type="hidden_context_item", content={"k": [1, None]}), "developer", '{"k": [1, null]}'),
    "hidden text": (base(type="hidden_context_item", content="Be brief."), "developer", "Be brief."),
    "sdk": (base(type="sdk_hidden_context", content="cancelled"), "developer", "cancelled"),
}
"""Items of each type, with the role and content under which they are stored."""


@pytest.mark.parametrize("name", ITEMS)
async def test_items_of_each_type(db: chatdb.Pool, store: ChatDBStore[str], name: str) -> None:
    """An item comes back equal, with equal JSON, and its message has the role and the text that a person would read."""
    fields, role, content = ITEMS[name]
    item = ITEM.validate_python(fields)
    await store.save_thread(thread(), "alice")
    await store.add_thread_item("t1", item, "alice")
    loaded = await store.load_item("t1", item.id, "alice")
    assert loaded == item
    assert loaded.model_dump_json() == item.model_dump_json()
    [message] = await chatdb.get_history(db, user_id="alice", conversation_key="chatkit:t1")
    assert (message.key, message.role, message.content) == (item.id, role, content)
    named = {"name": "weather"} if item.type == "client_tool_call" else {}
    assert message.metadata == {"framework": "chatkit", "type": item.type, **named}
    assert message.payload == json.dumps(item.model_dump(mode="json"), separators=(",", ":"))


TEXTS = {
    "NUL": "a\0b",
    "surrogate": "a\ud83db",
    "escapes": 'a"\\u0000\\',
    "lines": "a\u2028\r\n\tb",
    "emoji": "👩‍👩‍👧 ñ",
    "empty": "",
    "long": "ä" * 2_500_000,
}


@pytest.mark.parametrize("name", TEXTS)
async def test_texts_are_verbatim(db: chatdb.Pool, store: ChatDBStore[str], name: str) -> None:
    """A text comes back as it was; the content has U+FFFD for what PostgreSQL cannot store, and at most 4 MiB."""
    text = TEXTS[name]
    item = user_message("m1", text)
    hidden = HiddenContextItem(id="h1", thread_id="t1", created_at=NOW, content={"k": [text[:100], 1.5, None]})
    await store.save_thread(thread(title=text[:100], metadata={"k": [text[:100]]}), "alice")
    await store.add_thread_item("t1", item, "alice")
    await store.save_item("t1", hidden, "alice")
    assert (await store.load_thread_items("t1", None, 10, "asc", "alice")).data == [item, hidden]
    assert await store.load_thread("t1", "alice") == thread(title=text[:100], metadata={"k": [text[:100]]})
    stored = await chatdb.get_message(db, user_id="alice", conversation_key="chatkit:t1", key="m1")
    assert stored.content == re.sub("[\0\ud800-\udfff]", "\ufffd", text)[: 2 * 1024 * 1024]


@pytest.mark.parametrize("zone", [None, UTC, timezone(timedelta(hours=-5, minutes=-30))], ids=str)
async def test_times_are_verbatim(store: ChatDBStore[str], zone: Any) -> None:
    """A time comes back as it was, with or without a zone."""
    time = NOW.replace(tzinfo=zone)
    await store.save_thread(thread(created_at=time), "alice")
    await store.add_thread_item("t1", user_message("m1", created_at=time), "alice")
    for record in (await store.load_thread("t1", "alice"), await store.load_item("t1", "m1", "alice")):
        assert record.created_at == time
        assert record.created_at.utcoffset() == time.utcoffset()


@pytest.mark.parametrize(
    "status", [ActiveStatus(), LockedStatus(reason="\0"), ClosedStatus()], ids=lambda one: one.type
)
async def test_threads_are_verbatim(db: chatdb.Pool, store: ChatDBStore[str], status: Any) -> None:
    """A thread comes back equal, without the items that ChatKit may pass with it; its title is the conversation's."""
    fields: dict[str, Any] = {"status": status, "allowed_image_domains": ["host"], "metadata": {"k": "\0" * 100_000}}
    items = Page(data=[user_message("m1")])
    await store.save_thread(Thread(id="t1", created_at=NOW, title="x" * 1_500, items=items, **fields), "alice")
    loaded = await store.load_thread("t1", "alice")
    assert loaded == thread(title="x" * 1_500, **fields)
    assert type(loaded) is ThreadMetadata
    assert (await store.load_threads(5, None, "desc", "alice")).data == [loaded]
    assert (await store.load_thread_items("t1", None, 5, "asc", "alice")).data == []
    conversation = await chatdb.get_conversation(db, user_id="alice", conversation_key="chatkit:t1")
    assert conversation.title == "x" * 1_000
    assert conversation.metadata is not None
    assert conversation.metadata.keys() == {"framework", "thread"}
    assert json.loads(conversation.metadata["thread"]) == loaded.model_dump(mode="json")


async def test_unknown_fields_and_types_of_a_newer_release(db: chatdb.Pool, store: ChatDBStore[str]) -> None:
    """A stored item keeps fields that this release does not know, and one of an unknown type is read as its text."""
    await store.save_thread(thread(), "alice")
    here: dict[str, Any] = {"user_id": "alice", "conversation_key": "chatkit:t1"}
    newer = {**user_message("m1").model_dump(mode="json"), "new": {"k": 1}}
    unknown = base(type="video", content=[{"type": "output_text", "text": "a film"}])
    assert parse_item(unknown) == ("assistant", "a film", "video", None)
    for key, fields in (("m1", newer), ("v1", unknown)):
        role, content, kind, _ = parse_item(fields)
        metadata = {"framework": "chatkit", "type": kind}
        await chatdb.append_message(db, **here, role=role, content=content, payload=fields, metadata=metadata, key=key)
    first, second = (await store.load_thread_items("t1", None, 5, "asc", "alice")).data
    assert first == user_message("m1")
    assert isinstance(second, AssistantMessageItem)
    assert (second.id, second.content[0].text) == ("v1", "a film")
    await store.add_thread_item("t1", user_message("m2"), "alice")
    message = await chatdb.get_message(db, **here, key="m1")
    assert message.payload is not None
    assert message.payload.parsed() == newer


# beside a store in memory


class MemoryStore(Store[str]):
    """A store in memory, which keeps threads and items in the order in which they were added."""

    def __init__(self) -> None:
        self.threads: dict[tuple[str, str], ThreadMetadata] = {}
        self.items: dict[tuple[str, str], dict[str, ThreadItem]] = {}
        self.attachments: dict[tuple[str, str], Attachment] = {}

    async def load_thread(self, thread_id: str, context: str) -> ThreadMetadata:
        """Return a thread."""
        if (context, thread_id) not in self.threads:
            raise NotFoundError
        return self.threads[context, thread_id]

    async def save_thread(self, thread: ThreadMetadata, context: str) -> None:
        """Store a thread."""
        self.threads[context, thread.id] = thread
        self.items.setdefault((context, thread.id), {})

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: str
    ) -> Page[ThreadItem]:
        """Return a page of items."""
        found = self.items.get((context, thread_id))
        return Page() if found is None else self._page([*found.values()], after, limit, order)

    async def load_threads(self, limit: int, after: str | None, order: str, context: str) -> Page[ThreadMetadata]:
        """Return a page of threads."""
        return self._page([found for (user, _), found in self.threads.items() if user == context], after, limit, order)

    def _page(self, records: list[Any], after: str | None, limit: int, order: str) -> Page[Any]:
        if order == "desc":
            records.reverse()
        if after is not None:
            ids = [record.id for record in records]
            if after not in ids:
                raise NotFoundError
            del records[: ids.index(after) + 1]
        has_more = len(records) > limit
        return Page(data=records[:limit], has_more=has_more, after=records[limit - 1].id if has_more else None)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: str) -> None:
        """Append an item."""
        await self.load_thread(thread_id, context)
        if self.items[context, thread_id].setdefault(item.id, item) != item:
            raise ConflictError

    async def save_item(self, thread_id: str, item: ThreadItem, context: str) -> None:
        """Append or replace an item."""
        await self.load_thread(thread_id, context)
        self.items[context, thread_id][item.id] = item

    async def load_item(self, thread_id: str, item_id: str, context: str) -> ThreadItem:
        """Return an item."""
        found = self.items.get((context, thread_id), {})
        if item_id not in found:
            raise NotFoundError
        return found[item_id]

    async def delete_thread(self, thread_id: str, context: str) -> None:
        """Delete a thread."""
        self.threads.pop((context, thread_id), None)
        self.items.pop((context, thread_id), None)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: str) -> None:
        """Delete an item."""
        self.items.get((context, thread_id), {}).pop(item_id, None)

    async def save_attachment(self, attachment: Attachment, context: str) -> None:
        """Store an attachment."""
        self.attachments[context, attachment.id] = attachment

    async def load_attachment(self, attachment_id: str, context: str) -> Attachment:
        """Return an attachment."""
        if (context, attachment_id) not in self.attachments:
            raise NotFoundError
        return self.attachments[context, attachment_id]

    async def delete_attachment(self, attachment_id: str, context: str) -> None:
        """Delete an attachment."""
        self.attachments.pop((context, attachment_id), None)


def random_call(chance: random.Random) -> tuple[str, tuple[Any, ...]]:
    """Return a method and its arguments."""
    name, item = f"t{chance.randrange(4)}", f"i{chance.randrange(12)}"
    fields = chance.choice([*ITEMS.values()])[0] | {"id": item, "thread_id": name}
    attachment = file(f"a{chance.randrange(4)}", thread_id=chance.choice([None, name]), metadata={"n": chance.random()})
    page = chance.randrange(1, 6), chance.choice(["asc", "desc"])
    calls: dict[str, tuple[Any, ...]] = {
        "load_thread": (name,),
        "save_thread": (thread(name, title=chance.choice([None, "A", "B"]), metadata={"n": chance.random()}),),
        "load_threads": (page[0], chance.choice([None, name]), page[1]),
        "delete_thread": (name,),
        "load_thread_items": (name, chance.choice([None, item]), *page),
        "add_thread_item": (name, ITEM.validate_python(fields)),
        "save_item": (name, ITEM.validate_python(fields)),
        "load_item": (name, item),
        "delete_thread_item": (name, item),
        "save_attachment": (attachment,),
        "load_attachment": (attachment.id,),
        "delete_attachment": (attachment.id,),
    }
    weights = [1, 3, 3, 0.3, 6, 10, 3, 2, 1, 1, 1, 0.5]
    [method] = chance.choices([*calls], weights)
    return method, (*calls[method], chance.choice(["alice", "alice", "bob"]))


async def outcome(store: Store[str], method: str, arguments: tuple[Any, ...]) -> object:
    """Return what a method returns, or the type of its error."""
    try:
        return await getattr(store, method)(*arguments)
    except (NotFoundError, ConflictError) as error:
        return type(error)


async def assert_like_memory(stores: list[ChatDBStore[str]], seed: int, calls: int) -> None:
    """Assert that each call on one of the stores has the outcome that it has on a store in memory."""
    chance, memory = random.Random(seed), MemoryStore()
    for number in range(calls):
        method, arguments = random_call(chance)
        found = await outcome(chance.choice(stores), method, arguments)
        assert found == await outcome(memory, method, arguments), (seed, number, method, arguments)


@pytest.mark.parametrize("seed", range(2))
async def test_any_calls_in_any_order(db: chatdb.Pool, seed: int) -> None:
    """Two stores on one database do what a store in memory does."""
    await assert_like_memory([store_of(db), store_of(db)], seed, 300)


# round trips


async def each_method(store: Store[str]) -> AsyncIterator[str]:
    """Run each method with and without its options; yield its name after each call."""
    for order in ("asc", "desc"):
        for after in (None, "m2"):
            await store.load_thread_items("t1", after, 2, order, "alice")
            yield f"load_thread_items {order} {after}"
        for after in (None, "t2"):
            await store.load_threads(2, after, order, "alice")
            yield f"load_threads {order} {after}"
    new = f"m{next(_serial) + 100}"
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("load_thread", ("t1",)),
        ("save_thread", (thread("t1", title=new),)),
        ("save_thread", (thread(f"t{new}"),)),
        ("add_thread_item", ("t1", user_message(new))),
        ("save_item", ("t1", user_message(new, "other"))),
        ("save_item", ("t1", user_message(f"{new}b"))),
        ("load_item", ("t1", new)),
        ("delete_thread_item", ("t1", new)),
        ("delete_thread", (f"t{new}",)),
        ("save_attachment", (file(new),)),
        ("save_attachment", (file(new, thread_id="t1"),)),
        ("load_attachment", (new,)),
        ("delete_attachment", (new,)),
    ]
    for method, arguments in calls:
        await getattr(store, method)(*arguments, "alice")
        yield method


async def prepare(store: Store[str]) -> None:
    """Store three threads, and four items in the first."""
    for number in (1, 2, 3):
        await store.save_thread(thread(f"t{number}"), "alice")
    for number in (1, 2, 3, 4):
        await store.add_thread_item("t1", user_message(f"m{number}"), "alice")
    await store.save_attachment(file("a1"), "alice")


@pytest.mark.server_independent
async def test_round_trips(dsn: str) -> None:
    """Each method is one round trip, except a user's first attachment."""
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1) as db:
            store = store_of(db)
            await prepare(store)
            _ = [each async for each in each_method(store)]  # prepares the statements
            counts = {}
            proxy.clear()
            async for name in each_method(store):
                counts[name] = proxy.round_trips
                proxy.clear()
            assert counts == dict.fromkeys(counts, 1)
            assert len(counts) == 8 + 10
            await store.save_attachment(file("a1"), "bob")
            proxy.clear()
            await store.save_attachment(file("a1"), "carol")
            assert proxy.round_trips == 3
            shared = store_of(db, prefix="")
            await shared.save_thread(thread(), "bob")
            for name in ("t1", "t2"):
                proxy.clear()
                await shared.save_thread(thread(name), "bob")
                assert proxy.round_trips == 1


async def test_threads_between_conversations_of_others(db: chatdb.Pool, store: ChatDBStore[str]) -> None:
    """Pages of threads are full, whatever else the user has, and leave out archived threads."""
    names = []
    for number in range(12):
        for _ in range(number % 4):
            await chatdb.create_conversation(db, user_id="alice", key=f"agents:{next(_serial)}")
        await chatdb.create_conversation(db, user_id="alice")
        await store.save_thread(thread(f"t{number}"), "alice")
        names.append(f"t{number}")
    await store.save_attachment(file("a1"), "alice")
    await chatdb.update_conversation(db, user_id="alice", conversation_key="chatkit:t5", archived=True)
    names.remove("t5")
    for order, expected in (("asc", names), ("desc", names[::-1])):
        found: list[str] = []
        after = None
        while True:
            page = await store.load_threads(3, after, order, "alice")
            found += [each.id for each in page.data]
            if not page.has_more:
                break
            assert len(page.data) == 3
            after = page.after
        assert found == expected
    assert (await store.load_thread("t5", "alice")).id == "t5"


# lost answers, cancellation, concurrency


LOST: list[tuple[str, tuple[Any, ...]]] = [
    ("save_thread", (thread("t1", title="new"),)),
    ("save_thread", (thread("t9"),)),
    ("add_thread_item", ("t1", user_message("m9"))),
    ("save_item", ("t1", user_message("m1", "new"))),
    ("save_item", ("t1", user_message("m9"))),
    ("save_attachment", (file("a9"),)),
]


@pytest.mark.server_independent
@pytest.mark.parametrize(("method", "arguments"), LOST, ids=lambda one: one if isinstance(one, str) else "")
@pytest.mark.parametrize("answered", [False, True])
async def test_lost_connections(dsn: str, method: str, arguments: tuple[Any, ...], *, answered: bool) -> None:
    """A write whose statement or answer is lost is sent again, and stored once."""
    lost: list[str] = []

    def watch(statement: Statement) -> bool:
        if not lost and "/* chatdb." in statement.sql and statement.answered is answered:
            lost.append(statement.sql)
            return True
        return False

    memory = MemoryStore()
    await prepare(memory)
    await getattr(memory, method)(*arguments, "alice")
    async with chatdb.create_pool(dsn) as db:
        await prepare(store_of(db))
    with Proxy(dsn, watch=watch) as proxy:
        async with chatdb.create_pool(proxy.dsn) as db:
            store = store_of(db)
            await getattr(store, method)(*arguments, "alice")
            assert lost
            found = [
                [
                    await each.load_threads(50, None, "asc", "alice"),
                    await each.load_thread_items("t1", None, 50, "asc", "alice"),
                    await outcome(each, "load_attachment", ("a9", "alice")),
                ]
                for each in (store, memory)
            ]
            assert found[0] == found[1]


@pytest.mark.parametrize("prefix", ["", "chatkit:"])
async def test_a_thread_keeps_the_values_of_others(dsn: str, prefix: str) -> None:
    """A thread that is saved over a conversation of another program keeps its values, even if the answer is lost."""
    lost: list[str] = []

    def watch(statement: Statement) -> bool:
        if not lost and "/* chatdb.upsert_conversation" in statement.sql and statement.answered:
            lost.append(statement.sql)
            return True
        return False

    async with chatdb.create_pool(dsn) as db:
        await chatdb.create_conversation(db, user_id="alice", key=f"{prefix}t1", title="Old", metadata={"state": 1})
    with Proxy(dsn, watch=watch) as proxy:
        async with chatdb.create_pool(proxy.dsn) as db:
            store = store_of(db, prefix=prefix)
            await store.save_thread(thread(), "alice")
            assert lost
            assert await store.load_thread("t1", "alice") == thread()
            stored = await chatdb.get_conversation(db, user_id="alice", conversation_key=f"{prefix}t1")
            assert stored.metadata is not None
            assert (stored.title, stored.metadata["state"], stored.revision) == ("Trip", 1, 1)


@pytest.mark.server_independent
@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_write_settles(dsn: str, times: int) -> None:
    """A write that was sent is stored before the CancelledError goes on, however often the caller is cancelled."""
    with Proxy(dsn, delay=0.1) as proxy:
        async with chatdb.create_pool(proxy.dsn, max_size=1) as db:
            store = store_of(db)
            await store.save_thread(thread(), "alice")
            for number in range(2):
                proxy.clear()
                task = asyncio.create_task(store.add_thread_item("t1", user_message(f"m{number}"), "alice"))
                await until(lambda: bool(proxy.sent))
                for _ in range(times):
                    task.cancel()
                    await asyncio.sleep(0.01)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert proxy.ready > 0
            task = asyncio.create_task(store.add_thread_item("none", user_message("m1"), "alice"))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            found = await store.load_thread_items("t1", None, 5, "asc", "alice")
            assert [item.id for item in found.data] == ["m0", "m1"]


async def test_concurrent_writers(db: chatdb.Pool) -> None:
    """Two stores add to a thread and to a new user's attachments at once: all is stored once, in one order."""
    stores = [store_of(db), store_of(db)]
    await stores[0].save_thread(thread(), "alice")

    async def write(store: ChatDBStore[str], writer: int) -> None:
        for number in range(10):
            await store.add_thread_item("t1", user_message(f"{writer}-{number}"), "alice")
            await store.save_attachment(file(f"{number}"), "alice")

    await asyncio.gather(*(write(store, number) for number, store in enumerate(stores * 2)))
    found = (await stores[0].load_thread_items("t1", None, 100, "asc", "alice")).data
    for writer in range(4):
        ids = [item.id for item in found if item.id.startswith(f"{writer}-")]
        assert ids == [f"{writer}-{number}" for number in range(10)]
    assert len(found) == 40
    assert await stores[1].load_attachment("9", "alice") == file("9")


async def test_delete_against_add(db: chatdb.Pool) -> None:
    """A thread that one store deletes while the other adds is gone or new: no item of the old one is left."""
    one, other = store_of(db), store_of(db)
    for number in range(20):
        await one.save_thread(thread(), "alice")
        await one.add_thread_item("t1", user_message("old"), "alice")
        added, _ = await asyncio.gather(
            outcome(other, "add_thread_item", ("t1", user_message(f"m{number}"), "alice")),
            one.delete_thread("t1", "alice"),
        )
        assert added in {None, NotFoundError}
        assert await outcome(other, "load_thread", ("t1", "alice")) is NotFoundError
        await other.save_thread(thread(), "alice")
        assert (await one.load_thread_items("t1", None, 5, "asc", "alice")).data == []


# users, other frameworks, errors


async def test_another_user(store: ChatDBStore[str]) -> None:
    """Another user finds nothing and changes nothing, also under the same ids."""
    await prepare(store)
    assert (await store.load_threads(5, None, "desc", "bob")).data == []
    for after, order in product((None, "m1"), ("asc", "desc")):
        assert await store.load_thread_items("t1", after, 5, order, "bob") == Page()
        assert await store.load_thread_items("missing", after, 5, order, "alice") == Page()
        assert await outcome(store, "load_thread_items", ("t1", "missing", 5, order, "alice")) is NotFoundError
    for method, arguments in (
        ("load_thread", ("t1",)),
        ("load_threads", (5, "t1", "asc")),
        ("add_thread_item", ("t1", user_message("m9"))),
        ("save_item", ("t1", user_message("m1", "new"))),
        ("load_item", ("t1", "m1")),
        ("load_attachment", ("a1",)),
    ):
        assert await outcome(store, method, (*arguments, "bob")) is NotFoundError
    for method, arguments in (
        ("delete_thread", ("t1",)),
        ("delete_thread_item", ("t1", "m1")),
        ("delete_attachment", ("a1",)),
    ):
        assert await outcome(store, method, (*arguments, "bob")) is None
    assert len((await store.load_thread_items("t1", None, 9, "asc", "alice")).data) == 4
    assert await store.load_attachment("a1", "alice") == file("a1")


async def test_a_fixed_user_and_no_prefix(db: chatdb.Pool) -> None:
    """A store can belong to one user, and without a prefix its threads are all conversations with a key."""
    store: ChatDBStore[None] = ChatDBStore(db, user_id="alice", prefix="")
    await store.save_thread(thread(), None)
    await store.save_attachment(file("a1"), None)
    made = await chatdb.create_conversation(db, user_id="alice", key="own", title="Own")
    await chatdb.create_conversation(db, user_id="alice", title="without a key")
    own = ThreadMetadata(id="own", title="Own", created_at=made.created_at)
    assert (await store.load_threads(5, None, "asc", None)).data == [thread(), own]
    assert await store.load_thread("own", None) == own
    with pytest.raises(InvalidInputError, match="reserved"):
        await store.load_thread_items(":attachments", None, 5, "asc", None)


async def test_messages_of_others_are_read_as_text(db: chatdb.Pool, store: ChatDBStore[str]) -> None:
    """Messages that ChatKit did not store are items with their text; those of tools and empty ones are left out."""
    await store.save_thread(thread(), "alice")
    here: dict[str, Any] = {"user_id": "alice", "conversation_key": "chatkit:t1"}
    foreign = answer("foreign").model_dump(mode="json")
    others = [
        NewMessage(role="system", content="Be brief."),
        NewMessage(role="user", content="Hello", key="k1", payload=foreign, metadata={"framework": "other"}),
        NewMessage(role="assistant", content=""),
        NewMessage(role="tool", content="rain"),
        NewMessage(role="assistant", content="Hi"),
        NewMessage(role="developer", content="Shorter."),
    ]
    await chatdb.append_messages(db, **here, messages=others)
    await store.add_thread_item("t1", user_message("m1"), "alice")
    for order in ("asc", "desc"):
        found: list[ThreadItem] = []
        after, pages = None, 0
        while True:
            page = await store.load_thread_items("t1", after, 2, order, "alice")
            found += page.data
            pages += 1
            if not page.has_more:
                break
            after = page.after
        assert pages == 4
        ids = ["chatdb:seq:1", "k1", "chatdb:seq:5", "chatdb:seq:6", "m1"]
        assert [item.id for item in found] == (ids if order == "asc" else ids[::-1])
        for item in found:
            assert await store.load_item("t1", item.id, "alice") == item
        kinds = {item.id: (item.type, getattr(item, "content", None)) for item in found}
        assert kinds["chatdb:seq:1"] == ("hidden_context_item", "Be brief.")
        assert kinds["k1"] == ("user_message", [UserMessageTextContent(text="Hello")])
        assert kinds["chatdb:seq:5"] == ("assistant_message", [AssistantMessageContent(text="Hi")])
    for name in ("chatdb:seq:4", "chatdb:seq:99"):
        assert await outcome(store, "load_item", ("t1", name, "alice")) is NotFoundError
    with pytest.raises(InvalidInputError, match="did not store"):
        await store.save_item("t1", user_message("chatdb:seq:1"), "alice")
    await store.delete_thread_item("t1", "chatdb:seq:1", "alice")
    assert len(await chatdb.get_history(db, **here)) == 6


async def test_a_thread_that_others_changed(db: chatdb.Pool, store: ChatDBStore[str]) -> None:
    """A title that others set is the thread's, and a copy of a thread has the name under which it is stored."""
    await store.save_thread(thread(title="A\0" * 600), "alice")
    assert (await store.load_thread("t1", "alice")).title == "A\0" * 600
    here: dict[str, Any] = {"user_id": "alice", "conversation_key": "chatkit:t1"}
    await chatdb.update_conversation(db, **here, title="B", pinned=True)
    assert await store.load_thread("t1", "alice") == thread(title="B")
    await store.save_thread(thread(title=None), "alice")
    stored = await chatdb.get_conversation(db, **here)
    assert (stored.title, stored.pinned_at is not None) == (None, True)
    await store.add_thread_item("t1", user_message("m1"), "alice")
    await chatdb.fork_conversation(db, **here, new_key="chatkit:t2")
    names = [each.id for each in (await store.load_threads(5, None, "asc", "alice")).data]
    assert names == ["t1", "t2"]
    assert (await store.load_thread("t2", "alice")).id == "t2"
    assert (await store.load_item("t2", "m1", "alice")).id == "m1"
    for broken in ("{", "[]", '{"id": 1}', 5, None):
        await chatdb.update_conversation(db, **here, title="C", metadata={"thread": broken})
        found = await store.load_thread("t1", "alice")
        assert (found.id, found.title, found.created_at) == ("t1", "C", stored.created_at)


async def test_long_ids(db: chatdb.Pool, store: ChatDBStore[str]) -> None:
    """Ids that are too long for a key, or that PostgreSQL cannot store, work like any other."""
    for name in ("n" * 300, "a\0b", "a\ud83d", "ñ" * 200):
        await store.save_thread(thread(name), "alice")
        for number in range(3):
            await store.add_thread_item(name, user_message(f"{number}{name}"), "alice")
        await store.save_attachment(file(name), "alice")
        assert (await store.load_thread(name, "alice")).id == name
        page = await store.load_thread_items(name, None, 1, "desc", "alice")
        second = await store.load_thread_items(name, page.after, 1, "desc", "alice")
        assert [each.id for each in (*page.data, *second.data)] == [f"2{name}", f"1{name}"]
        assert (await store.load_item(name, f"0{name}", "alice")).id == f"0{name}"
        assert (await store.load_attachment(name, "alice")).id == name
    found = await store.load_threads(3, None, "asc", "alice")
    last = await store.load_threads(3, found.after, "asc", "alice")
    assert [each.id for each in (*found.data, *last.data)] == ["n" * 300, "a\0b", "a\ud83d", "ñ" * 200]


async def test_bad_input(db: chatdb.Pool, store: ChatDBStore[str]) -> None:
    """What cannot be stored is refused before anything is written, and by its name."""
    await store.save_thread(thread(), "alice")
    here: dict[str, Any] = {"id": "h1", "thread_id": "t1", "created_at": NOW}
    for content in (object(), {"\ud83d": 1}, 10**5000, json.loads("[" * 250 + "]" * 250)):
        with pytest.raises(InvalidInputError):
            await store.add_thread_item("t1", HiddenContextItem(**here, content=content), "alice")
    with pytest.raises(InvalidInputError, match="metadata"):
        await store.save_thread(thread(metadata={"k": "x" * 1024 * 1024}), "alice")
    with pytest.raises(InvalidInputError, match="payload"):
        await store.save_item("t1", SDKHiddenContextItem(**here, content="x" * 17 * 1024 * 1024), "alice")
    for limit, order in ((0, "asc"), (-1, "asc"), (True, "asc"), (1, "up")):
        with pytest.raises(InvalidInputError, match=r"limit|order"):
            await store.load_thread_items("t1", None, limit, order, "alice")
        with pytest.raises(InvalidInputError, match=r"limit|order"):
            await store.load_threads(limit, None, order, "alice")
    for user in ("", "x" * 256):
        with pytest.raises(InvalidInputError, match="user_id"):
            await store.save_thread(thread(), user)
    assert (await store.load_thread("t1", "alice")) == thread()
    assert await store.load_thread_items("t1", None, 10**9, "asc", "alice") == Page()
    assert len((await store.load_threads(10**9, None, "asc", "alice")).data) == 1
    assert title_of(None) is None
    assert readable("ä" * (2**21 + 1)) == "ä" * 2**21


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ChatKit, the import says what to install."""
    monkeypatch.setitem(sys.modules, "chatkit.store", None)
    with pytest.raises(chatdb.ConfigurationError, match=r"pip install 'chatdb\[chatkit\]'"):
        runpy.run_path(str(ROOT / "chatdb" / "adapters" / "chatkit.py"))


async def test_attachments(db: chatdb.Pool, store: ChatDBStore[str]) -> None:
    """Attachments are an archived conversation of the user, which exports and erasure take along, and no thread."""
    image = ImageAttachment.model_validate(
        {
            "id": "a1",
            "name": "cat\0.jpg",
            "mime_type": "image/jpeg",
            "preview_url": "https://host/a?b=ñ",
            "upload_descriptor": {"url": "https://host/up", "method": "PUT", "headers": {"k": "v"}},
            "metadata": {"k": "\ud83d"},
        }
    )
    await store.save_attachment(image, "alice")
    assert await store.load_attachment("a1", "alice") == image
    done = image.model_copy(update={"upload_descriptor": None, "thread_id": "t1"})
    await store.save_attachment(done, "alice")
    assert await store.load_attachment("a1", "alice") == done
    assert (await store.load_threads(5, None, "asc", "alice")).data == []
    [conversation] = await chatdb.list_conversations(db, user_id="alice", archived=True)
    assert (conversation.title, conversation.key, conversation.last_seq) == ("Attachments", "chatkit::attachments", 1)
    [message] = await chatdb.get_history(db, user_id="alice", conversation_id=conversation.id)
    assert (message.role, message.content, message.key) == ("user", "cat\ufffd.jpg", "a1")
    assert message.metadata == {"framework": "chatkit", "type": "attachment"}
    await chatdb.update_conversation(db, user_id="alice", conversation_id=conversation.id, archived=False)
    assert (await store.load_threads(5, None, "asc", "alice")).data == []
    await chatdb.delete_user(db, user_id="alice")
    assert await outcome(store, "load_attachment", ("a1", "alice")) is NotFoundError


@pytest.fixture
def protected(databases: Databases, roles: Roles) -> Iterator[str]:
    """Yield the service's DSN of a database with row-level security."""
    with cloned(databases, roles) as dsn:
        protect_tables(as_role(dsn, roles.owner))
        yield as_role(dsn, roles.app)


@pytest.mark.owner
@pytest.mark.server_independent
async def test_row_level_security(protected: str) -> None:
    """Behind row-level security the store does the same, in three round trips a call."""
    with Proxy(protected) as proxy:
        async with chatdb.create_pool(proxy.dsn, row_level_security=True, max_size=2) as db:
            store = store_of(db)
            await assert_like_memory([store], 7, 100)
            await prepare(store)
            _ = [each async for each in each_method(store)]
            proxy.clear()
            async for name in each_method(store):
                assert proxy.round_trips == 3, name
                proxy.clear()


# a server over HTTP


class Parrot(Model):
    """A model that answers with the number and the text of the messages that it gets, a word at a time."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.is_stuck = False

    async def get_response(self, *_: Any, **__: Any) -> ModelResponse:
        """Answer at once, which a server does not ask for."""
        raise NotImplementedError

    async def stream_response(self, *arguments: Any, **_: Any) -> AsyncIterator[TResponseStreamEvent]:
        """Answer in events."""
        messages = arguments[1]
        self.inputs.append(messages)
        numbers = count()
        words = f"{len(messages)}: {messages[-1]['content'][0]['text']}".split(" ")
        message = ResponseOutputMessage(
            id=f"msg_{len(self.inputs)}", type="message", role="assistant", status="in_progress", content=[]
        )
        at: dict[str, Any] = {"item_id": message.id, "output_index": 0, "content_index": 0}
        yield ResponseOutputItemAddedEvent(
            item=message, output_index=0, sequence_number=next(numbers), type="response.output_item.added"
        )
        text = ResponseOutputText(text="", type="output_text", annotations=[])
        yield ResponseContentPartAddedEvent(
            **at, part=text, sequence_number=next(numbers), type="response.content_part.added"
        )
        for word in words:
            yield ResponseTextDeltaEvent(
                **at, delta=f"{word} ", logprobs=[], sequence_number=next(numbers), type="response.output_text.delta"
            )
            await asyncio.sleep(60 if self.is_stuck else 0)
        text = ResponseOutputText(text=" ".join(words), type="output_text", annotations=[])
        yield ResponseContentPartDoneEvent(
            **at, part=text, sequence_number=next(numbers), type="response.content_part.done"
        )
        message = message.model_copy(update={"content": [text], "status": "completed"})
        yield ResponseOutputItemDoneEvent(
            item=message, output_index=0, sequence_number=next(numbers), type="response.output_item.done"
        )
        output = ModelOutput(
            id=f"resp_{len(self.inputs)}",
            created_at=0,
            model="parrot",
            object="response",
            output=[message],
            tool_choice="none",
            tools=[],
            parallel_tool_calls=False,
        )
        yield ResponseCompletedEvent(response=output, sequence_number=next(numbers), type="response.completed")


class Converter(ThreadItemConverter):
    """Shows the model the name of an attachment."""

    async def attachment_to_message_content(self, attachment: Attachment) -> ResponseInputTextParam:
        """Return the name."""
        return {"type": "input_text", "text": attachment.name}


class ParrotServer(ChatKitServer[str]):
    """A server whose agent gets the newest items of the thread."""

    def __init__(self, store: Store[str]) -> None:
        super().__init__(store)
        self.model = Parrot()
        self.agent = Agent[Any](name="Parrot", model=self.model)

    async def respond(
        self, thread: ThreadMetadata, input_user_message: UserMessageItem | None, context: str
    ) -> AsyncIterator[ThreadStreamEvent]:
        """Run the agent."""
        page = await self.store.load_thread_items(thread.id, None, 20, "desc", context)
        items = await Converter().to_agent_input(page.data[::-1])
        thread.title = thread.title or f"About {len(items)}"
        agent_context = AgentContext[str](thread=thread, store=self.store, request_context=context)
        config = RunConfig(tracing_disabled=True)
        run = Runner.run_streamed(self.agent, items, context=agent_context, run_config=config)
        async for event in stream_agent_response(agent_context, run):
            yield event


def service_of(server: ParrotServer) -> FastAPI:
    """Return a service whose requests name their user in a header."""
    app = FastAPI()

    @app.post("/chatkit")
    async def chatkit(request: Request) -> Response:
        result = await server.process(await request.body(), request.headers["x-user"])
        if isinstance(result, StreamingResult):
            return StreamingResponse(result, media_type="text/event-stream")
        return Response(result.json, media_type="application/json")

    return app


class Client:
    """A client of a service."""

    def __init__(self, app: FastAPI) -> None:
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")

    async def send(self, kind: str, user: str = "alice", **params: Any) -> Any:
        """Return the JSON of an answer, or of each event of a streamed one."""
        body = {"type": kind, "params": params}
        found = await self._client.post("/chatkit", json=body, headers={"x-user": user})
        found.raise_for_status()
        if found.headers["content-type"] == "application/json":
            return found.json()
        return [json.loads(line.removeprefix("data: ")) for line in found.text.split("\n\n") if line]

    @staticmethod
    def input(text: str, *attachments: str) -> dict[str, Any]:
        """Return what the user enters."""
        parts = [{"type": "input_text", "text": text}]
        return {"content": parts, "attachments": attachments, "inference_options": {}}


def texts(page: dict[str, Any]) -> list[str]:
    """Return the texts of a page of items."""
    return [part["text"] for item in page["data"] for part in item["content"]]


async def test_a_server_over_http(db: chatdb.Pool) -> None:
    """A server with an agent keeps threads, answers and titles, retries, and shows nothing to another user."""
    server = ParrotServer(store_of(db))
    client = Client(service_of(server))
    await server.store.save_attachment(file("a1"), "alice")
    events = await client.send("threads.create", input=client.input("Hello", "a1"))
    assert [event for event in events if event["type"] == "error"] == []
    name = events[0]["thread"]["id"]
    assert (await server.store.load_attachment("a1", "alice")).thread_id == name
    for number in range(30):
        await client.send("threads.add_user_message", thread_id=name, input=client.input(f"Question {number}"))
    assert len(server.model.inputs[-1]) == 20
    whole = await client.send("threads.get_by_id", thread_id=name)
    assert whole["title"] == "About 1"
    assert texts(whole["items"])[:4] == ["Hello", "1: Hello", "Question 0", "3: Question 0"]
    found: list[str] = []
    after = None
    while True:
        page = await client.send("items.list", thread_id=name, after=after, order="asc", limit=7)
        found += texts(page)
        if not page["has_more"]:
            break
        after = page["after"]
    assert len(found) == 62
    assert found[-1] == "20: Question 29"
    stored = await chatdb.get_history(db, user_id="alice", conversation_key=f"chatkit:{name}")
    assert [message.content for message in stored] == ["Hello\na1.txt", *found[1:]]

    fifth = (await client.send("items.list", thread_id=name, order="asc", limit=10))["data"][8]["id"]
    await client.send("threads.retry_after_item", thread_id=name, item_id=fifth)
    page = await client.send("items.list", thread_id=name, order="asc", limit=100)
    assert texts(page)[-2:] == ["Question 3", "9: Question 3"]
    assert len(page["data"]) == 10

    await client.send("threads.update", thread_id=name, title="Renamed")
    await client.send("threads.create", user="bob", input=client.input("Mine"))
    for _ in range(4):
        await client.send("threads.create", input=client.input("Another"))
    listed = await client.send("threads.list", limit=3)
    rest = await client.send("threads.list", limit=3, after=listed["after"])
    assert [each["title"] for each in listed["data"] + rest["data"]] == ["About 1"] * 4 + ["Renamed"]
    assert (listed["has_more"], rest["has_more"]) == (True, False)
    assert (await client.send("items.list", user="bob", thread_id=name))["data"] == []
    with pytest.raises(NotFoundError):
        await client.send("threads.get_by_id", user="bob", thread_id=name)
    await client.send("threads.delete", user="bob", thread_id=name)
    await client.send("threads.get_by_id", thread_id=name)
    await client.send("threads.delete", thread_id=name)
    with pytest.raises(NotFoundError):
        await client.send("threads.get_by_id", thread_id=name)


@pytest.mark.server_independent
async def test_the_pages_code(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's service answers, its move brings the threads of another store, and its queries find them."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    page = (ROOT / "docs" / "adapters" / "chatkit.md").read_text(encoding="utf-8")
    service_code, read_code, move_code = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    service: dict[str, Any] = {"__name__": "service"}
    exec(service_code, service)
    app = service["app"]
    async with app.router.lifespan_context(app):
        client = Client(app)
        events = await client.send("threads.create", input=client.input("Hello"))
        name = events[0]["thread"]["id"]
        found = await client.send("threads.get_by_id", thread_id=name)
        assert texts(found["items"]) == ["Hello", "You said: Hello"]

        memory = MemoryStore()
        await prepare(memory)
        await memory.add_thread_item("t1", answer("m5"), "alice")
        names: dict[str, Any] = {"chatdb": chatdb, "db": app.state.db, "name": name}
        exec(move_code, names)
        for _ in range(2):
            await names["move"](memory, store_of(app.state.db), "alice")
        for number in (1, 2, 3):
            for order in ("asc", "desc"):
                arguments = (f"t{number}", None, 9, order, "alice")
                stored = await store_of(app.state.db).load_thread_items(*arguments)
                assert stored == await memory.load_thread_items(*arguments)
        await outcome(memory, "load_thread", ("t1", "alice"))
        exec(f"async def read():\n{indent(read_code, '    ')}\n    return locals()", names)
        read = await names["read"]()
        assert [message.content for message in read["messages"]] == ["Hello", "You said: Hello"]
        assert read["conversation"].key == f"chatkit:{name}"


async def test_a_cancelled_stream(db: chatdb.Pool) -> None:
    """If the client goes away while the answer is written, the server stores the part of it that was sent."""
    server = ParrotServer(store_of(db))
    server.model.is_stuck = True
    body = {"type": "threads.create", "params": {"input": Client.input("Hello")}}
    result = await server.process(json.dumps(body), "alice")
    assert isinstance(result, StreamingResult)
    seen: list[bytes] = []

    async def read_each() -> None:
        async for event in result:
            seen.append(event)  # noqa: PERF401 - the test reads it meanwhile

    task = asyncio.create_task(read_each())
    await until(lambda: any(b"assistant_message.content_part.text_delta" in event for event in seen))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [kept] = (await server.store.load_threads(5, None, "asc", "alice")).data
    items = (await server.store.load_thread_items(kept.id, None, 9, "asc", "alice")).data
    assert [item.type for item in items] == ["user_message", "assistant_message", "sdk_hidden_context"]
    assert isinstance(items[1], AssistantMessageItem)
    assert items[1].content[0].text == "1: "
