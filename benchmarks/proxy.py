"""A proxy that makes the way to the server longer, in a process of its own: it is to take no time of the client's."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

from tests.support.proxy import Proxy


def _serve(dsn: str, delay: float, parent: Connection) -> None:
    proxy = Proxy(dsn, delay=delay)
    parent.send(proxy.dsn)
    parent.recv()  # until the parent closes, or ends


@contextlib.contextmanager
def far(dsn: str, round_trip: float) -> Iterator[str]:
    """Give the DSN of a proxy in a process of its own that makes each round trip longer, by so many seconds."""
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
