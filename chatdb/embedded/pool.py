"""A pool on an embedded server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from chatdb._core.dsn import read_dsn
from chatdb.embedded.process import without_libpq_variables
from chatdb.embedded.server import EmbeddedServer
from chatdb.errors import ChatDBError, ConfigurationError, UnavailableError
from chatdb.pool import Pool


async def _run_to_end(
    work: Callable[[], object], *, on_cancel: Callable[[], object] | None = None, patience: float | None = None
) -> None:
    """
    Run blocking work in a thread and wait until it ends, even if this task is cancelled.

    After a cancellation, wait at most `patience` seconds.
    """
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1)  # the loop's default executor may be busy
    future = loop.run_in_executor(executor, work)
    executor.shutdown(wait=False)
    cancelled: asyncio.CancelledError | None = None
    deadline: float | None = None
    while not future.done() and (deadline is None or loop.time() < deadline):
        try:
            await asyncio.wait([future], timeout=None if deadline is None else deadline - loop.time())
        except asyncio.CancelledError as error:
            if cancelled is None and on_cancel is not None:
                on_cancel()  # only once: a second call would cut short the cleanup after the first
            cancelled = error
            if deadline is None and patience is not None:
                deadline = loop.time() + patience
    if cancelled is not None:
        future.add_done_callback(lambda done: done.exception())  # otherwise asyncio logs it as never retrieved
        raise cancelled
    future.result()


_MIGRATE = """
import sys
from chatdb import errors
from chatdb.admin import migrate
try:
    migrate.apply_migrations(sys.argv[1])
except errors.ChatDBError as error:
    print(error, file=sys.stderr)
    sys.exit({errors.ConfigurationError: 2, errors.UnavailableError: 3}.get(type(error), 4))
"""


def _migrate(dsn: str) -> None:
    """Apply the migrations. If libpq variables are set, use a subprocess: a DSN cannot override all of them."""
    from chatdb.admin.migrate import apply_migrations

    environment = without_libpq_variables()
    if len(environment) == len(os.environ):
        apply_migrations(dsn)
        return
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = (sys.executable, "-c", _MIGRATE, dsn)
    done = subprocess.run(  # noqa: S603 - Python, and no shell
        command, env=environment, capture_output=True, text=True, start_new_session=True, check=False
    )
    said = done.stderr.strip().rpartition("\n")[2]
    if done.returncode == 2:
        raise ConfigurationError(said)
    if done.returncode == 3:
        raise UnavailableError(said, sent=None)
    if done.returncode:
        raise ChatDBError(f"could not migrate the embedded server's database: {said}")


class EmbeddedPool(Pool):
    """A pool on an embedded server, which runs at least while the pool is open."""

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__(read_dsn(server.dsn, environment={}))
        self._server = server

    @property
    def path(self) -> Path:
        """The data folder."""
        return self._server.path

    async def _open(self) -> Self:
        try:
            await _run_to_end(self._server.start, on_cancel=self._server.abort)
            # A migration that waits for another process may outlive this call, until the server stops or its wait ends.
            await _run_to_end(lambda: _migrate(self._server.dsn), patience=5)
            await super()._open()
        except BaseException:
            await _run_to_end(self._server.stop)
            raise
        return self

    async def close(self) -> None:
        """Close all connections, and stop the server if no one else uses it."""
        try:
            await super().close()
        finally:
            await _run_to_end(self._server.stop)

    def terminate(self) -> None:
        """Drop all connections, and stop the server if no one else uses it. Blocks until it has stopped."""
        super().terminate()
        self._server.stop()


def open_embedded(path: Path | str | None = None) -> EmbeddedPool:
    """
    Create a pool on an embedded PostgreSQL server. Await it, or use it in `async with`, to open it.

    Opening the pool starts the server and applies the migrations. The server stops when the last pool on its data
    folder is closed, in whichever process. `path` is the data folder; it defaults to `CHATDB_HOME`, then to the user's
    data folder (/var/lib/chatdb for root). Requires the extras `embedded` and `migrate`.

    Raises ConfigurationError if an extra is missing or the folder is not usable, and UnavailableError if the server
    does not start in time.
    """
    return EmbeddedPool(EmbeddedServer(path))
