"""The fixtures of chatdb.testing in the tests of a service, which run in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import psycopg
import pytest

from chatdb.testing.databases import PREFIX, TEMPLATE
from tests.docs import runner
from tests.support import use_testing
from tests.support.paths import ROOT

PLUGINS = ("--disable-plugin-autoload", "-p", "pytest_asyncio.plugin")
ANYIO = ("-p", "anyio.pytest_plugin")
XDIST = ("-p", "xdist.plugin", "-n", "2")

ERRORS = """\
import pytest


@pytest.fixture
def anyio_backend():
    return "trio"


@pytest.mark.anyio
async def test_trio(chatdb_pool):
    pass


def test_no_coroutine(chatdb_pool):
    pass


@pytest.mark.asyncio
async def test_commits(chatdb_transaction):
    await chatdb_transaction.execute("insert into chatdb.conversations (user_id) values ('alice')")
    await chatdb_transaction.execute("commit")


@pytest.mark.asyncio
async def test_after_it(chatdb_transaction):
    assert await chatdb_transaction.fetchval("select count(*) from chatdb.conversations") == 0
"""


def left(server: str) -> list[str]:
    """Return the kit's databases that no living process owns or that are templates."""
    with psycopg.connect(server, autocommit=True) as connection:
        found = connection.execute("select datname from pg_database where starts_with(datname, %s)", [PREFIX])
        return sorted(name for (name,) in found)


def test_the_tests_of_a_service(server: str, owners_template: str, tmp_path: Path) -> None:
    """They pass under pytest-asyncio, anyio and pytest-xdist, share the template, and leave no database."""
    before = left(server)
    use_testing.write(tmp_path)
    for file in runner.blocks(ROOT / "docs" / "howto" / "testing.md"):
        named = re.match(r"# (test_\w+\.py)\n", file.code)
        if named:
            (tmp_path / named[1]).write_text(file.code, encoding="utf-8")
    output = use_testing.run(tmp_path, *PLUGINS, *ANYIO, *XDIST, CHATDB_TEST_DSN=server)
    assert "19 passed" in output, output
    assert left(server) == before
    assert owners_template in before
    assert sum(name.startswith(TEMPLATE) for name in before) == 1


def test_the_session_loop_as_default(server: str, tmp_path: Path) -> None:
    """The fixtures run on the loop of the test if the configuration sets its scope, in auto mode too."""
    use_testing.write(tmp_path)
    scopes = (f"asyncio_default_{kind}_loop_scope=session" for kind in ("test", "fixture"))
    options = [part for option in ("asyncio_mode=auto", *scopes) for part in ("-o", option)]
    output = use_testing.run(tmp_path, *PLUGINS, *options, "test_with_asyncio.py", CHATDB_TEST_DSN=server)
    assert "6 passed" in output, output


def test_the_errors(server: str, tmp_path: Path) -> None:
    """A test that cannot work fails with a sentence, and does not affect the next one."""
    use_testing.write(tmp_path)
    (tmp_path / "test_errors.py").write_text(ERRORS, encoding="utf-8")
    output = use_testing.run(tmp_path, *PLUGINS, *ANYIO, "test_errors.py", CHATDB_TEST_DSN=server)
    assert "2 passed, 3 errors" in output, output
    for sentence in (
        "chatdb_pool does not work with anyio's backend trio, because chatdb needs asyncio: define a fixture "
        'anyio_backend that returns "asyncio"',
        "chatdb_pool is for coroutine tests that pytest-asyncio or anyio runs",
        "the test ended the transaction of chatdb_transaction, so nothing could be rolled back: use chatdb_pool",
    ):
        assert f"ConfigurationError: {sentence}" in output, output


@pytest.mark.server_independent
def test_nothing_is_loaded_without_opting_in() -> None:
    """No entry point loads the plugin, and importing chatdb imports neither it nor pytest."""
    assert [point.value for point in entry_points(group="pytest11") if "chatdb" in point.value] == []
    code = "import chatdb, sys; sys.exit('pytest' in sys.modules or 'chatdb.testing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
