"""
Brings the messages of each conversation together in the table's file, for `chatdb repack`.

Messages are stored in the order in which all users write them, so a history of 100 is on about 100 blocks. pg_repack,
or REPACK (CONCURRENTLY) of PostgreSQL 19, rewrites the table in the order of the primary key while readers and writers
go on. CLUSTER would lock it, so chatdb only prints that statement. For the table's storage parameters, see
docs/decisions/0020-messages-are-frozen-early.md.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final, NamedTuple

from chatdb.admin.all_users import check_server, statement
from chatdb.admin.connection import (
    REPACK_LOCK,
    SEARCH_LOCK,
    WAIT,
    advisory_lock,
    errors,
    fetch_value,
    libpq_variables,
    pinned_transaction,
    psycopg,
    refuse_distributed,
    retry_on_lock_timeout,
    wait_for_lock,
)
from chatdb.errors import ChatDBError, ConfigurationError, SchemaError, UnavailableError

CLUSTER: Final = "cluster chatdb.messages using pk_messages; vacuum (analyze) chatdb.messages"
"""What an operator can run instead. It locks the table against readers and writers."""
CLEAN_UP: Final = "drop extension pg_repack cascade; create extension pg_repack"
"""Removes what a killed pg_repack leaves in the database."""

_REPACK: Final = "repack (concurrently, analyze) chatdb.messages using index pk_messages"
_ORDER: Final = "user_id, conversation_id, seq"
_OWNER_VERSION: Final = (1, 5)
"""The first version of pg_repack that the owner of a table can use."""
_SECONDS: Final = 40 / 2**30
"""Estimated seconds for each byte of the table and its indexes; see docs/operations/repack.md."""
_GRACE: Final = 60.0
"""Seconds that an interrupted pg_repack has to remove its trigger and its tables."""
_POLL: Final = 0.5
"""Seconds between two looks at what pg_repack says."""
_MOST_OUTPUT: Final = 2**16
_WAITING: Final = re.compile(r"^NOTICE: Waiting for \d+ transactions to finish\. First PID: (\d+)", re.MULTILINE)
_ADVISORY: Final = 16185446
"""The first key of the advisory lock that pg_repack holds while it works."""


class Method(StrEnum):
    """How the table is rewritten."""

    PG_REPACK = "pg_repack"
    REPACK = "REPACK (CONCURRENTLY)"
    CLUSTER = "CLUSTER"


class Scatter(NamedTuple):
    """
    On how many blocks the newest messages of some conversations are, at most 100 of each.

    `messages_per_block` is None until the table has been analyzed. `exceeds_buffers` says whether the table is larger
    than `shared_buffers`.
    """

    conversations: int
    messages: int
    blocks: int
    messages_per_block: float | None
    exceeds_buffers: bool

    @property
    def per_history(self) -> float:
        """The mean number of blocks of a history."""
        return self.blocks / max(self.conversations, 1)

    @property
    def packed(self) -> float | None:
        """The mean number of blocks after a rewrite, as an estimate: the last block is full only by chance."""
        if not self.messages_per_block or not self.conversations:
            return None
        return self.messages / self.conversations / self.messages_per_block + 1

    @property
    def is_scattered(self) -> bool:
        """Whether histories are on more than three times the blocks that they need."""
        return self.packed is not None and self.per_history > 3 * self.packed

    def __str__(self) -> str:
        if not self.conversations:
            return "no conversation of 20 messages was found"
        best = "" if self.packed is None else f", and could be on about {self.packed:.0f}"
        return (
            f"a history of {self.messages / self.conversations:.0f} messages is on {self.per_history:.0f} blocks"
            f"{best} (means of {self.conversations} sampled conversations)"
        )


class Leftovers(NamedTuple):
    """What pg_repack has in the database: its objects for chatdb's messages, and whether a run is using them."""

    objects: tuple[str, ...]
    is_running: bool


class RepackPlan(NamedTuple):
    """
    How `repack_messages` would rewrite the table, and what it costs.

    With `Method.CLUSTER` it refuses, and `reason` says why. `messages` and `seconds` are estimates, `size` is
    that of the table with its indexes.
    """

    method: Method
    reason: str
    messages: int
    size: int
    seconds: float
    scatter: Scatter


class RepackReport(NamedTuple):
    """What `repack_messages` did."""

    method: Method
    seconds: float
    size_before: int
    size: int
    scatter_before: Scatter
    scatter: Scatter


def read_scatter(connection: psycopg.Connection) -> Scatter:
    """Return how scattered the messages of a sample of conversations are. Reads at most some 1,600 blocks."""
    [row] = connection.execute(statement("sample_locality").encode()).fetchall()
    return Scatter(*row)


def read_leftovers(connection: psycopg.Connection) -> Leftovers:
    """Return what pg_repack has in the database for chatdb's messages."""
    objects = tuple(name for (name,) in connection.execute(_OBJECTS))
    is_running = fetch_value(
        connection,
        "select exists (select from pg_catalog.pg_locks where locktype = 'advisory' and classid = %s and database = "
        "(select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()))",
        _ADVISORY,
    )
    return Leftovers(objects, is_running)


_OBJECTS = """
    select pg_catalog.concat('trigger ', tgname, ' on chatdb.messages')
    from pg_catalog.pg_trigger
    where tgrelid = 'chatdb.messages'::regclass and tgname = 'repack_trigger'
    union all
    select pg_catalog.concat('table repack.', c.relname)
    from pg_catalog.pg_class as c
    inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
    where n.nspname = 'repack' and c.relkind = 'r'
      and c.relname in (
          pg_catalog.concat('log_', 'chatdb.messages'::regclass::oid),
          pg_catalog.concat('table_', 'chatdb.messages'::regclass::oid)
      )
    order by 1
"""


def plan_repack(dsn: str) -> RepackPlan:
    """
    Return how the table would be rewritten and what that costs, from its size and a sample. Writes nothing.

    Raises ConfigurationError on a standby, for a role without the privileges or from which row-level security hides
    rows, and if a killed pg_repack left objects behind; UnavailableError if another one is running; SchemaError without
    chatdb's tables.
    """
    with pinned_transaction(dsn) as connection:
        refuse_distributed(connection, "chatdb repack", "run pg_repack or CLUSTER on the shards, on each node")
        return _plan(connection)


def repack_messages(dsn: str, *, wait: float = WAIT, on_wait: Callable[[int], object] = lambda _: None) -> RepackReport:
    """
    Rewrite the table in the order of its primary key. Blocks; readers and writers go on meanwhile.

    Waits up to `wait` seconds for another operator command and for each of the table's locks, and without limit for
    transactions that were open at the start: `on_wait` is called with the server process of one that pg_repack waits
    for. An interrupt ends the rewrite and leaves nothing behind.

    Raises as `plan_repack` does; ConfigurationError behind a transaction pooler, and if only CLUSTER could rewrite the
    table; UnavailableError.
    """
    with advisory_lock(dsn, wait=wait, key=REPACK_LOCK) as connection:
        refuse_distributed(connection, "chatdb repack", "run pg_repack or CLUSTER on the shards, on each node")
        plan = _plan(connection)
        if plan.method is Method.CLUSTER:
            raise ConfigurationError(plan.reason)
        # in older versions of pg_repack, an index that is built meanwhile would not match the new file
        wait_for_lock(connection, SEARCH_LOCK, wait=wait)
        start = time.monotonic()
        if plan.method is Method.PG_REPACK:
            _run_pg_repack(dsn, connection, wait, on_wait)
        else:
            _run_repack(connection, wait)
        seconds = time.monotonic() - start
        _, size = _size(connection)
        return RepackReport(plan.method, seconds, plan.size, size, plan.scatter, read_scatter(connection))


def choose_method(*, server: int, extension: str | None, program: str | None) -> tuple[Method, str]:
    """
    Return how to rewrite the table and, for CLUSTER, why not otherwise.

    `server` is the version of PostgreSQL, such as 150020; `extension` the version of pg_repack in the database, and
    `program` its path on this machine.
    """
    if extension is not None and program is not None:
        return Method.PG_REPACK, ""
    if server >= 190_000:
        return Method.REPACK, ""
    if extension is not None:
        return Method.CLUSTER, (
            "the database has the extension pg_repack, but this machine lacks the program of that name: install it "
            f"(on Debian, the package postgresql-{server // 10_000}-repack), then run this again"
        )
    return Method.CLUSTER, (
        f"the database lacks the extension pg_repack: install it on the server (on Debian, the package "
        f"postgresql-{server // 10_000}-repack), run create extension pg_repack as a superuser, then run this again"
    )


def find_program() -> str | None:
    """Return the path of pg_repack: on the PATH, or in Debian's folder for the newest PostgreSQL."""
    found = Path("/usr/lib/postgresql").glob("*/bin/pg_repack")
    newest = max(found, key=lambda path: _version(path.parts[-3]), default=None)
    return shutil.which("pg_repack") or (None if newest is None else str(newest))


def _plan(connection: psycopg.Connection) -> RepackPlan:
    if fetch_value(connection, "select pg_catalog.to_regclass('chatdb.messages')") is None:
        raise SchemaError("the database has no chatdb tables: run chatdb migrate or yoyo apply")
    # behind row-level security, pg_repack could copy a part of the rows
    [(has_row_security, is_standby)] = connection.execute(statement("check_operator").encode()).fetchall()
    check_server({"has_row_security": has_row_security, "is_standby": is_standby}, dry_run=False)
    extension = fetch_value(connection, "select extversion from pg_catalog.pg_extension where extname = 'pg_repack'")
    _check_leftovers(connection)
    method, reason = choose_method(server=connection.info.server_version, extension=extension, program=find_program())
    _check_role(connection, method, extension)
    messages, size = _size(connection)
    return RepackPlan(method, reason, messages, size, size * _SECONDS, read_scatter(connection))


def _check_leftovers(connection: psycopg.Connection) -> None:
    leftovers = read_leftovers(connection)
    if leftovers.is_running:
        raise UnavailableError("pg_repack is running on this database: wait until it ends", sent=False)
    if leftovers.objects:
        raise ConfigurationError(
            f"a pg_repack that was killed left {', '.join(leftovers.objects)}, and every write pays for it: run "
            f"{CLEAN_UP} as a superuser, then run this again"
        )


def _check_role(connection: psycopg.Connection, method: Method, extension: str | None) -> None:
    if _is_superuser(connection):
        return
    if not fetch_value(connection, _OWNS):
        raise ConfigurationError(
            "the role does not own the table chatdb.messages: run this as a superuser, or as the table's owner"
        )
    if method is Method.PG_REPACK and _version(extension) < _OWNER_VERSION:
        raise ConfigurationError(
            f"pg_repack {extension} works only for a superuser: run this as a superuser, or install pg_repack 1.5 or "
            "later, which also works for the table's owner"
        )


_OWNS = """
    select pg_catalog.pg_has_role(relowner, 'usage')
    from pg_catalog.pg_class
    where oid = 'chatdb.messages'::regclass
"""


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]+", text or "")[:2]))


def _size(connection: psycopg.Connection) -> tuple[int, int]:
    row = connection.execute(_SIZE).fetchone()
    messages, size = row or (0, 0)
    return int(messages), int(size)


# the number of messages as at the last VACUUM or ANALYZE, because a count would read the whole table
_SIZE = """
    select greatest(reltuples, 0)::int8, pg_catalog.pg_total_relation_size(oid)
    from pg_catalog.pg_class
    where oid = 'chatdb.messages'::regclass
"""


def _run_repack(connection: psycopg.Connection, wait: float) -> None:
    """Run PostgreSQL's own statement. Not tested: written from the documentation of PostgreSQL 19."""

    def lock_table() -> None:
        with connection.transaction():
            connection.execute("set local lock_timeout = '2s'")
            connection.execute("lock table chatdb.messages in share update exclusive mode")

    retry_on_lock_timeout(lock_table, time.monotonic() + wait)
    connection.execute("set lock_timeout = 0")
    with suppress(errors.InvalidParameterValue):  # a platform that cannot watch a connection
        connection.execute("set client_connection_check_interval = '1s'")
    connection.execute(_REPACK)


def _run_pg_repack(dsn: str, connection: psycopg.Connection, wait: float, on_wait: Callable[[int], object]) -> None:
    program = find_program()
    database = connection.info.dbname
    if program is None or re.search(r"[\s'\\]", database):  # pg_repack 1.4 pastes the name into a connection string
        raise ConfigurationError("pg_repack cannot be run: it is gone, or cannot take the name of this database")
    file = _file(connection)
    command = [program, "--no-password", "--no-kill-backend", f"--wait-timeout={max(1, math.ceil(wait))}"]
    if not _is_superuser(connection):
        command.append("--no-superuser-check")
    with (
        TemporaryFile() as output,  # at a pipe that a kill of this process closed, pg_repack would end without clean-up
        subprocess.Popen(  # noqa: S603 - the program that the operator installed, and no shell
            [*command, "--table=chatdb.messages", f"--order-by={_ORDER}"],
            env=os.environ | libpq_variables(dsn, connection) | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # otherwise a terminal's SIGINT and ours reach it: the second stops its clean-up
        ) as process,
    ):
        try:
            error = _watch(process, output.fileno(), on_wait)
        except BaseException:
            _interrupt(process)
            raise
    is_rewritten = _file(connection) != file
    if process.returncode != 0:
        left = read_leftovers(connection).objects
        advice = f". It left {', '.join(left)}: run {CLEAN_UP} as a superuser" if left else ""
        raise ChatDBError(
            f"pg_repack ended with status {process.returncode}{error and f' ({error})'}; the table was "
            f"{'' if is_rewritten else 'not '}rewritten{advice}"
        )
    if not is_rewritten:
        raise UnavailableError(
            f"pg_repack did not get a lock on chatdb.messages within {wait:g} s, so nothing was changed: end long "
            "transactions, or raise --wait, then run this again",
            sent=False,
        )


def _watch(process: subprocess.Popen[bytes], output: int, on_wait: Callable[[int], object]) -> str:
    """Read what pg_repack says until it ends, and return its first error. The details could quote a row."""
    reported = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL)
        has_ended = process.returncode is not None
        said = os.pread(output, _MOST_OUTPUT, 0).decode(errors="replace")
        waiting = _WAITING.findall(said)
        for pid in waiting[reported:]:
            on_wait(int(pid))
        reported = len(waiting)
        if has_ended:
            error = re.search("^ERROR: (.*)", said, re.MULTILINE)
            return error[1].strip() if error else ""


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """End pg_repack, which then cancels its statement and drops what it created."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()  # does nothing if it has ended


def _file(connection: psycopg.Connection) -> int | None:
    """Return the number of the table's file, which a rewrite changes."""
    number: int | None = fetch_value(connection, "select pg_catalog.pg_relation_filenode('chatdb.messages')")
    return number


def _is_superuser(connection: psycopg.Connection) -> bool:
    return fetch_value(connection, "select rolsuper from pg_catalog.pg_roles where rolname = current_user") is True
