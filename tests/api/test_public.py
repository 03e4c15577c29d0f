"""`Message.public()`: a stored message as a dict for an HTTP response."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import chatdb
from chatdb import JsonText, Message
from tests.support.talk import Talk

PAYLOADS = [
    ("null", None),
    ("true", True),
    ('"text"', "text"),
    ("[]", []),
    ("{}", {}),
    ('{"a" :1e5, "a": 2}', {"a": 2}),
    (r'"\ud83d"', r"\ud83d"),
    (r'"a\udc00\ud800b"', r"a\udc00\ud800b"),
    (r'"\ud83d\ude00"', "😀"),
    (r'{"\ud800": ["\udfff", {"x": "\ud83d"}]}', {r"\ud800": [r"\udfff", {"x": r"\ud83d"}]}),
    (r'"a\u0000b"', "a\0b"),
    (r'{"\u0000": 1}', {"\0": 1}),
    ("1e400", "1e400"),
    ("-1e400", "-1e400"),
    ('{"a": [1E+999, -1.5e9999]}', {"a": ["1E+999", "-1.5e9999"]}),
    ("1e-400", 0.0),
    ("1e308", 1e308),
    ("-0.0", -0.0),
    ("123456789012345678901234567890", 123456789012345678901234567890),
    ("1" * 4300, int("1" * 4300)),
    ('"\\u2028</script>"', "\u2028</script>"),
    ("[" * 200 + "]" * 200, None),
]


def writable(public: Any) -> bytes:
    """Return the JSON of an answer, as a strict web framework writes it."""
    return json.dumps(public, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("text", "value"), PAYLOADS, ids=lambda value: str(value)[:20].encode("ascii", "replace").decode()
)
async def test_payload(talk: Talk, text: str, value: Any) -> None:
    """The payload is its JSON value; what strict JSON in UTF-8 cannot hold is a text."""
    await talk.append(payload=JsonText(text))
    [message] = await talk.get_history()

    public = message.public()

    if text.startswith("[["):
        value = json.loads(text)
    assert public["payload"] == value
    assert type(public["payload"]) is type(value)
    assert json.loads(writable(public)) == public
    assert json.loads(json.dumps(public, allow_nan=False).encode()) == public


async def test_all_fields(talk: Talk) -> None:
    """All fields but the user are there, in their order, as plain values, and the record stays as it is."""
    message = await talk.append(
        "Grüße 👋", payload={"a": [1]}, metadata={"b": {"c": None}}, token_count=3, key="k", role="tool"
    )
    before = message.model_copy(deep=True)

    public = message.public()

    assert list(public) == [name for name in Message.model_fields if name != "user_id"]
    assert public == message.model_dump(exclude={"user_id"}) | {
        "payload": {"a": [1]},
        "created_at": message.created_at.isoformat(),
    }
    assert datetime.fromisoformat(public["created_at"]) == message.created_at
    public["metadata"]["b"]["c"] = public["payload"]["a"] = "changed"
    assert message == before
    assert {type(value) for value in public.values()} <= {int, str, dict, type(None)}


async def test_nothing_given(talk: Talk) -> None:
    """What is not set is None."""
    public = (await talk.append("")).public()

    unset = {"parent_seq", "payload", "metadata", "token_count", "key", "state"}
    assert {name for name, value in public.items() if value is None} == unset
    assert json.loads(writable(public)) == public


async def test_a_streamed_message(talk: Talk) -> None:
    """The state and the text so far are there while a message is streamed, and the state says if it was aborted."""
    at: dict[str, Any] = {"user_id": talk.conversation.user_id, "conversation_id": talk.conversation.id}
    started = await chatdb.start_message(talk.db, **at, key="k")
    await chatdb.extend_message(talk.db, **at, key="k", offset=0, text="Grüße")
    [streaming] = await talk.get_history()
    aborted = await chatdb.finish_message(talk.db, **at, key="k", aborted=True)

    public = [message.public() for message in (started, streaming, aborted)]
    assert [(each["state"], each["content"]) for each in public] == [
        ("streaming", ""),
        ("streaming", "Grüße"),
        ("aborted", "Grüße"),
    ]
    assert json.loads(writable(public)) == public


async def test_a_payload_of_null_and_none(talk: Talk) -> None:
    """JSON's null is None, as no payload is."""
    for payload in (JsonText("null"), None):
        assert (await talk.append(payload=payload)).public()["payload"] is None


@pytest.mark.owner
async def test_metadata_of_other_programs(talk: Talk) -> None:
    """A number that another program stored in jsonb, and that no float holds, is a text."""
    await talk.append()
    await talk.db.execute("""update chatdb.messages set metadata = '{"n": 1e400, "m": [-1e999], "i": 1e30}'""")

    public = (await talk.get_message(seq=1)).public()

    assert json.loads(writable(public)) == public


async def test_every_way_to_a_message(talk: Talk) -> None:
    """Messages of appends, of pages and of validation have the same public values."""
    appended = await talk.append(payload=JsonText(r'["\ud800", 1e999]'), metadata={"a": 1})
    read = [
        *await talk.get_history(),
        await talk.get_message(seq=1),
        Message.model_validate_json(appended.model_dump_json()),
        appended.model_copy(),
    ]

    assert [message.public() for message in read] == [appended.public()] * len(read)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec=None, exclude_categories=())),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(st.characters(codec=None, exclude_categories=()), max_size=3), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_payload_can_be_written(value: Any) -> None:
    """Whatever JSON a payload is, strict JSON can hold its public value, which is equal where it can be."""
    fields = {name: None for name in Message.model_fields} | {"created_at": datetime(2026, 1, 1)}  # noqa: C420, DTZ001
    message = Message.model_construct(**fields | {"payload": JsonText(json.dumps(value))})

    payload = message.public()["payload"]

    assert json.loads(writable(payload)) == payload
    try:
        writable(value)
    except UnicodeEncodeError:
        return
    assert payload == value
    assert not isinstance(payload, float) or math.isfinite(payload)
