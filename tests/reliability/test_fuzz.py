"""A million hostile inputs for every public parameter, every DSN and every file reader."""

from __future__ import annotations

import inspect
import io
import random
import ssl
from collections import Counter
from datetime import timedelta
from decimal import Decimal
from functools import cache
from typing import Any

import pytest

import chatdb
from chatdb import NEW, UNSET, ChatDBError, ConfigurationError, InvalidInputError, JsonText, NewMessage
from chatdb._core.dsn import connect_arguments, libpq_dsn
from chatdb.transfer import files
from tests.support.calls import NOBODYS, SIGNATURES, required, streamed
from tests.support.seeds import DSNS, FILES, SECRET

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

MIB = 1024 * 1024


def calls(request: pytest.FixtureRequest, full: int) -> int:
    """Return the number of inputs in this run."""
    return full // 50 if request.config.getoption("--quick") else full


# --- the parameters ------------------------------------------------------------------------------------------------


def character(chance: random.Random) -> str:
    """Return a character from any Unicode plane, often a troublesome one."""
    if chance.random() < 0.3:
        return chance.choice("\0\ud800\udfff\ufeff\u202e\u2028\x1b\x7f\r\n'\"\\%${}\ufffd\uffff")
    return chr(chance.randrange(chance.randrange(17) << 16 | 0xFFFF) + 1)


def text(chance: random.Random) -> object:
    """Return a text, or a value that only resembles one."""
    match chance.randrange(12):
        case 0:
            return chance.choice(["", " ", "a" * 255, "a" * 256, "a" * 1000, "a" * 1001, "👋" * 255, "👋" * 256])
        case 1:
            return chance.choice([None, 1, True, 1.5, b"bytes", [SECRET], {"a": SECRET}, object(), UNSET, Decimal(1)])
        case 2:
            return "x" * chance.randrange(70_000)
        case 3:
            return chance.choice(["null", "alice'; drop table chatdb.messages; --", "$1", "{}", "\\x00", "%s"])
        case _:
            return "".join(character(chance) for _ in range(chance.randrange(1, 12)))


def number(chance: random.Random) -> object:
    """Return a boundary number, or a value that only resembles a number."""
    edges = [0, -1, 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**400, 10_000, 10_001]
    others = [None, True, 1.0, float("nan"), float("inf"), "1", b"1", [], Decimal(1), 1j, UNSET, SECRET]
    return chance.choice(edges if chance.random() < 0.6 else others)


def nested(depth: int, innermost: object) -> object:
    """Return nested lists."""
    for _ in range(depth):
        innermost = [innermost]
    return innermost


def value(chance: random.Random, depth: int = 0) -> object:
    """Return a JSON value, or one that JSON lacks."""
    match chance.randrange(16 if depth < 4 else 6):
        case 0 | 1:
            return text(chance)
        case 2:
            return number(chance)
        case 3:
            return chance.choice([float("nan"), float("-inf"), 1e308, 5e-324, 1e22, -0.0, {1, 2}, (1, 2), {1: 2}])
        case 4:
            return chance.choice(
                [
                    JsonText("1e131000"),
                    JsonText("1" * 5_000),
                    JsonText("[" * 10_000 + "]" * 10_000),
                    JsonText('{"a": NaN}'),
                    JsonText('"\\ud800"'),
                    JsonText('"\\u0000"'),
                    JsonText("{"),
                    JsonText(""),
                    JsonText('{"a": 1, "a": 2}'),
                ]
            )
        case 5:
            return nested(chance.choice([1, 199, 200, 201, 10_000]), chance.choice([1, "\0", "\ud800"]))
        case 6 | 7 | 8:
            return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
        case 9:
            circle: dict[str, object] = {}
            circle["self"] = circle
            return circle
        case _:
            return {chance.choice(["a", "b", "\0", "\ud800", ""]): value(chance, depth + 1) for _ in range(3)}


def batch(chance: random.Random) -> object:
    """Return messages, or values that only resemble them."""
    fields: dict[str, Any] = {"role": role, "content": text, "payload": value, "metadata": value}
    fields |= {"token_count": number, "key": text, "seq": number}
    if chance.random() < 0.2:
        return chance.choice([None, "messages", b"", 1, {}, [None], [[]], [1], NewMessage(role="user", content="x")])
    names = list(fields)
    return [
        {"role": "user", "content": "x"} | {name: fields[name](chance) for name in chance.sample(names, 2)}
        for _ in range(chance.randrange(1, 4))
    ]


def role(chance: random.Random) -> object:
    """Return a valid or invalid role."""
    return chance.choice(["user", "tool", "User", "user ", "function", "", None, 1, b"user", ["user"]])


def flag(chance: random.Random) -> object:
    """Return a bool, or a value that only resembles one."""
    return chance.choice([True, False, None, 0, 1, 1.0, "true", "", []])


def word(chance: random.Random) -> object:
    """Return one of the words that options take, or another value."""
    return chance.choice(["updated_at", "created_at", "conflict", "skip", "", "Skip", None, 1, b"skip", text(chance)])


def token(chance: random.Random) -> object:
    """Return a state or a position in a list, or a value that only resembles one."""
    return chance.choice(
        [None, NEW, NOBODYS, NOBODYS.etag, NOBODYS.cursor, f"{NOBODYS.etag}=", "e1", "c9", number(chance), text(chance)]
    )


def duration(chance: random.Random) -> object:
    """Return a duration, or a value that only resembles one."""
    days = chance.choice([0, 1, -1, 10_000, 10_001, 999_999_999, -999_999_999])
    return timedelta(days=days) if chance.random() < 0.6 else number(chance)


HOSTILE = {
    **dict.fromkeys(
        ("user_id", "key", "title", "content", "conversation_key", "before_key", "after_key", "new_key", "text"), text
    ),
    **dict.fromkeys(("query", "to_user_id"), text),
    **dict.fromkeys(("payload", "metadata", "metadata_patch", "conversation_metadata_patch"), value),
    **dict.fromkeys(("conversation_id", "seq", "limit", "batch", "after_seq", "before_seq", "token_count"), number),
    **dict.fromkeys(("parent_seq", "top_seq", "at_least", "max_tokens", "offset", "flush_every"), number),
    **dict.fromkeys(("archived", "pinned", "create", "descending", "aborted"), flag),
    **dict.fromkeys(("order_by", "on_existing", "mode"), word),
    **dict.fromkeys(("expected", "after"), token),
    "timeout": number,
    "older_than": duration,
    "role": role,
    "messages": batch,
}
"""The generator for each parameter's values."""


class Counting:
    """A real pool that counts its statements."""

    def __init__(self, pool: chatdb.pool.Pool) -> None:
        self.pool = pool
        self.sent = 0

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Run the statement."""
        self.sent += 1
        return await self.pool.fetch(query, *args, timeout=timeout)


async def test_every_parameter(request: pytest.FixtureRequest, db: chatdb.pool.Pool) -> None:
    """A refusal is a typed error before anything is sent, every other value is accepted, and the pool keeps working."""
    assert {name for parameters in SIGNATURES.values() for name in parameters} <= HOSTILE.keys()
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    made = await chatdb.create_conversation(db, user_id="alice", key="thread")
    valid: dict[str, Any] = {"user_id": "alice", "conversation_id": made.id, "role": "user", "content": "x"}
    valid |= {"key": "k", "seq": 1, "after_seq": 0, "expected": made, "messages": [{"role": "user", "content": "x"}]}
    valid |= {
        "query": "x",
        "to_user_id": "bob",
        "max_tokens": 8000,
        "offset": 0,
        "text": "x",
        "older_than": timedelta(0),
    }
    counting = Counting(db)
    outcomes: Counter[str] = Counter()
    functions = [(name, getattr(chatdb, name)) for name in SIGNATURES]
    huge = "x" * (100 * MIB)
    for count in range(calls(request, 250_000)):
        name, function = chance.choice(functions)
        parameters = SIGNATURES[name]
        named = {"conversation_id", "seq"}  # required, unless a key is given
        arguments = {each: valid[each] for each, default in parameters.items() if default is required or each in named}
        if name.startswith(("delete_", "move_")):
            arguments["user_id"] = "nobody"
        tried = chance.sample(list(parameters), min(len(parameters), chance.choice([1, 1, 2])))
        arguments |= {each: HOSTILE[each](chance) for each in tried}
        if "conversation_key" in tried and "conversation_id" not in tried:
            del arguments["conversation_id"]
        if count % 25_000 == 0 and "content" in parameters:
            arguments["content"] = huge
        before = counting.sent
        try:
            result = function(counting, **arguments)
            if inspect.isasyncgen(result):
                async for _ in result:
                    break
                await result.aclose()
            elif isinstance(result, chatdb.MessageStream):
                await streamed(result)
            else:
                await result
            outcomes["taken"] += 1
        except InvalidInputError as error:
            if counting.sent != before:
                pytest.fail(f"seed {seed}: {name} sent what it refuses: {error.parameter}")
            outcomes["refused"] += 1
        except ChatDBError as error:
            outcomes[type(error).__name__] += 1
        if count % 1_000 == 0:
            assert (await chatdb.get_conversation(db, user_id="alice", conversation_id=made.id)).id == made.id
    print(f"figure: hostile arguments: {sum(outcomes.values()):,}, {dict(outcomes)}")
    expected = {"ConversationNotFoundError", "MessageNotFoundError", "ConflictError", "StaleError"}
    assert set(outcomes) <= {"taken", "refused"} | expected
    assert min(outcomes["taken"], outcomes["refused"]) > calls(request, 250_000) // 20
    async for message in chatdb.iter_messages(db, user_id="alice", conversation_id=made.id):
        assert message.content is not None
    for conversation in await chatdb.list_conversations(db, user_id="alice", limit=100):
        assert conversation.user_id == "alice"


# --- DSNs and files ------------------------------------------------------------------------------------------------

PIECES = ("#", "@", ":", "/", "%", "%zz", "?", "&", "=", "\0", "\ud800", "[", "]", ",", " ", "+", "é", "\n", "99999999")


def mutated(chance: random.Random, whole: str, pieces: tuple[str, ...]) -> str:
    """Return the text with random parts cut, doubled, moved or replaced."""
    for _ in range(chance.randrange(1, 5)):
        start = chance.randrange(len(whole) + 1)
        end = min(len(whole), start + chance.randrange(12))
        piece = chance.choice((*pieces, "", whole[start:end] * 2, whole[end : end + 9]))
        whole = whole[:start] + piece + whole[end:]
    return whole


def test_every_dsn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DSN is parsed, or refused by a ConfigurationError that does not quote it."""
    once = cache(ssl.create_default_context)  # reading the system's certificates takes 10 ms
    monkeypatch.setattr(ssl, "create_default_context", once)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(calls(request, 450_000)):
        dsn = mutated(chance, chance.choice(DSNS), PIECES)
        try:
            connect_arguments(dsn)
            libpq_dsn(dsn, scheme="postgresql").encode()
            outcomes["taken"] += 1
        except ConfigurationError as error:
            if SECRET[:6] in str(error):
                pytest.fail(f"seed {seed}: {dsn!r}: {error}")
            outcomes["refused"] += 1
    print(f"figure: hostile DSNs: {sum(outcomes.values()):,}, {dict(outcomes)}")
    assert min(outcomes.values()) > 20


BITS = ('"', "{", "}", "[", "]", ",", ":", "\\", "\\ud800", "\\u0000", "null", "NaN", "1e999", "1" * 5_000, "[" * 300)


def test_every_file(request: pytest.FixtureRequest) -> None:
    """A file is read as far as possible or raises InvalidInputError; no reader raises anything else."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(calls(request, 300_000)):
        data = mutated(chance, chance.choice(FILES), BITS).encode(errors="surrogatepass")
        if chance.random() < 0.2:
            place = chance.randrange(len(data) + 1)
            data = data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
        try:
            file = io.BytesIO(data)
            for _ in files.read(file, files.detect(file)):
                pass
            outcomes["read"] += 1
        except InvalidInputError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data!r}") from error
    print(f"figure: hostile files: {sum(outcomes.values()):,}, {dict(outcomes)}")
    assert min(outcomes.values()) > 20
