"""Every public parameter and pool option, with values of every kind: accepted, or refused by name."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import ssl
import traceback
import uuid
from collections import UserDict
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import Mock

import asyncpg
import numpy
import pytest
from pydantic import BaseModel, PostgresDsn, Secret, SecretStr, TypeAdapter, ValidationError
from pydantic_core import MultiHostUrl
from sqlalchemy import make_url

import chatdb
from chatdb import (
    NEW,
    UNSET,
    ChatDBError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    JsonText,
    NewMessage,
    NotFoundError,
    UnavailableError,
)
from chatdb._core.options import _CHECKS, _NOT_SUPPORTED, DriverOptions
from chatdb.admin.migrate import apply_migrations, rollback_migrations
from tests.support.calls import (
    CALLS,
    NOBODYS,
    SIGNATURES,
    Counting,
    Undoing,
    arguments_with,
    call,
    conversation_with_a_message,
)

pytestmark = pytest.mark.server_independent

MARK = "Alice's own words"


class Color(enum.Enum):
    """An enum with an int value."""

    RED = 1


class Part(enum.StrEnum):
    """An enum with a str value."""

    USER = "user"


class Level(enum.IntEnum):
    """An enum of ints."""

    LOW = 1


class Item(BaseModel):
    """A host's model."""

    type: str = "message"


class Turn(NewMessage):
    """A host's message with one more field."""

    model: str = "some-model"


@dataclasses.dataclass
class Call:
    """A host's dataclass."""

    name: str = "f"


def raising(*_: object, **__: object) -> Any:
    """Raise an error that no code expects."""
    raise ArithmeticError("a method of the caller's class")


METHODS = ("__eq__", "__str__", "__repr__", "__iter__", "__len__", "__bool__", "__hash__", "__contains__", "__lt__")
METHODS += ("__gt__", "__le__", "__ge__", "__getitem__", "__int__", "__float__", "__index__", "__format__", "__call__")


def hostile(*bases: type) -> type:
    """Return a class whose methods all raise."""
    return type("Hostile", bases, dict.fromkeys(METHODS, raising))


class HostileDict(dict[Any, Any]):
    """A dict that raises when it is read."""

    keys = values = items = get = __iter__ = __len__ = __getitem__ = raising  # type: ignore[assignment]


def numbers() -> Any:
    """Yield one valid message, then raise."""
    yield {"role": "user", "content": ""}
    raise LookupError("a caller's own")


ODD: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "7": 7,
    "2**63": 2**63,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "1.0": 1.0,
    "nan": math.nan,
    "inf": math.inf,
    "1j": 1j,
    "empty str": "",
    "str": "odd",
    "number in a str": "10",
    "NUL": "a\0b",
    "surrogate": "a\ud800b",
    "long str": "x" * 70_000,
    "bytes": b"odd",
    "bytearray": bytearray(b"odd"),
    "list": [],
    "list of odd": [1, "a", None],
    "tuple": (1, 2),
    "dict": {},
    "dict of odd": {"a": {1}},
    "dict of numbers": {1: 2},
    "set": {1},
    "frozenset": frozenset({1}),
    "range": range(3),
    "generator": numbers,  # called for each use
    "object": object(),
    "class": object,
    "function": len,
    "UNSET": UNSET,
    "JsonText": JsonText("{"),
    "datetime": datetime(2026, 1, 1, tzinfo=UTC),
    "date": date(2026, 1, 1),
    "timedelta": timedelta(seconds=1),
    "Decimal": Decimal("1.10"),
    "Decimal sNaN": Decimal("sNaN"),
    "Fraction": Fraction(1, 3),
    "UUID": uuid.UUID(int=1),
    "Path": Path("odd"),
    "numpy int64": numpy.int64(1),
    "numpy float64": numpy.float64(1e-7),
    "numpy float32": numpy.float32(1),
    "numpy bool": numpy.bool_(True),
    "numpy str": numpy.str_("odd"),
    "numpy array": numpy.array([1, 2]),
    "numpy array of one": numpy.array(1),
    "numpy datetime64": numpy.datetime64("2026-01-01"),
    "pydantic model": Item(),
    "NewMessage": NewMessage(role="user", content=""),
    "Secret": SecretStr("odd"),
    "dataclass": Call(),
    "Enum": Color.RED,
    "StrEnum": Part.USER,
    "IntEnum": Level.LOW,
    "UserDict": UserDict(a=1),
    "mappingproxy": MappingProxyType({"a": 1}),
    "mock": Mock(),
    "mock of a str": Mock(spec=str),
    "mock of a dict": Mock(spec=dict),
    "hostile object": hostile(object)(),
    "hostile str": hostile(str)("odd"),
    "hostile int": hostile(int)(7),
    "hostile float": hostile(float)(7.0),
    "hostile list": hostile(list)(),
    "hostile dict": HostileDict(a=1),
    "model without fields": NewMessage.model_construct(role="user"),
    "conversation without fields": chatdb.Conversation.model_construct(id="odd", updated_at="odd"),
    "NEW": NEW,
    "etag of nothing": NOBODYS.etag,
    "cursor of nothing": NOBODYS.cursor,
}
"""Values that few parameters accept."""


def odd(label: str) -> Any:
    """Return an odd value; a generator is created anew for each use."""
    return ODD[label]() if label == "generator" else ODD[label]


PLACES = [(name, parameter) for name, parameters in SIGNATURES.items() for parameter in parameters]


async def refused_wrongly(
    tx: asyncpg.Connection,
    parameter: str,
    send: Callable[[Counting, Any], Awaitable[object]],
    taken: tuple[type[ChatDBError], ...] = (),
) -> dict[str, str]:
    """
    Send each odd value and report the ones that are neither accepted nor refused by the parameter's name.

    `taken` lists the errors for values that chatdb accepts and the database answers.
    """
    wrong = {}
    for label in ODD:
        db = Undoing(tx)
        try:
            await send(db, odd(label))
        except InvalidInputError as error:
            if db.statements or not str(error).startswith(parameter) or not error.parameter.startswith(parameter):
                wrong[label] = f"{len(db.statements)} sent, {error}"
        except taken:
            pass
        except Exception as error:  # noqa: BLE001 - any other error is wrong
            wrong[label] = repr(error)[:200]
        await db.undo()
    return wrong


@pytest.mark.parametrize(("name", "parameter"), PLACES)
async def test_every_parameter(tx: asyncpg.Connection, name: str, parameter: str) -> None:
    """An odd value is accepted, or raises InvalidInputError that names the parameter before anything is sent."""
    conversation = await conversation_with_a_message(tx)

    async def send(db: Counting, value: Any) -> None:
        await call(db, name, arguments_with(name, parameter, value), conversation)

    assert await refused_wrongly(tx, parameter, send, (NotFoundError, ConflictError, UnavailableError)) == {}


FIELDS = list(NewMessage.model_fields)


@pytest.mark.parametrize("kind", [dict, NewMessage.model_construct, Turn.model_construct], ids=["dict", "model", "own"])
@pytest.mark.parametrize("field", FIELDS)
async def test_every_field_of_a_message(tx: asyncpg.Connection, kind: Any, field: str) -> None:
    """Same for the fields of messages in a batch."""
    conversation = await conversation_with_a_message(tx)

    async def send(db: Counting, value: Any) -> None:
        batch = [kind(**{"role": "user", "content": "", field: value})]
        await call(db, "append_messages", {"messages": batch}, conversation)

    assert await refused_wrongly(tx, f"messages[0].{field}", send) == {}


@pytest.mark.parametrize("label", [label for label in ODD if label != "NewMessage"])
async def test_every_message_of_a_batch(label: str) -> None:
    """A batch item that is not a message is refused by its index."""
    db = Counting(None)
    with pytest.raises(InvalidInputError) as caught:
        await chatdb.append_messages(db, user_id="alice", conversation_id=1, messages=[odd(label)])
    assert caught.value.parameter.startswith("messages[0]")
    assert db.statements == []


HANDLES = {label: value for label, value in ODD.items() if label != "mock"}
"""Every odd value except the mock that has every method."""


@pytest.mark.parametrize("label", HANDLES)
async def test_every_handle(label: str) -> None:
    """A value that is neither a pool nor a connection raises InvalidInputError for `db`."""
    for name, arguments in CALLS:
        with pytest.raises(InvalidInputError, match=r"^db: must be a pool or an asyncpg connection, not "):
            await call(HANDLES[label], name, arguments, NOBODYS)
    with pytest.raises(InvalidInputError, match=r"^db: "):
        await chatdb.check_schema(HANDLES[label])
    with pytest.raises(InvalidInputError, match=r"^db: "):
        async with chatdb.transaction(HANDLES[label]):
            pass


@pytest.mark.parametrize("label", ODD)
async def test_the_user_of_a_transaction(tx: asyncpg.Connection, label: str) -> None:
    """An odd `user_id` is accepted or refused by name."""
    try:
        async with chatdb.transaction(tx, user_id=odd(label)):
            pass
    except InvalidInputError as error:
        assert error.parameter == "user_id"  # noqa: PT017 - one of two outcomes


@pytest.mark.parametrize("label", ODD)
def test_the_folder_of_an_embedded_server(label: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An odd folder is accepted or raises ConfigurationError."""
    monkeypatch.chdir(tmp_path)
    try:
        chatdb.open_embedded(odd(label))
    except ConfigurationError as error:
        assert "path must be" in str(error) or "the folder" in str(error)  # noqa: PT017


DSN = "postgresql://ada@127.0.0.1:1/none"


@pytest.mark.parametrize("option", _CHECKS)
def test_every_option(option: str) -> None:
    """An odd option value is accepted, or raises ConfigurationError that names the option."""
    wrong = {}
    for label in ODD:
        try:
            pool = chatdb.create_pool(DSN, **{option: odd(label)})
        except ConfigurationError as error:
            if option not in str(error):
                # these options read the service file or the password file
                wrong[label] = str(error)
        except Exception as error:  # noqa: BLE001
            wrong[label] = repr(error)[:200]
        else:
            pool.terminate()
    if option == "service":
        wrong = {label: said for label, said in wrong.items() if "no service file defines the service" not in said}
    if option == "host":  # a remote host requires TLS
        wrong = {label: said for label, said in wrong.items() if "one port for all hosts" not in said}
    assert wrong == {}


TAKEN = {
    "init_size": [1, 3],
    "max_queries": [1, 5, 2**31 - 1],
    "timeout": [1, 2.5, numpy.float64(3)],
    "statement_cache_size": [0, 7, Level.LOW],
    "max_cached_statement_lifetime": [0, 1, 0.5],
    "max_cacheable_statement_size": [0, 10],
    "ssl": [None, False, "prefer", "disable"],
    "direct_tls": [None, False],
    "server_settings": [None, {}, {"geqo": "off"}],
    "target_session_attrs": [None, "any", "primary", "read-write"],
    "krbsrvname": [None, "postgres"],
    "gsslib": [None, "gssapi"],
    "min_size": [0, 1],
    "max_size": [1, 3],
    "acquire_timeout": [1, 9.5],
    "command_timeout": [1, numpy.float64(3)],
    "retries": [0, 3],
    "row_level_security": [True, False],
    "max_inactive_connection_lifetime": [0, 1, 0.05],
    "record_class": [asyncpg.Record],
    "passfile": [None, "none", Path("none")],
    "password": [None, "", "odd", lambda: "odd"],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in TAKEN for value in TAKEN[option]])
async def test_what_is_taken_works(dsn: str, option: str, value: Any) -> None:
    """A pool opens with each accepted value."""
    async with chatdb.create_pool(dsn, **{option: value}) as db:
        assert (await chatdb.create_conversation(db, user_id="alice")).user_id == "alice"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"maxsize": 3}, r"^create_pool has no option maxsize: did you mean max_size\?$"),
        ({"pool_timeout": 3}, r"^create_pool has no option pool_timeout"),
        ({"max_size": "10"}, r"^max_size must be an int from 1 to 262,143, not str$"),
        ({"max_size": 0}, r"^max_size must be an int from 1 to 262,143, not 0$"),
        ({"max_size": numpy.int64(10)}, r"^max_size .*, not int64$"),
        ({"min_size": 20}, r"^min_size must be at most max_size \(10\), not 20$"),
        ({"min_size": 2, "init_size": 1}, r"^init_size must be between min_size and max_size, 2 to 10$"),
        ({"acquire_timeout": None}, r"^acquire_timeout must be a positive number of seconds, .*, not NoneType$"),
        ({"acquire_timeout": 0}, r"^acquire_timeout must be a positive number of seconds, .*, not 0$"),
        ({"command_timeout": "30"}, r"^command_timeout .*, not str$"),
        ({"command_timeout": Decimal(30)}, r"^command_timeout .*, not Decimal$"),
        ({"retries": "2"}, r"^retries must be an int"),
        ({"row_level_security": "off"}, r"^row_level_security must be True or False, not str$"),
        ({"server_settings": {"jit": False}}, r"^server_settings\.jit must be a str, not bool$"),
        ({"port": [5432, "5433"]}, r"^port\[1\] must be an int from 1 to 65,535, not str$"),
        ({"ssl": "on"}, r"^ssl must be an SSLContext"),
        ({"init": 3}, r"^init must be a coroutine function, not 3$"),
        ({"loop": None}, r"^loop is not supported"),
        ({"connection_class": None}, r"^connection_class is not supported"),
    ],
)
def test_an_option_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    """The error names the option, what it must be, and what it was."""
    with pytest.raises(ConfigurationError, match=said):
        chatdb.create_pool(DSN, **options)


def test_all_options_of_the_driver() -> None:
    """Each option of asyncpg has a type and a check, or is refused."""
    of_driver = inspect.signature(asyncpg.create_pool).parameters | inspect.signature(asyncpg.connect).parameters
    named = of_driver.keys() - {"dsn", "connect_kwargs"}
    own = inspect.signature(chatdb.create_pool).parameters.keys() - {"dsn", "options"}
    assert named | own == _CHECKS.keys() | _NOT_SUPPORTED.keys()
    assert _CHECKS.keys() - own == DriverOptions.__annotations__.keys()


def test_an_option_comes_before_the_dsn() -> None:
    """Options override the DSN, and the host that is used decides whether TLS is required."""
    pool = chatdb.create_pool(
        DSN, host="db.example.com", user="eve", port=7, server_settings={"geqo": "off"}, max_cached_statement_lifetime=9
    )
    told = pool._connect_kwargs
    assert (told["host"], told["user"], told["port"], told["database"]) == (["db.example.com"], "eve", 7, "none")
    assert isinstance(told["ssl"], ssl.SSLContext)
    assert told["server_settings"] == {"application_name": "chatdb", "geqo": "off"}
    for weak in ("prefer", "allow"):
        assert isinstance(chatdb.create_pool(DSN, host="10.0.0.7", ssl=weak)._connect_kwargs["ssl"], ssl.SSLContext)


PASSWORD = "s3cr3t-%40"
PLAIN = f"postgresql://ada:{PASSWORD}@127.0.0.1:1/none"
HELD = {
    "PostgresDsn": TypeAdapter(PostgresDsn).validate_python(PLAIN),
    "MultiHostUrl": MultiHostUrl(PLAIN),
    "SecretStr": SecretStr(PLAIN),
    "Secret of a PostgresDsn": Secret[PostgresDsn](TypeAdapter(PostgresDsn).validate_python(PLAIN)),
    "SQLAlchemy's URL": make_url(PLAIN),
    "psycopg's": make_url(PLAIN.replace("postgresql", "postgresql+psycopg")),
    "asyncpg's": make_url(PLAIN.replace("postgresql", "postgresql+asyncpg")),
    "StrEnum": enum.StrEnum("Urls", {"MAIN": PLAIN}).MAIN,
}


@pytest.mark.parametrize("label", HELD)
def test_an_object_that_holds_a_dsn(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects from settings classes are accepted, including their masked passwords."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    told = chatdb.create_pool(HELD[label])._connect_kwargs
    assert (told["host"], told["port"], told["user"], told["password"]) == (["127.0.0.1"], 1, "ada", "s3cr3t-@")
    assert told["database"] == "none"


@pytest.mark.parametrize("label", [label for label in ODD if label not in {"None", "empty str"}])
def test_every_dsn(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value without a DSN raises ConfigurationError that says what to pass."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with pytest.raises(ConfigurationError, match=r"dsn must be a str|the DSN"):
        chatdb.create_pool(odd(label))


JSON = {
    "datetime": "datetime",
    "UUID": "UUID",
    "Decimal": "Decimal",
    "numpy int64": "int64",
    "numpy float32": "float32",
    "numpy bool": "numpy.bool",
    "numpy array": "ndarray",
    "pydantic model": "Item",
    "Enum": "Color",
    "dataclass": "Call",
    "bytes": "bytes",
    "set": "set",
    "UserDict": "UserDict",
    "hostile object": "Hostile",
}


@pytest.mark.parametrize("parameter", ["metadata", "payload"])
@pytest.mark.parametrize("label", JSON)
def test_the_path_of_what_is_no_json(parameter: str, label: str) -> None:
    """The error gives the path from the parameter on, and the type."""
    value = {"items": [0, 1, {}, {"when": ODD[label], "created At": 1}], "toolCall": 1}
    with pytest.raises(InvalidInputError) as caught:
        getattr(chatdb._core.validate, f"check_{parameter}")(parameter, value)
    assert str(caught.value).endswith(f": {parameter}.items[3].when is of type {JSON[label]}")
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("when", ".when"),
        ("created_at", ".created_at"),
        ("createdAt", ".createdAt"),
        ("toolCallID", ".toolCallID"),
        ("item_12", ".item_12"),
        ("Alice Smith", "[...]"),
        ("alice@example.com", "[...]"),
        ("ALICE", "[...]"),
        ("sk_live_51H8abc", "[...]"),
        ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "[...]"),
        ("x" * 41, "[...]"),
        ("größe", "[...]"),
    ],
)
def test_the_keys_that_a_path_shows(key: str, shown: str) -> None:
    """Identifier-like keys are shown; keys that may be a user's words or a secret are not."""
    with pytest.raises(InvalidInputError) as caught:
        chatdb._core.validate.check_payload("payload", {"a": {key: {1}}})
    assert str(caught.value).endswith(f": payload.a{shown} is of type set")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [{1: 2}]}, "metadata.a[0] has a key of type int"),
        ({"a": 10**5000}, "metadata.a is an int with too many digits"),
        ({"a": numpy.float64("nan")}, "metadata.a is not finite"),
    ],
)
def test_other_faults_have_paths(value: Any, said: str) -> None:
    """Non-str keys and numbers that JSON lacks are reported with their paths too."""
    with pytest.raises(InvalidInputError, match=said.replace("[", r"\[")):
        chatdb._core.validate.check_metadata("metadata", value)


async def test_a_subclass_of_new_message(tx: asyncpg.Connection) -> None:
    """Extra fields, added by a subclass or a copy, are not stored."""
    conversation = await chatdb.create_conversation(tx, user_id="alice")
    copied = NewMessage(role="user", content="b").model_copy(update={"model": "m"})
    stored = await chatdb.append_messages(
        tx, user_id="alice", conversation_id=conversation.id, messages=[Turn(role="user", content="a"), copied]
    )
    assert [message.content for message in stored] == ["a", "b"]


@pytest.mark.parametrize(
    ("message", "parameter", "said"),
    [
        ({"role": "user", "content": "", "contents": 1}, "messages[0].contents", "did you mean content?"),
        ({"role": "user", "content": "", "seq": 1}, "messages[0].seq", "token_count, key"),
        ({"role": "user", "content": "", "Alice's": 1}, "messages[0][...]", "is not a field"),
        (UserDict(role="user", content="", seq=1), "messages[0].seq", "is not a field"),
        (NewMessage.model_construct(role="user"), "messages[0].content", "is required"),
    ],
)
async def test_a_field_that_a_message_does_not_have(message: Any, parameter: str, said: str) -> None:
    """The error names the field and suggests the likely one."""
    with pytest.raises(InvalidInputError) as caught:
        await chatdb._core.validate.check_messages([message])
    assert caught.value.parameter == parameter
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "fields", "parameter", "said"),
    [
        ((), {"role": "user", "content": "", "contents": MARK}, "NewMessage.contents", "is not a field of a message"),
        ((), {"role": "user", "content": "", MARK: 1}, "NewMessage[...]", "is not a field of a message"),
        ((), {"role": "user"}, "NewMessage.content", "is required"),
        ((), {}, "NewMessage.content", "is required"),
        (("user", MARK), {}, "NewMessage", "takes keyword arguments only"),
    ],
)
def test_a_new_message_that_cannot_be_made(
    values: tuple[Any, ...], fields: dict[str, Any], parameter: str, said: str
) -> None:
    """NewMessage raises chatdb's error too, and quotes none of the values."""
    make: Any = NewMessage
    with pytest.raises(InvalidInputError, match=said) as caught:
        make(*values, **fields)
    assert caught.value.parameter == parameter
    assert MARK not in "".join(traceback.format_exception(caught.value))


def test_the_fields_of_a_subclass_are_its_own() -> None:
    """Pydantic's errors about a subclass's own fields reach the caller unchanged."""
    with pytest.raises(ValidationError, match="model"):
        Turn(role="user", content="a", model=[])  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def test_an_iterable_that_raises() -> None:
    """The error says that the iterable raised, and its cause is the caller's error."""
    with pytest.raises(InvalidInputError, match=r"^messages: iterating over them raised LookupError$") as caught:
        await chatdb._core.validate.check_messages(numbers())
    assert isinstance(caught.value.__cause__, LookupError)
    assert isinstance(caught.value, ChatDBError)


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"to": 2}, "to"),
        ({"to": ["0002"]}, "to"),
        pytest.param({"to": "nothing"}, "to", marks=pytest.mark.owner),
        ({"wait": "5"}, "wait"),
        ({"wait": None}, "wait"),
        ({"wait": math.nan}, "wait"),
        ({"wait": -1}, "wait"),
        ({"wait": True}, "wait"),
    ],
)
def test_arguments_of_migrations(dsn: str, arguments: dict[str, Any], parameter: str) -> None:
    """Applying and rolling back migrations refuse an argument by name."""
    work: Any
    for work in (apply_migrations, rollback_migrations):
        with pytest.raises(InvalidInputError, match=f"^{parameter}: must be"):
            work(dsn, **arguments)
