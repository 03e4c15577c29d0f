"""
No error, traceback, log record or repr contains a message text, title, key, metadata or password.

Every private value contains MARK. A `Told` searches all output of the package for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import traceback
from collections.abc import Awaitable, Iterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

import chatdb
from chatdb import ChatDBError, JsonText, Message, NewMessage
from chatdb._core.dsn import connect_arguments
from chatdb._core.query import Query
from chatdb.admin.connection import connected
from chatdb.admin.row_security import protect_tables
from chatdb.formats.items import SourceConversation, SourceMessage
from chatdb.records import StoredConversation
from chatdb.transfer import tables
from chatdb.transfer.exporter import export_conversations
from chatdb.transfer.files import FORMATS, detect, read
from chatdb.transfer.importer import import_conversations
from tests.support.calls import CALLS, NOBODYS, SIGNATURES, Undoing, call
from tests.support.leaks import leaks
from tests.support.package import bindings

MARK = "XYZZY"


class Told(logging.Handler):
    """Search texts for MARK and record the matches."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.leaks: list[str] = []
        self.errors: list[str] = []
        self.reprs = self.records = 0

    def search(self, what: str, *texts: str) -> None:
        """Record the texts that contain MARK."""
        self.leaks += [f"{what}: {text[:300]}" for text in texts if MARK.lower() in text.lower()]

    def emit(self, record: logging.LogRecord) -> None:
        """Search a log record as a handler would format it."""
        self.records += 1
        self.search(f"log of {record.name}", self.format(record))

    def error(self, error: BaseException) -> None:
        """Search an error and its causes, in every printable form."""
        self.errors.append(type(error).__name__)
        seen: BaseException | None = error
        while seen is not None:
            self.search(f"{type(seen).__name__} behind {type(error).__name__}", str(seen), repr(seen), repr(seen.args))
            seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
        if isinstance(error, ChatDBError):
            self.search("fields", repr(vars(error)))
        self.search("traceback", "".join(traceback.format_exception(error)))

    def shown(self, *values: object) -> None:
        """Search the str and repr of values, alone and inside other values."""
        for value in values:
            self.reprs += 1
            self.search(type(value).__name__, repr(value), str(value), f"{[value]} {value}")

    async def awaited(self, awaitable: Awaitable[Any], *, is_shown: bool = True) -> Any:
        """Await a call and search its error or its result; `is_shown=False` skips the result."""
        try:
            answer = await awaitable
        except Exception as error:  # noqa: BLE001 - any error
            self.error(error)
            return None
        self.shown(*((answer if isinstance(answer, list) else [answer]) if is_shown else ()))
        return answer


@pytest.fixture
def told() -> Iterator[Told]:
    """Yield a Told that receives the records of every logger."""
    told = Told()
    root = logging.getLogger()
    before = {logger: logger.level for name in logging.root.manager.loggerDict if (logger := logging.getLogger(name))}
    before[root] = root.level
    for logger in before:
        logger.setLevel(logging.DEBUG)
    root.addHandler(told)
    try:
        yield told
    finally:
        root.removeHandler(told)
        for logger, level in before.items():
            logger.setLevel(level)


def figure(told: Told, what: str) -> None:
    """Print how much was searched, and check that nothing was found."""
    own = sum(name in chatdb.__all__ for name in told.errors)
    found = f"{len(told.errors)} errors ({own} of chatdb's), {told.reprs} reprs, {told.records} log records"
    print(f"figure: {what}: {found}: {len(told.leaks)} leaks")
    assert sorted({leak[:150] for leak in told.leaks}) == []


BODY: dict[str, Any] = {
    "content": MARK,
    "payload": {MARK: MARK},
    "metadata": {MARK: MARK},
    "title": MARK,
    "key": MARK,
    "role": "user",
    "seq": 1,
    "text": MARK,
    "messages": [{"role": "user", "content": MARK, "key": f"{MARK} 2", "payload": MARK, "metadata": {MARK: 1}}],
}
SAID = {"role": "user", "content": MARK, "key": MARK}
WRONG: list[Any] = [
    *(f"{MARK}\0", f"{MARK}\ud800", MARK * 1_000_000, "", MARK, MARK.encode(), None, -1, 2**70, float("nan"), True),
    *([MARK], {MARK}, (MARK, object()), {MARK: object()}, {MARK: float("inf")}, {1: MARK}, {MARK: "\0"}),
    *(JsonText(f'{{"{MARK}": }}'), JsonText(MARK), JsonText(f'"{MARK}'), NewMessage(**SAID)),
    *([SAID | {"role": MARK}], [SAID | {"content": f"{MARK}\0"}], [{"role": "user", MARK: MARK}], [SAID, SAID]),
    *([MARK, MARK], [SAID | {"content": None}], [SAID | {"payload": JsonText(MARK)}], [SAID | {"metadata": MARK}]),
]


@pytest.mark.server_independent  # test_every_refusal_of_the_server runs on each version
async def test_every_argument(tx: asyncpg.Connection, told: Told) -> None:
    """Call every function with wrong values, which chatdb, the driver or the server refuses."""
    conversation = await chatdb.create_conversation(tx, user_id="alice", key=MARK, title=MARK, metadata={MARK: MARK})
    here = {"user_id": "alice", "conversation_id": conversation.id}
    await chatdb.append_message(tx, **here, **{name: BODY[name] for name in ("role", "content", "payload", "key")})
    told.shown(conversation)
    for name, parameters in SIGNATURES.items():
        given = {parameter: BODY[parameter] for parameter in parameters if parameter in BODY}
        given |= {parameter: here[parameter] for parameter in parameters if parameter in here}
        for parameter in parameters:
            for value in WRONG:
                db = Undoing(tx)
                # a record's repr shows its user_id
                answering = call(db, name, given | {parameter: value}, conversation)
                await told.awaited(answering, is_shown=parameter != "user_id")
                await db.undo()
    assert len(told.errors) > 500
    figure(told, "arguments")


REFUSED: list[dict[str, Any]] = [
    {"role": MARK},
    {"role": None},
    {"content": MARK * 1_000_000},
    {"content": None},
    {"content": f"{MARK}\0"},
    {"content": [MARK]},
    {"payload": MARK},
    {"metadata": f'["{MARK}"]'},
    {"metadata": f'{{"{MARK}": 01}}'},
    {"metadata": f'{{"{MARK}": "\\u0000"}}'},
    {"token_count": MARK},
    {"token_count": -1},
]


@pytest.mark.owner
async def test_every_refusal_of_the_server(dsn: str, told: Told) -> None:
    """Errors of the server contain the row in their DETAIL; provoke one of every class."""
    async with chatdb.create_pool(dsn) as db, chatdb.create_pool(dsn, command_timeout=0.2) as hurried:
        conversation = await chatdb.create_conversation(db, user_id="alice", key=MARK, title=MARK)
        here = {"user_id": "alice", "conversation_id": conversation.id}
        body = {"role": "user", "content": MARK, "payload": [MARK], "metadata": {MARK: MARK}}
        await chatdb.append_message(db, **here, **body, key=MARK)
        for wrong in REFUSED:
            row = {"role": "user", "content": MARK, "payload": None, "metadata": None, "token_count": None} | wrong
            await told.awaited(Query("append_message", Message).fetch_one(db, "alice", conversation.id, *row.values()))
        for statement in (  # statements that another service might run on chatdb's tables
            f"insert into chatdb.conversations (user_id, key) values ('alice', '{MARK}')",
            f"insert into chatdb.messages values (default, 99, 1, now(), 1, 'bob', 'user', '{MARK}', '{MARK}')",
            f"insert into chatdb.messages select 9, 99, 1, now(), 1, 'bob', 'user', null, '{MARK}'",
            f"insert into chatdb.messages select 9, id, 7, now(), 1, user_id, '{MARK}' from chatdb.conversations",
            f"update chatdb.conversations set title = repeat('{MARK}', 900)",
        ):
            try:
                with chatdb._core.driver_errors.mapped_driver_errors():
                    await db.execute(statement)
            except ChatDBError as error:
                told.error(error)
        changed = dict(body, content=MARK * 2)
        await told.awaited(chatdb.append_message(db, **here, **changed, key=MARK))
        await told.awaited(chatdb.append_messages(db, **here, messages=[changed | {"key": MARK}]))
        async with chatdb.transaction(db) as other:
            await other.execute("select from chatdb.conversations for update")
            await told.awaited(chatdb.append_message(hurried, **here, **body))
            for setting in ("set local lock_timeout = '20ms'", "set local statement_timeout = '20ms'"):
                with contextlib.suppress(ChatDBError, asyncpg.PostgresError):
                    async with chatdb.transaction(db) as connection:
                        await connection.execute(setting)
                        await told.awaited(chatdb.append_message(connection, **here, **body))
        with contextlib.suppress(Exception):
            async with chatdb.transaction(db) as connection:
                await db.fetchval("select pg_terminate_backend($1, 20000)", connection.get_server_pid())
                await told.awaited(chatdb.append_message(connection, **here, **body))
        before = len(told.errors)
        for change in (
            "alter table chatdb.messages add constraint mine check (content = 'y') not valid",
            "alter table chatdb.messages drop column token_count",
            "drop table chatdb.messages cascade",
            "drop schema chatdb cascade",
        ):
            await db.execute(change)
            for name, arguments in CALLS:
                marked = arguments | {key: BODY[key] for key in arguments.keys() & BODY.keys() - {"role", "seq"}}
                await told.awaited(call(db, name, marked, NOBODYS))
                await told.awaited(call(db, name, marked, conversation))
        assert len(told.errors) > before + 2 * len(CALLS)
    await told.awaited(chatdb.append_message(db, **here, **body))  # the pool is closed
    figure(told, "refusals")


PASSWORDS = [
    MARK,
    f"{MARK}/{MARK}",
    f"{MARK}?{MARK}={MARK}",
    f"{MARK}#{MARK}",
    f"{MARK}@{MARK}",
    f"{MARK}%zz",
    f"{MARK}[",
    f"{MARK}:{MARK}",
    f"{MARK} {MARK}",
]
OPTIONS = [
    "",
    "sslmode=verify-full",
    "sslmode=no",
    "connect_timeout=soon",
    f"password={MARK}&port=x",
    f"passfile=/{MARK}",
]


def connect(dsn: str) -> None:
    """Connect as the operator commands do."""
    with connected(dsn):
        pass


async def test_every_dsn(told: Told, dsn: str, one_authority: None) -> None:
    """A DSN's password, encoded well or badly, appears neither in errors nor in a pool's repr."""
    for password in PASSWORDS:
        for option in OPTIONS:
            for place in ("127.0.0.1:1", "[::1", "127.0.0.1:port", "nowhere.invalid"):
                wrong = f"postgresql://alice:{password}@{place}/chat?{option}"

                async def open_pool(wrong: str = wrong) -> None:
                    pool = chatdb.create_pool(wrong, acquire_timeout=2)
                    told.shown(pool)
                    await pool

                await told.awaited(open_pool())
                for use in (connect, lambda dsn: [*tables.read(dsn, "auto", sessions=())]):
                    try:
                        use(wrong)
                    except ChatDBError as error:
                        told.error(error)
    parts = urlsplit(dsn)
    stranger = parts._replace(netloc=f"chatdb_test_nobody:{MARK}@{parts.netloc.rpartition('@')[2]}").geturl()
    await told.awaited(chatdb.create_pool(stranger))
    with pytest.raises(ChatDBError) as caught:
        protect_tables(stranger)
    told.error(caught.value)
    figure(told, "DSNs")


async def test_everything_public(db: chatdb.pool.Pool, told: Told) -> None:
    """Search records, handles and reports as a log would print them."""
    conversation = await chatdb.create_conversation(db, user_id="alice", key=MARK, title=MARK, metadata={MARK: MARK})
    here = {"user_id": "alice", "conversation_id": conversation.id}
    host = logging.getLogger("host")
    host.setLevel(logging.DEBUG)
    async with chatdb.transaction(db, user_id="alice") as connection:
        for name, arguments in CALLS:
            if name.startswith(("delete", "move")):
                continue
            marked = arguments | {key: BODY[key] for key in arguments.keys() & BODY.keys() - {"role", "seq"}}
            answer = await told.awaited(call(connection, name, marked, conversation))
            host.info("answered %s", answer)
        await chatdb.append_message(connection, **here, role="user", content=MARK, key=f"{MARK} 3")
        told.shown(connection, db, *(query for _, _, query in bindings()))
        told.shown([message async for message in chatdb.iter_messages(connection, **here)])
    filled = await chatdb.get_history(db, **here)
    told.shown(*filled, *(Message.model_validate(message.model_dump()) for message in filled))
    told.shown(NewMessage(role="user", content=MARK, payload=MARK, metadata={MARK: 1}, key=MARK))
    now = conversation.created_at
    told.shown(
        StoredConversation(
            ordinality=1, id=1, last_seq=1, created_at=now, final_seq=1, final_key=MARK, final_created_at=now
        )
    )
    told.shown(await chatdb.delete_user(db, user_id="alice"), connect_arguments.__name__)
    items = [
        SourceConversation(MARK, MARK, f'{{"a": "{MARK}"}}', 1, None, None),
        SourceMessage(1, "user", MARK, f'"{MARK}"', None, None, MARK, None),
    ]
    told.shown(*items, await import_conversations(db, user_id="alice", items=items))
    told.shown(*[record async for record in export_conversations(db, user_id="alice")])
    assert told.records > 0
    figure(told, "records and handles")


@pytest.mark.parametrize("format", FORMATS)
async def test_every_source(db: chatdb.pool.Pool, told: Told, format: str) -> None:  # noqa: A002
    """Read and import a file that is broken at every position."""
    whole = {
        "sharegpt": f'[{{"id": "{MARK}", "conversations": [{{"from": "human", "value": "{MARK}"}}]}}]',
        "chatgpt": f'[{{"title": "{MARK}", "mapping": {{"{MARK}": {{"message": "{MARK}"}}}}, "current_node": "a"}}]',
    }.get(
        format, f'{{"format": "chatdb", "version": 1, "{MARK}": "{MARK}"}}\n{{"conversation": {{"key": "{MARK}"}}}}\n'
    )
    data = whole.encode()
    for end in range(len(data)):
        for broken in (data[:end], data[:end] + b"\xff" + data[end:], data[:end] + b"}" + data[end:]):
            try:
                told.shown(*read(io.BytesIO(broken), format))
            except ChatDBError as error:
                told.error(error)
            with contextlib.suppress(ChatDBError):
                told.shown(detect(io.BytesIO(broken)))
        if end % 40 == 0:
            await told.awaited(import_conversations(db, user_id="alice", items=read(io.BytesIO(data[:end]), format)))
    figure(told, f"sources, {format}")


async def test_a_leak_is_found(told: Told) -> None:
    """The search finds MARK wherever it can occur."""
    cause = asyncpg.UniqueViolationError(MARK)
    behind = ChatDBError("the key is taken")
    behind.__cause__ = cause
    with_context = ChatDBError("the key is taken")
    with_context.__context__ = ValueError(MARK)
    in_field = chatdb.InvalidInputError(MARK, "is wrong")
    for count, error in enumerate([ChatDBError(MARK), behind, with_context, in_field], 1):
        told.error(error)
        assert len(told.leaks) >= count
        told.leaks[count:] = []
    told.leaks.clear()
    told.shown({"content": MARK})
    for name in ("asyncpg", "asyncio", "chatdb", "host"):
        logging.getLogger(name).warning("lost %s", MARK)
    await told.awaited(asyncio.sleep(0, MARK))
    assert len(told.leaks) == 3 + 4 + 3
    assert len(leaks.of_this_test()) == 2 + 4


@pytest.mark.parametrize("private", ["content", "payload", "metadata", "key"])
async def test_a_leak_is_found_in_every_test(private: str) -> None:
    """An error or log record that contains a private argument fails any test."""
    said = "wonderful weather"

    class Telling:
        async def fetch(self, *arguments: Any, timeout: float | None = None) -> list[Any]:
            logging.getLogger("chatdb").debug("it says: %s", said)
            raise ChatDBError(f"what is said of {said} is no statement")

    value = {"a": [said]} if private in {"payload", "metadata"} else said
    with pytest.raises(ChatDBError):
        await call(Telling(), "append_message", {"role": "user", "content": "a text", private: value}, NOBODYS)
    assert len(leaks.of_this_test()) == 2


@pytest.mark.parametrize("dsn", ["//alice:rainy%20day@nowhere/chat", "///chat?host=nowhere&password=rainy%20day"])
def test_a_leak_of_a_password_is_found(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that contains a DSN's password fails any test."""

    def telling(dsn: str) -> None:
        raise ChatDBError("there is no such password as rainy day")

    monkeypatch.setattr(chatdb._core.dsn, "urlsplit", telling)
    with pytest.raises(ChatDBError):
        connect_arguments(f"postgresql:{dsn}")
    assert len(leaks.of_this_test()) == 1
