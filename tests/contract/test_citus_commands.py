"""How many commands Citus sends to its nodes for each statement: `nox -s distributed` compares docs with a cluster."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import chatdb
from chatdb._core.query import data_folder
from chatdb.admin.citus import distribute_tables
from chatdb.admin.migrate import apply_migrations
from chatdb.admin.search_index import create_search_index
from chatdb.watching import _poll_conversations
from tests.support.calls import CALLS, call, conversation_with_a_message
from tests.support.distributed import cluster_database
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif("CHATDB_TEST_CITUS_DSN" not in os.environ, reason="no Citus cluster is named")
PAGE = (ROOT / "docs" / "operations" / "citus.md").read_text(encoding="utf-8")
ROUNDS = 7
"""PostgreSQL plans a prepared statement for each call five times, and then may keep one plan."""


class Counted:
    """A pool's connection, and what was sent since `start`: statements, and commands from the coordinator to nodes."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.statements: list[str] = []
        self.commands: list[str] = []

    def start(self) -> None:
        """Forget what was sent so far."""
        self.statements.clear()
        self.commands.clear()

    def hear(self, _: object, message: Any) -> None:
        """Keep a command that the coordinator reports."""
        if message.message.startswith("issuing "):
            self.commands.append(message.message)


@pytest.fixture(scope="module")
def distributed() -> Iterator[str]:
    """Yield the DSN of a database with distributed tables."""
    with cluster_database(os.environ["CHATDB_TEST_CITUS_DSN"], f"chatdb_test_{os.getpid()}") as dsn:
        apply_migrations(dsn)
        distribute_tables(dsn, shards=4)
        create_search_index(dsn)
        yield dsn


@pytest.fixture
async def counted(distributed: str) -> AsyncIterator[Counted]:
    """Yield a connection whose commands are counted."""
    settings = {"citus.log_remote_commands": "on"}
    async with (
        chatdb.create_pool(distributed, max_size=1, server_settings=settings) as db,
        db.acquire() as connection,
    ):
        counted = Counted(connection)
        db.add_call_listener(lambda call: counted.statements.append(call.statement))
        connection.add_log_listener(counted.hear)
        yield counted
        connection.remove_log_listener(counted.hear)


async def test_each_statement_is_one_command(counted: Counted) -> None:
    """Each statement on the rows of one user is one command, but for those in the page's table."""
    seen: set[str] = set()
    wrong: dict[str, list[str]] = {}
    for turn in range(ROUNDS):
        for number, (name, arguments) in enumerate(CALLS):
            conversation = await conversation_with_a_message(counted.connection)
            counted.start()
            await call(counted.connection, name, arguments, conversation)
            statements, commands = [*counted.statements], [*counted.commands]
            seen.update(statements)
            if name != "move_user" and len(commands) != len(statements):
                wrong[f"{name} {number} round {turn}"] = commands
            await chatdb.delete_user(counted.connection, user_id="alice")
            await chatdb.delete_user(counted.connection, user_id="another")
    assert wrong == {}
    others = {"check_schema", "poll_conversations", "search_messages_words", "search_messages_words_conversation"}
    assert seen == {path.stem for path in data_folder("sql").glob("*.sql")} - others


async def test_the_other_statements_are_in_the_page(counted: Counted) -> None:
    """The page's table has the number of commands of each statement that is not one command."""
    db = counted.connection

    async def count(name: str, **arguments: Any) -> int:
        numbers: list[int] = []
        for _ in range(ROUNDS):
            conversation = await conversation_with_a_message(db)
            counted.start()
            await call(db, name, arguments, conversation)
            numbers.append(len(counted.commands))
            await chatdb.delete_user(db, user_id="alice")
            for other in range(8):
                await chatdb.delete_user(db, user_id=f"another {other}")
        return max(numbers)

    words = await count("search_messages", query="first", mode="words", conversation_id=None)
    in_one = await count("search_messages", query="first", mode="words", conversation_key="thread")
    moved = [await count("move_user", to_user_id=f"another {number}") for number in range(8)]
    conversation = await conversation_with_a_message(db)
    counted.start()
    await _poll_conversations.fetch_all(db, ["alice"], [str(conversation.id)], [str(conversation.revision)])
    polled = len(counted.commands)
    counted.start()
    await chatdb.check_schema(db)
    checked = len(counted.commands)
    for row in (
        f'| `search_messages` with `mode="words"` | {words}, with a conversation {in_one} |',
        f"| `poll_conversations`, for all conversations that a `Watcher` watches | {polled} for one user; ",
        f"| `move_user`, depending on the users' nodes | {min(moved)} to {max(moved)} |",
        f"| `check_schema` | {checked} |",
    ):
        assert row in PAGE, row
