"""The tests of a service that uses chatdb.testing; as a script, runs them on the installed package."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = {
    "pytest.ini": """\
[pytest]
asyncio_default_fixture_loop_scope = function
filterwarnings = error
""",
    "conftest.py": """\
import pytest

pytest_plugins = ["chatdb.testing"]


@pytest.fixture
def anyio_backend():
    return "asyncio"
""",
    "test_with_asyncio.py": """\
import asyncio

import chatdb
import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def trip(chatdb_pool, chatdb_factory):
    return await chatdb_factory.create(chatdb_pool, turns=2, versions=1)


async def test_a_fixture_of_the_service(chatdb_pool, trip):
    line = await chatdb.get_branch(chatdb_pool, user_id="alice", conversation_id=trip.id)
    assert line[-1].seq == trip.last_seq


async def test_a_database_of_its_own(chatdb_pool, chatdb_dsn):
    assert await chatdb.list_conversations(chatdb_pool, user_id="alice") == []
    async with chatdb.create_pool(chatdb_dsn) as second:
        await chatdb.create_conversation(second, user_id="alice")
    assert len(await chatdb.list_conversations(chatdb_pool, user_id="alice")) == 1


@pytest.mark.parametrize("time", [1, 2])
async def test_what_is_rolled_back(chatdb_transaction, chatdb_factory, time):
    assert await chatdb.list_conversations(chatdb_transaction, user_id="alice") == []
    async with chatdb.transaction(chatdb_transaction):
        await chatdb_factory.create(chatdb_transaction)
    assert len(await chatdb.list_conversations(chatdb_transaction, user_id="alice")) == 1


@pytest.mark.asyncio(loop_scope="session")
class TestOnTheSessionsLoop:
    loops = set()

    @pytest.mark.parametrize("time", [1, 2])
    async def test_a_pool_and_a_transaction(self, chatdb_pool, chatdb_transaction, time):
        self.loops.add(asyncio.get_running_loop())
        assert len(self.loops) == 1
        for db in (chatdb_pool, chatdb_transaction):
            assert await chatdb.list_conversations(db, user_id="alice") == []
""",
    "test_with_anyio.py": """\
import chatdb
import pytest

pytestmark = pytest.mark.anyio


@pytest.fixture
async def trip(chatdb_pool, chatdb_factory):
    return await chatdb_factory.create(chatdb_pool, turns=2)


async def test_a_fixture_of_the_service(chatdb_pool, trip):
    assert [each.id for each in await chatdb.list_conversations(chatdb_pool, user_id="alice")] == [trip.id]


async def test_what_is_rolled_back(chatdb_transaction, chatdb_factory):
    await chatdb_factory.create(chatdb_transaction)
    assert len(await chatdb.list_conversations(chatdb_transaction, user_id="alice")) == 1
""",
    "test_in_parallel.py": """\
import asyncio
import os

import chatdb
import pytest


@pytest.mark.parametrize("number", range(8))
def test_many(chatdb_dsn, chatdb_factory, number):
    async def use():
        async with chatdb.create_pool(chatdb_dsn) as db:
            await chatdb_factory.create(db, key="the same")
            return await chatdb.list_conversations(db, user_id="alice")

    assert "PYTEST_XDIST_WORKER" in os.environ
    assert len(asyncio.run(use())) == 1
""",
}
"""A project, by file names. All of its 16 tests pass under pytest-xdist."""

NOT_OPTED_IN = """\
import sys


def test_nothing_is_loaded():
    assert "chatdb" not in sys.modules


def test_no_fixture(chatdb_dsn):
    pass
"""


def write(folder: Path) -> None:
    """Write the project into a folder."""
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")


def run(folder: Path, *arguments: str, **variables: str) -> str:
    """Run pytest in a folder, where DATABASE_URL names a server that is not there, and return its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CHATDB_TEST"))}
    env |= {"DATABASE_URL": "postgresql://127.0.0.1:1/production?sslmode=disable"} | variables
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def databases_left() -> list[str]:
    """Return the databases on the embedded server of this user's tests."""
    import psycopg

    from chatdb.embedded import EmbeddedServer
    from chatdb.testing.servers import embedded_folder

    with EmbeddedServer(embedded_folder()) as server, psycopg.connect(server.dsn) as connection:
        found = connection.execute("select datname from pg_database where datname like 'chatdb\\_testing%'")
        return [name for (name,) in found]


def main() -> None:
    """Run the project on the embedded server, and a project that does not opt in."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder)
        output = run(folder, "-n", "2")
        print(output)
        assert "16 passed" in output
        assert not [name for name in databases_left() if "template" not in name]
    with tempfile.TemporaryDirectory() as place:
        for name, text in {"pytest.ini": FILES["pytest.ini"], "test_without.py": NOT_OPTED_IN}.items():
            (Path(place) / name).write_text(text, encoding="utf-8")
        output = run(Path(place))
        print(output)
        assert "fixture 'chatdb_dsn' not found" in output
        assert "1 passed, 1 error" in output
    print("chatdb.testing works from the installed package")


if __name__ == "__main__":
    main()
