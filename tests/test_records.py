"""The records: what they have, what they refuse, and how they travel."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import get_args

import pytest
from pydantic import ValidationError

import chatdb
from chatdb import UNSET, Conversation, Deleted, JsonText, Message, NewMessage, Role

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
RECORDS = {
    Conversation: {
        "id": 1,
        "user_id": "alice",
        "key": None,
        "title": "Plans",
        "metadata": {"a": [1]},
        "last_seq": 3,
        "created_at": NOW,
        "updated_at": NOW,
    },
    Message: {
        "id": 7,
        "conversation_id": 1,
        "user_id": "alice",
        "seq": 3,
        "role": "user",
        "content": "hello",
        "payload": JsonText('{"b" :1e5}'),
        "metadata": None,
        "token_count": 2,
        "key": "turn-1",
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
}
"""A record of each kind, with its fields in their order."""

each = pytest.mark.parametrize("record", RECORDS)


@each
def test_fields(record):
    """A record has the documented fields, in their order, and no other."""
    assert list(record.model_fields) == list(RECORDS[record])
    assert record(**RECORDS[record]).model_dump() == RECORDS[record]


@each
def test_is_frozen(record):
    """No field of a record can be set or deleted, and none be added."""
    made = record(**RECORDS[record])
    for field in [*RECORDS[record], "other"]:
        with pytest.raises(ValidationError):
            setattr(made, field, None)
    with pytest.raises(ValidationError):
        delattr(made, next(iter(RECORDS[record])))

    assert made == record(**RECORDS[record])


@each
def test_is_not_hashable(record):
    """A record has no hash, whatever is in it."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(record(**RECORDS[record]))


@each
def test_refuses_other_fields(record):
    """A field that a record does not have is refused."""
    with pytest.raises(ValidationError, match="other"):
        record(**RECORDS[record], other=1)


@each
def test_refuses_missing_fields(record):
    """All fields must be given, but for those of a new message that have a default."""
    for field in RECORDS[record]:
        rest = {name: value for name, value in RECORDS[record].items() if name != field}
        if record is NewMessage and field not in {"role", "content"}:
            assert getattr(NewMessage(**rest), field) is None
        else:
            with pytest.raises(ValidationError, match=field):
                record(**rest)


@each
def test_equality(record):
    """Records are equal if all their fields are."""
    made = record(**RECORDS[record])
    other = dict.fromkeys(("id", "conversations"), 99) | {"content": "other"}

    assert made == record(**RECORDS[record])
    assert made != made.model_copy(update={field: other[field] for field in other.keys() & RECORDS[record].keys()})


@each
def test_travels(record):
    """A record comes back the same from JSON, from a pickle and from a copy."""
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
    """A record can be described to the readers of a service, with its fields by name."""
    assert list(record.model_json_schema(mode="serialization")["properties"]) == list(RECORDS[record])


@each
def test_refusals_quote_no_value(record):
    """What a record refuses it does not quote, for the value may be a text of a conversation."""
    with pytest.raises(ValidationError) as raised:
        record(**RECORDS[record], other="XYZZY")

    assert "XYZZY" not in str(raised.value)


async def test_stored_records_travel(tx):
    """Records of real rows come back the same from JSON, their times aware and in UTC."""
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
    """Times are in UTC and right, whatever the zone of the session."""
    await tx.execute("set local timezone to 'Asia/Kathmandu'")
    created = await chatdb.create_conversation(tx, user_id="alice")

    assert created.created_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - created.created_at) < timedelta(minutes=5)


def test_roles():
    """The roles are the five documented ones."""
    assert set(get_args(Role)) == {"user", "assistant", "system", "developer", "tool"}


def test_json_text():
    """JsonText is a str that knows what it stands for."""
    text = JsonText(' {"b":1e5,"a":[null, 1.0]}')

    assert isinstance(text, str)
    assert text == ' {"b":1e5,"a":[null, 1.0]}'
    assert text.parsed() == {"b": 100000.0, "a": [None, 1.0]}
    assert list(text.parsed()) == ["b", "a"]


def test_unset():
    """UNSET says its name, which signatures show, and is not None."""
    assert repr(UNSET) == "UNSET"
    assert UNSET is not None


async def test_new_message_is_checked_when_it_is_appended(tx):
    """A new message takes any value, and the function that appends it refuses the wrong one by name."""
    message = NewMessage(role="nobody", content=3, token_count="many", key=b"", metadata=[], payload=object())

    with pytest.raises(chatdb.InvalidInputError, match=r"messages\[0\]\.role"):
        await chatdb.append_messages(tx, user_id="alice", conversation_id=1, messages=[message])


def test_cursor_in_another_zone():
    """A time that went through JSON with another offset is the same time."""
    made = Conversation(**RECORDS[Conversation])
    moved = NOW.astimezone(timezone(timedelta(hours=5, minutes=45))).isoformat()

    assert Conversation.model_validate(made.model_dump() | {"updated_at": moved}) == made
