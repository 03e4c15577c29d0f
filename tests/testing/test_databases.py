"""The databases of chatdb.testing: one template a server, cheap clones, and nothing left of killed runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from chatdb.admin.migrate import apply_migrations
from chatdb.errors import ConfigurationError
from chatdb.testing import databases as module
from chatdb.testing.databases import PREFIX, Databases, database_of
from chatdb.testing.servers import named_server, start_server
from tests.support.databases import as_role, execute
from tests.support.pgbouncer import pgbouncer
from tests.support.proxy import Proxy, Statement

pytestmark = pytest.mark.owner

WORK = """
import sys, time
from chatdb.testing.databases import Databases
databases = Databases(sys.argv[1])
with databases.new(databases.template() if sys.argv[2] == "migrated" else "template0") as dsn:
    print(dsn, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def creator(server: str) -> Iterator[str]:
    """Yield the DSN of a new role that may create databases. Its template is another than this suite's."""
    role = f"chatdb_test_{os.getpid()}_creator"
    execute(server, f"create role {role} login createdb password '{role}'")
    dsn = as_role(server, role)
    yield dsn
    for name in names(server, role):
        execute(server, f"drop database {name} with (force)")
    execute(server, f"drop role {role}")


def names(server: str, role: str | None = None) -> list[str]:
    """Return the databases of the kit that a role owns."""
    owner = role or urlsplit(server).username
    with psycopg.connect(server, autocommit=True) as connection:
        found = connection.execute(
            "select datname from pg_database where starts_with(datname, %s) and pg_get_userbyid(datdba) = %s",
            [PREFIX, owner],
        )
        return sorted(name for (name,) in found)


def name_of(dsn: str) -> str:
    """Return the name of a DSN's database."""
    return urlsplit(dsn).path[1:]


def killed(creator: str) -> str:
    """Kill a process that has a database, and return its DSN."""
    process = subprocess.Popen([sys.executable, "-c", WORK, creator, "empty"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    made = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return made


def killed_during(creator: str, words: str) -> None:
    """Kill a process that makes the template before the server gets a statement with these words."""
    reached, may_go = threading.Event(), threading.Event()

    def watch(statement: Statement) -> bool:
        if words in statement.sql and not statement.answered and not may_go.is_set():
            reached.set()
            may_go.wait(60)
            return True
        return False

    with Proxy(creator, watch=watch) as proxy:
        process = subprocess.Popen([sys.executable, "-c", WORK, proxy.dsn, "migrated"], stdout=subprocess.DEVNULL)
        try:
            assert reached.wait(60)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            may_go.set()


def in_use(dsn: str) -> bool:
    """Return whether the role has a session in a database of the kit."""
    with psycopg.connect(dsn, autocommit=True, dbname="postgres") as connection:
        found = connection.execute(
            "select true from pg_stat_activity where usename = current_user and starts_with(datname, %s)",
            [PREFIX],
        )
        return found.fetchone() is not None


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    """Wait until a condition is true."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_clone_is_one_statement(databases: Databases, owners_template: str) -> None:
    """A database costs one CREATE DATABASE from the template and one DROP, and no migration runs."""
    with Proxy(databases.server) as proxy, Databases(proxy.dsn) as counted:
        assert counted.template() == owners_template
        proxy.clear()
        with counted.new(counted.template()) as dsn, psycopg.connect(database_of(databases.server, name_of(dsn))) as db:
            assert db.execute("select count(*) from chatdb.messages").fetchone() == (0,)
        sent = [statement for statement in proxy.statements if statement != "select"]
    assert [" ".join(statement.split()[:4]) for statement in sent] == [
        f"create database {name_of(dsn)} template",
        "drop database if exists",
    ]
    assert f"template {owners_template} " in f"{sent[0]} "
    assert name_of(dsn) not in names(databases.server)


def test_parallel_runs_make_one_template(creator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several runs on a server, one makes the template, and the others wait for it and clone it."""
    role = urlsplit(creator).username or ""
    migrated: list[str] = []

    def apply(dsn: str) -> None:
        migrated.append(dsn)
        apply_migrations(dsn)

    monkeypatch.setattr(module, "apply_migrations", apply)

    def run() -> tuple[str, int]:
        with Databases(creator) as each, each.new(each.template()) as dsn, psycopg.connect(dsn) as db:
            row = db.execute("select count(*) from chatdb._chatdb_migration").fetchone()
            assert row
            return each.template(), row[0]

    with ThreadPoolExecutor(3) as executor:
        made = [future.result() for future in [executor.submit(run) for _ in range(3)]]
    assert len(set(made)) == 1
    assert len(migrated) == 1
    assert names(creator, role) == [made[0][0]]
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        psycopg.connect(database_of(creator, made[0][0]))


@pytest.mark.parametrize(
    "words",
    [
        "pk_messages",
        pytest.param("create schema", marks=pytest.mark.chaos),
        pytest.param("allow_connections", marks=pytest.mark.chaos),
        pytest.param("rename to", marks=pytest.mark.chaos),
    ],
)
def test_a_template_left_half_made_is_made_again(creator: str, words: str) -> None:
    """A run that is killed during a migration leaves no template; the next run drops what it left and makes one."""
    role = urlsplit(creator).username or ""
    killed_during(creator, words)
    (half,) = names(creator, role)
    assert not half.startswith(module.TEMPLATE)
    wait_for(lambda: not in_use(creator))
    with Databases(creator) as next_run, next_run.new(next_run.template()) as dsn, psycopg.connect(dsn) as db:
        assert db.execute("select count(*) from chatdb.messages").fetchone() == (0,)
        assert half not in names(creator, role)
    assert names(creator, role) == [next_run.template()]


def test_leftovers_are_dropped_but_nothing_in_use(creator: str) -> None:
    """The databases of a killed run are dropped. Those that are connected to, and those of a living run, are kept."""
    role = urlsplit(creator).username or ""
    left = killed(creator)
    with Databases(creator) as living, living.new() as own:
        assert names(creator, role) == [name_of(own)]  # the first use dropped the leftover
        busy = killed(creator)
        with psycopg.connect(busy), Databases(creator) as third:
            assert third.drop_leftovers() == []
            assert names(creator, role) == sorted(map(name_of, (own, busy)))
        wait_for(lambda: not in_use(creator))
        with Databases(creator) as fourth:
            fourth.template()
            # the server's own processes may still be in the database
            wait_for(lambda: fourth.drop_leftovers() == [] and name_of(busy) not in names(creator, role))
            assert name_of(own) in names(creator, role)
    assert name_of(left) not in names(creator, role)


def test_a_restarted_session_keeps_its_databases(creator: str) -> None:
    """If the server ends the session that holds the lock, the next call takes the lock again."""
    role = urlsplit(creator).username or ""
    with Databases(creator) as one, one.new() as dsn:
        with psycopg.connect(creator, autocommit=True) as other:
            other.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name = 'chatdb testing'"
                " and usename = current_user"
            )
        with one.new(), Databases(creator) as another:
            assert another.drop_leftovers() == []
            assert name_of(dsn) in names(creator, role)
    assert names(creator, role) == []


def test_a_role_that_may_not_create_databases(server: str, creator: str) -> None:
    """The error names the role and says what to do."""
    role = urlsplit(creator).username
    execute(server, f"alter role {role} nocreatedb")
    with (
        pytest.raises(ConfigurationError, match=f"the role {role} may not create databases .* CREATEDB"),
        ExitStack() as s,
    ):
        s.enter_context(Databases(creator)).template()


@pytest.mark.server_independent
def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable and the reason, not the password."""
    monkeypatch.setenv("CHATDB_TEST_DSN", "postgresql://u:secret@127.0.0.1:1/postgres?sslmode=disable")
    with pytest.raises(ConfigurationError, match=r"CHATDB_TEST_DSN, cannot be used: .*127\.0\.0\.1:1") as caught:
        named_server()
    assert "secret" not in str(caught.value)


def test_the_servers_variable(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CHATDB_TEST_DSN names the server, and DATABASE_URL never does."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/production?sslmode=disable")
    monkeypatch.delenv("CHATDB_TEST_DSN", raising=False)
    assert named_server() is None
    monkeypatch.setenv("CHATDB_TEST_DSN", server)
    with ExitStack() as stack:
        assert start_server(stack) == server


def test_a_pooler_is_refused(server: str, tmp_path: Path) -> None:
    """A transaction pooler cannot keep the lock, and the error says so."""
    sentence = r"is a transaction pooler.*CHATDB_TEST_DSN to a direct"
    with (
        pgbouncer(server, tmp_path) as pooled,
        Databases(pooled) as through,
        pytest.raises(ConfigurationError, match=sentence),
    ):
        through.template()


@pytest.mark.parametrize(
    ("dsn", "made"),
    [
        ("postgresql://u:p@h:5433/a?sslmode=disable", "postgresql://u:p@h:5433/b?sslmode=disable"),
        ("postgresql:///a?host=/tmp", "postgresql:///b?host=/tmp"),
        ("postgresql://u@h/?dbname=a&sslmode=disable", "postgresql://u@h/b?sslmode=disable"),
        ("postgresql://one,two/a", "postgresql://one,two/b"),
        ("postgresql://", "postgresql:///b"),
    ],
)
@pytest.mark.server_independent
def test_the_dsn_of_another_database(dsn: str, made: str) -> None:
    """Only the database changes."""
    assert database_of(dsn, "b") == made
