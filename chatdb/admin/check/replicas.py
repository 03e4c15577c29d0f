"""Checks replicas for `pool.reader()`: their role, and how far they are behind the primary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from chatdb._core.dsn import connect_arguments, server_of
from chatdb.admin.check.findings import DIFFERENT, MISSING, OK, Finding
from chatdb.admin.connection import pinned_transaction, psycopg
from chatdb.errors import ConfigurationError, UnavailableError
from chatdb.replicas import MAX_LAG, SERVER_STATE, ServerState


def check_replicas(dsn: str, replicas: Sequence[str]) -> Iterator[Finding]:
    """
    Yield a finding on each replica. Blocks, for a replica that is behind at most `MAX_LAG` seconds.

    Raises ConfigurationError for a wrong DSN, and ConfigurationError or UnavailableError if the primary cannot be used.
    """
    for replica in replicas:
        what = f"replica {server_of(connect_arguments(replica))}"
        with pinned_transaction(dsn) as connection:
            primary = _state(connection)
        begin = time.monotonic()
        try:
            with pinned_transaction(replica) as connection:
                yield _finding(what, connection, primary, begin)
        except (ConfigurationError, UnavailableError) as error:
            yield Finding(what, MISSING, str(error), "until then, the primary answers a reader's calls")


def _finding(what: str, connection: psycopg.Connection, primary: ServerState, begin: float) -> Finding:
    found = _state(connection)
    problem = found.problem(primary)
    if problem is not None:
        hint = "pass the DSN of a physical replica, in recovery, of this database"
        return Finding(what, DIFFERENT, f"{problem}, so a reader does not use it", hint)
    while found.position < primary.position:
        if time.monotonic() - begin > MAX_LAG:
            behind = f"more than {MAX_LAG:g} s behind ({primary.position - found.position:,} bytes of the log)"
            hint = "see pg_stat_wal_receiver and pg_is_wal_replay_paused() on the replica"
            return Finding(what, DIFFERENT, f"a replica, {behind}, so a reader does not use it", hint)
        time.sleep(0.02)
        found = _state(connection)
    return Finding(what, OK, f"a replica, {time.monotonic() - begin:.2f} s behind at most")


def _state(connection: psycopg.Connection) -> ServerState:
    [row] = connection.execute(SERVER_STATE.encode()).fetchall()
    return ServerState(*row)
