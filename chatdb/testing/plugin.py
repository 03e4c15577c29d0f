"""The fixtures, which run under pytest-asyncio in each loop scope, under anyio on asyncio, and under pytest-xdist."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack
from typing import Any, Final

import asyncpg
import pytest

from chatdb._core.dsn import connect_arguments
from chatdb.errors import ConfigurationError
from chatdb.pool import Connection, Pool, create_pool
from chatdb.testing.databases import Databases
from chatdb.testing.factories import ConversationFactory
from chatdb.testing.servers import start_container, start_server

try:
    import pytest_asyncio as _asyncio
except ImportError:
    _asyncio = None  # type: ignore[assignment]

_SCOPES: Final = ("function", "class", "module", "package", "session")
_CONTAINER: Final = pytest.StashKey[tuple[ExitStack, str | None]]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # noqa: ANN401 - xdist's WorkerController
    """Start a container in the controller of pytest-xdist, so that its workers share it."""
    stash = node.config.stash
    if _CONTAINER not in stash:
        stack = ExitStack()
        try:
            stash[_CONTAINER] = stack, None if os.environ.get("CHATDB_TEST_DSN") else start_container(stack)
        except ConfigurationError as error:
            raise pytest.UsageError(str(error)) from None  # otherwise pytest prints a traceback of its own code
    node.workerinput["chatdb_server"] = stash[_CONTAINER][1]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the container that the workers shared."""
    if _CONTAINER in config.stash:
        config.stash[_CONTAINER][0].close()


@pytest.fixture(scope="session")
def chatdb_server(request: pytest.FixtureRequest) -> Generator[str]:
    """
    Yield the DSN of the server for the tests: CHATDB_TEST_DSN, a container, or the embedded server.

    Override it to use another server on which the tests may create databases. DATABASE_URL is never used.
    """
    of_controller = getattr(request.config, "workerinput", {}).get("chatdb_server")
    with ExitStack() as stack:
        yield of_controller or start_server(stack)


@pytest.fixture(scope="session")
def chatdb_databases(chatdb_server: str) -> Generator[Databases]:
    """Yield what creates and drops the databases on the server."""
    with Databases(chatdb_server) as databases:
        yield databases


@pytest.fixture
def chatdb_dsn(chatdb_databases: Databases) -> Generator[str]:
    """Yield the DSN of a migrated database of the test's own, which is dropped after the test."""
    with chatdb_databases.new(chatdb_databases.template()) as dsn:
        yield dsn


@pytest.fixture
def chatdb_factory() -> ConversationFactory:
    """Return a factory of conversations. Each test gets the same ones."""
    return ConversationFactory()


@pytest.fixture
def chatdb_pool(request: pytest.FixtureRequest) -> Pool:
    """Return an open pool on a migrated database of the test's own."""
    pool: Pool = _on_the_tests_loop(request, "chatdb_pool")
    return pool


@pytest.fixture
def chatdb_transaction(request: pytest.FixtureRequest) -> Connection:
    """
    Return a connection in a transaction that is rolled back after the test: faster than a database of its own.

    The test must not end the transaction. A `chatdb.transaction` on it is a savepoint.
    """
    connection: Connection = _on_the_tests_loop(request, "chatdb_transaction")
    return connection


class _SharedDatabase:
    """A migrated database that stays empty, because the tests on it roll back."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases
        self._stack = ExitStack()
        self._dsn: str | None = None

    @property
    def dsn(self) -> str:
        if self._dsn is None:
            self._dsn = self._stack.enter_context(self._databases.new(self._databases.template()))
        return self._dsn

    def drop(self) -> None:
        self._dsn = None
        self._stack.close()


@pytest.fixture(scope="session")
def _chatdb_shared(chatdb_databases: Databases) -> Generator[_SharedDatabase]:
    shared = _SharedDatabase(chatdb_databases)
    yield shared
    shared.drop()


def _open_pool() -> Callable[..., AsyncGenerator[Pool]]:
    async def fixture(chatdb_dsn: str) -> AsyncGenerator[Pool]:
        async with create_pool(chatdb_dsn) as pool:
            yield pool

    return fixture


def _open_transaction() -> Callable[..., AsyncGenerator[Connection]]:
    async def fixture(_chatdb_shared: _SharedDatabase) -> AsyncGenerator[Connection]:
        connection: Any = await asyncpg.connect(**connect_arguments(_chatdb_shared.dsn))
        try:
            transaction = connection.transaction()
            await transaction.start()
            yield connection
            has_ended = not connection.is_closed() and not connection.is_in_transaction()
            if not has_ended and not connection.is_closed():
                await transaction.rollback()
        finally:
            connection.terminate()
        if has_ended:
            _chatdb_shared.drop()
            raise ConfigurationError(
                "the test ended the transaction of chatdb_transaction, so nothing could be rolled back: use "
                "chatdb_pool or chatdb_dsn, a database of the test's own"
            )

    return fixture


# An async fixture runs on one loop, which must be the test's. Which runner and which loop that is depends on the test.
for _name, _make in (("chatdb_pool", _open_pool), ("chatdb_transaction", _open_transaction)):
    globals()[f"_{_name}_anyio"] = pytest.fixture(name=f"_{_name}_anyio")(_make())
    if _asyncio is not None:
        for _scope in _SCOPES:
            globals()[f"_{_name}_{_scope}"] = _asyncio.fixture(loop_scope=_scope, name=f"_{_name}_{_scope}")(_make())


def _on_the_tests_loop(request: pytest.FixtureRequest, name: str) -> Any:  # noqa: ANN401 - a fixture's value
    """Return the value of the async fixture for the loop on which the test will run."""
    item = request.node
    if _asyncio is not None and _asyncio.is_async_test(item):
        marker: Any = item.get_closest_marker("asyncio")
        scope = marker.kwargs.get("loop_scope") or request.config.getini("asyncio_default_test_loop_scope")
        return request.getfixturevalue(f"_{name}_{scope}")
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend")
        if backend != "asyncio" and backend[0] != "asyncio":
            raise ConfigurationError(
                f"{name} does not work with anyio's backend {backend if isinstance(backend, str) else backend[0]}, "
                'because chatdb needs asyncio: define a fixture anyio_backend that returns "asyncio"'
            )
        return request.getfixturevalue(f"_{name}_anyio")
    raise ConfigurationError(
        f"{name} is for coroutine tests that pytest-asyncio or anyio runs: install one of them, and mark the test with "
        "pytest.mark.asyncio or pytest.mark.anyio. Other tests can use chatdb_dsn"
    )
