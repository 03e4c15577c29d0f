"""A proxy that adds network latency. Its separate process uses none of the client's CPU time."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

from tests.support.proxy import Proxy


def _serve(dsn: str, delay: float, parent: Connection) -> None:
    proxy = Proxy(dsn, delay=delay)
    parent.send(proxy.dsn)
    parent.recv()  # blocks until the parent closes the pipe or exits


@contextlib.contextmanager
def far(dsn: str, round_trip: float) -> Iterator[str]:
    """Yield the DSN of a proxy process that adds `round_trip` seconds to each round trip."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(dsn, round_trip / 2, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()
        ours.close()
        theirs.close()
