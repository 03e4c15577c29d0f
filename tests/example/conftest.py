"""Collects the tests of examples/fastapi only in nox -s example, which installs what they need, and starts it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from chatdb.testing.databases import Databases

if TYPE_CHECKING:
    import httpx

    from tests.support.service import Service


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the modules unless the session asked for them."""
    return True if collection_path.suffix == ".py" and not config.getoption("--example") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test of this folder its mark."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("example")


@pytest.fixture(scope="session")
def start_service(
    databases: Databases, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Service]]:
    """Yield a function that returns a started service, by default on a database of its own."""
    from contextlib import ExitStack

    from tests.support.service import Service

    with ExitStack() as stack:

        def start(dsn: str | None = None, **environment: str) -> Service:
            there = dsn or stack.enter_context(databases.new(template))
            folder = tmp_path_factory.mktemp("service")
            return stack.enter_context(Service(there, folder, **environment))

        yield start


@pytest.fixture(scope="session")
def shared_service(start_service: Callable[..., Service]) -> Service:
    """Return the service that all tests of a test process share."""
    return start_service()


@pytest.fixture
def service(shared_service: Service) -> Iterator[Service]:
    """Yield the shared service. Fail a test after which its log has private texts or errors."""
    yield shared_service
    shared_service.check_log()


@pytest.fixture
async def alice(service: Service) -> AsyncGenerator[httpx.AsyncClient]:
    """Yield a client with the token of a new user."""
    from tests.support.service import token

    async with service.client(token(f"user-alice-{uuid4()}")) as client:
        yield client


@pytest.fixture
async def bob(service: Service) -> AsyncGenerator[httpx.AsyncClient]:
    """Yield a client with the token of another new user."""
    from tests.support.service import token

    async with service.client(token(f"user-bob-{uuid4()}")) as client:
        yield client


@pytest.fixture
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    """Return the folder for screenshots that --screenshots names."""
    folder: Any = request.config.getoption("--screenshots")
    return Path(folder) if folder else None
