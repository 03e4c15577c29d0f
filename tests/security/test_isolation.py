"""
Two users call any operations in any order on the same ids and keys, and never see or change the other's rows.

A model in plain Python predicts each answer. A snapshot of the tables shows whose rows changed.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import chatdb
from chatdb import (
    UNSET,
    ChatDBError,
    ConflictError,
    Conversation,
    ConversationNotFoundError,
    Deleted,
    JsonText,
    Message,
    MessageNotFoundError,
    NewMessage,
)
from chatdb.admin.row_security import protect_tables
from chatdb.formats.items import Item, SourceConversation, SourceMessage
from chatdb.transfer.exporter import export_conversations
from chatdb.transfer.importer import import_conversations
from tests.support.calls import CONVERSATION_CALLS, MISSING, iterated
from tests.support.databases import as_role, cloned
from tests.support.pgbouncer import pgbouncer
from tests.support.roles import Roles

OF_USERS = {
    name
    for name in chatdb.__all__
    if inspect.isfunction(function := getattr(chatdb, name)) and "user_id" in inspect.signature(function).parameters
} - {"transaction"}
"""The public functions on what users own."""

_example = itertools.count(1)


class Counting:
    """A database handle that records its statements."""

    def __init__(self, db: chatdb.pool.Pool) -> None:
        self._db = db
        self.sent: list[str] = []

    async def fetch(self, query: str, /, *args: Any, timeout: float | None = None) -> list[Any]:
        """Run a statement and record it."""
        self.sent.append(query)
        return await self._db.fetch(query, *args, timeout=timeout)


class Model:
    """One user's data, and each function's effect on it."""

    def __init__(self, user: str) -> None:
        self.user = user
        self.conversations: dict[int, Conversation] = {}
        self.messages: dict[int, dict[int, Message]] = {}

    def add(self, conversation: Conversation) -> None:
        """Add a stored conversation."""
        self.conversations[conversation.id] = conversation
        self.messages[conversation.id] = {}

    def by_key(self, key: str | None) -> Conversation | None:
        """Find a conversation by its key."""
        found = (item for item in self.conversations.values() if key is not None and item.key == key)
        return next(found, None)

    def page(self, limit: int, before: Conversation | None) -> list[Conversation]:
        """List conversations, latest activity first."""
        ordered = sorted(self.conversations.values(), key=lambda item: (item.updated_at, item.id), reverse=True)
        if before is not None:
            ordered = [item for item in ordered if (item.updated_at, item.id) < (before.updated_at, before.id)]
        return ordered[:limit]

    def message_by_key(self, number: int, key: str | None) -> Message | None:
        """Find a message by its key."""
        found = (item for item in self.messages[number].values() if key is not None and item.key == key)
        return next(found, None)

    def append(self, number: int, batch: list[NewMessage], answer: Any) -> list[Message] | type[ConflictError]:
        """Append messages. The ids and the time come from `answer`, because the model cannot predict them."""
        stored = [self.message_by_key(number, item.key) for item in batch]
        if any(stored):
            same = (found is not None and body(found) == body(item) for found, item in zip(stored, batch, strict=True))
            return [found for found in stored if found] if all(same) else ConflictError
        conversation = self.conversations[number]
        now = answer[0].created_at
        assert now >= conversation.updated_at
        new = [
            Message(
                id=given.id,
                conversation_id=number,
                user_id=self.user,
                seq=conversation.last_seq + place,
                role=item.role,
                content=item.content,
                payload=as_text(item.payload),
                metadata=item.metadata,
                token_count=item.token_count,
                key=item.key,
                created_at=now,
            )
            for place, (item, given) in enumerate(zip(batch, answer, strict=True), start=1)
        ]
        self.messages[number] |= {message.seq: message for message in new}
        changes = {"last_seq": conversation.last_seq + len(new), "updated_at": now}
        self.conversations[number] = conversation.model_copy(update=changes)
        return new

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rows that the tables should hold."""
        messages = (message for number in self.messages for message in self.messages[number].values())
        return (
            [self.conversations[number].model_dump() for number in sorted(self.conversations)],
            [item.model_dump() for item in sorted(messages, key=lambda item: (item.conversation_id, item.seq))],
        )


def as_text(payload: Any) -> JsonText | None:
    """Return the JSON text that chatdb stores for a payload."""
    return payload if payload is None or isinstance(payload, JsonText) else JsonText(json.dumps(payload))


def body(message: Message | NewMessage) -> tuple[Any, ...]:
    """Return the fields that must be equal when a key is used again."""
    return message.role, message.content, as_text(message.payload), message.metadata


async def outcome(call: Coroutine[Any, Any, Any]) -> Any:
    """Return a call's result, or the error that it raises."""
    try:
        return await call
    except ChatDBError as error:
        return error


SNAPSHOT_CONVERSATIONS = """
    select id, user_id, key, title, metadata::text as metadata, last_seq, created_at, updated_at,
        c::text as whole, xmin::text, ctid::text
    from chatdb.conversations as c where user_id = any($1) order by user_id, id
"""
SNAPSHOT_MESSAGES = """
    select id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
        token_count, key, created_at, m::text as whole, xmin::text, ctid::text
    from chatdb.messages as m where user_id = any($1) order by user_id, conversation_id, seq
"""

users = st.sampled_from((0, 1))
conversations = st.sampled_from((0, 1, 1, 1, 2, 3, 4, 5, 6))
places = st.sampled_from((0, 0, 1, 1, 2, 3, 4, 6))
limits = st.integers(1, 4)
keys = st.sampled_from((None, "k", "l", "m"))
titles = st.sampled_from((None, "", "title"))
metadata = st.sampled_from((None, {}, {"m": 1}))
payloads = st.sampled_from((None, {"p": 1}, JsonText('{"p": 1}'), JsonText('{ "p":1 }')))
contents = st.sampled_from(("", "a", "b"))
token_counts = st.sampled_from((None, 0, 7))


def messages(keys: st.SearchStrategy[str | None]) -> st.SearchStrategy[NewMessage]:
    """Draw any message, or a plain one that is likely to repeat a body."""
    role = st.sampled_from(("user", "assistant"))
    plain = st.builds(partial(NewMessage, role="user", content="a"), key=keys)
    return plain | st.builds(
        NewMessage,
        role=role,
        content=contents,
        payload=payloads,
        metadata=metadata,
        token_count=token_counts,
        key=keys,
    )


def batches(keys: st.SearchStrategy[str | None]) -> st.SearchStrategy[list[NewMessage]]:
    """Draw a batch of messages with distinct keys."""
    return st.lists(messages(keys), max_size=3, unique_by=lambda message: message.key or object())


def or_unset(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw one of the values, or UNSET."""
    return st.just(UNSET) | values


class Isolation(RuleBasedStateMachine):
    """
    Two users call every public function with ids of their own, of the other user, and of nobody.

    A third user has the same ids and keys and makes no calls.
    """

    def __init__(
        self, run: Callable[[Coroutine[Any, Any, Any]], Any], db: Any, admin: chatdb.pool.Pool, called: set[str]
    ) -> None:
        super().__init__()
        self.run = run
        self.db = db
        self.admin = admin
        self.called = called
        number = next(_example)
        self.shared = -number
        self.models = [Model(f"{name} {number}") for name in ("ada", "bob", "eve")]
        self.ids = [MISSING, self.shared]
        self.cursors: list[Conversation | None] = [None]
        self.content: list[Any] = []

    @initialize()
    def begin(self) -> None:
        """Create two conversations for every user, with the same id, key and message keys."""
        for model in self.models:
            for conversation in (self.adopt(model), self.create(model, title=None, key="k", metadata=None)):
                for key in ("k", "l"):
                    self.append_to(model, conversation.id, NewMessage(role="user", content="a", key=key))

    def adopt(self, model: Model) -> Conversation:
        """Store a conversation under an id that other users also have, as adopted tables can."""
        sql = "insert into chatdb.conversations (id, user_id) values ($1, $2)"
        self.run(self.admin.execute(sql, self.shared, model.user))
        get = chatdb.get_conversation(self.db, user_id=model.user, conversation_id=self.shared)
        model.add(self.run(get))
        self.content = self.snapshot()
        return model.conversations[self.shared]

    def create(self, model: Model, **fields: Any) -> Conversation:
        """Create or get a conversation by its key."""
        answer = self.call(model, chatdb.create_conversation, **fields)
        stored = model.by_key(fields["key"])
        if stored is None:
            assert answer.id not in self.ids
            stored = Conversation(
                id=answer.id,
                user_id=model.user,
                last_seq=0,
                created_at=answer.created_at,
                updated_at=answer.created_at,
                **fields,
            )
            model.add(stored)
            self.ids.append(answer.id)
        self.settle(model, answer, stored)
        return stored

    def append_to(self, model: Model, number: int, message: NewMessage) -> None:
        """Append one message."""
        answer = self.call(model, chatdb.append_message, number, **dict(message))
        if number in model.conversations:
            expected = model.append(number, [message], [answer])
            self.settle(model, answer, expected if isinstance(expected, type) else expected[0])

    # helpers

    def conversation(self, index: int) -> int:
        """Return the id of a conversation that exists, was deleted, or never existed."""
        return self.ids[index % len(self.ids)]

    def snapshot(self) -> list[Any]:
        """Return each user's rows with their versions."""
        names = [model.user for model in self.models]
        conversations = self.run(self.admin.fetch(SNAPSHOT_CONVERSATIONS, names))
        messages = self.run(self.admin.fetch(SNAPSHOT_MESSAGES, names))
        return [
            tuple([row for row in rows if row["user_id"] == name] for rows in (conversations, messages))
            for name in names
        ]

    def call(self, model: Model, function: Callable[..., Any], number: int | None = None, **arguments: Any) -> Any:
        """
        Call a function and check that the other users' rows are unchanged.

        If the user does not have the conversation, the call must send the same statements and raise the same error as
        for an unused id.
        """
        self.called.add("iter_messages" if function is iterated else function.__name__)
        about = {} if number is None else {"conversation_id": number}
        counting = Counting(self.db)
        answer = self.run(outcome(function(counting, user_id=model.user, **about, **arguments)))
        before, self.content = self.content, self.snapshot()
        for other, old, new in zip(self.models, before, self.content, strict=True):
            assert other is model or old == new
        if number is not None and number not in model.conversations:
            missing = Counting(self.db)
            nobodys = self.run(outcome(function(missing, user_id=model.user, conversation_id=MISSING, **arguments)))
            assert type(answer) is type(nobodys) is ConversationNotFoundError
            assert (answer.args, vars(answer)) == (nobodys.args, vars(nobodys))
            assert type(answer.__cause__) is type(nobodys.__cause__)
            assert counting.sent == missing.sent
            self.settle(model, None, None)
        return answer

    def settle(self, model: Model, answer: Any, expected: Any) -> None:
        """Check the answer and the user's rows against the model."""
        if isinstance(expected, type):
            assert type(answer) is expected
        else:
            assert answer == expected
        for found, rows in zip(self.content[self.models.index(model)], model.rows(), strict=True):
            decoded = [dict(row) | {"metadata": row["metadata"] and json.loads(row["metadata"])} for row in found]
            for row in decoded:
                del row["whole"], row["xmin"], row["ctid"]
            assert decoded == rows
        for item in answer if isinstance(answer, list) else [answer]:
            if isinstance(item, Conversation):
                self.cursors.append(item)

    # conversations

    @rule(user=users, title=titles, key=keys, metadata=metadata)
    def create_conversation(self, user: int, **fields: Any) -> None:
        """Create or get a conversation by its key."""
        self.create(self.models[user], **fields)

    @rule(user=users)
    def adopt_again(self, user: int) -> None:
        """Store the deleted conversation with the shared id again."""
        if self.shared not in self.models[user].conversations:
            self.adopt(self.models[user])

    @rule(user=users, index=conversations)
    def get_conversation(self, user: int, index: int) -> None:
        """Get a conversation by its id."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.get_conversation, number)
        if number in model.conversations:
            self.settle(model, answer, model.conversations[number])

    @rule(user=users, key=keys.filter(bool) | st.just("unknown"))
    def get_conversation_by_key(self, user: int, key: str) -> None:
        """Get a conversation by its key."""
        model = self.models[user]
        answer = self.call(model, chatdb.get_conversation_by_key, key=key)
        self.settle(model, answer, model.by_key(key) or ConversationNotFoundError)

    @rule(user=users, limit=limits, cursor=st.integers(0, 20))
    def list_conversations(self, user: int, limit: int, cursor: int) -> None:
        """List conversations after any user's conversation."""
        model, before = self.models[user], self.cursors[cursor % len(self.cursors)]
        answer = self.call(model, chatdb.list_conversations, limit=limit, before=before)
        self.settle(model, answer, model.page(limit, before))

    @rule(user=users, index=conversations, title=or_unset(titles), metadata=or_unset(metadata))
    def update_conversation(self, user: int, index: int, **fields: Any) -> None:
        """Update a conversation."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.update_conversation, number, **fields)
        if number in model.conversations:
            changes = {name: value for name, value in fields.items() if value is not UNSET}
            model.conversations[number] = model.conversations[number].model_copy(update=changes)
            self.settle(model, answer, model.conversations[number])

    @rule(user=users, index=conversations)
    def delete_conversation(self, user: int, index: int) -> None:
        """Delete a conversation."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.delete_conversation, number)
        if number in model.conversations:
            del model.conversations[number]
            self.settle(model, answer, Deleted(conversations=1, messages=len(model.messages.pop(number))))

    @rule(user=users, sure=st.integers(0, 3).map(lambda draw: draw == 0))
    def delete_user(self, user: int, sure: bool) -> None:
        """Delete a user's data in some of the draws."""
        if not sure:
            return
        model = self.models[user]
        counts = Deleted(
            conversations=len(model.conversations), messages=sum(len(found) for found in model.messages.values())
        )
        model.conversations.clear()
        model.messages.clear()
        self.settle(model, self.call(model, chatdb.delete_user), counts)

    # messages

    @rule(user=users, index=conversations, message=messages(keys))
    def append_message(self, user: int, index: int, message: NewMessage) -> None:
        """Append a message."""
        self.append_to(self.models[user], self.conversation(index), message)

    @rule(user=users, index=conversations, batch=batches(st.none()) | batches(keys.filter(bool)) | batches(keys))
    def append_messages(self, user: int, index: int, batch: list[NewMessage]) -> None:
        """Append a batch."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.append_messages, number, messages=batch)
        if number in model.conversations:
            self.settle(model, answer, model.append(number, batch, answer) if batch else [])

    @rule(user=users, index=conversations, limit=limits, before_seq=st.none() | places)
    def get_history(self, user: int, index: int, limit: int, before_seq: int | None) -> None:
        """Read the newest messages."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.get_history, number, limit=limit, before_seq=before_seq)
        if number in model.conversations:
            found = [item for seq, item in model.messages[number].items() if before_seq is None or seq < before_seq]
            self.settle(model, answer, found[-limit:])

    @rule(user=users, index=conversations, limit=limits, after_seq=places)
    def list_messages(self, user: int, index: int, limit: int, after_seq: int) -> None:
        """List the messages after a `seq`."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.list_messages, number, limit=limit, after_seq=after_seq)
        if number in model.conversations:
            found = [item for seq, item in model.messages[number].items() if seq > after_seq]
            self.settle(model, answer, found[:limit])

    @rule(user=users, index=conversations, batch=limits, after_seq=places)
    def iter_messages(self, user: int, index: int, batch: int, after_seq: int) -> None:
        """Iterate over all messages after a `seq`."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, iterated, number, batch=batch, after_seq=after_seq)
        if number in model.conversations:
            self.settle(model, answer, [item for seq, item in model.messages[number].items() if seq > after_seq])

    @rule(user=users, index=conversations, seq=places)
    def get_message(self, user: int, index: int, seq: int) -> None:
        """Get a message by its `seq`."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.get_message, number, seq=seq)
        if number in model.conversations:
            self.settle(model, answer, model.messages[number].get(seq, MessageNotFoundError))

    @rule(user=users, index=conversations, key=keys.filter(bool) | st.just("unknown"))
    def get_message_by_key(self, user: int, index: int, key: str) -> None:
        """Get a message by its key."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.get_message_by_key, number, key=key)
        if number in model.conversations:
            self.settle(model, answer, model.message_by_key(number, key) or MessageNotFoundError)

    @rule(
        user=users,
        index=conversations,
        seq=places,
        content=or_unset(contents),
        payload=or_unset(payloads),
        metadata=or_unset(metadata),
        token_count=or_unset(token_counts),
    )
    def update_message(self, user: int, index: int, seq: int, **fields: Any) -> None:
        """Update a message."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.update_message, number, seq=seq, **fields)
        if number in model.conversations:
            found = model.messages[number].get(seq)
            if found is not None:
                changes = {name: value for name, value in fields.items() if value is not UNSET}
                if "payload" in changes:
                    changes["payload"] = as_text(changes["payload"])
                found = model.messages[number][seq] = found.model_copy(update=changes)
            self.settle(model, answer, found or MessageNotFoundError)

    @rule(user=users, index=conversations, seq=places)
    def delete_message(self, user: int, index: int, seq: int) -> None:
        """Delete a message."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.delete_message, number, seq=seq)
        if number in model.conversations:
            gone = model.messages[number].pop(seq, None)
            self.settle(model, answer, Deleted(conversations=0, messages=1) if gone else MessageNotFoundError)

    @rule(user=users, index=conversations, seq=places)
    def delete_messages_after(self, user: int, index: int, seq: int) -> None:
        """Delete the messages after a `seq`."""
        model, number = self.models[user], self.conversation(index)
        answer = self.call(model, chatdb.delete_messages_after, number, seq=seq)
        if number in model.conversations:
            gone = [place for place in model.messages[number] if place > seq]
            for place in gone:
                del model.messages[number][place]
            self.settle(model, answer, Deleted(conversations=0, messages=len(gone)))


@pytest.fixture
def runner(pytestconfig: pytest.Config) -> Iterator[asyncio.Runner]:
    """Yield an event loop for tests that are not coroutines."""
    factory = uvloop.new_event_loop if pytestconfig.getoption("--uvloop") else None
    with asyncio.Runner(loop_factory=factory) as found:
        yield found


@pytest.mark.timeout(600)  # hypothesis takes up to five minutes to find the shortest sequence that fails
def test_users_share_nothing(dsn: str, runner: asyncio.Runner, arguments_of: Callable[[str], dict[str, Any]]) -> None:
    """Any sequence of calls returns what the model predicts and leaves other users' rows unchanged."""
    with started(runner, **arguments_of(dsn)) as db:
        run_isolation(runner, db, db, examples=60)


@contextmanager
def started(runner: asyncio.Runner, dsn: str, **options: Any) -> Iterator[chatdb.pool.Pool]:
    """Open a pool of one connection on the runner's loop."""

    async def start() -> chatdb.pool.Pool:
        return await chatdb.create_pool(dsn, max_size=1, **options)

    db = runner.run(start())
    yield db
    runner.run(db.close())


def run_isolation(runner: asyncio.Runner, db: Any, admin: chatdb.pool.Pool, *, examples: int) -> None:
    """Run sequences of calls on `db`; `admin` sees all rows."""
    called: set[str] = set()
    run_state_machine_as_test(
        # runner.run installs a Ctrl-C handler on every call, which costs a quarter of the test's time
        partial(Isolation, runner.get_loop().run_until_complete, db, admin, called),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate, Phase.shrink),
        ),
    )
    assert called == OF_USERS


class InTransactions:
    """A database handle that runs each statement in a transaction of its user."""

    def __init__(self, pool: chatdb.pool.Pool) -> None:
        self._pool = pool

    async def fetch(self, query: str, /, *args: Any, timeout: float | None = None) -> list[Any]:
        """Run a statement whose first argument is `user_id`."""
        async with chatdb.transaction(self._pool, user_id=args[0]) as connection:
            return await connection.fetch(query, *args, timeout=timeout)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_users_share_nothing_behind_both_walls(
    server: str, roles: Roles, tmp_path: Path, runner: asyncio.Runner, pytestconfig: pytest.Config
) -> None:
    """The same holds for an unprivileged role with row-level security on one PgBouncer connection."""
    examples = 6 if pytestconfig.getoption("--quick") else 60
    with cloned(server, roles, f"{roles.database}_isolation") as dsn:
        protect_tables(as_role(dsn, roles.owner))
        with (
            pgbouncer(as_role(dsn, roles.app), tmp_path, "1.24", default_pool_size=1) as pooled,
            started(runner, pooled) as db,
            started(runner, dsn) as admin,
        ):
            run_isolation(runner, InTransactions(db), admin, examples=examples)
    print(f"figure: {examples} sequences of 40 calls by 2 users, behind both walls and one pooled connection: 0 shared")


def test_every_function_on_a_conversation_is_called():
    """The table of calls lists every function with a `conversation_id`."""
    functions = {name for name in OF_USERS if "conversation_id" in inspect.signature(getattr(chatdb, name)).parameters}
    assert set(CONVERSATION_CALLS) == functions


@pytest.mark.parametrize("name", CONVERSATION_CALLS)
async def test_a_foreign_conversation_looks_like_a_missing_one(db, name):
    """Both raise the same error after the same statement, and the other user's rows are unchanged."""
    conversation = await chatdb.create_conversation(db, user_id="bob", key="k")
    here = {"user_id": "bob", "conversation_id": conversation.id}
    for content in ("a", "b"):
        await chatdb.append_message(db, role="user", content=content, key="k" if content == "a" else None, **here)
    before = [await chatdb.get_conversation(db, **here), await chatdb.list_messages(db, **here)]
    function = iterated if name == "iter_messages" else getattr(chatdb, name)

    async def call(number: int) -> tuple[Any, ...]:
        counting = Counting(db)
        with pytest.raises(ChatDBError) as caught:
            await function(counting, user_id="ada", conversation_id=number, **CONVERSATION_CALLS[name])
        return type(caught.value), caught.value.args, vars(caught.value), caught.value.__cause__, counting.sent

    foreign, missing = await call(conversation.id), await call(MISSING)
    assert foreign == missing
    assert foreign[0] is ConversationNotFoundError
    assert len(foreign[-1]) == 1
    assert [await chatdb.get_conversation(db, **here), await chatdb.list_messages(db, **here)] == before


async def test_a_foreign_key_looks_like_a_missing_one(db):
    """Another user's key is not found, and the user can create a conversation with the same key."""
    other = await chatdb.create_conversation(db, user_id="bob", key="k", title="bob's")
    errors = []
    for key in ("k", "unknown"):
        with pytest.raises(ConversationNotFoundError) as caught:
            await chatdb.get_conversation_by_key(db, user_id="ada", key=key)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    own = await chatdb.create_conversation(db, user_id="ada", key="k")
    assert (own.id != other.id, own.title) == (True, None)


async def test_the_other_users_cursor_pages_ones_own_list(db):
    """Another user's conversation in `before` only sets a time."""
    own = [await chatdb.create_conversation(db, user_id="ada") for _ in range(2)]
    other = await chatdb.create_conversation(db, user_id="bob")
    last = await chatdb.create_conversation(db, user_id="ada")
    assert await chatdb.list_conversations(db, user_id="ada", before=other) == own[::-1]
    assert await chatdb.list_conversations(db, user_id="bob", before=last) == [other]
    assert await chatdb.list_conversations(db, user_id="bob", before=other) == []


async def test_import_and_export_keep_to_the_user(db):
    """Import and export read and write only their user's rows."""
    time = datetime(2026, 1, 1, tzinfo=UTC)
    others = ["aaron", "zed"]

    def file(length: int) -> Iterator[Item]:
        for key in ("k", None):
            yield SourceConversation(key, None, None, length, time, time)
            for seq in range(1, length + 1):
                yield SourceMessage(seq, "user", "ada's", None, None, None, None, time)

    async def adopt(user: str) -> None:
        """Store conversations that differ only in their texts."""
        await db.executemany(
            """
            insert into chatdb.conversations (id, user_id, key, last_seq, created_at, updated_at)
            values ($1, $2, $3, 1, $4, $4)
            """,
            [(1, user, "k", time), (2, user, None, time)],
        )
        await db.executemany(
            """
            insert into chatdb.messages (conversation_id, user_id, seq, role, content, created_at)
            values ($1, $2, 1, 'user', 'theirs', $3)
            """,
            [(number, user, time + timedelta(hours=1)) for number in (1, 2)],
        )

    await adopt(others[0])
    first = await import_conversations(db, user_id="ada", items=file(1))
    assert (first.conversations, first.stored_conversations, first.messages) == (2, 0, 2)
    await adopt(others[1])
    snapshots = (SNAPSHOT_CONVERSATIONS, SNAPSHOT_MESSAGES)
    before = [await db.fetch(sql, others) for sql in snapshots]

    again = await import_conversations(db, user_id="ada", items=file(1))
    assert (again.conversations, again.stored_conversations, again.messages) == (0, 2, 0)
    grown = await import_conversations(db, user_id="ada", items=file(3))
    assert (grown.conversations, grown.extended_conversations, grown.messages) == (0, 2, 4)
    assert [await db.fetch(sql, others) for sql in snapshots] == before

    records = [record async for record in export_conversations(db, user_id="ada")]
    assert {record.user_id for record in records} == {"ada"}
    assert [record.content for record in records if isinstance(record, Message)] == ["ada's"] * 6
    assert {record.id for record in records if isinstance(record, Conversation)} == {1, 2}
