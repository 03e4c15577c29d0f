"""Every error, raised by its real cause; none reveals a text, a key or a password."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import time
import traceback
import uuid
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

import chatdb
from chatdb import (
    AcquireTimeoutError,
    ChatDBError,
    CommandTimeoutError,
    ConfigurationError,
    ConflictError,
    ConversationNotFoundError,
    InvalidInputError,
    Message,
    MessageNotFoundError,
    SchemaError,
    UnavailableError,
    errors,
)
from chatdb._core.dsn import connect_arguments
from chatdb._core.query import Query
from chatdb.admin.users_link import UsersMissingError
from chatdb.schema import EXPECTED_SCHEMA, kind_of
from tests.support.calls import CALLS, NOBODYS, call, conversation_with_a_message

MARK = "XYZZY"  # a text, key or password that no error may reveal
DSN = f"postgresql://alice:{MARK}@127.0.0.1:{{}}/chat?{{}}"


@contextlib.contextmanager
def raises(kind, *, sent=..., match=None):
    """Expect an error of exactly this class that never shows the mark."""
    with pytest.raises(kind, match=match) as raised:
        yield raised
    error = raised.value
    assert type(error) is kind
    assert sent is ... or error.sent is sent
    for told in (str(error), repr(error), "".join(traceback.format_exception(error))):
        assert MARK not in told


async def append(db, conversation, **fields):
    """Append a message whose texts are the mark."""
    place = {"user_id": conversation.user_id, "conversation_id": conversation.id}
    marked = {"role": "user", "content": MARK, "metadata": {MARK: MARK}, "payload": [MARK]}
    return await chatdb.append_message(db, **place, **marked | fields)


# the error hierarchy


def drawn():
    """Read each class and its bases from the tree in the docstring of `chatdb.errors`."""
    bases, path = {}, []
    for line in re.findall(r"^ {4}( *\w+Error\b.*)$", errors.__doc__, re.MULTILINE):
        level = (len(line) - len(line.lstrip())) // 2
        name, *others = re.findall(r"\b\w+Error\b", line)
        path[level:] = [name]
        if "also a " in line:
            bases[name] = [path[level - 1], *others]
            continue
        bases[name] = [path[level - 1]] if level else ["Exception"]
        bases |= {other: [name] for other in others}
    return bases


def test_the_tree_is_as_drawn():
    """The tree lists exactly the errors of the module, each under its base."""
    found = {
        name: [base.__name__ for base in value.__bases__]
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }

    assert found == drawn()


def test_the_tree_is_that_of_the_contract():
    """The errors and their bases are the documented ones."""
    assert drawn() == {
        "ChatDBError": ["Exception"],
        "NotFoundError": ["ChatDBError"],
        "ConversationNotFoundError": ["NotFoundError"],
        "MessageNotFoundError": ["NotFoundError"],
        "ConflictError": ["ChatDBError"],
        "StaleError": ["ConflictError"],
        "InvalidInputError": ["ChatDBError", "ValueError"],
        "UnavailableError": ["ChatDBError"],
        "AcquireTimeoutError": ["UnavailableError"],
        "CommandTimeoutError": ["UnavailableError"],
        "PoolClosedError": ["UnavailableError"],
        "SchemaError": ["ChatDBError"],
        "ConfigurationError": ["ChatDBError"],
    }


# errors that a caller causes


async def test_input_and_conflict_tell_no_text(tx):
    """An error about a caller's values says what is wrong, not what they are."""
    conversation = await chatdb.create_conversation(tx, user_id=MARK, key=MARK, title=MARK)
    await append(tx, conversation, key=MARK)
    with raises(ConflictError):
        await append(tx, conversation, key=MARK, content=MARK * 2)
    with raises(ConflictError):
        batch = [{"role": "tool", "content": MARK, "key": MARK}]
        await chatdb.append_messages(tx, user_id=MARK, conversation_id=conversation.id, messages=batch)
    with raises(InvalidInputError):
        await append(tx, conversation, role=MARK)
    with raises(ConversationNotFoundError):
        await chatdb.get_conversation(tx, user_id=MARK, conversation_key=MARK * 2)
    with raises(MessageNotFoundError):
        await chatdb.get_message(tx, user_id=MARK, conversation_id=conversation.id, key=MARK * 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"role": MARK},
        {"role": None},
        {"content": MARK * 1024 * 1024},
        {"content": None},
        {"content": f"{MARK}\0"},
        {"content": f"{MARK}\ud800"},
        {"content": [MARK]},
        {"payload": MARK},
        {"payload": f'{{"{MARK}": }}'},
        {"metadata": f'"{MARK}"'},
        {"metadata": f'{{"{MARK}": 01}}'},
        {"metadata": f'{{"{MARK}": "\\u0000"}}'},
        {"metadata": f'{{"{MARK}": 1e131073}}'},
        {"token_count": MARK},
        {"token_count": -1},
    ],
    ids=lambda wrong: f"{wrong}"[:40],
)
async def test_values_that_the_server_or_the_driver_refuses(tx, wrong):
    """A value that bypasses chatdb's checks still raises InvalidInputError, without the row that the server quotes."""
    conversation = await chatdb.create_conversation(tx, user_id="alice")
    row = {"role": "user", "content": MARK, "payload": None, "metadata": None, "token_count": None} | wrong

    with raises(InvalidInputError):
        await Query("append_message", Message).fetch_one(tx, "alice", conversation.id, None, *row.values())


async def test_misuse_stays_the_drivers_error(tx):
    """Two concurrent operations on one connection are a programming error, which propagates unchanged."""
    calls = [chatdb.list_conversations(tx, user_id="alice") for _ in range(2)]

    answers = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(answer) for answer in answers] == [list, asyncpg.InterfaceError]


async def test_an_aborted_transaction_stays_the_drivers_error(tx):
    """Using an aborted transaction is a programming error, which propagates unchanged."""
    with pytest.raises(asyncpg.DivisionByZeroError):
        await tx.execute("select 1 / 0")

    with pytest.raises(asyncpg.InFailedSQLTransactionError) as raised:
        await chatdb.list_conversations(tx, user_id="alice")
    assert not isinstance(raised.value, ChatDBError)


@pytest.mark.parametrize("make", [chatdb.create_pool, lambda dsn: asyncpg.create_pool(**connect_arguments(dsn))])
async def test_a_pool_that_is_not_open(dsn, make):
    """A pool that is closed or not open yet, asyncpg's too, raises PoolClosedError with sent=False."""
    pool = make(dsn)
    for _ in range(2):
        with pytest.raises(chatdb.PoolClosedError) as raised:
            await chatdb.list_conversations(pool, user_id="alice")
        assert raised.value.sent is False
        if not pool._initialized:
            await (await pool).close()


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_errors_cross_processes(again):
    """Every error can be pickled and copied with its attributes, so a worker's error reaches its parent."""
    made = [
        InvalidInputError("content", "must be a str"),
        UsersMissingError("public.users(id)", ["ada"], 3),
        *(kind("gone", sent=None) for kind in (UnavailableError, *UnavailableError.__subclasses__())),
        *(
            kind("x")
            for kind in (ChatDBError, ConversationNotFoundError, ConflictError, SchemaError, ConfigurationError)
        ),
    ]
    for error in made:
        error.add_note("a note")
        found = again(error)
        assert type(found) is type(error)
        assert (found.args, str(found), vars(found)) == (error.args, str(error), vars(error))


# a server that is absent or does not answer


def closed_port():
    """Return a local port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


async def test_nobody_listens():
    """A refused connection raises UnavailableError with sent=False, whoever opens the connection."""
    dsn = DSN.format(closed_port(), "")
    with raises(UnavailableError, sent=False):
        await chatdb.create_pool(dsn)
    async with asyncpg.create_pool(**connect_arguments(dsn), min_size=0) as pool:
        with raises(UnavailableError, sent=False):
            await chatdb.list_conversations(pool, user_id="alice")


async def test_no_socket(tmp_path):
    """A missing Unix socket raises UnavailableError with sent=False."""
    with raises(UnavailableError, sent=False):
        await chatdb.create_pool(f"postgresql://alice:{MARK}@/chat?host={tmp_path}")


@contextlib.asynccontextmanager
async def listening(serve):
    """Listen on a port and serve each connection with the given function."""
    serving = set()

    async def served(reader, writer):
        serving.add(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(served, "127.0.0.1", 0) as listener:
        yield listener.sockets[0].getsockname()[1]
    await asyncio.gather(*serving)  # Python 3.11 does not wait for them


async def test_a_server_that_never_answers():
    """Waiting for a silent server ends at the acquire timeout, with sent=False."""
    start = time.monotonic()
    async with listening(lambda reader, writer: reader.read()) as port:
        with raises(AcquireTimeoutError, sent=False):
            await chatdb.create_pool(DSN.format(port, ""), acquire_timeout=0.2)

    assert 0.2 <= time.monotonic() - start < 5


async def test_a_server_that_hangs_up():
    """A server that accepts and closes the connection raises UnavailableError with sent=False."""
    async with listening(lambda reader, writer: reader.read(1)) as port:
        with raises(UnavailableError, sent=False):
            await chatdb.create_pool(DSN.format(port, "sslmode=disable"))


async def test_an_exhausted_pool(dsn):
    """If no connection becomes free, the wait ends at the acquire timeout, with sent=False."""
    async with chatdb.create_pool(dsn, max_size=1, acquire_timeout=0.5) as db:
        async with db.acquire():
            start = time.monotonic()
            with raises(AcquireTimeoutError, sent=False, match=r"max_size is 1\b"):
                await chatdb.list_conversations(db, user_id="alice")
            assert 0.5 <= time.monotonic() - start < 5
        assert await chatdb.list_conversations(db, user_id="alice") == []


async def test_a_statement_that_takes_too_long(db, dsn):
    """A statement that exceeds the command timeout has sent=True, and the pool works afterwards."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    async with chatdb.create_pool(dsn, command_timeout=0.5) as hurried:
        async with chatdb.transaction(db) as other:
            await other.execute("select from chatdb.conversations for update")
            with raises(CommandTimeoutError, sent=True):
                await append(hurried, conversation)
        assert (await append(hurried, conversation)).seq == 1


# a server that ends the statement


async def blocked_backend(db):
    """Return the pid of the backend that waits for a lock."""
    async with asyncio.timeout(20):
        while True:
            pid = await db.fetchval(
                "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            )
            if pid is not None:
                return pid
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def killed(db):
    """Lock the conversations, kill the first backend that waits for them, and unlock them."""
    async with chatdb.transaction(db) as other:
        await other.execute("lock table chatdb.conversations")

        async def kill():
            assert await db.fetchval("select pg_terminate_backend($1)", await blocked_backend(db))

        killer = asyncio.create_task(kill())
        yield killer
        await killer


async def test_a_backend_that_is_killed(db):
    """A write whose backend is killed may have committed, and the pool works afterwards."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    async with killed(db):
        with raises(UnavailableError) as raised:
            await append(db, conversation)

    assert raised.value.sent is not False
    assert (await append(db, conversation)).seq == 1


async def test_a_killed_backend_is_retried_by_chatdbs_pool_only(db, dsn):
    """Only chatdb's pool retries, and only what is safe to repeat; connections and other pools never do."""
    conversation = await chatdb.create_conversation(db, user_id="alice")

    async def answered(handle):
        async with killed(db) as killer:
            reading = asyncio.create_task(chatdb.list_conversations(handle, user_id="alice"))
            await killer
        return await reading

    assert await answered(db) == [conversation]
    async with asyncpg.create_pool(**connect_arguments(dsn), min_size=0) as pool:
        with raises(UnavailableError, sent=None):
            await answered(pool)
    connection = await asyncpg.connect(**connect_arguments(dsn))
    with raises(UnavailableError, sent=None):
        await answered(connection)
    with raises(UnavailableError):  # now closed
        await chatdb.list_conversations(connection, user_id="alice")


@pytest.mark.parametrize("goes_on", [True, False], ids=["statement", "commit"])
async def test_a_backend_that_goes_between_two_statements(db, goes_on):
    """A transaction whose backend ends between two statements can be retried, and the pool works afterwards."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    with raises(UnavailableError):
        async with chatdb.transaction(db) as connection:
            await append(connection, conversation)
            pid = await connection.fetchval("select pg_backend_pid()")  # a pooler reports another pid at startup
            assert await db.fetchval("select pg_terminate_backend($1, 20000)", pid)
            await asyncio.sleep(0.05)  # time for the driver to notice
            if goes_on:
                await append(connection, conversation)

    assert (await append(db, conversation)).seq == 1


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("set local lock_timeout = '20ms'", UnavailableError),
        ("set transaction read only", UnavailableError),
        ("set local statement_timeout = '50ms'", CommandTimeoutError),
    ],
    ids=["lock timeout", "read only", "statement timeout"],
)
async def test_a_statement_that_is_rolled_back(db, setting, kind):
    """A statement that the server rolls back for a temporary reason has sent=True and can be retried."""
    conversation = await chatdb.create_conversation(db, user_id="alice")

    async with chatdb.transaction(db) as other, chatdb.transaction(db) as connection:
        await append(other, conversation)
        await connection.execute(setting)
        with raises(kind, sent=True):
            async with connection.transaction():
                await append(connection, conversation)


async def test_a_transaction_that_lost_a_race(db):
    """A serialization failure has sent=True and can be retried."""
    conversation = await chatdb.create_conversation(db, user_id="alice")

    async with db.acquire() as connection:
        block = connection.transaction(isolation="repeatable_read")
        await block.start()
        await chatdb.list_conversations(connection, user_id="alice")  # take a snapshot from before the next append
        await append(db, conversation)
        with raises(UnavailableError, sent=True):
            await append(connection, conversation)
        await block.rollback()


# an outdated or damaged database


async def test_a_database_without_migrations(empty_dsn):
    """Without chatdb's tables every function says to run chatdb migrate."""
    said = {}
    async with chatdb.create_pool(empty_dsn) as db:
        for name, arguments in CALLS:
            try:
                said[name] = await call(db, name, arguments, NOBODYS)
            except SchemaError as error:
                said[name] = "run chatdb migrate" in str(error)
        with raises(SchemaError, match="run chatdb migrate"):
            await chatdb.check_schema(db)

    assert said == dict.fromkeys(said, True)


@pytest.mark.owner
@pytest.mark.parametrize(
    ("older", "missing", "name", "arguments"),
    [
        ("drop table chatdb.messages cascade", "messages.content", "get_history", {}),
        ("alter table chatdb.messages drop column token_count", "messages.token_count", "get_message", {"seq": 1}),
        ("alter table chatdb.conversations drop column active_on", "conversations.active_on", "list_conversations", {}),
        (
            "drop index chatdb.uq_messages_user_id_conversation_id_key",
            "messages.uq_messages_user_id_conversation_id_key",
            "append_message",
            {"role": "user", "content": MARK, "key": MARK},
        ),
        (
            "drop index chatdb.uq_conversations_user_id_key",
            "conversations.uq_conversations_user_id_key",
            "create_conversation",
            {"key": MARK},
        ),
    ],
    ids=["table", "column", "generated column", "index of messages", "index of conversations"],
)
async def test_a_database_with_older_migrations(tx, older, missing, name, arguments):
    """If a table, column or index is missing, the function that needs it says so and the check names it."""
    conversation = await conversation_with_a_message(tx)
    await call(tx, name, arguments, conversation)
    await tx.execute(older)

    with raises(SchemaError, match=re.escape(missing)):
        await chatdb.check_schema(tx)
    with raises(SchemaError, match="run chatdb migrate"):
        await call(tx, name, arguments, conversation)


@pytest.mark.owner
@pytest.mark.parametrize("table", EXPECTED_SCHEMA)
async def test_check_schema_misses_every_part(tx, table):
    """The check names any dropped column, constraint or index."""
    for part, definition in EXPECTED_SCHEMA[table].items():
        kind = kind_of(part)
        if kind == "index":
            statement = f"drop index chatdb.{part}"
        else:
            what = "column" if kind == "column" else "constraint"
            statement = f"alter table chatdb.{table} drop {what} {part} cascade"
        shown = re.escape(definition if kind == "column" else kind)
        block = tx.transaction()
        await block.start()
        await tx.execute(statement)
        with raises(SchemaError, match=rf"\b{table}\.{part} \({shown}\).*: run chatdb migrate"):
            await chatdb.check_schema(tx)
        await block.rollback()
    await chatdb.check_schema(tx)


@pytest.mark.owner
async def test_check_schema_knows_types(tx):
    """A column of the wrong type counts as missing."""
    await tx.execute("alter table chatdb.messages alter column payload type jsonb")

    with raises(SchemaError, match=r"messages\.payload \(json\)"):
        await chatdb.check_schema(tx)


@pytest.mark.owner
async def test_check_schema_knows_invalid_indexes(db):
    """An index left invalid by a failed build counts as missing."""
    index = "uq_conversations_user_id_key"
    await db.execute(f"drop index chatdb.{index}")
    for _ in range(2):
        await db.execute("insert into chatdb.conversations (user_id, key) values ('alice', 'twice')")
    with pytest.raises(asyncpg.UniqueViolationError):
        await db.execute(
            f"create unique index concurrently {index} on chatdb.conversations (user_id, key) where key is not null"
        )

    with raises(SchemaError, match=index):
        await chatdb.check_schema(db)


@pytest.mark.owner
async def test_a_database_with_newer_migrations(db):
    """Extra columns, tables and indexes do no harm, even to statements that were already prepared."""

    async def serve():
        for name, arguments in CALLS:
            await chatdb.delete_user(db, user_id="alice")
            await call(db, name, arguments, await conversation_with_a_message(db))
        await chatdb.check_schema(db)

    await serve()
    await db.execute(
        """
        alter table chatdb.conversations add column shared_at timestamptz, add column pins int not null default 0;
        alter table chatdb.messages add column edited_at timestamptz, add column language text;
        create table chatdb.attachments (id bigint primary key, content text);
        create index ix_messages_language on chatdb.messages (user_id, language);
        """
    )
    await serve()


# a wrong role, name or connection setting


@pytest.fixture
async def role(db):
    """Yield a role that can log in and do nothing else."""
    name = f"chatdb_test_{uuid.uuid4().hex[:12]}"
    await db.execute(f"create role {name} login password '{MARK}'")
    yield name
    await db.execute(f"drop role {name}")


@pytest.fixture
def role_dsn(dsn, role):
    """Return the DSN of that role."""
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{role}:{MARK}@{parts.netloc.rpartition('@')[2]}"))


@pytest.mark.owner
async def test_a_role_without_privileges(role_dsn):
    """Without privileges on chatdb's tables, the error says to grant them."""
    async with chatdb.create_pool(role_dsn) as db:
        for name, arguments in CALLS:
            with raises(ConfigurationError, match="privilege"):
                await call(db, name, arguments, NOBODYS)


@pytest.mark.owner
async def test_a_role_with_some_privileges(role_dsn, role, db):
    """A read-only role is told which privilege a write needs."""
    conversation = await chatdb.create_conversation(db, user_id="alice")
    await db.execute(f"grant usage on schema chatdb to {role}; grant select on all tables in schema chatdb to {role}")
    async with chatdb.create_pool(role_dsn) as reader:
        assert await chatdb.list_conversations(reader, user_id="alice") == [conversation]
        with raises(ConfigurationError, match="privilege"):
            await append(reader, conversation)
    await db.execute(f"drop owned by {role}")


@pytest.mark.owner
async def test_a_role_that_may_not_log_in(role_dsn, role, db):
    """A role that the server rejects raises ConfigurationError."""
    await db.execute(f"alter role {role} nologin")

    with raises(ConfigurationError):
        await chatdb.create_pool(role_dsn)


@pytest.mark.owner
async def test_a_role_with_too_many_connections(role_dsn, role, db):
    """Exceeding a connection limit raises UnavailableError with sent=False."""
    await db.execute(f"alter role {role} connection limit 1")

    async with chatdb.create_pool(role_dsn):
        with raises(UnavailableError, sent=False):
            await chatdb.create_pool(role_dsn)
        async with asyncpg.create_pool(**connect_arguments(role_dsn), min_size=0) as pool:
            with raises(UnavailableError, sent=False):
                await chatdb.list_conversations(pool, user_id="alice")


async def test_an_unknown_role(dsn):
    """An unknown user raises ConfigurationError."""
    parts = urlsplit(dsn)
    stranger = parts._replace(netloc=f"chatdb_test_nobody:{MARK}@{parts.netloc.rpartition('@')[2]}")

    with raises(ConfigurationError):
        await chatdb.create_pool(urlunsplit(stranger))


async def test_an_unknown_database(dsn):
    """An unknown database raises ConfigurationError, on any pool."""
    dsn = urlunsplit(urlsplit(dsn)._replace(path="/chatdb_test_missing"))
    with raises(ConfigurationError):
        await chatdb.create_pool(dsn)
    async with asyncpg.create_pool(**connect_arguments(dsn), min_size=0) as pool:
        with raises(ConfigurationError):
            await chatdb.list_conversations(pool, user_id="alice")


def message(letter, body):
    """Return a PostgreSQL protocol message."""
    return letter + (len(body) + 4).to_bytes(4) + body


async def test_a_wrong_password():
    """A wrong password raises ConfigurationError, which does not show it."""

    async def refuse(reader, writer):  # the test server trusts everybody
        await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
        writer.write(message(b"R", (3).to_bytes(4)))
        asked = await reader.readexactly(1 + 4 + len(MARK) + 1)
        assert asked == message(b"p", MARK.encode() + b"\0")
        refusal = {
            b"S": b"FATAL",
            b"V": b"FATAL",
            b"C": b"28P01",
            b"M": b'password authentication failed for user "alice"',
        }
        writer.write(message(b"E", b"".join(name + text + b"\0" for name, text in refusal.items()) + b"\0"))

    async with listening(refuse) as port:
        with raises(ConfigurationError, match="password"):
            await chatdb.create_pool(DSN.format(port, "sslmode=disable"))


async def test_a_server_without_tls():
    """If the DSN requires TLS and the server offers none, nothing is sent in clear and ConfigurationError is raised."""
    heard = []

    async def decline(reader, writer):
        heard.append(await reader.readexactly(8))
        writer.write(b"N")
        heard.append(await reader.read())

    async with listening(decline) as port:
        with raises(ConfigurationError):
            await chatdb.create_pool(DSN.format(port, "sslmode=verify-full"))

    assert b"".join(heard) == (8).to_bytes(4) + (80877103).to_bytes(4)  # the TLS request and nothing else


@pytest.mark.skipif(shutil.which("openssl") is None, reason="only openssl makes a certificate here")
async def test_a_certificate_that_nobody_vouches_for(tmp_path):
    """An unverified certificate raises ConfigurationError, and its owner receives no password."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    await asyncio.to_thread(
        subprocess.run,
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate),
            *("-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    heard = []

    async def serve(reader, writer):
        await reader.readexactly(8)
        writer.write(b"S")
        await writer.start_tls(context)
        heard.append(await reader.read(1))

    async with listening(serve) as port:
        with raises(ConfigurationError):
            await chatdb.create_pool(DSN.format(port, "sslmode=verify-full"))
        assert b"".join(heard) == b""
        with raises(UnavailableError):  # the server hangs up after verification
            await chatdb.create_pool(DSN.format(port, f"sslmode=verify-full&sslrootcert={certificate}"))
        assert b"".join(heard) == b"\0"


async def test_a_setting_that_the_driver_refuses(dsn):
    """A DSN value that only the driver knows to be wrong raises ConfigurationError."""
    with raises(ConfigurationError):
        await chatdb.create_pool(f"{dsn}{'&' if '?' in dsn else '?'}target_session_attrs=sometimes")


async def test_a_pooler_that_loses_prepared_statements(dsn):
    """Behind a pooler that loses prepared statements the error says how to do without them."""

    async def lose() -> None:
        async with chatdb.transaction(pool) as connection:
            await chatdb.list_conversations(connection, user_id="alice")
            # simulate such a pooler's next session; execute() would notice the deallocate
            await asyncpg.Connection.execute(connection._con, "deallocate all")
            await chatdb.list_conversations(connection, user_id="alice")

    async with chatdb.create_pool(dsn, max_size=1) as pool:
        with raises(ConfigurationError, match="statement_cache_size=0"):
            await lose()


async def test_a_transaction_on_a_server_that_went(dsn):
    """A transaction that cannot get a connection from asyncpg's pool raises UnavailableError."""
    async with asyncpg.create_pool(**connect_arguments(dsn), min_size=0) as pool:
        pool.set_connect_args(dsn="postgresql://alice@127.0.0.1:1/chat")
        with pytest.raises(chatdb.UnavailableError) as caught:
            async with chatdb.transaction(pool):
                pass
    assert caught.value.sent is False
