"""The PostgreSQL container of chatdb.testing, on this machine's Docker engine; without one, the tests are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from chatdb.errors import ConfigurationError
from chatdb.testing.servers import start_container
from tests.support import use_testing
from tests.support.paths import ROOT

pytestmark = pytest.mark.server_independent

PLUGINS = ("--disable-plugin-autoload", "-p", "pytest_asyncio.plugin", "-p", "xdist.plugin", "-n", "2")
NO_IMAGE = "localhost/chatdb-no-such-image:1"

WHICH = """\
from pathlib import Path


import pytest


@pytest.mark.parametrize("number", range(8))
def test_which_server(chatdb_dsn, chatdb_server, number, worker_id):
    Path(__file__).with_name(f"server-{worker_id}").write_text(chatdb_server)
"""


@pytest.fixture
def image() -> str:
    """Return the image that starts on this machine's engine, or skip the test."""
    with ExitStack() as stack:
        if start_container(stack) is None:
            pytest.skip("no Docker engine answers")
    return os.environ.get("CHATDB_TEST_IMAGE", "postgres:18")


def test_workers_share_a_container(image: str, tmp_path: Path) -> None:
    """The workers of pytest-xdist use one container, which is gone after the run."""
    use_testing.write(tmp_path)
    (tmp_path / "test_which.py").write_text(WHICH, encoding="utf-8")
    files = ("test_which.py", "test_with_asyncio.py", "test_in_parallel.py")
    output = use_testing.run(tmp_path, *PLUGINS, *files, CHATDB_TEST_IMAGE=image)
    assert "22 passed" in output, output
    servers = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.glob("server-*")}
    assert servers.keys() == {"server-gw0", "server-gw1"}
    [server] = set(servers.values())
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server)


def test_an_image_that_is_not_there(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the image and says what to do, in one process and with pytest-xdist, which shows no traceback."""
    monkeypatch.setenv("CHATDB_TEST_IMAGE", NO_IMAGE)
    sentence = f"the container {NO_IMAGE} for the tests does not start: "
    with pytest.raises(ConfigurationError, match=f"{sentence}.*or a server in CHATDB_TEST_DSN"), ExitStack() as stack:
        start_container(stack)
    use_testing.write(tmp_path)
    output = use_testing.run(tmp_path, *PLUGINS, "test_in_parallel.py", CHATDB_TEST_IMAGE=NO_IMAGE)
    assert f"ERROR: {sentence}" in output, output
    assert "INTERNALERROR" not in output


@pytest.mark.parametrize("host", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:1", "nonsense"])
def test_an_engine_that_does_not_answer(host: str) -> None:
    """Without an engine, there is no container, no error, and no warning about a socket that was not closed."""
    program = "from contextlib import ExitStack; from chatdb.testing.servers import start_container as start\n"
    program += "with ExitStack() as stack: print(start(stack))"
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DOCKER_HOST": host}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("None\n", "")
