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
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import pytest
import uvloop
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import chatdb
from chatdb import (
    NEW,
    UNSET,
    ChatDBError,
    ConflictError,
    Conversation,
    ConversationNotFoundError,
    Deleted,
    InvalidInputError,
    JsonText,
    Message,
    MessageNotFoundError,
    MessageTail,
    Moved,
    NewMessage,
    StaleError,
)
from chatdb.admin.row_security import protect_tables
from chatdb.formats.items import Item, SourceConversation, SourceMessage
from chatdb.testing.databases import Databases
from chatdb.transfer.exporter import export_conversations
from chatdb.transfer.importer import import_conversations
from tests.support.calls import CONVERSATION_CALLS, MISSING, NOBODYS, iterated
from tests.support.databases import as_role, cloned
from tests.support.pgbouncer import pgbouncer
from tests.support.roles import Roles

OF_USERS = {
    name
    for name in chatdb.__all__
    if inspect.isfunction(function := getattr(chatdb, name)) and "user_id" in inspect.signature(function).parameters
} - {"transaction", "stream_message"}
"""The public functions on what users own, without the one that calls others."""

_example = itertools.count(1)


async def exported(db: Any, **arguments: Any) -> list[Any]:
    """Exhaust `export_user`."""
    return [record async for record in chatdb.export_user(db, **arguments)]


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
        self.last_parts: dict[int, int] = {}
        """The start of the last part of each message, by its id."""
        self.moved: dict[int, tuple[int, bool]] = {}
        """The last_seq at which the head of a conversation was set, and whether it was the newest message."""

    def add(self, conversation: Conversation) -> None:
        """Add a stored conversation."""
        self.conversations[conversation.id] = conversation
        self.messages[conversation.id] = {}

    def by_key(self, key: str | None) -> Conversation | None:
        """Find a conversation by its key."""
        found = (item for item in self.conversations.values() if key is not None and item.key == key)
        return next(found, None)

    def page(self, order: Order, limit: int, after: Conversation | None) -> list[Conversation]:
        """Return a page of a list."""

        def place(item: Conversation) -> tuple[datetime, int]:
            return getattr(item, order.by), item.id

        ordered = sorted(self.conversations.values(), key=place, reverse=order.descending)
        if after is not None:
            key = place(after)
            ordered = [item for item in ordered if (place(item) < key if order.descending else place(item) > key)]
        return [item for item in ordered if order.archived in (None, item.archived_at is not None)][:limit]

    def message_by_key(self, number: int, key: str | None) -> Message | None:
        """Find a message by its key."""
        found = (item for item in self.messages[number].values() if key is not None and item.key == key)
        return next(found, None)

    def message(self, number: int, place: dict[str, Any]) -> Message | None:
        """Find a message by its seq or its key."""
        if "key" in place:
            return self.message_by_key(number, place["key"])
        return self.messages[number].get(place["seq"])

    def newest(self, number: int, limit: int) -> list[Message]:
        """Return the newest messages, oldest first."""
        return [self.messages[number][seq] for seq in sorted(self.messages[number])][-limit:]

    def parent(self, number: int, seq: int) -> int:
        """Return the seq of a message's parent."""
        found = self.messages[number][seq].parent_seq
        return max((each for each in self.messages[number] if each < seq), default=0) if found is None else found

    def line(self, number: int, top: int | None = None) -> list[Message]:
        """Return the messages of the line that ends with the head or another message."""
        seq = self.conversations[number].head_seq if top is None else top
        found: list[Message] = []
        while seq:
            found.append(self.messages[number][seq])
            seq = self.parent(number, seq)
        return found[::-1]

    def versions(self, number: int, limit: int, before: int) -> dict[int, list[int]]:
        """Return the messages of a page of the line that have other versions, with the seqs of all."""
        page = [each.seq for each in self.line(number) if each.seq < before][-limit:]
        parents = {seq: self.parent(number, seq) for seq in sorted(self.messages[number])}
        found = {seq: [other for other in parents if parents[other] == parents[seq]] for seq in page}
        return {seq: seqs for seq, seqs in found.items() if len(seqs) > 1}

    def subtree(self, number: int, seq: int) -> set[int]:
        """Return a version and all that follows it."""
        found = {seq}
        for other in sorted(self.messages[number]):
            if self.parent(number, other) in found:
                found.add(other)
        return found

    def context(self, number: int, max_tokens: int, limit: int) -> list[Message]:
        """Return the newest messages of the line that fit, and its leading message."""

        def tokens(message: Message) -> int:
            return len(message.content) // 4 + 1 if message.token_count is None else message.token_count

        line = [each for each in self.line(number) if each.state != "streaming"]
        lead = [each for each in line[:1] if each.role in {"system", "developer"}]
        left = max_tokens - sum(map(tokens, lead))
        fitting: list[Message] = []
        for message in line[len(lead) :][-limit:][::-1]:
            left -= tokens(message)
            if left < 0:
                break
            fitting.insert(0, message)
        is_all = bool(fitting) and self.parent(number, fitting[0].seq) == (lead[0].seq if lead else 0)
        for place, message in enumerate(fitting):
            roles = [each.role for each in fitting[place:] if each.role in {"assistant", "tool"}]
            if roles[:1] != ["tool"] and (message.role == "user" or (place == 0 and is_all)):
                return lead + fitting[place:]
        return lead if sum(map(tokens, lead)) <= max_tokens else []

    def move(self, number: int, head: int) -> None:
        """Make a message the head."""
        conversation = self.conversations[number]
        self.moved[number] = (conversation.last_seq, head >= max(self.messages[number], default=0))
        self.conversations[number] = conversation.model_copy(update={"head_seq": head})

    def next_parent(self, number: int, given: int | None) -> int | None:
        """Return the `parent_seq` that the next message has."""
        conversation = self.conversations[number]
        last_seq, is_newest = self.moved.get(number, (None, False))
        is_moved = last_seq == conversation.last_seq
        parent = conversation.head_seq if given is None else given
        if parent == conversation.last_seq or (is_moved and is_newest and parent == conversation.head_seq):
            return None
        return parent

    def remove(self, number: int, seq: int) -> None:
        """Delete a message, whose children get its parent."""
        follows, gone = self.parent(number, seq), self.messages[number][seq]
        following = min((each for each in self.messages[number] if each > seq), default=None)
        del self.messages[number][seq]
        for each in list(self.messages[number].values()):
            is_child = each.parent_seq == seq
            is_next = each.seq == following and each.parent_seq is None and gone.parent_seq is not None
            if is_child or is_next:
                self.messages[number][each.seq] = each.model_copy(update={"parent_seq": follows})
        if self.conversations[number].head_seq == seq:
            self.move(number, follows)
        self.edit(number)

    def cut(self, number: int, after_seq: int) -> list[int]:
        """Delete the messages after a position, on every branch, without raising the revision."""
        head = self.conversations[number].head_seq
        left = [each.seq for each in self.line(number) if each.seq <= after_seq]
        gone = [seq for seq in self.messages[number] if seq > after_seq]
        for seq in gone:
            del self.messages[number][seq]
        if head > after_seq:
            self.move(number, max(left, default=0))
        return gone

    def edit(self, number: int, **changes: Any) -> None:
        """Change a conversation, which raises its revision."""
        found = self.conversations[number]
        self.conversations[number] = found.model_copy(update={"revision": found.revision + 1} | changes)

    def patch(self, number: int, patch: dict[str, Any] | None) -> None:
        """Merge a patch into a conversation's metadata."""
        if patch is not None:
            found = self.conversations[number]
            self.conversations[number] = found.model_copy(update={"metadata": merged(found.metadata, patch)})

    def store(self, number: int, batch: list[NewMessage], answer: Any, parent_seq: int | None = None) -> list[Message]:
        """Append messages, with the ids and the time from `answer`, which the model cannot predict."""
        conversation = self.conversations[number]
        if not batch:
            return []
        parent = self.next_parent(number, parent_seq)
        now = answer[0].created_at
        assert now >= conversation.updated_at
        new = [
            Message(
                id=given.id,
                conversation_id=number,
                user_id=self.user,
                seq=conversation.last_seq + place,
                parent_seq=parent if place == 1 else None,
                role=item.role,
                content=item.content,
                payload=as_text(item.payload),
                metadata=item.metadata,
                token_count=item.token_count,
                key=item.key,
                state=None,
                created_at=now,
            )
            for place, (item, given) in enumerate(zip(batch, answer, strict=True), start=1)
        ]
        self.messages[number] |= {message.seq: message for message in new}
        self.conversations[number] = conversation.model_copy(
            update={
                "last_seq": conversation.last_seq + len(new),
                "head_seq": conversation.last_seq + len(new),
                "revision": conversation.revision + len(new),
                "updated_at": now,
            }
        )
        return new

    def append(
        self, number: int, batch: list[NewMessage], answer: Any, options: Options
    ) -> list[Message] | type[ChatDBError]:
        """Append messages under conditions."""
        stored = [self.message_by_key(number, item.key) for item in batch]
        is_expected = as_expected(self.conversations[number], options.expected)
        if options.skip:
            batch = [item for item, found in zip(batch, stored, strict=True) if found is None]
            if not is_expected:
                return StaleError if batch or not stored else []
            if stored and not batch:
                return []
        elif any(stored):
            same = (found is not None and body(found) == body(item) for found, item in zip(stored, batch, strict=True))
            return [found for found in stored if found] if all(same) else ConflictError
        if not is_expected:
            return StaleError
        if options.parent_seq and options.parent_seq not in self.messages[number]:
            return MessageNotFoundError
        if batch:
            self.patch(number, options.patch)
        elif not stored and options.patch is not None:
            before = self.conversations[number].metadata
            self.patch(number, options.patch)
            if self.conversations[number].metadata != before:
                self.edit(number)
        return self.store(number, batch, answer, options.parent_seq)

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rows that the tables should hold."""
        messages = (message for number in self.messages for message in self.messages[number].values())
        return (
            [self.conversations[number].model_dump() for number in sorted(self.conversations)],
            [item.model_dump() for item in sorted(messages, key=lambda item: (item.conversation_id, item.seq))],
        )


class Order(NamedTuple):
    """Which conversations a list has, and in what order."""

    by: Literal["updated_at", "created_at"]
    descending: bool
    archived: bool | None


class Options(NamedTuple):
    """Conditions and additions of an append."""

    expected: Any = None
    patch: dict[str, Any] | None = None
    create: bool = False
    skip: bool = False
    parent_seq: int | None = None


def as_expected(conversation: Conversation, expected: Any) -> bool:
    """Return whether a stored conversation is as the caller expects it."""
    if isinstance(expected, str):
        return conversation.etag == expected
    return expected is None or (
        expected is not NEW
        and (conversation.id, conversation.revision)
        == (
            expected.id,
            expected.revision,
        )
    )


def merged(stored: dict[str, Any] | None, patch: dict[str, Any]) -> dict[str, Any] | None:
    """Return metadata after a patch of its top level."""
    both = {**(stored or {}), **patch}
    return {name: value for name, value in both.items() if value is not None} or None


def as_text(payload: Any) -> JsonText | None:
    """Return the JSON text that chatdb stores for a payload."""
    return payload if payload is None or isinstance(payload, JsonText) else JsonText(json.dumps(payload))


def body(message: Message | NewMessage) -> tuple[Any, ...]:
    """Return the fields that must be equal when a key is used again; a message that streams equals no other."""
    if getattr(message, "state", None) == "streaming":
        return (object(),)
    return message.role, message.content, as_text(message.payload), message.metadata


async def outcome(call: Coroutine[Any, Any, Any]) -> Any:
    """Return a call's result, or the error that it raises."""
    try:
        return await call
    except ChatDBError as error:
        return error


SNAPSHOT_CONVERSATIONS = """
    select id, user_id, key, title, metadata::text as metadata, last_seq,
        case when head_last_seq = last_seq then head_seq else last_seq end as head_seq,
        last_seq + edits as revision, created_at, updated_at, archived_at, pinned_at,
        c::text as whole, xmin::text, ctid::text
    from chatdb.conversations as c where user_id = any($1) order by user_id, id
"""
SNAPSHOT_MESSAGES = """
    select id, m.conversation_id, m.user_id, m.seq, parent_seq, role, coalesce(p.content, m.content) as content,
        payload::text as payload, metadata::text as metadata, token_count, key, state, created_at,
        concat(m::text, p.whole) as whole, m.xmin::text, m.ctid::text
    from chatdb.messages as m
    left join (
        select user_id, conversation_id, seq, string_agg(content, '' order by start) as content,
            string_agg(concat(p::text, p.xmin, p.ctid), ' ' order by start) as whole
        from chatdb.message_parts as p group by user_id, conversation_id, seq
    ) as p on p.user_id = m.user_id and p.conversation_id = m.conversation_id and p.seq = m.seq
    where m.user_id = any($1) order by m.user_id, m.conversation_id, m.seq
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
patches = st.sampled_from(({}, {"m": 1}, {"m": 2, "n": None}, {"m": None}))
flags = st.sampled_from((UNSET, True, False))
known_keys = st.sampled_from(("k", "l", "m", "unknown"))
addresses = conversations | known_keys
"""An index of an id, or a key."""

expectations = st.none() | st.tuples(st.sampled_from(("current", "current", "any")), st.integers(0, 20))
"""No condition, or the current state or any conversation that a user has read; an etag if the number is even."""

message_places = st.fixed_dictionaries({"seq": places}) | st.fixed_dictionaries({"key": known_keys})
orders = st.sampled_from(
    (
        *(Order("updated_at", True, archived) for archived in (False, False, True, None)),
        *(
            Order("created_at", descending, archived)
            for descending in (True, False)
            for archived in (False, True, None)
        ),
    )
)
options = st.just(Options()) | st.builds(
    Options,
    expected=expectations | st.just(NEW),
    patch=st.none() | patches,
    create=st.booleans(),
    skip=st.booleans(),
    parent_seq=st.none() | places,
)


def messages(keys: st.SearchStrategy[str | None]) -> st.SearchStrategy[NewMessage]:
    """Draw any message, or a plain one that is likely to repeat a body."""
    role = st.sampled_from(("user", "assistant", "system", "tool"))
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
        """Create two conversations for every user, with the same id, key and message keys; the second has branches."""
        for model in self.models:
            self.adopt(model)
            self.create(model, title=None, key="k", metadata=None)
            for address in (1, "k"):
                for key in ("k", "l"):
                    self.append_to(model, address, NewMessage(role="user", content="a", key=key))
            for parent_seq in (1, None, 0, 1, None):
                options = Options(parent_seq=parent_seq)
                self.append_with(model, "k", [NewMessage(role="user", content="b")], options)
            self.switch(model, "k", {"seq": 2}, None)

    def adopt(self, model: Model) -> Conversation:
        """Store a conversation under an id that other users also have, as adopted tables can."""
        sql = "insert into chatdb.conversations (id, user_id) values ($1, $2)"
        self.run(self.admin.execute(sql, self.shared, model.user))
        get = chatdb.get_conversation(self.db, user_id=model.user, conversation_id=self.shared)
        model.add(self.run(get))
        self.content = self.snapshot()
        return model.conversations[self.shared]

    def created(self, model: Model, answer: Conversation, key: str | None, **fields: Any) -> Conversation:
        """Add a new conversation to the model, with the id and the time from `answer`."""
        assert answer.id not in self.ids
        stored = Conversation(
            id=answer.id,
            user_id=model.user,
            key=key,
            last_seq=0,
            head_seq=0,
            revision=0,
            created_at=answer.created_at,
            updated_at=answer.created_at,
            archived_at=None,
            pinned_at=None,
            **fields,
        )
        model.add(stored)
        self.ids.append(answer.id)
        return stored

    def create(self, model: Model, batch: list[NewMessage] | None = None, **fields: Any) -> None:
        """Create a conversation, or get the one that has the key."""
        options = {} if batch is None else {"messages": batch}
        answer = self.call(model, chatdb.create_conversation, **options, **fields)
        must_be_new = fields.pop("expected", None) is NEW
        stored = model.by_key(fields["key"])
        if stored is not None:
            self.settle(model, answer, StaleError if must_be_new else stored)
            return
        self.created(model, answer, **fields)
        model.store(answer.id, batch or [], self.stored(model, answer.id))
        self.settle(model, answer, model.conversations[answer.id])

    def append_to(self, model: Model, address: int | str, message: NewMessage) -> None:
        """Append one message without conditions."""
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.append_message, at, **dict(message))
        if number is not None:
            expected = model.append(number, [message], [answer], Options())
            self.settle(model, answer, expected if isinstance(expected, type) else expected[0])

    def append_with(self, model: Model, address: int | str, batch: list[NewMessage], options: Options) -> None:
        """Append a message or a batch under conditions."""
        options = options._replace(create=options.create and isinstance(address, str))
        if options.expected is NEW and not options.create:
            options = options._replace(expected=None)
        at, number = self.where(model, address)
        options = options._replace(expected=self.expected(model.conversations.get(number), options.expected))
        arguments = {
            "expected": options.expected,
            "conversation_metadata_patch": options.patch,
            "create": options.create,
            "parent_seq": options.parent_seq,
        }
        creates = options.create and number is None and options.expected in (None, NEW)
        if len(batch) == 1 and not options.skip:
            found = self.call(model, chatdb.append_message, at, creates=creates, **dict(batch[0]), **arguments)
            answer = found if isinstance(found, ChatDBError) else [found]
        else:
            arguments |= {"messages": batch, "on_existing": "skip" if options.skip else "conflict"}
            answer = self.call(model, chatdb.append_messages, at, creates=creates, **arguments)
        if creates and options.parent_seq:
            self.settle(model, answer, MessageNotFoundError)
        elif creates:
            get = chatdb.get_conversation(self.db, user_id=model.user, **at)
            number = self.created(model, self.run(get), at["conversation_key"], title=None, metadata=None).id
            options = options._replace(expected=None)
            model.patch(number, options.patch)
            self.settle(model, answer, model.store(number, batch, answer))
        elif number is not None:
            self.settle(model, answer, model.append(number, batch, answer, options))

    def switch(self, model: Model, address: int | str, place: dict[str, Any], expectation: Any) -> None:
        """Make the newest message that follows a version the head."""
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        answer = self.call(model, chatdb.switch_branch, at, expected=expected, **place)
        if number is None:
            return
        stored = model.message(number, place)
        if not as_expected(model.conversations[number], expected):
            self.settle(model, answer, StaleError)
        elif stored is None:
            self.settle(model, answer, MessageNotFoundError)
        else:
            head = max(model.subtree(number, stored.seq))
            is_other = head != model.conversations[number].head_seq
            model.move(number, head)
            if is_other:
                model.edit(number)
            self.settle(model, answer, model.conversations[number])

    # helpers

    def where(self, model: Model, address: int | str) -> tuple[dict[str, Any], int | None]:
        """Return the arguments that name a conversation, and its id if the user has it."""
        if isinstance(address, str):
            found = model.by_key(address)
            return {"conversation_key": address}, None if found is None else found.id
        number = self.ids[address % len(self.ids)]  # of a stored or deleted conversation, or one that never existed
        return {"conversation_id": number}, number if number in model.conversations else None

    def expected(self, current: Conversation | None, drawn: Any) -> Any:
        """Return a drawn expectation as a conversation or its etag; those of other users and deleted ones too."""
        if drawn is None or drawn is NEW:
            return drawn
        kind, index = drawn
        found = current if kind == "current" else self.cursors[index % len(self.cursors)]
        found = found or NOBODYS
        return found if index % 2 else found.etag

    def stored(self, model: Model, number: int) -> list[Any]:
        """Return the rows of a conversation's messages, for their ids and times."""
        _, messages = self.content[self.models.index(model)]
        return [
            SimpleNamespace(id=row["id"], created_at=row["created_at"])
            for row in messages
            if row["conversation_id"] == number
        ]

    def snapshot(self) -> list[Any]:
        """Return each user's rows with their versions."""
        names = [model.user for model in self.models]
        conversations = self.run(self.admin.fetch(SNAPSHOT_CONVERSATIONS, names))
        messages = self.run(self.admin.fetch(SNAPSHOT_MESSAGES, names))
        return [
            tuple([row for row in rows if row["user_id"] == name] for rows in (conversations, messages))
            for name in names
        ]

    def call(
        self,
        model: Model,
        function: Callable[..., Any],
        at: dict[str, Any] | None = None,
        *,
        creates: bool = False,
        **arguments: Any,
    ) -> Any:
        """
        Call a function and check that the other users' rows are unchanged.

        If the user does not have the conversation, the call must send the same statements and raise the same error as
        for an id or a key that nobody has.
        """
        self.called.add({iterated: "iter_messages", exported: "export_user"}.get(function, function.__name__))
        counting = Counting(self.db)
        answer = self.run(outcome(function(counting, user_id=model.user, **(at or {}), **arguments)))
        before, self.content = self.content, self.snapshot()
        for other, old, new in zip(self.models, before, self.content, strict=True):
            assert other is model or old == new
        if at is not None and not creates and not self.has(model, at):
            missing = Counting(self.db)
            nobodys_at = {name: MISSING if name == "conversation_id" else "nobody's" for name in at}
            nobodys = self.run(outcome(function(missing, user_id=model.user, **nobodys_at, **arguments)))
            assert type(answer) is type(nobodys) is ConversationNotFoundError
            assert (answer.args, vars(answer)) == (nobodys.args, vars(nobodys))
            assert type(answer.__cause__) is type(nobodys.__cause__)
            assert counting.sent == missing.sent
            self.settle(model, None, None)
        return answer

    def has(self, model: Model, at: dict[str, Any]) -> bool:
        """Return whether the user has the conversation that these arguments name."""
        if "conversation_key" in at:
            return model.by_key(at["conversation_key"]) is not None
        return at["conversation_id"] in model.conversations

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
            for each in item if isinstance(item, tuple) else (item,):
                if isinstance(each, Conversation):
                    self.cursors.append(each)

    # conversations

    @rule(
        user=users,
        title=titles,
        key=keys,
        metadata=metadata,
        batch=st.none() | batches(keys),
        expected=st.sampled_from((None, NEW)),
    )
    def create_conversation(self, user: int, **fields: Any) -> None:
        """Create or get a conversation by its key."""
        self.create(self.models[user], **fields)

    @rule(
        user=users,
        key=known_keys.filter(lambda key: key != "unknown"),
        title=titles,
        metadata=metadata,
        patch=or_unset(patches),
        archived=flags,
    )
    def upsert_conversation(self, user: int, key: str, title: Any, metadata: Any, patch: Any, archived: Any) -> None:
        """Create a conversation, or replace the title and replace or patch the metadata of the one with the key."""
        model = self.models[user]
        data = {"metadata": metadata} if patch is UNSET else {"metadata_patch": patch}
        answer = self.call(model, chatdb.upsert_conversation, key=key, title=title, archived=archived, **data)
        stored = model.by_key(key)
        if stored is None:
            stored = self.created(model, answer, key, title=title, metadata=metadata if patch is UNSET else None)
            if patch is not UNSET:
                model.patch(stored.id, patch)
            if archived is True:
                model.conversations[stored.id] = model.conversations[stored.id].model_copy(
                    update={"archived_at": answer.created_at}
                )
        else:
            changes = {"title": title, "metadata": metadata if patch is UNSET else merged(stored.metadata, patch)}
            if archived is True:
                assert isinstance(answer.archived_at, datetime)
                changes["archived_at"] = stored.archived_at or answer.archived_at
            elif archived is False:
                changes["archived_at"] = None
            if any(getattr(stored, name) != value for name, value in changes.items()):
                model.edit(stored.id, **changes)
        self.settle(model, answer, model.conversations[stored.id])

    @rule(user=users)
    def adopt_again(self, user: int) -> None:
        """Store the deleted conversation with the shared id again."""
        if self.shared not in self.models[user].conversations:
            self.adopt(self.models[user])

    @rule(user=users, address=addresses)
    def get_conversation(self, user: int, address: int | str) -> None:
        """Get a conversation."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.get_conversation, at)
        if number is not None:
            self.settle(model, answer, model.conversations[number])

    @rule(user=users, address=addresses, limit=limits)
    def load_conversation(self, user: int, address: int | str, limit: int) -> None:
        """Get a conversation and its newest messages."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.load_conversation, at, limit=limit)
        if number is not None:
            self.settle(model, answer, (model.conversations[number], model.line(number)[-limit:]))

    @rule(
        user=users,
        limit=limits,
        order=orders,
        after=st.none() | st.integers(0, 20) | known_keys,
        function=st.sampled_from((chatdb.list_conversations, chatdb.list_previews)),
    )
    def list_conversations(
        self, user: int, limit: int, order: Order, after: int | str | None, function: Callable[..., Any]
    ) -> None:
        """List conversations after any conversation or cursor that any user has received, or after a key."""
        model = self.models[user]
        place: Conversation | None = None
        arguments: dict[str, Any] = {}
        if isinstance(after, str):
            place, arguments = model.by_key(after), {"after_key": after}
        elif after is not None:
            place = self.cursors[after % len(self.cursors)]
            arguments = {"after": place if place is None or after % 2 else place.cursor}
        arguments |= {"limit": limit, "order_by": order.by, "descending": order.descending, "archived": order.archived}
        answer = self.call(model, function, **arguments)
        if isinstance(after, str) and place is None:
            self.settle(model, answer, ConversationNotFoundError)
            return
        page: list[Any] = model.page(order, limit, place)
        if function is chatdb.list_previews:
            page = [(each, next(iter(model.line(each.id)[-1:]), None)) for each in page]
        self.settle(model, answer, page)

    @rule(user=users, limit=limits)
    def list_pinned(self, user: int, limit: int) -> None:
        """List pinned conversations."""
        model = self.models[user]
        pinned = [each for each in model.conversations.values() if each.pinned_at and not each.archived_at]
        pinned.sort(key=lambda each: (each.pinned_at, each.id), reverse=True)
        self.settle(model, self.call(model, chatdb.list_pinned, limit=limit), pinned[:limit])

    @rule(
        user=users,
        address=addresses,
        title=or_unset(titles),
        metadata=or_unset(metadata),
        patch=or_unset(patches),
        archived=flags,
        pinned=flags,
        expectation=expectations,
    )
    def update_conversation(
        self, user: int, address: int | str, metadata: Any, patch: Any, expectation: Any, **fields: Any
    ) -> None:
        """Change a conversation."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        data = {"metadata": metadata} if patch is UNSET else {"metadata_patch": patch}
        answer = self.call(model, chatdb.update_conversation, at, expected=expected, **data, **fields)
        if number is None:
            return
        stored = model.conversations[number]
        if not as_expected(stored, expected):
            self.settle(model, answer, StaleError)
            return
        changes = {} if fields["title"] is UNSET else {"title": fields["title"]}
        if patch is not UNSET:
            changes["metadata"] = merged(stored.metadata, patch)
        elif metadata is not UNSET:
            changes["metadata"] = metadata
        for flag in ("archived", "pinned"):
            time = getattr(stored, f"{flag}_at")
            if fields[flag] is True:
                assert isinstance(getattr(answer, f"{flag}_at"), datetime)
                changes[f"{flag}_at"] = time or getattr(answer, f"{flag}_at")
            elif fields[flag] is False:
                changes[f"{flag}_at"] = None
        if any(getattr(stored, name) != value for name, value in changes.items()):
            model.edit(number, **changes)
        self.settle(model, answer, model.conversations[number])

    @rule(user=users, address=addresses, expectation=expectations)
    def delete_conversation(self, user: int, address: int | str, expectation: Any) -> None:
        """Delete a conversation."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        answer = self.call(model, chatdb.delete_conversation, at, expected=expected)
        if number is None:
            return
        if not as_expected(model.conversations[number], expected):
            self.settle(model, answer, StaleError)
            return
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

    @rule(user=users)
    def export_user(self, user: int) -> None:
        """Read everything of a user."""
        model = self.models[user]
        answer = self.call(model, exported)
        expected: list[Conversation | Message] = []
        for number, conversation in sorted(model.conversations.items()):
            expected += [conversation, *model.newest(number, 9_999)]
        self.settle(model, answer, expected)

    @rule(user=users, to=users, sure=st.integers(0, 3).map(lambda draw: draw == 0))
    def move_user(self, user: int, to: int, sure: bool) -> None:
        """Move a user's data in some of the draws, which changes only the rows of these two."""
        if not sure:
            return
        model, other = self.models[user], self.models[to]
        if model is not other and self.shared in model.conversations and self.shared in other.conversations:
            self.call(model, chatdb.delete_conversation, {"conversation_id": self.shared})
            del model.conversations[self.shared], model.messages[self.shared]
        self.called.add("move_user")
        by = self.admin if isinstance(self.db, InTransactions) else self.db  # a restricted role may not move users
        answer = self.run(outcome(chatdb.move_user(by, user_id=model.user, to_user_id=other.user)))
        before, self.content = self.content, self.snapshot()
        for each, old, new in zip(self.models, before, self.content, strict=True):
            assert each in (model, other) or old == new
        if model is other:
            self.settle(model, answer, InvalidInputError)
            return
        counts = Moved(
            conversations=len(model.conversations), messages=sum(len(found) for found in model.messages.values())
        )
        for number, conversation in model.conversations.items():
            key = None if other.by_key(conversation.key) else conversation.key
            other.conversations[number] = conversation.model_copy(update={"user_id": other.user, "key": key})
            other.messages[number] = {
                seq: message.model_copy(update={"user_id": other.user})
                for seq, message in model.messages[number].items()
            }
        other.last_parts |= model.last_parts
        other.moved |= model.moved
        model.conversations.clear()
        model.messages.clear()
        self.settle(model, answer, counts)
        self.settle(other, answer, counts)

    # messages

    @rule(user=users, address=addresses, message=messages(keys))
    def append_message(self, user: int, address: int | str, message: NewMessage) -> None:
        """Append a message."""
        self.append_to(self.models[user], address, message)

    @rule(
        user=users,
        address=addresses,
        batch=batches(st.none()) | batches(keys.filter(bool)) | batches(keys),
        options=options,
    )
    def append_messages(self, user: int, address: int | str, batch: list[NewMessage], options: Options) -> None:
        """Append a message or a batch, with and without conditions."""
        self.append_with(self.models[user], address, batch, options)

    @rule(user=users, address=addresses, message=messages(keys.filter(bool)), expectation=expectations)
    def upsert_message(self, user: int, address: int | str, message: NewMessage, expectation: Any) -> None:
        """Append the message with a key, or replace it."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        answer = self.call(model, chatdb.upsert_message, at, expected=expected, **dict(message))
        if number is None:
            return
        stored = model.message_by_key(number, message.key)
        is_same = stored is not None and (*body(stored), stored.token_count) == (*body(message), message.token_count)
        if stored is not None and is_same:
            self.settle(model, answer, stored)
        elif not as_expected(model.conversations[number], expected):
            self.settle(model, answer, StaleError)
        elif stored is None:
            self.settle(model, answer, model.store(number, [message], [answer])[0])
        elif stored.state == "streaming":
            self.settle(model, answer, ConflictError)
        else:
            changes = {"role": message.role, "content": message.content, "payload": as_text(message.payload)}
            changes |= {"metadata": message.metadata, "token_count": message.token_count}
            model.messages[number][stored.seq] = stored.model_copy(update=changes)
            model.edit(number)
            self.settle(model, answer, model.messages[number][stored.seq])

    @rule(
        user=users,
        address=addresses,
        after_seq=places,
        batch=batches(keys),
        expectation=expectations.filter(bool),
    )
    def replace_messages_after(
        self, user: int, address: int | str, after_seq: int, batch: list[NewMessage], expectation: Any
    ) -> None:
        """Replace the messages after a position."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        arguments = {"after_seq": after_seq, "messages": batch, "expected": expected}
        answer = self.call(model, chatdb.replace_messages_after, at, **arguments)
        if number is None:
            return
        stored = [model.message_by_key(number, item.key) for item in batch]
        if not as_expected(model.conversations[number], expected):
            same = (
                found is not None and found.seq > after_seq and body(found) == body(item)
                for found, item in zip(stored, batch, strict=True)
            )
            self.settle(model, answer, stored if batch and all(same) else StaleError)
        elif any(found is not None and found.seq <= after_seq for found in stored):
            self.settle(model, answer, ConflictError)
        else:
            model.cut(number, after_seq)
            model.edit(number)
            self.settle(model, answer, model.store(number, batch, answer))

    @rule(user=users, address=addresses, expectation=expectations)
    def pop_message(self, user: int, address: int | str, expectation: Any) -> None:
        """Delete the newest message of the line."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        answer = self.call(model, chatdb.pop_message, at, expected=expected)
        if number is None:
            return
        if not as_expected(model.conversations[number], expected):
            self.settle(model, answer, StaleError)
            return
        head = next(iter(model.line(number)[-1:]), None)
        if head is not None:
            model.remove(number, head.seq)
        self.settle(model, answer, head)

    @rule(user=users, address=addresses, limit=limits, before=st.none() | places | known_keys)
    def get_history(self, user: int, address: int | str, limit: int, before: int | str | None) -> None:
        """Read the newest messages, or those before a position."""
        model = self.models[user]
        at, number = self.where(model, address)
        position = {"before_key": before} if isinstance(before, str) else {"before_seq": before}
        answer = self.call(model, chatdb.get_history, at, limit=limit, **position)
        if number is None:
            return
        if isinstance(before, str):
            found = model.message_by_key(number, before)
            if found is None:
                self.settle(model, answer, MessageNotFoundError)
                return
            before = found.seq
        self.settle(
            model, answer, [each for each in model.newest(number, 999) if before is None or each.seq < before][-limit:]
        )

    @rule(user=users, address=addresses, limit=limits, after=places | known_keys)
    def list_messages(self, user: int, address: int | str, limit: int, after: int | str) -> None:
        """Read the messages after a position."""
        model = self.models[user]
        at, number = self.where(model, address)
        position = {"after_key": after} if isinstance(after, str) else {"after_seq": after}
        answer = self.call(model, chatdb.list_messages, at, limit=limit, **position)
        if number is None:
            return
        if isinstance(after, str):
            found = model.message_by_key(number, after)
            if found is None:
                self.settle(model, answer, MessageNotFoundError)
                return
            after = found.seq
        self.settle(model, answer, [each for each in model.newest(number, 999) if each.seq > after][:limit])

    @rule(user=users, address=addresses, batch=limits, after_seq=places)
    def iter_messages(self, user: int, address: int | str, batch: int, after_seq: int) -> None:
        """Read all messages after a position."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, iterated, at, batch=batch, after_seq=after_seq)
        if number is not None:
            self.settle(model, answer, [each for each in model.newest(number, 999) if each.seq > after_seq])

    @rule(user=users, address=addresses, place=message_places)
    def get_message(self, user: int, address: int | str, place: dict[str, Any]) -> None:
        """Get a message by its position or its key."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.get_message, at, **place)
        if number is not None:
            self.settle(model, answer, model.message(number, place) or MessageNotFoundError)

    @rule(
        user=users,
        address=addresses,
        place=message_places,
        content=or_unset(contents),
        payload=or_unset(payloads),
        metadata=or_unset(metadata),
        patch=or_unset(patches),
        token_count=or_unset(token_counts),
        expectation=expectations,
    )
    def update_message(
        self,
        user: int,
        address: int | str,
        place: dict[str, Any],
        metadata: Any,
        patch: Any,
        expectation: Any,
        **fields: Any,
    ) -> None:
        """Change a message."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        data = {"metadata": metadata} if patch is UNSET else {"metadata_patch": patch}
        answer = self.call(model, chatdb.update_message, at, expected=expected, **place, **data, **fields)
        if number is None:
            return
        stored = model.message(number, place)
        if not as_expected(model.conversations[number], expected):
            self.settle(model, answer, StaleError)
        elif stored is None:
            self.settle(model, answer, MessageNotFoundError)
        elif stored.state == "streaming" and fields["content"] is not UNSET:
            self.settle(model, answer, ConflictError)
        else:
            changes = {name: value for name, value in (fields | data).items() if value is not UNSET}
            if "payload" in changes:
                changes["payload"] = as_text(changes["payload"])
            if "metadata_patch" in changes:
                changes["metadata"] = merged(stored.metadata, changes.pop("metadata_patch"))
            if any(getattr(stored, name) != value for name, value in changes.items()):
                model.messages[number][stored.seq] = stored = stored.model_copy(update=changes)
                model.edit(number)
            self.settle(model, answer, stored)

    @rule(user=users, address=addresses, place=message_places, expectation=expectations)
    def delete_message(self, user: int, address: int | str, place: dict[str, Any], expectation: Any) -> None:
        """Delete a message."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        answer = self.call(model, chatdb.delete_message, at, expected=expected, **place)
        if number is None:
            return
        stored = model.message(number, place)
        if not as_expected(model.conversations[number], expected):
            self.settle(model, answer, StaleError)
        elif stored is None:
            self.settle(model, answer, MessageNotFoundError)
        else:
            model.remove(number, stored.seq)
            self.settle(model, answer, Deleted(conversations=0, messages=1))

    @rule(user=users, address=addresses, after=places | known_keys, expectation=expectations)
    def delete_messages_after(self, user: int, address: int | str, after: int | str, expectation: Any) -> None:
        """Delete the messages after a position."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        position = {"after_key": after} if isinstance(after, str) else {"after_seq": after}
        answer = self.call(model, chatdb.delete_messages_after, at, expected=expected, **position)
        if number is None:
            return
        found = model.message_by_key(number, after) if isinstance(after, str) else None
        if not as_expected(model.conversations[number], expected):
            self.settle(model, answer, StaleError)
        elif isinstance(after, str) and found is None:
            self.settle(model, answer, MessageNotFoundError)
        else:
            start = after if found is None else found.seq
            gone = model.cut(number, start)
            if gone:
                model.edit(number)
            self.settle(model, answer, Deleted(conversations=0, messages=len(gone)))

    # branches

    @rule(user=users, address=addresses, limit=limits, before=st.none() | places, top=st.none() | places)
    def get_branch(self, user: int, address: int | str, limit: int, before: int | None, top: int | None) -> None:
        """Read the newest messages of a line, or those before a position."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.get_branch, at, limit=limit, before_seq=before, top_seq=top)
        if number is None:
            return
        if top is not None and top not in model.messages[number]:
            self.settle(model, answer, MessageNotFoundError)
            return
        line = [each for each in model.line(number, top) if before is None or each.seq < before]
        self.settle(model, answer, line[-limit:])

    @rule(user=users, address=addresses, limit=limits, before=st.none() | places)
    def list_versions(self, user: int, address: int | str, limit: int, before: int | None) -> None:
        """List the versions of the messages on a page of the line."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.list_versions, at, limit=limit, before_seq=before)
        if number is not None:
            self.settle(model, answer, model.versions(number, limit, 999 if before is None else before))

    @rule(user=users, address=addresses, max_tokens=st.integers(1, 20), limit=limits)
    def get_context(self, user: int, address: int | str, max_tokens: int, limit: int) -> None:
        """Read the newest messages of the line that fit a number of tokens."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.get_context, at, max_tokens=max_tokens, limit=limit)
        if number is not None:
            self.settle(model, answer, model.context(number, max_tokens, limit))

    @rule(user=users, address=addresses, place=message_places, expectation=expectations)
    def switch_branch(self, user: int, address: int | str, place: dict[str, Any], expectation: Any) -> None:
        """Select a version."""
        self.switch(self.models[user], address, place, expectation)

    @rule(user=users, address=addresses, place=message_places, expectation=expectations)
    def delete_branch(self, user: int, address: int | str, place: dict[str, Any], expectation: Any) -> None:
        """Delete a version and all that follows it."""
        model = self.models[user]
        at, number = self.where(model, address)
        expected = self.expected(model.conversations.get(number), expectation)
        answer = self.call(model, chatdb.delete_branch, at, expected=expected, **place)
        if number is None:
            return
        stored = model.message(number, place)
        if not as_expected(model.conversations[number], expected):
            self.settle(model, answer, StaleError)
        elif stored is None:
            self.settle(model, answer, MessageNotFoundError)
        else:
            follows, gone = model.parent(number, stored.seq), model.subtree(number, stored.seq)
            for seq in gone:
                del model.messages[number][seq]
            if model.conversations[number].head_seq in gone:
                model.move(number, follows)
            model.edit(number)
            self.settle(model, answer, Deleted(conversations=0, messages=len(gone)))

    @rule(user=users, address=addresses, place=st.just({}) | message_places, new_key=keys)
    def fork_conversation(self, user: int, address: int | str, place: dict[str, Any], new_key: str | None) -> None:
        """Copy a line into a new conversation."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.fork_conversation, at, new_key=new_key, **place)
        if number is None:
            return
        stored = model.message(number, place) if place else None
        if place and stored is None:
            self.settle(model, answer, MessageNotFoundError)
        elif model.by_key(new_key) is not None:
            self.settle(model, answer, ConflictError)
        else:
            source = model.conversations[number]
            line = [each for each in model.line(number, stored.seq if stored else None) if each.state != "streaming"]
            new = self.created(model, answer, new_key, title=source.title, metadata=source.metadata)
            counts = {"last_seq": len(line), "head_seq": len(line), "revision": len(line)}
            model.conversations[new.id] = new.model_copy(update=counts)
            for seq, (message, row) in enumerate(zip(line, self.stored(model, new.id), strict=True), start=1):
                changes = {"id": row.id, "conversation_id": new.id, "seq": seq, "parent_seq": None}
                model.messages[new.id][seq] = message.model_copy(update=changes)
            self.settle(model, answer, model.conversations[new.id])

    # messages that are streamed

    @rule(
        user=users,
        address=addresses,
        role=st.sampled_from(("assistant", "system")),
        key=keys,
        metadata=metadata,
        parent_seq=st.none() | places,
    )
    def start_message(
        self, user: int, address: int | str, role: Any, key: str | None, metadata: Any, parent_seq: int | None
    ) -> None:
        """Start a message, or get the one that has the key."""
        model = self.models[user]
        at, number = self.where(model, address)
        arguments = {"role": role, "key": key, "metadata": metadata, "parent_seq": parent_seq}
        answer = self.call(model, chatdb.start_message, at, **arguments)
        if number is None:
            return
        stored = model.message_by_key(number, key)
        if stored is not None:
            self.settle(model, answer, stored if stored.role == role else ConflictError)
        elif parent_seq and parent_seq not in model.messages[number]:
            self.settle(model, answer, MessageNotFoundError)
        else:
            new = NewMessage(role=role, content="", metadata=metadata, key=key)
            [message] = model.store(number, [new], [answer], parent_seq)
            model.messages[number][message.seq] = started = message.model_copy(update={"state": "streaming"})
            model.last_parts[started.id] = 0
            self.settle(model, answer, started)

    @rule(user=users, address=addresses, place=message_places, offset=st.integers(-1, 3), text=contents)
    def extend_message(self, user: int, address: int | str, place: dict[str, Any], offset: int, text: str) -> None:
        """Add text to a message at its length, in place of its last part, or elsewhere."""
        model = self.models[user]
        at, number = self.where(model, address)
        stored = None if number is None else model.message(number, place)
        length = len(stored.content) if stored else 0
        start = length if offset < 0 else offset
        answer = self.call(model, chatdb.extend_message, at, offset=start, text=text, **place)
        if number is None:
            return
        if stored is None:
            self.settle(model, answer, MessageNotFoundError)
        elif stored.state != "streaming" or start not in (length, model.last_parts[stored.id]):
            self.settle(model, answer, ConflictError)
        else:
            content = stored.content[:start] + text
            model.last_parts[stored.id] = start
            model.messages[number][stored.seq] = stored.model_copy(update={"content": content})
            self.settle(model, answer, len(content))

    @rule(user=users, address=addresses, place=message_places, offset=st.integers(0, 3))
    def read_message(self, user: int, address: int | str, place: dict[str, Any], offset: int) -> None:
        """Read a message from an offset on."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.read_message, at, offset=offset, **place)
        if number is not None:
            stored = model.message(number, place)
            tail = stored and MessageTail(text=stored.content[offset:], offset=len(stored.content), state=stored.state)
            self.settle(model, answer, tail or MessageNotFoundError)

    @rule(
        user=users,
        address=addresses,
        place=message_places,
        content=st.none() | contents,
        payload=payloads,
        metadata=metadata,
        token_count=token_counts,
        aborted=st.booleans(),
    )
    def finish_message(
        self, user: int, address: int | str, place: dict[str, Any], payload: Any, aborted: bool, **fields: Any
    ) -> None:
        """Finish a message, or get the one that is finished."""
        model = self.models[user]
        at, number = self.where(model, address)
        answer = self.call(model, chatdb.finish_message, at, payload=payload, aborted=aborted, **fields, **place)
        if number is None:
            return
        stored = model.message(number, place)
        if stored is None:
            self.settle(model, answer, MessageNotFoundError)
            return
        if stored.state == "streaming":
            given = {
                name: value for name, value in (fields | {"payload": as_text(payload)}).items() if value is not None
            }
            stored = stored.model_copy(update=given | {"state": "aborted" if aborted else None})
            model.messages[number][stored.seq] = stored
            model.edit(number)
        self.settle(model, answer, stored)

    @rule(user=users, days=st.sampled_from((0, 1)))
    def list_streaming(self, user: int, days: int) -> None:
        """List the messages that stream."""
        model = self.models[user]
        answer = self.call(model, chatdb.list_streaming, older_than=timedelta(days=days))
        every = [each for number in sorted(model.messages) for _, each in sorted(model.messages[number].items())]
        self.settle(model, answer, [each for each in every if each.state == "streaming" and not days])

    @rule(user=users, address=st.none() | addresses, query=st.sampled_from(("e", "O W", "%")), limit=limits)
    def search_messages(self, user: int, address: int | str | None, query: str, limit: int) -> None:
        """Search in all conversations or in one, on two pages."""
        model = self.models[user]
        at, number = (None, None) if address is None else self.where(model, address)
        answer = self.call(model, chatdb.search_messages, at, query=query, limit=limit)
        if address is not None and number is None:
            return
        found = [
            (message.created_at, message.conversation_id, message.seq)
            for place in (model.messages if number is None else [number])
            for message in model.messages[place].values()
            if message.state != "streaming" and query.lower() in message.content.lower()
        ]
        expected = sorted(found, reverse=True)
        assert [(each.created_at, each.conversation_id, each.seq) for each in answer] == expected[:limit]
        if answer:
            more = self.call(model, chatdb.search_messages, at, query=query, limit=limit, after=answer[-1].cursor)
            places = [(each.created_at, each.conversation_id, each.seq) for each in more]
            assert places == expected[limit : 2 * limit]


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
        run_isolation(runner, db, db, examples=30)


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
    databases: Databases, roles: Roles, tmp_path: Path, runner: asyncio.Runner, pytestconfig: pytest.Config
) -> None:
    """The same holds for an unprivileged role with row-level security on one PgBouncer connection."""
    examples = 40 if pytestconfig.getoption("--quick") else 60
    with cloned(databases, roles) as dsn:
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
    """By id and by key, both raise the same error after the same statement, and the other user's rows stay."""
    conversation = await chatdb.create_conversation(db, user_id="bob", key="k")
    here = {"user_id": "bob", "conversation_id": conversation.id}
    for content in ("a", "b"):
        await chatdb.append_message(db, role="user", content=content, key="k" if content == "a" else None, **here)
    before = [await chatdb.get_conversation(db, **here), await chatdb.list_messages(db, **here)]
    function = iterated if name == "iter_messages" else getattr(chatdb, name)

    async def call(**at: Any) -> tuple[Any, ...]:
        counting = Counting(db)
        with pytest.raises(ChatDBError) as caught:
            await function(counting, user_id="ada", **at, **CONVERSATION_CALLS[name])
        return type(caught.value), caught.value.args, vars(caught.value), caught.value.__cause__, counting.sent

    calls = [{"conversation_id": conversation.id}, {"conversation_key": "k"}, {"conversation_key": "unknown"}]
    answers = [await call(**at) for at in [*calls, {"conversation_id": MISSING}]]
    by_id, by_key, by_unknown_key, by_missing_id = answers
    assert (by_id, by_key) == (by_missing_id, by_unknown_key)
    assert by_id[:-1] == by_key[:-1]
    assert answers[0][0] is ConversationNotFoundError
    assert len(answers[0][-1]) == 1
    assert [await chatdb.get_conversation(db, **here), await chatdb.list_messages(db, **here)] == before


@pytest.mark.parametrize(
    "create",
    [
        lambda db, at: chatdb.create_conversation(db, user_id=at["user_id"], key="k"),
        lambda db, at: chatdb.create_conversation(db, user_id=at["user_id"], key="k", expected=NEW),
        lambda db, at: chatdb.create_conversation(db, user_id=at["user_id"], key="k", messages=[X]),
        lambda db, at: chatdb.upsert_conversation(db, user_id=at["user_id"], key="k"),
        lambda db, at: chatdb.append_message(db, **at, **X, create=True, expected=NEW),
        lambda db, at: chatdb.append_message(db, **at, **X, key="k", create=True),
        lambda db, at: chatdb.append_messages(db, **at, messages=[X], create=True, expected=NEW),
        lambda db, at: chatdb.append_messages(db, **at, messages=[X | {"key": "k"}], create=True, on_existing="skip"),
        lambda db, at: chatdb.append_messages(db, **at, messages=[], create=True),
    ],
)
async def test_a_foreign_key_is_free(db, create):
    """A user can create a conversation and a message with the keys of another user's, whose rows stay unchanged."""
    other = await chatdb.create_conversation(db, user_id="bob", key="k", title="bob's", messages=[X | {"key": "k"}])
    at = {"user_id": "bob", "conversation_key": "k"}
    before = await chatdb.load_conversation(db, **at)
    await create(db, at | {"user_id": "ada"})
    own = await chatdb.get_conversation(db, user_id="ada", conversation_key="k")
    assert (own.id != other.id, own.title) == (True, None)
    assert await chatdb.load_conversation(db, **at) == before


X = {"role": "user", "content": "x"}


@pytest.mark.parametrize("function", [chatdb.list_conversations, chatdb.list_previews])
async def test_a_foreign_key_is_no_place_in_a_list(db, function):
    """Another user's conversation key in `after_key` raises the same error as an unknown one."""
    await chatdb.create_conversation(db, user_id="bob", key="k")
    await chatdb.create_conversation(db, user_id="ada")
    errors = []
    for key in ("k", "unknown"):
        with pytest.raises(ConversationNotFoundError) as caught:
            await function(db, user_id="ada", after_key=key)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


async def test_a_foreign_etag_is_stale(db):
    """Another user's etag, and that of a deleted conversation, raise the same error as a stale one."""
    own, other, deleted = [await chatdb.create_conversation(db, user_id=user) for user in ("ada", "bob", "ada")]
    await chatdb.delete_conversation(db, user_id="ada", conversation_id=deleted.id)
    here = {"user_id": "ada", "conversation_id": own.id}
    errors = []
    for expected in (other.etag, deleted.etag, own.model_copy(update={"revision": 1})):
        with pytest.raises(StaleError) as caught:
            await chatdb.append_message(db, **here, **X, expected=expected)
        errors.append((caught.value.args, vars(caught.value)))
    assert errors == errors[:1] * 3
    assert await chatdb.get_conversation(db, **here) == own


async def test_the_other_users_cursor_pages_ones_own_list(db):
    """Another user's conversation or cursor in `after` only sets a time."""
    own = [await chatdb.create_conversation(db, user_id="ada") for _ in range(2)]
    other = await chatdb.create_conversation(db, user_id="bob")
    last = await chatdb.create_conversation(db, user_id="ada")
    for theirs, latest in ((other, last), (other.cursor, last.cursor)):
        assert await chatdb.list_conversations(db, user_id="ada", after=theirs) == own[::-1]
        assert await chatdb.list_conversations(db, user_id="bob", after=latest) == [other]
        assert await chatdb.list_conversations(db, user_id="bob", after=theirs) == []


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
