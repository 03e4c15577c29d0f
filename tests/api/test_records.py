"""The records: their fields, what they refuse, and how they serialize."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple, get_args

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

import chatdb
from chatdb import UNSET, Conversation, Deleted, JsonText, Match, Message, MessageTail, Moved, NewMessage, Role

REFUSED = (ValidationError, chatdb.InvalidInputError)
"""Errors for an unknown field: pydantic's or, for NewMessage, chatdb's own."""

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
RECORDS = {
    Conversation: {
        "id": 1,
        "user_id": "alice",
        "key": None,
        "title": "Plans",
        "metadata": {"a": [1]},
        "last_seq": 3,
        "head_seq": 2,
        "revision": 4,
        "created_at": NOW,
        "updated_at": NOW,
        "archived_at": None,
        "pinned_at": NOW,
    },
    Message: {
        "id": 7,
        "conversation_id": 1,
        "user_id": "alice",
        "seq": 3,
        "parent_seq": 1,
        "role": "user",
        "content": "hello",
        "payload": JsonText('{"b" :1e5}'),
        "metadata": None,
        "token_count": 2,
        "key": "turn-1",
        "state": "aborted",
        "created_at": NOW,
    },
    NewMessage: {
        "role": "user",
        "content": "hello",
        "payload": {"a": [1]},
        "metadata": {"a": 1},
        "token_count": 2,
        "key": "turn-1",
    },
    Deleted: {"conversations": 1, "messages": 2},
    Moved: {"conversations": 1, "messages": 2},
    Match: {"conversation_id": 7, "seq": 3, "role": "user", "created_at": NOW, "snippet": "hello"},
    MessageTail: {"text": "llo", "offset": 5, "state": "streaming"},
}
"""One record of each class, with its fields in order."""

each = pytest.mark.parametrize("record", RECORDS)


@each
def test_fields(record):
    """A record has exactly the documented fields, in order."""
    assert list(record.model_fields) == list(RECORDS[record])
    assert record(**RECORDS[record]).model_dump() == RECORDS[record]


@each
def test_is_frozen(record):
    """A record's fields cannot be set, deleted or added."""
    made = record(**RECORDS[record])
    for field in [*RECORDS[record], "other"]:
        with pytest.raises(ValidationError):
            setattr(made, field, None)
    with pytest.raises(ValidationError):
        delattr(made, next(iter(RECORDS[record])))

    assert made == record(**RECORDS[record])


@each
def test_is_not_hashable(record):
    """A record has no hash, whatever it contains."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(record(**RECORDS[record]))


@each
def test_refuses_other_fields(record):
    """An unknown field is refused."""
    with pytest.raises(REFUSED, match="other"):
        record(**RECORDS[record], other=1)


@each
def test_refuses_missing_fields(record):
    """All fields are required, except those of NewMessage that have a default."""
    for field in RECORDS[record]:
        rest = {name: value for name, value in RECORDS[record].items() if name != field}
        if record is NewMessage and field not in {"role", "content"}:
            assert getattr(NewMessage(**rest), field) is None
        else:
            with pytest.raises(REFUSED, match=field):
                record(**rest)


@each
def test_equality(record):
    """Records are equal if all their fields are equal."""
    made = record(**RECORDS[record])
    other = dict.fromkeys(("id", "conversations", "offset", "seq"), 99) | {"content": "other"}

    assert made == record(**RECORDS[record])
    assert made != made.model_copy(update={field: other[field] for field in other.keys() & RECORDS[record].keys()})


@each
def test_travels(record):
    """A record survives JSON, pickling and copying."""
    made = record(**RECORDS[record])

    for back in (
        record.model_validate_json(made.model_dump_json()),
        record.model_validate(made.model_dump(mode="json")),
        pickle.loads(pickle.dumps(made)),
        copy.deepcopy(made),
    ):
        assert back == made
        assert type(getattr(back, "payload", None)) is type(RECORDS[record].get("payload"))


@each
def test_has_a_json_schema(record):
    """A record has a JSON schema with its fields by name."""
    assert list(record.model_json_schema(mode="serialization")["properties"]) == list(RECORDS[record])


def test_every_field_has_a_description():
    """The JSON schema of every public record describes each field in a sentence."""
    public = {found for name in chatdb.__all__ if isinstance(found := getattr(chatdb, name), type)}
    assert {found for found in public if issubclass(found, BaseModel)} == RECORDS.keys()
    for record in RECORDS:
        for mode in ("serialization", "validation"):
            for name, field in record.model_json_schema(mode=mode)["properties"].items():
                assert re.fullmatch(r"[A-Z].{8,}\.", field.get("description", "")), (record, name)


@each
def test_refusals_quote_no_value(record):
    """A record's errors quote no value, since it may be a conversation's text."""
    with pytest.raises(REFUSED) as raised:
        record(**RECORDS[record], other="XYZZY")

    assert "XYZZY" not in str(raised.value)


# --- records that are filled from rows without validation ------------------------------------------------------------


class Pair(NamedTuple):
    """A record as chatdb returns it, and the same row validated."""

    filled: Conversation | Message
    validated: Conversation | Message


@pytest.fixture
async def pairs(tx):
    """Return conversations and messages with all optional values, and with none."""
    plain = await chatdb.create_conversation(tx, user_id="alice")
    full = await chatdb.create_conversation(tx, user_id="alice", key="k", title="Plans", metadata={"a": [1, {}]})
    for fields in (
        {"payload": JsonText(' {"b" :1e5}'), "metadata": {"a": [1.5, None]}, "token_count": 2, "key": "turn-1"},
        {},
    ):
        await chatdb.append_message(
            tx, user_id="alice", conversation_id=full.id, role="tool", content="Grüße 👋", **fields
        )
    conversations = await chatdb.list_conversations(tx, user_id="alice")
    messages = await chatdb.list_messages(tx, user_id="alice", conversation_id=full.id)
    assert {record.id for record in conversations} == {plain.id, full.id}
    at = {"user_id": "alice", "conversation_id": full.id}
    rows = [
        *await tx.fetch(chatdb.conversations._list_conversations.sql, "alice", 2),
        *(await tx.fetch(chatdb.messages._list_messages.sql, *at.values(), None, 0, 20))[:2],
    ]
    return [
        Pair(record, type(record)(**(at if type(record) is Message else {}) | dict(row)))
        for record, row in zip([*conversations, *messages], rows, strict=True)
    ]


def is_filled(record):
    """Return whether the record skipped validation, which would set a slot of pydantic's."""
    try:
        object.__getattribute__(record, "__pydantic_fields_set__")
    except AttributeError:
        return True
    return False


async def test_filled_records_are_as_validated_ones(pairs):
    """Filled and validated records are equal in both directions, field by field, with the same types and repr."""
    assert len(pairs) == 4
    for filled, validated in pairs:
        assert (is_filled(filled), is_filled(validated)) == (True, False)
        assert filled == validated
        assert validated == filled
        assert [*vars(filled).items()] == [*vars(validated).items()]
        assert [*map(type, vars(filled).values())] == [*map(type, vars(validated).values())]
        assert (repr(filled), str(filled)) == (repr(validated), str(validated))
        assert [*filled] == [*validated]
    assert {type(filled.metadata) for filled, _ in pairs} == {dict, type(None)}
    assert {type(filled.payload) for filled, _ in pairs[2:]} == {JsonText, type(None)}
    assert len({repr(filled) for filled, _ in pairs}) == 4
    for one, other in itertools.combinations([filled for filled, _ in pairs], 2):
        assert one != other


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "json"},
        {"include": {"id": True, "metadata": True}},
        {"exclude": {"metadata": {"a"}}},
        {"exclude_unset": True},
        {"exclude_defaults": True},
        {"exclude_none": True},
        {"round_trip": True},
    ],
    ids=repr,
)
async def test_filled_records_are_dumped_as_validated_ones(pairs, options):
    """They dump to the same dict and JSON, alone, in a list and inside another model."""

    class Answer(BaseModel):
        items: list[Conversation | Message]

    dumped = [filled.model_dump(**options) for filled, _ in pairs]
    assert dumped == [validated.model_dump(**options) for _, validated in pairs]
    options = {name: value for name, value in options.items() if name != "mode"}
    for filled, validated in pairs:
        assert filled.model_dump_json(**options) == validated.model_dump_json(**options)
    filled, validated = ([*part] for part in zip(*pairs, strict=True))
    for kind in (list[Conversation | Message], list[Any]):
        assert TypeAdapter(kind).dump_json(filled, **options) == TypeAdapter(kind).dump_json(validated, **options)
    if "include" not in options and "exclude" not in options:
        assert Answer(items=filled).model_dump_json(**options) == Answer(items=validated).model_dump_json(**options)
    assert all(is_filled(record) for record in filled)


async def test_filled_records_are_taken_by_validation(pairs):
    """They and their dumps validate to equal records, whether or not a model revalidates instances."""

    class Strict(BaseModel):
        model_config = ConfigDict(revalidate_instances="always")
        record: Conversation | Message

    class Trusting(BaseModel):
        record: Conversation | Message

    for filled, validated in pairs:
        record = type(filled)
        assert record.model_validate(filled.model_dump()) == validated
        assert record.model_validate_json(filled.model_dump_json()) == validated
        assert record.model_validate(filled) is filled
        assert Trusting(record=filled).record is filled
        assert Strict(record=filled).record == validated


async def test_filled_records_are_copied_as_validated_ones(pairs):
    """Copies and pickles are equal, types included; deep copies are independent, and updates leave the original."""
    for filled, validated in pairs:
        copies = [pickle.loads(pickle.dumps(filled, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        copies += [copy.deepcopy(filled), filled.model_copy(deep=True)]
        for back in [*copies, copy.copy(filled), filled.model_copy(), filled.model_construct(**vars(filled))]:
            assert back is not filled
            assert back == validated
            assert [*map(type, vars(back).values())] == [*map(type, vars(validated).values())]
            assert (back.model_fields_set, back.model_extra) == (validated.model_fields_set, None)
        for back in copies:
            if back.metadata is not None:
                back.metadata["other"] = 1
        assert filled == validated

        renamed = filled.model_copy(update={"id": 99, "metadata": None})
        assert renamed == validated.model_copy(update={"id": 99, "metadata": None})
        assert (renamed.id, renamed.metadata, filled == validated) == (99, None, True)
        if hasattr(copy, "replace"):
            assert copy.replace(filled, id=99) == validated.model_copy(update={"id": 99})


async def test_filled_records_are_records(pairs):
    """They have exactly their fields, cannot be changed and cannot be hashed."""
    for filled, validated in pairs:
        record = type(filled)
        assert filled.model_fields_set == validated.model_fields_set == set(record.model_fields)
        assert filled.model_extra is validated.model_extra is None
        for field in [*record.model_fields, "other"]:
            with pytest.raises(ValidationError):
                setattr(filled, field, None)
        for field in record.model_fields:
            with pytest.raises(ValidationError):
                delattr(filled, field)
        with pytest.raises(TypeError, match="unhashable"):
            hash(filled)
        assert filled == validated


@pytest.mark.parametrize("name", ["other", "_private", "__pydantic_other__", "__other__"])
async def test_filled_records_have_no_other_attribute(pairs, name):
    """An unknown attribute raises AttributeError that names the record and the attribute, as on a validated record."""
    for record in itertools.chain(*pairs):
        assert not hasattr(record, name)
        with pytest.raises(AttributeError, match=f"'{type(record).__name__}' object has no attribute '{name}'"):
            getattr(record, name)


async def test_what_every_function_returns_is_filled(tx):
    """Every function returns records that are filled, not validated."""
    user = {"user_id": "alice"}
    at = user | {"conversation_id": (await chatdb.create_conversation(tx, **user)).id}
    said = {"role": "user", "content": "hello"}
    records = [
        await chatdb.create_conversation(tx, **user),
        await chatdb.create_conversation(tx, **user, key="k"),
        await chatdb.get_conversation(tx, **at),
        await chatdb.get_conversation(tx, **user, conversation_key="k"),
        *(page := await chatdb.list_conversations(tx, **user)),
        *await chatdb.list_conversations(tx, **user, after=page[0]),
        await chatdb.update_conversation(tx, **at, title="Plans"),
        await chatdb.append_message(tx, **at, **said),
        await chatdb.append_message(tx, **at, **said, key="k"),
        *await chatdb.append_messages(tx, **at, messages=[said, said]),
        *await chatdb.append_messages(tx, **at, messages=[said | {"key": "k2"}]),
        *await chatdb.get_history(tx, **at),
        *await chatdb.list_messages(tx, **at),
        *[message async for message in chatdb.iter_messages(tx, **at, batch=2)],
        await chatdb.get_message(tx, **at, seq=1),
        await chatdb.get_message(tx, **at, key="k"),
        await chatdb.update_message(tx, **at, seq=1, content="goodbye"),
        await chatdb.create_conversation(tx, **user, messages=[said]),
        await chatdb.upsert_conversation(tx, **user, key="k"),
        await chatdb.update_conversation(tx, **at, pinned=True),
        *await chatdb.list_pinned(tx, **user),
        await chatdb.append_message(tx, **user, conversation_key="new", create=True, **said),
        *await chatdb.append_messages(tx, **user, conversation_key="newer", create=True, messages=[said]),
        await chatdb.upsert_message(tx, **at, **said, key="k3"),
        await chatdb.pop_message(tx, **at),
        *await chatdb.replace_messages_after(
            tx, **at, after_seq=2, messages=[said], expected=await chatdb.get_conversation(tx, **at)
        ),
    ]
    conversation, messages = await chatdb.load_conversation(tx, **at)
    records += [conversation, *messages]
    for order in (
        {},
        {"archived": None},
        {"archived": True},
        {"order_by": "created_at"},
        {"order_by": "created_at", "descending": False},
    ):
        records += await chatdb.list_conversations(tx, **user, **order)
        records += itertools.chain(*await chatdb.list_previews(tx, **user, **order))
    records = [record for record in records if record is not None]  # a preview without a message
    assert [record for record in records if not is_filled(record)] == []


class Word(str):
    """A caller's str class."""


class Name(StrEnum):
    """A caller's enum of users."""

    ALICE = "alice"


class Number(int):
    """A caller's int class."""


async def test_arguments_of_other_types(tx):
    """Arguments that are subclasses of str and int appear in records as plain str and int."""
    at = {"user_id": Name.ALICE, "conversation_id": Number((await chatdb.create_conversation(tx, user_id="alice")).id)}
    written = await chatdb.append_message(tx, **at, role="user", content="hello")

    for page in (await chatdb.get_history(tx, **at), await chatdb.list_messages(tx, **at)):
        assert page == [written]
        assert [*map(type, vars(page[0]).values())] == [*map(type, vars(written).values())]
        assert (type(page[0].user_id), type(page[0].conversation_id)) == (str, int)


CODECS = {
    "no codec": {},
    "times as texts": {"timestamptz": (datetime.isoformat, lambda text: f"{text.replace(' ', 'T')}:00")},
    "large numbers as texts": {"int8": (str, str)},
    "large numbers as decimals": {"int8": (str, Decimal)},
    "numbers as texts": {"int4": (str, str)},
    "texts as words": {"text": (str, Word)},
    "all of them": {
        "timestamptz": (datetime.isoformat, lambda text: f"{text.replace(' ', 'T')}:00"),
        "int8": (str, str),
        "int4": (str, str),
        "text": (str, Word),
    },
}


@asynccontextmanager
async def with_codecs(connection, codecs):
    """Set codecs on a connection until the end of the block."""
    for name, (encoder, decoder) in codecs.items():
        await connection.set_type_codec(name, schema="pg_catalog", encoder=encoder, decoder=decoder)
    try:
        yield
    finally:
        for name in codecs:
            await connection.reset_type_codec(name, schema="pg_catalog")


@pytest.mark.parametrize("codecs", CODECS)
async def test_codecs_of_the_caller(tx, codecs):
    """Codecs that return other types do not change the records."""
    user = {"user_id": "alice"}
    at = user | {"conversation_id": (await chatdb.create_conversation(tx, **user, key="k", metadata={"a": 1})).id}
    await chatdb.create_conversation(tx, **user)
    await chatdb.update_conversation(tx, **at, pinned=True)

    async def read():
        conversations = await chatdb.list_conversations(tx, **user)
        return [
            *conversations,
            *await chatdb.list_conversations(tx, **user, after=conversations[0]),
            *await chatdb.list_pinned(tx, **user),
            *[record for pair in await chatdb.list_previews(tx, **user) for record in pair if record is not None],
            (loaded := await chatdb.load_conversation(tx, **at, limit=2))[0],
            *loaded[1],
            *await chatdb.get_history(tx, **user, conversation_key="k", before_seq=3),
            *await chatdb.list_messages(tx, **at),
            *await chatdb.get_history(tx, **at, limit=2),
            *await chatdb.list_messages(tx, **at, after_seq=2),
            await chatdb.get_message(tx, **at, seq=2),
            await chatdb.update_message(tx, **at, seq=2, content="full"),
        ]

    # the first row of a page has null in every nullable column
    for fields in ({}, {"payload": JsonText("[ 1 ]"), "metadata": {"b": 2}, "token_count": 3, "key": "k"}, {}):
        await chatdb.append_message(tx, **at, role="user", content="full" if fields else "", **fields)
    before = await read()
    async with with_codecs(tx, CODECS[codecs]):
        after = await read()
        said = {"role": "user", "content": "new"}
        appended = await chatdb.append_messages(tx, **at, messages=[said, said | {"token_count": 3}])
        deleted = await chatdb.delete_conversation(tx, **at)

    assert after == before
    for one, other in zip(after, before, strict=True):
        assert [*map(type, vars(one).values())] == [*map(type, vars(other).values())]
    for message in appended:
        assert type(message).model_validate(message.model_dump(), strict=True) == message
    assert all(map(is_filled, after))
    assert deleted == Deleted(conversations=1, messages=5)


async def test_stored_records_travel(tx):
    """Records read from the database survive JSON, with aware times in UTC."""
    created = await chatdb.create_conversation(
        tx, user_id="alice", key="k", title="Grüße 👋", metadata={"a": {"b": None}}
    )
    message = await chatdb.append_message(
        tx,
        user_id="alice",
        conversation_id=created.id,
        role="tool",
        content="Zeile\n\u2028👋",
        payload=JsonText(r'{"\u0000": 1.0, "a":"\ud800"}'),
        metadata={"x": [1.5]},
        token_count=0,
        key="k",
    )
    conversation = await chatdb.get_conversation(tx, user_id="alice", conversation_id=created.id)

    for record in (conversation, message):
        assert type(record).model_validate_json(record.model_dump_json()) == record
    for time in (conversation.created_at, conversation.updated_at, message.created_at):
        assert time.utcoffset() == timedelta(0)
        assert time.tzinfo is UTC


async def test_times_are_utc_in_any_session(tx):
    """Times are correct and in UTC, whatever the session's time zone."""
    await tx.execute("set local timezone to 'Asia/Kathmandu'")
    created = await chatdb.create_conversation(tx, user_id="alice")

    assert created.created_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - created.created_at) < timedelta(minutes=5)


def test_roles():
    """The roles are the five documented ones."""
    assert set(get_args(Role)) == {"user", "assistant", "system", "developer", "tool"}


def test_json_text():
    """JsonText is a str that can be parsed."""
    text = JsonText(' {"b":1e5,"a":[null, 1.0]}')

    assert isinstance(text, str)
    assert text == ' {"b":1e5,"a":[null, 1.0]}'
    assert text.parsed() == {"b": 100000.0, "a": [None, 1.0]}
    assert list(text.parsed()) == ["b", "a"]


def test_unset():
    """UNSET has a readable repr for signatures, and is not None."""
    assert repr(UNSET) == "UNSET"
    assert UNSET is not None


async def test_new_message_is_checked_when_it_is_appended(tx):
    """NewMessage accepts any value; the append refuses an invalid one by name."""
    message = NewMessage(role="nobody", content=3, token_count="many", key=b"", metadata=[], payload=object())

    with pytest.raises(chatdb.InvalidInputError, match=r"messages\[0\]\.role"):
        await chatdb.append_messages(tx, user_id="alice", conversation_id=1, messages=[message])


def test_cursor_in_another_zone():
    """A time that returns from JSON with another offset is the same time."""
    made = Conversation(**RECORDS[Conversation])
    moved = NOW.astimezone(timezone(timedelta(hours=5, minutes=45))).isoformat()

    assert Conversation.model_validate(made.model_dump() | {"updated_at": moved}) == made
