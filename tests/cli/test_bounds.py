"""Every command ends in time, with one sentence, on a silent server."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chatdb.admin.connection import connected, pinned_transaction
from tests.support.command import PROGRAM, chatdb_process, environment
from tests.support.forked import run
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.owner, pytest.mark.server_independent]

COMMANDS = {
    "list": ["list", "--user", "alice"],
    "show": ["show", "1", "--user", "alice"],
    "show --follow": ["show", "1", "--user", "alice", "--follow"],
    "export": ["export", "--user", "alice"],
    "import": ["import", "FILE", "--user", "alice"],
    "import of tables": ["import", "DSN", "--user", "alice"],
    "demo": ["demo", "--file", "FILE", "--database", "DSN"],
    "delete-user": ["delete-user", "alice", "--yes"],
    "delete-user --dry-run": ["delete-user", "alice", "--dry-run"],
    "migrate": ["migrate", "--wait", "5"],
    "migrate --dry-run": ["migrate", "--dry-run"],
    "rollback": ["rollback", "--yes", "--wait", "5"],
    "rollback --dry-run": ["rollback", "--dry-run"],
    "check": ["check"],
    "check --json": ["check", "--json"],
    "protect": ["protect", "--wait", "5"],
    "protect --dry-run": ["protect", "--dry-run"],
    "link-users": ["link-users", "--table", "public.users", "--wait", "5"],
    "link-users --dry-run": ["link-users", "--table", "public.users", "--dry-run"],
    "adopt": ["adopt", "--wait", "5"],
    "adopt --dry-run": ["adopt", "--dry-run"],
    "abort-streams": ["abort-streams", "--older-than", "1h", "--yes"],
    "abort-streams --dry-run": ["abort-streams", "--older-than", "1h", "--dry-run"],
    "search-index create": ["search-index", "create", "--wait", "5"],
    "search-index create --dry-run": ["search-index", "create", "--dry-run"],
    "search-index drop": ["search-index", "drop", "--yes", "--wait", "5"],
    "search-index status": ["search-index", "status"],
    "repack": ["repack", "--yes", "--wait", "5"],
    "repack --dry-run": ["repack", "--dry-run"],
    "distribute": ["distribute", "--yes", "--wait", "5"],
    "distribute --dry-run": ["distribute", "--dry-run"],
    "prune": ["prune", "--older-than", "1d", "--yes"],
    "prune --dry-run": ["prune", "--older-than", "1d", "--dry-run"],
}
SLOWER = {
    *("import", "import of tables", "export", "demo", "delete-user", "delete-user --dry-run"),
    *("abort-streams", "abort-streams --dry-run"),
}
"""Commands whose statements may take 30 seconds, and whose pool may take 10 seconds to close."""

LIMIT = 45.0
"""Maximum seconds for each command on a busy machine; 5 to 10 on an idle one."""


@contextmanager
def full_queue() -> Iterator[str]:
    """Yield the DSN of a listener that never answers, as if packets were dropped."""
    with closing(socket.socket()) as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = waiting.enter_context(closing(socket.socket()))
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(listener.getsockname())
        yield f"postgresql://alice:secret@127.0.0.1:{listener.getsockname()[1]}/chat?connect_timeout=2"


def ended(arguments: list[str], dsn: str, file: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a command and return its duration and result."""
    filled = [{"DSN": dsn, "FILE": str(file)}.get(each, each) for each in arguments]
    start = time.monotonic()
    done = subprocess.run(
        [PROGRAM, *filled],
        env=environment({"DATABASE_URL": dsn}),
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return time.monotonic() - start, done


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file to import."""
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}]}]))
    return path


# the server sends some 400 bytes to open the connection, and 900 bytes for the first statements
@pytest.mark.chaos
@pytest.mark.parametrize("silent", ["at once", "black hole", 350, 500, 900, 2_000])
def test_no_command_hangs(dsn: str, file: Path, silent: str | int, request: pytest.FixtureRequest) -> None:
    """Each command exits with status 1 and one sentence that names the silent server."""
    if isinstance(silent, int) and request.config.getoption("--quick"):
        pytest.skip("not in the sample")
    with ExitStack() as stack:
        if silent == "black hole":
            place = stack.enter_context(full_queue())
        elif silent == "at once":
            proxy = stack.enter_context(Proxy(dsn))
            proxy.pause()
            place = f"{proxy.dsn}&connect_timeout=2"
        else:
            place = f"{stack.enter_context(Proxy(dsn, answer_bytes=int(silent))).dsn}&connect_timeout=2"
        with ThreadPoolExecutor(8) as executor:
            results = [*executor.map(lambda arguments: ended(arguments, place, file), COMMANDS.values())]
    slowest = 0.0
    for name, (seconds, done) in zip(COMMANDS, results, strict=True):
        said = done.stderr.splitlines()
        assert done.returncode in ({1} if isinstance(silent, str) else {0, 1}), (name, done.stdout, said)
        assert len([line for line in said if line.startswith("chatdb: ")]) == done.returncode, (name, said)
        assert "Traceback" not in done.stderr
        assert "secret" not in done.stderr
        if isinstance(silent, str):
            assert f":{urlsplit(place).port}" in said[-1], (name, said)
        slowest = max(slowest, seconds)
        assert seconds < LIMIT + 40 * (name in SLOWER), (
            name,
            said,
        )
    print(f"figure: {len(COMMANDS)} commands, silent {silent}: 0 hangs, the slowest took {slowest:.1f} s")


def test_each_cause_has_its_words(dsn: str, file: Path) -> None:
    """Wrong password, missing database, closed port and unknown host have distinct errors, for all drivers."""
    parts = urlsplit(dsn)
    missing = parts._replace(path="/chatdb_no_such_database").geturl()
    stranger = parts._replace(netloc=f"chatdb_no_such_role:geheim@{parts.netloc.rpartition('@')[2]}").geturl()
    causes = {
        missing: "the database does not exist",
        stranger: "the user ",
        "postgresql://alice:geheim@127.0.0.1:1/chat": "127.0.0.1:1 cannot be reached (Connection refused)",
        "postgresql://alice:geheim@no-such-host.invalid/chat?sslmode=disable": "no-such-host.invalid:5432 cannot be",
    }
    commands = [["migrate"], ["check"], ["rollback", "--dry-run"], ["list", "--user", "alice"]]
    for place, words in causes.items():
        for command in commands:
            said = chatdb_process(*command, env={"DATABASE_URL": place}, cwd=file.parent, code=1)
            assert words in said.splitlines()[-1], command
            assert "geheim" not in said


def test_work_is_not_cut(dsn: str) -> None:
    """A statement may outlast the allowed silence while the server answers a second connection."""
    with connected(dsn) as connection:
        vars(connection)["silent_seconds"] = 0.3
        assert connection.execute("select pg_sleep(2), 1").fetchone() == ("", 1)


def test_a_look_has_limits(dsn: str) -> None:
    """A read-only command waits at most 10 seconds for a lock and 5 minutes for a statement."""
    with pinned_transaction(dsn) as connection:
        limits = "select current_setting('lock_timeout'), current_setting('statement_timeout')"
        assert connection.execute(limits).fetchone() == ("10s", "5min")


@pytest.mark.parametrize(
    "command",
    ["migrate", "rollback", "check", "protect", "adopt", "link-users --table users", "import postgresql:// --user a"],
)
def test_without_the_drivers(command: str, dsn: str, tmp_path: Path) -> None:
    """Without the extra `migrate`, the commands that need it say what to install."""
    program = tmp_path / "program.py"
    program.write_text("import sys; sys.modules['psycopg'] = None; from chatdb.cli.app import main; main()")
    status, _, said = run(program, *command.split(), env=environment({"DATABASE_URL": dsn}), cwd=tmp_path)
    assert status == 1
    assert "pip install 'chatdb[migrate]'" in said
    assert "Traceback" not in said
