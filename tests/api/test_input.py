"""Limits of every parameter: values at the edge are accepted, values beyond are refused before anything is sent."""

from __future__ import annotations

import asyncio
import enum
import json
import subprocess
import sys
import textwrap
import traceback
import tracemalloc
from collections import OrderedDict, UserDict, defaultdict
from datetime import UTC, datetime, timedelta
from itertools import count, islice, repeat
from typing import Any, NamedTuple

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chatdb
from chatdb import (
    NEW,
    UNSET,
    Conversation,
    ConversationNotFoundError,
    InvalidInputError,
    JsonText,
    MessageNotFoundError,
    NewMessage,
)
from chatdb._core import validate
from chatdb._core.driver_errors import CONSTRAINTS, map_driver_error
from chatdb.records import CURSOR, encode_token
from tests.support.calls import NOBODYS, SIGNATURES, arguments_with, call

pytestmark = pytest.mark.server_independent

MIB = 1024 * 1024
WIDE = "👋"  # one character, four bytes
MARK = "XYZZY"  # text that no error message may quote


class Recorder:
    """A database handle that records each statement and sends nothing."""

    def __init__(self):
        self.sent = []

    async def fetch(self, query, *args, timeout=None):
        """Record the statement."""
        self.sent.append(query)
        return []


def nested(depth, innermost=0):
    """Return `depth` levels of nested lists and dicts."""
    value = innermost
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def circular():
    """Return a dict that contains itself."""
    value = {}
    value["self"] = value
    return value


def json_of(size):
    """Return metadata whose JSON has that many bytes."""
    return {"a": "x" * (size - len('{"a": ""}'))}


WRONG_TEXT = {
    "None": None,
    "int": 1,
    "bytes": MARK.encode(),
    "list": [MARK],
    "UNSET": UNSET,
    "NUL": f"{MARK}\0",
    "high surrogate": f"{MARK}\ud800",
    "low surrogate": f"\udfff{MARK}",
}
WRONG_NAME = WRONG_TEXT | {"empty": "", "256 characters": "n" * 256, "256 wide characters": WIDE * 256}
WRONG_INT = {
    "None": None,
    "str": "1",
    "float": 1.0,
    "bool": True,
    "UNSET": UNSET,
    "2**63": 2**63,
    "-2**63 - 1": -(2**63) - 1,
    "10**400": 10**400,
}
WRONG_PLACE = WRONG_INT | {"negative": -1}
WRONG_LIMIT = WRONG_INT | {"0": 0, "-1": -1, "10,001": 10_001}
WRONG_BOOL = {"None": None, "0": 0, "1": 1, "str": "true", "list": [MARK]}
WRONG_CONVERSATION = {
    "int": 1,
    "bytes": MARK.encode(),
    "dict": NOBODYS.model_dump(),
    "UNSET": UNSET,
    "empty str": "",
    "str": MARK,
    "no ASCII": f"c1{WIDE}",
    "NUL": f"{MARK}\0",
    "lone surrogate": f"{MARK}\ud800",
    "id beyond int8": NOBODYS.model_copy(update={"id": 2**63}),
    "id as a str": NOBODYS.model_copy(update={"id": "1"}),
    "without fields": Conversation.model_construct(),
}
WRONG_JSON = {
    "set": {MARK},
    "bytes in a list": [MARK.encode()],
    "time": {"at": datetime(2026, 1, 1, tzinfo=UTC)},
    "object": {"a": object()},
    "NaN": {"a": float("nan")},
    "Infinity": {"a": [float("inf")]},
    "-Infinity": {"a": {"b": float("-inf")}},
    "int as key": {"a": {1: MARK}},
    "None as key": {None: MARK},
    "tuple as key": {"a": [{("a", "b"): MARK}]},
    "bool as key": {"a": {True: MARK}},
    "circular": circular(),
    "201 levels": {"a": nested(200)},
    "201 levels, the last empty": {"a": nested(199, innermost=[])},
    "5,000 levels": {"a": nested(4999)},
    "huge int": {"a": 10**5000},
    "UNSET inside": {"a": UNSET},
}


def longer_metadata(kibibytes):
    """Return metadata that exceeds this size slightly."""
    size = kibibytes * 1024
    return {
        "one byte": json_of(size + 1),
        "wide characters": {"a": WIDE * (size // 4 - 2)},
        "numbers": {"a": [1e300] * (size // 303 + 4)},  # jsonb writes each with 301 digits
        "the same numbers": {"a": [[1e300] * (size // 606 + 2)] * 2},
    }


WRONG_METADATA = WRONG_JSON | {
    "str": json.dumps(MARK),
    "JsonText": JsonText("{}"),
    "list": [{}],
    "int": 0,
    "NUL": {"a": f"{MARK}\0"},
    "NUL in a key": {"a": [{f"{MARK}\0": 1}]},
    "lone surrogate": {"a": {"b": [f"{MARK}\udc00"]}},
    "lone surrogate in a key": {f"{MARK}\udc00": 1},
}
WRONG_PAYLOAD = WRONG_JSON | {
    "16 MiB and one": "x" * (16 * MIB - 1),
    "16 MiB and one of wide characters": WIDE * (4 * MIB),
    "16 MiB and one as JsonText": JsonText(f'"{"x" * (16 * MIB - 1)}"'),
    "201 levels as JsonText": JsonText(json.dumps(nested(201))),
    "201 levels as JsonText, the last empty": JsonText("[" * 201 + "]" * 201),
    "100,000 levels as JsonText": JsonText("[" * 100_000 + "]" * 100_000),
    "empty JsonText": JsonText(""),
    "blank JsonText": JsonText(" \n"),
    "no JSON": JsonText(f"{{'{MARK}': 1}}"),
    "two values": JsonText(f'"{MARK}" 1'),
    "a comma too many": JsonText(f'["{MARK}",]'),
    "NaN as JsonText": JsonText("[NaN]"),
    "-Infinity as JsonText": JsonText("-Infinity"),
    "a leading zero": JsonText("01"),
    "a byte order mark": JsonText("\ufeff1"),
    "another blank": JsonText("\u00a01"),
    "other digits": JsonText("[\u0661]"),
    "a line break in a string": JsonText(f'"{MARK}\n"'),
    "a short escape": JsonText(r'"\u12"'),
    "an unknown escape": JsonText(r'"\x41"'),
    "NUL in JsonText": JsonText(f'"{MARK}\0"'),
    "lone surrogate in JsonText": JsonText(f'"{MARK}\ud800"'),
    "a number of 5,000 digits": JsonText("1" * 5_000),
}
WRONG_CONTENT = WRONG_TEXT | {
    "4 MiB and one": "x" * (4 * MIB + 1),
    "4 MiB and one of wide characters": WIDE * MIB + "x",
}

WRONG = {
    "user_id": WRONG_NAME,
    "key": WRONG_NAME,
    "title": WRONG_TEXT | {"1,001 characters": "t" * 1001, "1,001 wide characters": WIDE * 1001},
    "metadata": WRONG_METADATA,
    "conversation_id": WRONG_INT,
    "seq": WRONG_PLACE,
    "before_seq": WRONG_PLACE,
    "after_seq": WRONG_PLACE,
    "parent_seq": WRONG_PLACE,
    "top_seq": WRONG_PLACE,
    "at_least": WRONG_PLACE,
    "max_tokens": WRONG_INT | {"0": 0, "negative": -1},
    "limit": WRONG_LIMIT,
    "batch": WRONG_LIMIT,
    "before_key": WRONG_NAME,
    "after_key": WRONG_NAME,
    "conversation_key": WRONG_NAME,
    "new_key": WRONG_NAME,
    "after": WRONG_CONVERSATION
    | {
        "etag": NOBODYS.etag,
        "another version": f"c2{NOBODYS.cursor[2:]}",
        "time without a zone": NOBODYS.model_copy(update={"updated_at": datetime(2026, 1, 1)}),  # noqa: DTZ001
        "time beyond all years": encode_token(CURSOR, 2**62, 2**62, 1),
        "time before all years": encode_token(CURSOR, -(2**63), -(2**63), 1),
        "three bytes more": f"{NOBODYS.cursor}AAAA",
        "a byte less": NOBODYS.cursor[:-2],
        "padding": f"{NOBODYS.cursor}==",
        "a blank": f" {NOBODYS.cursor}",
        "NEW": NEW,
    },
    "expected": WRONG_CONVERSATION
    | {
        "cursor": NOBODYS.cursor,
        "another version": f"e2{NOBODYS.etag[2:]}",
        "revision beyond int8": NOBODYS.model_copy(update={"revision": 2**63}),
        "negative revision": NOBODYS.model_copy(update={"revision": -1}),
        "revision as a str": NOBODYS.model_copy(update={"revision": "1"}),
        "three bytes more": f"{NOBODYS.etag}AAAA",
        "a byte less": NOBODYS.etag[:-2],
        "quotes": f'"{NOBODYS.etag}"',
        "weak": f'W/"{NOBODYS.etag}"',
        "NEW": NEW,
    },
    "archived": WRONG_BOOL,
    "pinned": WRONG_BOOL,
    "descending": WRONG_BOOL,
    "create": WRONG_BOOL | {"True with an id": True},
    "to_user_id": WRONG_NAME,
    "query": WRONG_TEXT | {"empty": "", "white space": " \n", "1,001 characters": "q" * 1001},
    "mode": WRONG_TEXT | {"unknown": MARK, "regex": "regex", "capitals": "WORDS", "empty": ""},
    "order_by": WRONG_TEXT | {"unknown": MARK, "title": "title", "capitals": "UPDATED_AT", "empty": ""},
    "on_existing": WRONG_TEXT | {"unknown": MARK, "replace": "replace", "bool": True, "empty": ""},
    "offset": WRONG_PLACE,
    "text": WRONG_CONTENT,
    "aborted": WRONG_BOOL,
    "older_than": WRONG_INT
    | {
        "negative": timedelta(microseconds=-1),
        "beyond 10,000 days": timedelta(days=10_000, microseconds=1),
        "beyond every year": timedelta.max,
        "class": timedelta,
    },
    "flush_every": {
        **{label: value for label, value in WRONG_INT.items() if label != "float"},
        "0": 0,
        "0.009": 0.009,
        "3,601": 3601,
        "NaN": float("nan"),
        "infinity": float("inf"),
    },
    "role": WRONG_TEXT | {"unknown": MARK, "capital": "User", "empty": "", "unhashable": [[]]},
    "content": WRONG_CONTENT,
    "payload": WRONG_PAYLOAD | {"UNSET": UNSET},
    "token_count": WRONG_INT | {"negative": -1, "2**31": 2**31},
    "messages": {
        "None": None,
        "int": 3,
        "str": MARK,
        "bytes": MARK.encode(),
        "one message": NewMessage(role="user", content=MARK),
        "one dict": {"role": "user", "content": MARK},
        "the same key twice": [{"role": "user", "content": MARK, "key": MARK}] * 2,
    },
    "timeout": {"str": "1", "bool": True, "list": [], "negative": -1.0, "NaN": float("nan"), "huge": 10**400},
}
"""Invalid values of each parameter."""


def wrong_values(name, parameter):
    """Return the values that a function refuses for one of its parameters."""
    default = SIGNATURES[name][parameter]
    clears = default is UNSET and parameter in {"title", "metadata", "payload", "token_count", "archived", "pinned"}
    optional = default is None or clears or (parameter == "archived" and default is False)
    values = dict(WRONG["metadata" if "patch" in parameter else parameter])
    if "metadata" in parameter:
        values |= longer_metadata(1024 if "conversation" in name + parameter else 64)
    if "patch" in parameter:
        values |= {"None": None, "UserDict": UserDict(a=1)}
    if parameter == "expected" and name == "create_conversation":
        values = {label: value for label, value in values.items() if value is not NEW} | {"etag": NOBODYS.etag}
    return {
        label: value for label, value in values.items() if not (value is None and optional) and value is not default
    }


async def outcome(name, arguments, parameter):
    """Make a call that must be refused for one parameter, and return what happened."""
    db = Recorder()
    try:
        await call(db, name, arguments, NOBODYS)
    except InvalidInputError as error:
        if MARK in "".join(traceback.format_exception(error)):
            return "tells the text"
        if (error.parameter, str(error).partition(":")[0]) != (parameter, parameter):
            return f"names {error.parameter}"
        return "sent" if db.sent else "refused"
    except Exception as error:  # noqa: BLE001 - any other error is wrong
        return repr(error)[:100]
    return "taken"


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, parameter) for name, parameters in SIGNATURES.items() for parameter in parameters]
)
async def test_refused_before_anything_is_sent(name, parameter):
    """An invalid value raises InvalidInputError that names the parameter, quotes no text, and sends nothing."""
    values = wrong_values(name, parameter)

    outcomes = {
        label: await outcome(name, arguments_with(name, parameter, value), parameter) for label, value in values.items()
    }

    assert outcomes == dict.fromkeys(values, "refused")
    assert values


@pytest.mark.parametrize("kind", [dict, NewMessage])
@pytest.mark.parametrize("field", ["role", "content", "payload", "metadata", "token_count", "key"])
async def test_refused_in_a_batch(kind, field):
    """The error for an invalid value in a batch names the message and the field, and nothing is sent."""
    good = {"role": "user", "content": "hello"}
    optional = field not in {"role", "content"}
    values = {label: value for label, value in WRONG[field].items() if not (value is None and optional)}

    outcomes = {
        label: await outcome(
            "append_messages", {"messages": [good, kind(**good | {field: value}), good]}, f"messages[1].{field}"
        )
        for label, value in values.items()
    }

    assert outcomes == dict.fromkeys(values, "refused")


@pytest.mark.parametrize(
    ("value", "parameter"),
    [
        (None, "messages[1]"),
        (MARK, "messages[1]"),
        (("user", MARK), "messages[1]"),
        ({"role": "user"}, "messages[1].content"),
        ({"content": MARK}, "messages[1].role"),
        ({"role": "user", "content": MARK, "seq": 1}, "messages[1].seq"),
        ({"role": "user", "content": MARK, 1: MARK}, "messages[1].1"),
    ],
    ids=["None", "str", "tuple", "no content", "no role", "an unknown field", "a number as field"],
)
async def test_what_is_no_message_in_a_batch(value, parameter):
    """The error names an item that is neither a NewMessage nor a dict of its fields, and nothing is sent."""
    batch = [{"role": "user", "content": "hello"}, value]

    assert await outcome("append_messages", {"messages": batch}, parameter) == "refused"


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("\0", 0),
        (f"{MARK}\0", 5),
        (f"{WIDE}\0", 1),
        (f"é{MARK}\ud800", 6),
        (f"\udc00{MARK}", 0),
        (f"{WIDE}\ud83d", 1),
        ("x" * (4 * MIB - 1) + "\0", 4 * MIB - 1),
    ],
    ids=["first", "NUL", "after a wide character", "surrogate", "low surrogate", "half of a wide character", "last"],
)
@pytest.mark.parametrize(
    ("name", "parameter"), [("append_message", "content"), ("append_messages", "messages[0].content")]
)
async def test_position_of_what_content_cannot_hold(name, parameter, text, position):
    """The error gives the position of a NUL or lone surrogate in content, not the text around it."""
    arguments = {"role": "user", "content": text}

    with pytest.raises(InvalidInputError, match=rf" at position {position}\b") as raised:
        await call(Recorder(), name, {"messages": [arguments]} if name == "append_messages" else arguments, NOBODYS)

    assert raised.value.parameter == parameter
    assert MARK not in str(raised.value)


@pytest.mark.parametrize("parameter", ["metadata", "payload"])
def test_circles_that_branch(parameter):
    """A structure that contains itself twice is refused before it exhausts memory."""
    program = """
        import asyncio, resource, sys
        import chatdb

        resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
        value = {}
        value["left"] = value["right"] = value
        place = {"user_id": "alice", "conversation_id": 1, "role": "user", "content": ""}
        try:
            asyncio.run(chatdb.append_message(None, **place, **{sys.argv[1]: value}))
        except chatdb.InvalidInputError as error:
            print(error.parameter)
    """
    pytest.importorskip("resource", reason="the memory of a process is bounded on Unix only")

    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), parameter], capture_output=True, text=True, check=False
    )

    assert run.stdout.strip() == parameter, run.stderr[-300:]


# accepted values

WIDE_NAME = WIDE * 255


async def test_the_longest_names(tx):
    """User ids and keys can have 255 characters of any width, titles 1,000."""
    for name, title in [(WIDE_NAME, WIDE * 1000), ("n" * 255, "t" * 1000), ("n", "")]:
        conversation = await chatdb.create_conversation(tx, user_id=name, key=name, title=title)
        message = await chatdb.append_message(
            tx, user_id=name, conversation_id=conversation.id, role="user", content="", key=name
        )
        place = {"user_id": name, "conversation_id": conversation.id}

        assert (conversation.user_id, conversation.key, conversation.title) == (name, name, title)
        assert (await chatdb.get_conversation(tx, user_id=name, conversation_key=name)).id == conversation.id
        assert await chatdb.get_message(tx, **place, key=name) == message
        batch = [{"role": "user", "content": "", "key": name}]
        assert await chatdb.append_messages(tx, **place, messages=batch) == [message]
        assert (await chatdb.update_conversation(tx, **place, title=title)).title == title


@pytest.fixture
async def place(tx):
    """Return the user and id of a conversation with one message."""
    conversation = await chatdb.create_conversation(tx, user_id="alice")
    found = {"user_id": "alice", "conversation_id": conversation.id}
    await chatdb.append_message(tx, **found, role="user", content="")
    return found


async def written(db, place, way, **fields):
    """Write the fields with one of the four calls, and return the message."""
    if way == "batch":
        batch = [{"role": "user", "content": ""} | fields]
        [message] = await chatdb.append_messages(db, **place, messages=batch)
    elif way == "update":
        message = await chatdb.update_message(db, **place, seq=1, **fields)
    else:
        key = "k" if way == "keyed" else None
        message = await chatdb.append_message(db, **place, **{"role": "user", "content": "", "key": key} | fields)
    return message


WAYS = ("append", "keyed", "batch", "update")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "content", ["x" * (4 * MIB), WIDE * MIB, ""], ids=["4 MiB", "4 MiB of wide characters", "none"]
)
async def test_the_longest_content(tx, place, way, content):
    """Content can have 0 bytes to 4 MiB in UTF-8."""
    message = await written(tx, place, way, content=content)

    assert message.content == content
    assert await chatdb.get_message(tx, **place, seq=message.seq) == message


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "metadata",
    [json_of(65_536), {"a": WIDE * 16_381 + "xyz"}, {"a": "\n\\\x01" * 6_552 + "xxxxxxx"}, {"nested": nested(199)}],
    ids=["64 KiB", "64 KiB of wide characters", "64 KiB of escapes", "200 levels"],
)
async def test_the_largest_metadata(tx, place, way, metadata):
    """A message's metadata can have 64 KiB of JSON and 200 levels."""
    assert "nested" in metadata or len(json.dumps(metadata, ensure_ascii=False).encode()) == 65_536

    message = await written(tx, place, way, metadata=metadata)

    assert message.metadata == metadata


@pytest.mark.parametrize(
    "metadata",
    [json_of(MIB), {"a": WIDE * (MIB // 4 - 3) + "xyz"}, {"nested": nested(199)}],
    ids=["1 MiB", "1 MiB of wide characters", "200 levels"],
)
async def test_the_largest_metadata_of_a_conversation(tx, place, metadata):
    """A conversation's metadata can have 1 MiB of JSON and 200 levels."""
    assert "nested" in metadata or len(json.dumps(metadata, ensure_ascii=False).encode()) == MIB

    conversation = await chatdb.update_conversation(tx, **place, metadata=metadata)
    another = await chatdb.create_conversation(tx, user_id="alice", metadata=metadata)
    keyed = await chatdb.create_conversation(tx, user_id="alice", key="large", metadata=metadata)

    assert conversation.metadata == another.metadata == keyed.metadata == metadata


@pytest.mark.parametrize(
    "payload",
    ["x" * (16 * MIB - 2), JsonText(f'"{"x" * (16 * MIB - 2)}"'), JsonText(f'"{WIDE * (4 * MIB - 1)}"  ')],
    ids=["value", "JsonText", "JsonText of wide characters"],
)
async def test_the_largest_payload(tx, place, payload):
    """A payload can have 16 MiB of JSON."""
    message = await written(tx, place, "append", payload=payload)

    assert len(message.payload.encode()) == 16 * MIB
    assert message.payload == (payload if isinstance(payload, JsonText) else f'"{payload}"')


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("innermost", [0, []], ids=["200 levels", "200 levels, the last empty"])
async def test_the_deepest_payload(tx, place, way, innermost):
    """A payload can have 200 levels, as a value or as JsonText."""
    value = nested(200) if innermost == 0 else nested(199, innermost=innermost)
    text = JsonText(json.dumps(value, separators=(",", ":")))

    for payload in (value, text) if way == "update" else (value,):
        assert (await written(tx, place, way, payload=payload)).payload.parsed() == value


async def test_brackets_in_a_text_are_no_levels(tx, place):
    """JsonText with very many brackets is accepted if they are not nested."""
    for value in ("[{" * 300, [[]] * 300, {"a": ["]"] * 300}):
        assert (await written(tx, place, "append", payload=JsonText(json.dumps(value)))).payload.parsed() == value


@pytest.mark.parametrize(
    "number",
    ["1e131000", "-1e131073", "1e-131000", "1e999999999999", "1" * 4300, "0." + "1" * 20_000],
    ids=lambda number: f"{number[:12]} of {len(number)}",
)
@pytest.mark.parametrize("way", WAYS)
async def test_extreme_numbers_can_be_read_back(tx, place, way, number):
    """A number beyond float and numeric is refused or returned as written."""
    payload = JsonText(f'{{"n": {number}}}')
    try:
        message = await written(tx, place, way, payload=payload)
    except InvalidInputError as error:
        assert error.parameter.endswith("payload")  # noqa: PT017 - one of two outcomes
        return
    assert message.payload == payload
    assert (await chatdb.get_history(tx, **place))[-1].payload == payload
    assert message.payload.parsed() == json.loads(payload)


@pytest.mark.parametrize(
    "metadata", [{"a": 10**4299}, {"a": -1.7976931348623157e308}, {"a": 5e-324}], ids=lambda m: f"{m}"[:20]
)
async def test_extreme_numbers_in_metadata(tx, place, metadata):
    """The largest int and the largest and smallest floats in metadata can be read back."""
    message = await written(tx, place, "append", metadata=metadata)

    assert float(message.metadata["a"]) == float(metadata["a"]) if isinstance(metadata["a"], float) else True
    assert await chatdb.get_message(tx, **place, seq=2) == message


async def test_limits_at_their_edges(tx, place):
    """`limit` and `batch` range from 1 to 10,000."""
    for limit in (1, 10_000):
        assert len(await chatdb.get_history(tx, **place, limit=limit)) == 1
        assert len(await chatdb.list_messages(tx, **place, limit=limit)) == 1
        assert len([message async for message in chatdb.iter_messages(tx, **place, batch=limit)]) == 1
        assert len(await chatdb.list_conversations(tx, user_id="alice", limit=limit)) == 1
        last = (await chatdb.list_conversations(tx, user_id="alice"))[0]
        assert await chatdb.list_conversations(tx, user_id="alice", limit=limit, after=last) == []


async def test_numbers_at_their_edges(tx, place):
    """Ids can be any int8, seq any int8 from 0, and token counts any int4 from 0."""
    for conversation_id in (2**63 - 1, -(2**63), 0):
        with pytest.raises(ConversationNotFoundError):
            await chatdb.get_conversation(tx, user_id="alice", conversation_id=conversation_id)
    for seq in (0, 2**63 - 1):
        with pytest.raises(MessageNotFoundError):
            await chatdb.get_message(tx, **place, seq=seq)
    for seq, before, after in [(0, 0, 1), (2**63 - 1, 1, 0)]:
        assert len(await chatdb.get_history(tx, **place, before_seq=seq)) == before
        assert len(await chatdb.list_messages(tx, **place, after_seq=seq)) == after
    for way in WAYS:
        assert (await written(tx, place, way, token_count=2**31 - 1)).token_count == 2**31 - 1
    assert (await written(tx, place, "append", token_count=0)).token_count == 0


class Speaker(enum.StrEnum):
    """A host's own enumeration."""

    ASSISTANT = "assistant"


class Size(enum.IntEnum):
    """A host's own enumeration."""

    PAGE = 1


class Text(str):
    """A host's own str class."""

    __slots__ = ()


async def test_kinds_of_str_and_int(tx):
    """Subclasses of str and int are accepted as their values, and plain values are returned."""
    conversation = await chatdb.create_conversation(tx, user_id=Text("alice"), key=Text("key"), title=Text("title"))
    place = {"user_id": Text("alice"), "conversation_id": conversation.id}
    fields = {"role": Speaker.ASSISTANT, "content": JsonText("content"), "metadata": {Text("a"): Size.PAGE}}
    message = await chatdb.append_message(tx, **place, **fields, key=Text("key"), token_count=Size.PAGE)
    [other] = await chatdb.append_messages(tx, **place, messages=[fields])

    assert (conversation.key, conversation.title) == ("key", "title")
    assert (message.role, message.content, message.metadata, message.token_count) == (
        "assistant",
        "content",
        {"a": 1},
        1,
    )
    assert (other.role, other.content, other.metadata) == ("assistant", "content", {"a": 1})
    assert {type(value) for value in (conversation.title, message.role, message.content, message.key)} == {str}
    assert len(await chatdb.list_messages(tx, **place, limit=Size.PAGE)) == 1


async def test_a_caller_s_values_stay_as_they_are(tx, place):
    """A caller's objects are not modified, and later changes to them are not stored."""
    metadata, payload = {"a": [1]}, {"b": [2]}
    batch = [{"role": "user", "content": "", "metadata": metadata, "payload": payload}]

    [message] = await chatdb.append_messages(tx, **place, messages=batch)
    metadata["a"].append(3)

    assert batch[0].keys() == {"role", "content", "metadata", "payload"}
    assert payload == {"b": [2]}
    assert message.metadata == {"a": [1]}


# the same limits in the database

CONVERSATION = {"user_id": "'alice'", "key": "null", "title": "null", "metadata": "null", "last_seq": "0"}
MESSAGE = {
    "user_id": "'alice'",
    "conversation_id": "$1",
    "seq": "2",
    "role": "'user'",
    "content": "''",
    "payload": "null",
    "metadata": "null",
    "token_count": "null",
    "key": "null",
    "created_at": "now()",
}
JSONB = "jsonb_build_object('a', repeat('x', {}))"  # 9 bytes more than the text
EDGES = {
    "ck_conversations_user_id": (["'u'", f"repeat('{WIDE}', 255)"], ["''", "repeat('u', 256)"]),
    "ck_conversations_key": (["'k'", f"repeat('{WIDE}', 255)"], ["''", "repeat('k', 256)"]),
    "ck_conversations_title": (["''", f"repeat('{WIDE}', 1000)"], ["repeat('t', 1001)"]),
    "ck_conversations_metadata": (
        ["'{}'", JSONB.format(1_048_567)],
        [JSONB.format(1_048_568), "'[]'", "'null'", "'1'"],
    ),
    "ck_messages_seq": (["1 + 1", "9223372036854775807"], ["0", "-1"]),
    "ck_messages_role": (["'tool'", "'developer'"], ["'User'", "''", "'function'"]),
    "ck_messages_key": (["'k'", f"repeat('{WIDE}', 255)"], ["''", "repeat('k', 256)"]),
    "ck_messages_content": (["''", f"repeat('{WIDE}', 1048576)"], ["repeat('x', 4194305)"]),
    "ck_messages_payload": (["'null'", "to_json(repeat('x', 16777214))"], ["to_json(repeat('x', 16777215))"]),
    "ck_messages_metadata": (["'{}'", JSONB.format(65_527)], [JSONB.format(65_528), "'[]'", "'null'", "'1'"]),
    "ck_messages_token_count": (["0", "2147483647"], ["-1"]),
    "ck_messages_state": (["null", "'streaming'", "'aborted'"], ["''", "'Streaming'", "'done'"]),
    "ck_messages_parent_seq": (["null", "0", "1"], ["-1", "2", "9223372036854775807"]),
}
"""SQL expressions that each CHECK accepts, and ones that it refuses."""


@pytest.mark.parametrize("constraint", CONSTRAINTS)
async def test_the_database_enforces_the_same(tx, place, constraint):
    """SQL that bypasses chatdb meets the same limits, as CHECKs that chatdb translates."""
    parameter, sentence = CONSTRAINTS[constraint]
    table = constraint.split("_")[1]
    columns, arguments = (MESSAGE, [place["conversation_id"]]) if table == "messages" else (CONVERSATION, [])

    async def insert(expression):
        values = columns | {parameter: expression}
        # every other value is valid, so that the insert finds the message's conversation
        await tx.execute(
            f"insert into chatdb.{table} ({', '.join(values)}) values ({', '.join(values.values())})", *arguments
        )

    taken, refused = EDGES[constraint]
    for expression in taken:
        undone = tx.transaction()
        await undone.start()
        await insert(expression)
        await undone.rollback()
    for expression in refused:
        with pytest.raises(asyncpg.CheckViolationError) as raised:
            async with tx.transaction():
                await insert(expression)
        assert raised.value.constraint_name == constraint
        error = map_driver_error(raised.value)
        assert isinstance(error, InvalidInputError)
        assert (error.parameter, str(error)) == (parameter, f"{parameter}: {sentence}")


# values that only resemble JSON: subclasses and shared references


def shared(levels, value="lol"):
    """Return lists that contain the same object twice, so that the JSON doubles at each level."""
    for level in range(levels):
        value = {"a": value, "b": value} if level % 2 else [value, value]
    return value


@pytest.mark.parametrize("parameter", ["payload", "metadata"])
@pytest.mark.parametrize(
    "value",
    [shared(26), shared(60), shared(190), ["x" * MIB] * 10_000, [[{"k" * MIB: 1}] * 4_000], [[[0] * MIB] * 4_000] * 4],
    ids=["26 levels", "60 levels", "190 levels", "a string", "a key", "a list"],
)
def test_shared_references_are_refused_before_they_are_encoded(parameter, value):
    """A value that is small in memory but huge as JSON is refused without building the JSON."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInputError, match="must be at most") as raised:
            getattr(validate, f"check_{parameter}")(parameter, {"a": value})
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert raised.value.parameter == parameter


class Score(float, enum.Enum):
    """A float that is an enum."""

    LOW = 1e-7


class Level(enum.IntEnum):
    """An int that is an enum."""

    LOW = 1


class NumpyFloat(float):
    """A float whose repr is not a number, like numpy's."""

    def __repr__(self):
        """Return a repr like numpy's."""
        return f"np.float64({float.__repr__(self)})"


class OddStr(str):
    """A str whose methods fail."""

    def _fail(self, *_):
        raise LookupError

    __str__ = __len__ = __repr__ = find = isascii = encode = _fail


class OddDict(dict):
    """A dict whose items are not the stored ones."""

    def items(self):
        """Return other items."""
        return [("other", [1])]


class FailingDict(dict):
    """A dict that cannot be read."""

    def items(self):
        """Fail."""
        raise LookupError(MARK)


class EndlessList(list):
    """An endless list of strings."""

    def __iter__(self):
        """Yield strings forever."""
        return repeat("x" * 1000)


class Deep(list):
    """A list that always contains another one."""

    def __iter__(self):
        """Yield one more list."""
        return iter([Deep()])


class Pair(NamedTuple):
    """A tuple with names."""

    a: int
    b: str


@pytest.mark.parametrize(
    ("value", "json_value"),
    [
        (Score.LOW, 1e-7),
        (NumpyFloat(1e-7), 1e-7),
        (NumpyFloat(1e300), 1e300),
        (Level.LOW, 1),
        (OddStr("text"), "text"),
        ({OddStr("name"): 1}, {"name": 1}),
        (OddDict(a=object()), {"other": [1]}),
        (Pair(1, "b"), [1, "b"]),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, a=[]), {"a": []}),
    ],
    ids=["enum of float", "numpy", "numpy, large", "enum of int", "str", "key", "dict", "tuple", "order", "default"],
)
@pytest.mark.parametrize("parameter", ["payload", "metadata"])
def test_subclasses_are_taken_by_what_they_hold(parameter, value, json_value):
    """A subclass of a JSON type is stored as its value, whatever its methods return."""
    assert json.loads(getattr(validate, f"check_{parameter}")(parameter, {"a": value})) == {"a": json_value}


class Same(list):
    """A list subclass that behaves like a list."""

    def __iter__(self):
        """Iterate over the items."""
        return super().__iter__()


@pytest.mark.parametrize("kind", [list, Same])
def test_subclasses_may_be_as_deep(kind):
    """A subclass can be nested exactly as deep as the type itself."""
    value = "text"
    for _ in range(validate.MAX_DEPTH):
        value = kind([value])
    assert json.loads(validate.check_payload("payload", value))
    with pytest.raises(InvalidInputError, match="nested"):
        validate.check_payload("payload", kind([value]))


@pytest.mark.parametrize("value", [FailingDict(a=1), EndlessList(), Deep(), (x for x in "ab"), range(3), Score])
@pytest.mark.parametrize("parameter", ["payload", "metadata"])
def test_what_only_looks_like_json_is_refused(parameter, value, monkeypatch):
    """A value that is unreadable, endless or not JSON raises InvalidInputError, which quotes nothing."""
    monkeypatch.setattr(validate, "islice", lambda items, most: islice(items, most // 64))  # the full scan takes 10 s
    with pytest.raises(InvalidInputError) as raised:
        getattr(validate, f"check_{parameter}")(parameter, {"a": [value]})
    assert raised.value.parameter == parameter
    assert MARK not in str(raised.value)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.builds(lambda: 10**5000),
    st.floats().map(NumpyFloat) | st.floats() | st.sampled_from(Score) | st.sampled_from(Level),
    st.text(),
    st.decimals() | st.binary() | st.datetimes() | st.just(object()),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | inner.map(lambda value: [value, {"a": value}])
        | st.dictionaries(st.text(max_size=3) | st.text(max_size=3).map(str) | st.integers(), inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=20,
)


@given(VALUES)
@settings(deadline=None, max_examples=200)
def test_any_value_is_taken_as_it_is_or_refused(value):
    """Any value is stored as the JSON that Python makes of it, or raises InvalidInputError."""
    for parameter, given_value in (("payload", value), ("metadata", {"a": value})):
        try:
            encoded = getattr(validate, f"check_{parameter}")(parameter, given_value)
        except InvalidInputError:
            continue
        if encoded is not None:
            assert json.loads(encoded) == json.loads(json.dumps(given_value))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"items": [0, {"when": datetime(2026, 1, 1, tzinfo=UTC)}]}, "items[1].when is of type datetime"),
        ({f"{MARK} 1": [{1}]}, "[...][0] is of type set"),
        ({"a": {"b": float("nan")}}, "a.b is not finite"),
    ],
)
def test_path_of_what_is_no_json(value, sentence):
    """The error gives the path and the type of the non-JSON value."""
    with pytest.raises(InvalidInputError) as raised:
        validate.check_payload("payload", value)
    assert str(raised.value).endswith(sentence)
    assert MARK not in str(raised.value)


async def test_odd_strings_are_sent_as_they_are():
    """A subclass of str is sent as a plain str."""
    odd = OddStr("user")
    for taken in (
        validate.check_user_id(odd),
        validate.check_key("key", odd),
        validate.check_title("title", odd),
        validate.check_role("role", odd),
        validate.check_content("content", odd),
        (await validate.check_messages([{"role": odd, "content": odd, "key": odd}]))[0][-1],
    ):
        assert type(taken) is str
        assert taken == "user"
    assert type(validate.check_int("seq", Level.LOW, least=0)) is int


# batches


def endless(text="x"):
    """Yield messages forever."""
    for number in count():
        yield {"role": "user", "content": text, "key": f"{number}"}


@pytest.mark.parametrize(
    ("messages", "consumed", "problem"),
    [
        (endless(), 10_001, "at most 10,000"),
        (endless("x" * MIB), 64, "at most 64 MiB"),
        (endless(WIDE * (MIB // 4)), 64, "at most 64 MiB"),
        (({"role": "user", "content": "", "payload": "x" * MIB} for _ in count()), 64, "at most 64 MiB"),
    ],
    ids=["number", "bytes", "wide characters", "payloads"],
)
async def test_a_batch_ends_at_its_limit(messages, consumed, problem):
    """A batch with too many messages or bytes is refused before anything is sent, and read only to the limit."""
    taken = 0

    def counted():
        nonlocal taken
        for message in messages:
            taken += 1
            yield message

    db = Recorder()
    with pytest.raises(InvalidInputError, match=problem) as raised:
        await chatdb.append_messages(db, user_id="u", conversation_id=1, messages=counted())
    assert raised.value.parameter == "messages"
    assert taken == consumed
    assert db.sent == []


async def test_the_largest_batches():
    """A batch of exactly the limits is accepted."""
    assert len(await validate.check_messages([{"role": "user", "content": ""}] * 10_000)) == 10_000
    assert len(await validate.check_messages([{"role": "user", "content": "x" * (4 * MIB)}] * 16)) == 16
    with pytest.raises(InvalidInputError):
        await validate.check_messages(
            [*[{"role": "user", "content": "x" * (4 * MIB)}] * 16, {"role": "user", "content": "x"}]
        )


async def test_a_large_batch_lets_other_tasks_run():
    """Checking a large batch does not block the event loop."""
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await validate.check_messages([{"role": "user", "content": "x"}] * 10_000)
    many = turns
    await validate.check_messages([{"role": "user", "content": "x" * MIB}] * 32)
    task.cancel()
    assert many >= 15
    assert turns - many >= 15


def test_a_turn_is_checked_without_a_pause() -> None:
    """A batch of two ordinary messages does not give up the event loop, which would cost each turn a system call."""
    checking = validate.check_messages([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    with pytest.raises(StopIteration):
        checking.send(None)


def test_a_compact_text_of_many_lists_is_counted_by_its_bytes() -> None:
    """JsonText is accepted up to 16 MiB, however many lists it contains."""
    text = JsonText("[[" + "1," * (8 * MIB - 400) + "1]" + ",[]" * 250 + "]")
    assert 15 * MIB < len(text) < 16 * MIB
    assert validate.check_payload("payload", text) == text


@given(
    st.recursive(
        st.text('"\\\\[]{}a') | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text('"\\\\[{a'), inner)
    )
)
def test_the_depth_of_a_text(value: Any) -> None:
    """Depth counts structural brackets, not brackets inside strings, even after quotes and backslashes."""

    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    many = [value] + [[]] * 300  # with few brackets the depth is not computed
    assert validate._depth(json.dumps(many)) == depth(many)
    assert validate._depth(json.dumps(many, ensure_ascii=False, indent=1)) == depth(many)


@pytest.mark.parametrize("value", [[10**4_200] * 10_000, [[10**4_200] * 1_000] * 10, {"a": [-(10**4_200)] * 10_000}])
def test_the_digits_of_shared_numbers_are_counted(value: Any) -> None:
    """A shared long number is refused before hundreds of megabytes are written out."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInputError, match="16 MiB"):
            validate.check_payload("payload", value)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
