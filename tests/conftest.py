"""A real PostgreSQL for all tests: one server per run, one migrated template, and a clone per committing test."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
import trustme
import uvloop

import chatdb
from chatdb.admin.migrate import apply_migrations
from chatdb.embedded import EmbeddedServer
from chatdb.embedded.process import RunAs
from chatdb.testing.databases import Databases
from chatdb.testing.servers import named_server, start_container, turn_off_durability
from tests.support.databases import (
    as_role,
    database_of,
    execute,
    in_memory,
)
from tests.support.distributed import ClusterDatabases, distributed_template
from tests.support.leaks import leaks
from tests.support.pgbouncer import OPTIONS, VERSIONS, pgbouncer, program
from tests.support.roles import Roles

SERVERS = ("auto", "dsn", "citus", "container", "embedded", "local")
AppOf = Callable[[str, pytest.FixtureRequest], str]


def pytest_configure() -> None:
    """Enable Ctrl-C in the processes that tests start, even if a shell runs the tests in the background without it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leaks.watch()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Fail a test if an error or a log record revealed private data."""
    try:
        result = yield
    finally:
        found = leaks.of_this_test()
    assert found == []
    return result


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that the nox sessions use."""
    group = parser.getgroup("chatdb")
    group.addoption("--server", choices=SERVERS, default="auto", help="where the PostgreSQL for the tests comes from")
    group.addoption(
        "--role",
        choices=("owner", "app"),
        default="owner",
        help="as which role of docs/explanation/security.md the tests connect, except for those that need the owner",
    )
    group.addoption("--pooler", choices=VERSIONS, help="run what connects by arguments_of, through this PgBouncer")
    group.addoption("--distributed", action="store_true", help="run the statements for Citus, on any PostgreSQL")
    group.addoption("--quick", action="store_true", help="of what -m chaos runs, a sample")
    group.addoption("--frameworks", action="store_true", help="collect tests/adapters, which need every framework")
    group.addoption("--example", action="store_true", help="collect tests/example, which need examples/fastapi")
    group.addoption("--screenshots", help="the folder for screenshots of examples/fastapi; without it, none are made")
    group.addoption("--uvloop", action="store_true", help="run the coroutines on uvloop instead of asyncio's own loop")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """
    Let each xdist worker import another part of the modules first, so that each is compiled by one of them.

    Compiling them all, with pytest's assertions, takes 6 s of each worker's CPU time.
    """
    if not hasattr(session.config, "workerinput") or session.config.args != session.config.getini("testpaths"):
        return
    number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    modules = sorted(Path(__file__).parent.glob("*/test_*.py"))
    start = number * len(modules) // count
    for path in [*modules[start:], *modules[:start]]:
        if path.parent.name not in {"adapters", "example"}:
            with suppress(Exception, pytest.skip.Exception):  # pytest's own import reports it
                import_module(f"tests.{path.parent.name}.{path.stem}")


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what does not use the session's server, skip what a cluster lacks, and deselect what bypasses a pooler."""
    for item in items:
        if "server" not in getattr(item, "fixturenames", ()):
            item.add_marker("server_independent")
        if config.getoption("--server") == "citus" and (mark := item.get_closest_marker("not_on_citus")):
            item.add_marker(pytest.mark.skip(reason=f"on Citus: {mark.args[0]}"))
    if config.getoption("--pooler"):
        direct = {item for item in items if "arguments_of" not in getattr(item, "fixturenames", ())}
        config.hook.pytest_deselected(items=[item for item in items if item in direct])
        items[:] = [item for item in items if item not in direct]


def pytest_collection_finish() -> None:
    """Exempt everything imported so far from garbage collection, which would scan it repeatedly."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report to xdist's controller how much was searched."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["searched"] = leaks.errors, leaks.records


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what an xdist worker searched."""
    errors, records = getattr(node, "workeroutput", {}).get("searched", (0, 0))
    leaks.errors += errors
    leaks.records += records


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how much was searched for leaks."""
    terminalreporter.write_line(f"chatdb: {leaks.errors:,} errors and {leaks.records:,} log records searched for leaks")


def pytest_asyncio_loop_factories(config: pytest.Config) -> dict[str, object]:
    """Choose the event loop."""
    if config.getoption("--uvloop"):
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


def pytest_report_header(config: pytest.Config) -> str:
    """Show the server and the event loop in the report header."""
    return f"chatdb: server {config.getoption('--server')}, {'uvloop' if config.getoption('--uvloop') else 'asyncio'}"


def has_functions(config: pytest.Config) -> bool:
    """Return whether the tests' databases have the functions for Citus."""
    return config.getoption("--distributed") or config.getoption("--server") == "citus"


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """
    Yield the DSN of a server that can create databases.

    Tries, in this order: CHATDB_TEST_DSN, a container if a Docker engine answers, the embedded server, a local
    PostgreSQL.
    """
    wanted = request.config.getoption("--server")
    starts = {"dsn": _named, "citus": _citus, "container": start_container, "embedded": _embedded, "local": _local}
    with ExitStack() as stack:
        for name, start in starts.items():
            if wanted not in ("auto", name) or (name == "citus" != wanted):
                continue
            dsn = start(stack)
            if dsn:
                if name not in ("dsn", "citus"):
                    turn_off_durability(dsn)
                with psycopg.connect(dsn) as connection:
                    version = connection.info.server_version
                _say(request.config, f"chatdb: {name} PostgreSQL {version // 10000}.{version % 100}")
                yield dsn
                return
        pytest.exit(f"no PostgreSQL for the tests: --server={wanted} gives none", returncode=3)


def _say(config: pytest.Config, line: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if reporter is not None and capture is not None:
        with capture.global_and_fixture_disabled():  # otherwise it becomes part of the first test's output
            reporter.ensure_newline()
            reporter.write_line(line)


def _citus(stack: ExitStack) -> str | None:
    return os.environ.get("CHATDB_TEST_CITUS_DSN")


def _named(stack: ExitStack) -> str | None:
    return named_server()


def _embedded(stack: ExitStack) -> str:
    place = tempfile.TemporaryDirectory(prefix="chatdb-test-", dir=in_memory(), ignore_cleanup_errors=True)
    folder = stack.enter_context(place)
    Path(folder).chmod(0o711)  # without user namespaces, root's server runs as nobody
    return stack.enter_context(EmbeddedServer(Path(folder) / "server")).dsn


def _local(stack: ExitStack) -> str | None:
    named = os.environ.get("CHATDB_TEST_POSTGRES")
    found = shutil.which("initdb", path=named)
    if found is None and named is None:
        found = max(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
    if found is None:
        return None
    programs = Path(found).resolve().parent
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chatdb-test-", dir=in_memory())))
    log = folder / "log"

    def run(run_as: RunAs, program: str, *arguments: str) -> bool:
        drop = run_as.uid != os.geteuid()
        with log.open("ab") as output:
            done = subprocess.run(
                [*run_as.prefix, "env", programs / program, "-D", folder / "data", *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=run_as.uid if drop else None,
                group=run_as.gid if drop else None,
                extra_groups=[] if drop else None,
            )
        return done.returncode == 0

    def start(run_as: RunAs) -> bool:
        os.chown(folder, run_as.uid, run_as.gid)
        initdb = run(run_as, "initdb", "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C")
        return initdb and run(run_as, "pg_ctl", "start", "-w", "-o", f"-k {folder} -c listen_addresses=''")

    run_as = next(filter(start, RunAs.candidates()), None)
    if run_as is None:
        pytest.exit(f"the PostgreSQL in {programs} does not start:\n{log.read_text()}", returncode=3)
    stack.callback(run, run_as, "pg_ctl", "stop", "-m", "immediate")
    return f"postgresql://postgres@/postgres?host={folder}"


@pytest.fixture(scope="session")
def roles(server: str) -> Iterator[Roles]:
    """Yield the roles of docs/explanation/security.md, whose passwords are their names, and the migrated database."""
    name = f"chatdb_test_{os.getpid()}"
    made = Roles(f"{name}_owner", f"{name}_app", f"{name}_reader", f"{name}_chat")
    as_superuser, there, as_owner = made.blocks()
    dsn = database_of(server, made.database)
    names = (made.owner, made.app, made.reader)
    execute(server, *as_superuser, *(f"alter role {role} password '{role}'" for role in names))
    execute(dsn, *there)
    apply_migrations(as_role(dsn, made.owner))
    execute(as_role(dsn, made.owner), *as_owner)
    yield made
    execute(server, f"drop database {made.database} with (force)", *(f"drop role {role}" for role in names))


@pytest.fixture(scope="session")
def app_of(request: pytest.FixtureRequest) -> AppOf:
    """Return a function that turns the server's DSN into the test's DSN."""

    def of(dsn: str, test: pytest.FixtureRequest) -> str:
        if request.config.getoption("--role") == "owner" or test.node.get_closest_marker("owner"):
            return dsn
        roles: Roles = request.getfixturevalue("roles")
        execute(dsn, *roles.on_database(urlsplit(dsn).path[1:]))
        return as_role(dsn, roles.app)

    return of


@pytest.fixture(scope="session")
def databases(server: str, request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Yield what creates and drops the databases of the tests."""
    is_cluster = request.config.getoption("--server") == "citus"
    with ClusterDatabases(server) if is_cluster else Databases(server) as databases:
        yield databases


@pytest.fixture(scope="session")
def owners_template(databases: Databases, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the name of a database that the server's superuser has migrated."""
    if has_functions(request.config):
        with distributed_template(databases) as name:
            yield name
    else:
        yield databases.template()


@pytest.fixture(scope="session")
def template(request: pytest.FixtureRequest) -> str:
    """Return the name of a migrated database that tests clone."""
    if request.config.getoption("--role") == "app":
        roles: Roles = request.getfixturevalue("roles")
        return roles.database
    name: str = request.getfixturevalue("owners_template")
    return name


@pytest.fixture(scope="module")
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trust one authority; loading all of the system's takes 30 ms per parsed DSN."""
    file = tmp_path_factory.mktemp("authority") / "authority.pem"
    trustme.CA().cert_pem.write_to_path(str(file))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SSL_CERT_FILE", str(file))
        yield


@pytest.fixture
def empty_dsn(databases: Databases) -> Iterator[str]:
    """Yield the DSN of the test's own empty database."""
    with databases.new() as dsn:
        yield dsn


@pytest.fixture
def dsn(databases: Databases, template: str, app_of: AppOf, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the DSN of the test's own migrated database, whose commits no other test sees."""
    if request.node.get_closest_marker("owner"):
        template = request.getfixturevalue("owners_template")
    with databases.new(template) as made:
        yield app_of(made, request)


@pytest.fixture(scope="session")
def arguments_of(request: pytest.FixtureRequest) -> Iterator[Callable[[str], dict[str, object]]]:
    """Yield a function that returns pool arguments for a DSN, through PgBouncer if --pooler is set."""
    version = request.config.getoption("--pooler")
    if not version:
        yield lambda dsn: {"dsn": dsn}
        return
    server = request.getfixturevalue("server")
    folder = request.getfixturevalue("tmp_path_factory").mktemp("pgbouncer")
    try:
        program(version)
    except pytest.skip.Exception as error:  # the option requires it
        pytest.fail(str(error))
    with pgbouncer(server, folder, version, server_round_robin=1) as pooled:

        def of(dsn: str) -> dict[str, object]:
            return {"dsn": database_of(pooled, urlsplit(dsn).path.removeprefix("/")), **OPTIONS[version]}

        yield of


@pytest.fixture
async def db(dsn: str, arguments_of: Callable[[str], dict[str, object]]) -> AsyncIterator[chatdb.pool.Pool]:
    """Yield a pool on the test's own migrated database."""
    async with chatdb.create_pool(**arguments_of(dsn)) as pool:
        yield pool


@pytest.fixture(scope="session")
def shared_dsn(databases: Databases, template: str) -> Iterator[str]:
    """Yield the DSN of a migrated database that stays empty, because no test commits to it."""
    with databases.new(template) as dsn:
        yield dsn


@pytest.fixture(scope="session")
async def idle_connections(shared_dsn: str) -> AsyncIterator[dict[str, asyncpg.Connection]]:
    """Yield the connections that wait for the next test with `tx`, by DSN."""
    connections: dict[str, asyncpg.Connection] = {}
    yield connections
    for connection in connections.values():
        connection.terminate()


async def _is_alive(connection: asyncpg.Connection) -> bool:
    """Return whether no test between has ended a connection's session."""
    try:
        await connection.execute("select 1", timeout=5)
    except (OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
        connection.terminate()
        return False
    return True


@pytest.fixture
async def tx(
    shared_dsn: str,
    app_of: AppOf,
    arguments_of: Callable[[str], dict[str, object]],
    idle_connections: dict[str, asyncpg.Connection],
    request: pytest.FixtureRequest,
) -> AsyncIterator[asyncpg.Connection]:
    """
    Yield a connection in a transaction that is rolled back after the test: the fastest fixture.

    The next test gets the same connection, unless this one is closed or may have changed tables.
    """
    arguments = arguments_of(app_of(shared_dsn, request))
    if has_functions(request.config):  # the pool's connections know which functions exist
        async with chatdb.create_pool(**arguments) as pool, pool.acquire() as connection:
            block = connection.transaction()
            await block.start()
            yield connection
            await block.rollback()
        return
    dsn = str(arguments.pop("dsn"))
    connection = idle_connections.pop(dsn, None)
    if connection is None or not await _is_alive(connection):
        connection = await asyncpg.connect(**chatdb._core.dsn.connect_arguments(dsn), **arguments)
    block = connection.transaction()
    await block.start()
    yield connection
    await block.rollback()
    if request.node.get_closest_marker("owner"):
        await connection.close()
    elif not connection.is_closed():
        idle_connections[dsn] = connection
