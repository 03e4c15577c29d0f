"""
Distributes chatdb's tables over the nodes of a Citus cluster by user, and brings them back, for `chatdb distribute`.

Each direction copies the rows in one transaction, so a killed command, node or coordinator, or a full disk, leaves the
tables as they were. Distributing blocks writers and not readers; bringing the rows back blocks both.

Decision: docs/decisions/0027-functions-for-citus.md
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

import sqlparse

from chatdb._core.driver_errors import LINK
from chatdb.admin.connection import (
    WAIT,
    advisory_lock,
    errors,
    fetch_value,
    has_citus,
    pinned_transaction,
    psycopg,
    retry_on_lock_timeout,
)
from chatdb.admin.migrate import migration_files
from chatdb.errors import ChatDBError, ConfigurationError, InvalidInputError, SchemaError, UnavailableError
from chatdb.schema import EXPECTED_SCHEMA

SHARDS: Final = 32
"""Default number of shards of each table, which Citus recommends for a start."""
MOST_SHARDS: Final = 1024
_AWAY: Final = "chatdb_distributed"
"""The schema that holds the distributed tables while their rows are copied back."""
_FUNCTIONS: Final = "0013.chatdb-create-functions"
_LOCK_SECONDS: Final = 0.3
"""Maximum wait for each of three locks: together less than deadlock_timeout, one second by default."""
_RANGE: Final = 1 << 48
"""Size of the range of ids that Citus gives to the sequences of each node. The coordinator has the first one."""
_MESSAGES_PER_SECOND: Final = 40_000
"""For the estimate; see docs/operations/citus.md."""
# a single statement locks its tables in the order of its plan, and a function in the order of its statements
_ORDERS: Final = (
    ("conversations", "messages", "message_parts"),
    ("messages", "conversations", "message_parts"),
    ("message_parts", "messages", "conversations"),
)
_TABLES: Final = _ORDERS[0]
_UNWRITTEN: Final = re.compile(r"could not (?:extend|write|create) .*: |No space left on device")
Report = Callable[[str, float], object]


def _say_nothing(step: str, seconds: float) -> None:
    pass


class DistributionPlan(NamedTuple):
    """
    What `distribute_tables` or `gather_tables` would do.

    `is_done` tells that there is nothing to do, and `moves_rows` that rows are copied while writers wait. `messages`
    and `seconds`, how long calls wait, are estimates.
    """

    is_done: bool
    moves_rows: bool
    shards: int
    nodes: int
    messages: int
    seconds: float


def plan_distribution(dsn: str, *, shards: int = SHARDS, undo: bool = False) -> DistributionPlan:
    """
    Return what `distribute_tables` or, with `undo`, `gather_tables` would do. Writes nothing.

    Raises ConfigurationError if the database is not on the coordinator of a Citus cluster with workers, if a foreign
    key, a trigger or row-level security stands in the way, or if the role does not own the tables; SchemaError without
    chatdb's tables.
    """
    if type(shards) is not int or not 1 <= shards <= MOST_SHARDS:
        raise InvalidInputError("shards", f"must be an int from 1 to {MOST_SHARDS:,}")
    with pinned_transaction(dsn) as connection:
        return _plan(connection, shards, undo=undo)


def distribute_tables(
    dsn: str, *, shards: int = SHARDS, wait: float = WAIT, report: Report = _say_nothing
) -> DistributionPlan:
    """
    Distribute chatdb's tables by user, and send the functions to the nodes. Blocks; can be repeated.

    Writers wait until the rows are copied; readers do not. Waits up to `wait` seconds for another operator command and
    for the tables' locks. `report` is called with each finished step and its seconds.

    Raises as `plan_distribution` does; ConfigurationError behind a transaction pooler; UnavailableError if a lock, a
    node or the disk is not available: then the transaction was rolled back, and nothing is lost.
    """
    plan_distribution(dsn, shards=shards)
    deadline = time.monotonic() + wait
    with advisory_lock(dsn, wait=wait) as connection:
        _complete_commits(connection)
        plan = _plan(connection, shards, undo=False)
        step = _Steps(connection, report)
        if plan.is_done:
            return plan
        if not _names(connection):
            step.run("chatdb's functions created", lambda: _create_functions(connection))
        if plan.moves_rows:
            step.run("tables distributed", lambda: _distribute(connection, shards, deadline))
        if _has_remains(connection):
            step.run("rows on the coordinator removed", lambda: _remove_remains(connection, deadline))
        step.run("functions sent to the nodes", lambda: _send_functions(connection))
    return plan


def gather_tables(dsn: str, *, wait: float = WAIT, report: Report = _say_nothing) -> DistributionPlan:
    """
    Bring chatdb's rows back into tables of the coordinator. Blocks; can be repeated. Readers and writers wait.

    Waits and raises as `distribute_tables` does. The functions stay, because open pools use them.
    """
    plan_distribution(dsn, undo=True)
    deadline = time.monotonic() + wait
    with advisory_lock(dsn, wait=wait) as connection:
        _complete_commits(connection)
        plan = _plan(connection, SHARDS, undo=True)
        step = _Steps(connection, report)
        if plan.is_done:
            return plan
        # otherwise a call that waits on a node would find no table there after the commit
        step.run("functions kept on the coordinator", lambda: _recreate_functions(connection))
        try:
            step.run("rows brought back", lambda: _gather(connection, deadline))
        except UnavailableError:
            with suppress(psycopg.Error, UnavailableError):  # without the node that failed
                _send_functions(connection)
            raise
    return plan


def _complete_commits(connection: psycopg.Connection) -> None:
    """Complete commits that a lost node has only prepared. Citus does it within a minute, if the role may not."""
    with suppress(psycopg.Error):
        connection.execute("select pg_catalog.recover_prepared_transactions()")


class _Steps:
    """Runs the steps, and explains what stopped one."""

    def __init__(self, connection: psycopg.Connection, report: Report) -> None:
        self._connection = connection
        self._report = report

    def run(self, name: str, work: Callable[[], object]) -> None:
        start = time.monotonic()
        try:
            work()
        except psycopg.Error as error:
            raise _explained(error, is_lost=self._connection.closed) from None
        self._report(name, time.monotonic() - start)


def _explained(error: psycopg.Error, *, is_lost: bool) -> ChatDBError:
    nothing = "the transaction was rolled back, so nothing is lost and the tables are as before"
    if is_lost:
        return UnavailableError(
            "the connection to the coordinator was lost: nothing is lost, because the rows are moved in one "
            "transaction; run this again, which finds out how far it came",
            sent=None,
        )
    if isinstance(error, errors.LockNotAvailable | errors.DeadlockDetected):
        return UnavailableError(
            f"other transactions keep chatdb's tables locked: {nothing}; end long transactions, or raise --wait",
            sent=True,
        )
    # while rows are copied, Citus sends only the message of the node's error
    is_unwritten = bool(_UNWRITTEN.search(error.diag.message_primary or ""))
    if is_unwritten or isinstance(error, errors.DiskFull | errors.OutOfMemory):
        return UnavailableError(
            f"a node ran out of disk space or memory ({error.sqlstate}): {nothing}; make room, then run this again",
            sent=True,
        )
    if isinstance(error, errors.FeatureNotSupported | errors.InsufficientPrivilege):
        return ConfigurationError(f"Citus refused ({error.diag.message_primary}): {nothing}")
    return UnavailableError(
        f"a node of the cluster failed or cannot be reached (SQLSTATE {error.sqlstate}): {nothing}; check the nodes "
        "with citus_check_cluster_node_health(), and their disks, then run this again",
        sent=True,
    )


def _plan(connection: psycopg.Connection, shards: int, *, undo: bool) -> DistributionPlan:
    tables = _owners(connection)
    if not has_citus(connection):
        raise ConfigurationError(
            "the database has no Citus: install Citus on every node, run create extension citus in this database on "
            "each of them, and add the workers with select citus_add_node(host, port)"
        )
    if fetch_value(connection, "select groupid from pg_catalog.pg_dist_local_group") != 0:
        raise ConfigurationError("this is a worker of the Citus cluster: connect to its coordinator")
    nodes = fetch_value(
        connection, "select pg_catalog.count(*) from pg_catalog.pg_dist_node where isactive and shouldhaveshards"
    )
    there = _distributed(connection)
    if not nodes and not there:
        raise ConfigurationError("the Citus cluster has no worker: add one with select citus_add_node(host, port)")
    foreign = [table for table, is_owner in tables.items() if not is_owner]
    if foreign:
        raise ConfigurationError(f"the role does not own chatdb.{foreign[0]}: run this as the owner of chatdb's tables")
    messages = _estimate(connection)
    if undo:
        _refuse_extras(connection)
        seconds = 2 * messages / _MESSAGES_PER_SECOND + 1
        return DistributionPlan(not there, bool(there), there.get("messages", 0), nodes, messages, seconds)
    if there:
        is_done = bool(_names(connection)) and not _unsent(connection) and not _has_remains(connection)
        return DistributionPlan(is_done, False, there.get("messages", 0), nodes, messages, 0)
    _refuse_obstacles(connection)
    return DistributionPlan(False, True, shards, nodes, messages, messages / _MESSAGES_PER_SECOND + 1)


def _owners(connection: psycopg.Connection) -> dict[str, bool]:
    """Return chatdb's tables, and whether the role owns each."""
    rows = connection.execute(
        "select c.relname::text, pg_catalog.pg_has_role(c.relowner, 'usage') from pg_catalog.pg_class as c "
        "inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace "
        "where n.nspname = 'chatdb' and c.relkind = 'r'"
    ).fetchall()
    found = {name: is_owner for name, is_owner in rows if name in _TABLES}
    if len(found) < len(_TABLES):
        raise SchemaError("the database lacks chatdb's tables: run chatdb migrate first")
    return found


def _distributed(connection: psycopg.Connection) -> dict[str, int]:
    """Return the distributed ones of chatdb's tables, with their numbers of shards."""
    return dict(
        connection.execute(
            """
            select c.relname::text, (
                select pg_catalog.count(*) from pg_catalog.pg_dist_shard as s where s.logicalrelid = p.logicalrelid
            )
            from pg_catalog.pg_dist_partition as p
            inner join pg_catalog.pg_class as c on c.oid = p.logicalrelid
            inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
            where n.nspname = 'chatdb' and p.partmethod = 'h'
            """
        ).fetchall()
    )


def _estimate(connection: psycopg.Connection) -> int:
    """Return about how many messages there are, without reading them."""
    known = fetch_value(
        connection, "select reltuples::bigint from pg_catalog.pg_class where oid = 'chatdb.messages'::regclass"
    )
    size: int = fetch_value(connection, "select pg_catalog.pg_table_size('chatdb.messages'::regclass)")
    if "messages" in _distributed(connection):
        known = 0
        # fails while a node is down, or has not completed the commit of a transaction that it has prepared
        with suppress(psycopg.Error), connection.transaction():
            size = fetch_value(connection, "select pg_catalog.citus_table_size('chatdb.messages'::regclass)")
    return int(known) if known > 0 else size // 900


def _refuse_obstacles(connection: psycopg.Connection) -> None:
    links = connection.execute(
        """
        select k.conname::text, k.conrelid::regclass::text, n.nspname = 'chatdb'
        from pg_catalog.pg_constraint as k
        inner join pg_catalog.pg_class as c on c.oid = k.conrelid
        inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
        inner join pg_catalog.pg_class as f on f.oid = k.confrelid
        inner join pg_catalog.pg_namespace as m on m.oid = f.relnamespace
        where k.contype = 'f' and 'chatdb' in (n.nspname, m.nspname) and n.nspname <> m.nspname
        order by 1
        """
    ).fetchall()
    for name, table, is_own in links:
        if is_own:
            raise ConfigurationError(
                f"the foreign key {name} of {table} references a table of the host: run chatdb link-users --unlink "
                "first; on distributed tables, chatdb link-users can link a reference table of Citus"
            )
        raise ConfigurationError(
            f"the table {table} references chatdb's with the foreign key {name}, which Citus does not allow: drop it "
            f"first with alter table {table} drop constraint {name}"
        )
    trigger = fetch_value(
        connection,
        "select tgname::text from pg_catalog.pg_trigger where not tgisinternal and tgrelid in "
        "('chatdb.conversations'::regclass, 'chatdb.messages'::regclass, 'chatdb.message_parts'::regclass)",
    )
    if trigger is not None:
        raise ConfigurationError(
            f"chatdb's tables have the trigger {trigger}, which Citus does not allow: drop it first"
        )
    if fetch_value(
        connection,
        "select true from pg_catalog.pg_class as c inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace "
        "where n.nspname = 'chatdb' and c.relrowsecurity limit 1",
    ):
        raise ConfigurationError(
            "row-level security is on, and the setting that names its user does not reach the nodes of Citus: run "
            "chatdb protect --off first"
        )


def _refuse_extras(connection: psycopg.Connection) -> None:
    """Refuse to bring back tables with views, constraints or columns of the host, which the copy would lose."""
    view = fetch_value(
        connection,
        "select distinct r.ev_class::pg_catalog.regclass::text from pg_catalog.pg_depend as d "
        "inner join pg_catalog.pg_rewrite as r on r.oid = d.objid "
        "where d.classid = 'pg_catalog.pg_rewrite'::regclass and d.refclassid = 'pg_catalog.pg_class'::regclass "
        "and d.refobjid in ('chatdb.conversations'::regclass, 'chatdb.messages'::regclass, "
        "'chatdb.message_parts'::regclass) order by 1",
    )
    if view is not None:
        raise ConfigurationError(f"the view {view} reads chatdb's tables, and would be lost: drop it first")
    constraints = connection.execute(
        "select c.relname::text, k.conname::text, k.contype = 'f' from pg_catalog.pg_constraint as k "
        "inner join pg_catalog.pg_class as c on c.oid = k.conrelid "
        "inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace "
        "where n.nspname = 'chatdb' and k.contype in ('c', 'f') order by 1, 2"
    )
    for table, name, is_link in constraints:
        if table in _TABLES and name not in EXPECTED_SCHEMA[table]:
            instead = "run chatdb link-users --unlink" if is_link and name == LINK else "remove it"
            raise ConfigurationError(
                f"chatdb.{table} has the constraint {name}, which is not of chatdb's migrations and would be lost: "
                f"{instead} first"
            )
    columns = connection.execute(
        "select c.relname::text, a.attname::text from pg_catalog.pg_attribute as a "
        "inner join pg_catalog.pg_class as c on c.oid = a.attrelid "
        "inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace "
        "where n.nspname = 'chatdb' and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped"
    )
    for table, column in columns:
        if table in _TABLES and column not in EXPECTED_SCHEMA[table]:
            raise ConfigurationError(
                f"chatdb.{table} has the column {column}, which is not chatdb's and would be lost: drop it first"
            )


def _lock_writers(connection: psycopg.Connection, order: tuple[str, ...]) -> None:
    """Lock the tables, not for readers. Give up before any call that waits for us would be taken for a deadlock."""
    connection.execute(f"set local lock_timeout = {int(1000 * _LOCK_SECONDS)}".encode())
    for table in order:
        connection.execute(f"lock table chatdb.{table} in exclusive mode".encode())
    connection.execute("set local lock_timeout = 0")


def _lock_all(connection: psycopg.Connection) -> None:
    """
    Lock the tables, also for readers.

    A call that holds the lock of a later table waits for the first one since less than _LOCK_SECONDS, so PostgreSQL
    takes this call for the deadlock and not this command, and the pool repeats it. An upgrade of a weaker lock would
    instead meet calls that have waited for any time.
    """
    connection.execute(f"set local lock_timeout = {int(1000 * _LOCK_SECONDS)}".encode())
    connection.execute("lock table chatdb.conversations in access exclusive mode")
    connection.execute("set local lock_timeout = 0")
    connection.execute("lock table chatdb.messages, chatdb.message_parts in access exclusive mode")


def _distribute(connection: psycopg.Connection, shards: int, deadline: float) -> None:
    orders = itertools.cycle(_ORDERS)

    def work() -> None:
        with connection.transaction():
            _lock_writers(connection, next(orders))
            for table in _TABLES:
                together = (
                    f"shard_count => {shards}" if table == _TABLES[0] else "colocate_with => 'chatdb.conversations'"
                )
                connection.execute(
                    f"select pg_catalog.create_distributed_table('chatdb.{table}', 'user_id', {together})".encode()
                )

    retry_on_lock_timeout(work, deadline)


def _has_remains(connection: psycopg.Connection) -> bool:
    """Return whether the coordinator still has the rows that were copied to the nodes. No statement reads them."""
    return bool(_distributed(connection)) and bool(
        fetch_value(
            connection,
            "select pg_catalog.max(pg_catalog.pg_relation_size(c.oid)) > 0 from pg_catalog.pg_class as c "
            "where c.oid in ('chatdb.conversations'::regclass, 'chatdb.messages'::regclass, "
            "'chatdb.message_parts'::regclass)",
        )
    )


def _remove_remains(connection: psycopg.Connection, deadline: float) -> None:
    def work() -> None:
        with connection.transaction():
            connection.execute("set local citus.enable_ddl_propagation = off")
            _lock_all(connection)
            connection.execute("select pg_catalog.truncate_local_data_after_distributing_table('chatdb.conversations')")

    retry_on_lock_timeout(work, deadline)


def _gather(connection: psycopg.Connection, deadline: float) -> None:
    def work() -> None:
        with connection.transaction():
            _lock_all(connection)
            connection.execute("set local citus.max_intermediate_result_size = -1")
            connection.execute(f"create schema {_AWAY}".encode())
            for table in reversed(_TABLES):
                connection.execute(f"alter table chatdb.{table} set schema {_AWAY}".encode())
            _create_tables(connection)
            for table in _TABLES:
                columns = ", ".join(_written(table))
                connection.execute(
                    f"insert into chatdb.{table} ({columns}) select {columns} from {_AWAY}.{table}".encode()  # noqa: S608
                )
                if "id" in EXPECTED_SCHEMA[table]:
                    # not into the range of a node, which goes on from there when the tables are distributed again
                    connection.execute(
                        f"select pg_catalog.setval('chatdb.{table}_id_seq', greatest("  # noqa: S608
                        f"pg_catalog.max(id) filter (where id < {_RANGE}), "
                        f"(select last_value from {_AWAY}.{table}_id_seq))) from chatdb.{table}".encode()
                    )
            connection.execute(f"drop schema {_AWAY} cascade".encode())

    retry_on_lock_timeout(work, deadline)
    for table in _TABLES:
        connection.execute(f"analyze chatdb.{table}".encode())


def _written(table: str) -> list[str]:
    """Return the columns of a table that are not generated."""
    return [
        name
        for name, definition in EXPECTED_SCHEMA[table].items()
        if not re.match(r"(?:pk|fk|ck|uq|ix)_", name) and "generated always" not in definition
    ]


def _create_tables(connection: psycopg.Connection) -> None:
    """Create the tables as the migrations do, then the other indexes and the grants of the tables that are away."""
    for file in migration_files():
        if file.name != _FUNCTIONS:
            for statement in sqlparse.split(file.sql):
                # in a transaction, on new tables; the timeouts are this command's own
                if not re.match(r"(?:\s*--[^\n]*\n|\s)*(?:re)?set\b", statement):
                    connection.execute(re.sub(r"\bindex concurrently\b", "index", statement).encode())
    for (statement,) in connection.execute(_INDEXES, [_AWAY]).fetchall():
        connection.execute(statement.replace(f" {_AWAY}.", " chatdb.").encode())
    for (statement,) in connection.execute(_GRANTS, [_AWAY]).fetchall():
        connection.execute(statement.encode())


_INDEXES = """
    select pg_catalog.pg_get_indexdef(i.indexrelid)
    from pg_catalog.pg_index as i
    inner join pg_catalog.pg_class as c on c.oid = i.indexrelid
    inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
    where n.nspname = %s and c.relname not in (
        select o.relname from pg_catalog.pg_class as o
        inner join pg_catalog.pg_namespace as m on m.oid = o.relnamespace
        where m.nspname = 'chatdb'
    )
"""
_GRANTS = """
    select pg_catalog.format(
        'grant %%s on %%s chatdb.%%I to %%s%%s', a.privilege_type,
        case c.relkind when 'S' then 'sequence' else 'table' end, c.relname,
        case when a.grantee = 0 then 'public' else a.grantee::pg_catalog.regrole::text end,
        case when a.is_grantable then ' with grant option' else '' end
    )
    from pg_catalog.pg_class as c
    inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
    cross join lateral pg_catalog.aclexplode(c.relacl) as a
    where n.nspname = %s and c.relkind in ('r', 'S') and a.grantee <> c.relowner
"""


def _names(connection: psycopg.Connection) -> list[str]:
    """Return the functions that the migration creates, with their parameters."""
    [file] = [file for file in migration_files() if file.name == _FUNCTIONS]
    names = re.findall(r"exists chatdb\.(\w+)", file.rollback)
    rows = connection.execute(
        "select p.oid::pg_catalog.regprocedure::text from pg_catalog.pg_proc as p "
        "inner join pg_catalog.pg_namespace as n on n.oid = p.pronamespace "
        "where n.nspname = 'chatdb' and p.proname::text = any(%s)",
        [names],
    ).fetchall()
    return [name for (name,) in rows] if len(rows) == len(names) else []


def _unsent(connection: psycopg.Connection) -> list[str]:
    """Return the functions that are not sent to the nodes yet: all but move_user, whose users can be on two nodes."""
    sent = {
        name
        for (name,) in connection.execute(
            "select o.objid::pg_catalog.regprocedure::text from pg_catalog.pg_dist_object as o "
            "where o.classid = 'pg_catalog.pg_proc'::regclass and o.distribution_argument_index is not null "
            "and o.colocationid = (select p.colocationid from pg_catalog.pg_dist_partition as p "
            "where p.logicalrelid = 'chatdb.conversations'::regclass)"
        )
    }
    return [name for name in _names(connection) if name not in sent and not name.startswith("chatdb.move_user")]


def _advance_sequences(connection: psycopg.Connection) -> None:
    """Let each node go on after the ids that it gave when the tables were distributed before."""
    for table in ("conversations", "messages"):
        used = connection.execute(
            f"select id / {_RANGE} as node, pg_catalog.max(id) as newest from chatdb.{table} where id >= {_RANGE} "  # noqa: S608
            "group by 1".encode()
        ).fetchall()
        if not used:
            continue
        nodes, newest = (", ".join(map(str, column)) for column in zip(*used, strict=True))
        advance = (
            f"select pg_catalog.setval('chatdb.{table}_id_seq', greatest(s.last_value, u.newest)) "  # noqa: S608
            f"from chatdb.{table}_id_seq as s, rows from (pg_catalog.unnest(array[{nodes}]), "
            f"pg_catalog.unnest(array[{newest}])) as u (node, newest) "
            "where u.node = (select l.groupid from pg_catalog.pg_dist_local_group as l)"
        )
        answers = connection.execute("select success from pg_catalog.run_command_on_workers(%s)", [advance]).fetchall()
        if not all(success for (success,) in answers):
            raise UnavailableError(
                f"a node could not set the sequence of chatdb.{table}.id: check the nodes with "
                "citus_check_cluster_node_health(), then run this again",
                sent=True,
            )


def _send_functions(connection: psycopg.Connection) -> None:
    if _unsent(connection):
        _advance_sequences(connection)  # only the functions take ids from the nodes
    for name in _unsent(connection):
        connection.execute(
            "select pg_catalog.create_distributed_function(%s::pg_catalog.regprocedure, 'p_user_id', "
            "colocate_with => 'chatdb.conversations')",
            [name],
        )


def _create_functions(connection: psycopg.Connection) -> None:
    [file] = [file for file in migration_files() if file.name == _FUNCTIONS]
    with connection.transaction():
        for statement in sqlparse.split(file.sql):
            connection.execute(statement.encode())


def _recreate_functions(connection: psycopg.Connection) -> None:
    [file] = [file for file in migration_files() if file.name == _FUNCTIONS]
    with connection.transaction():
        for statement in [*sqlparse.split(file.rollback), *sqlparse.split(file.sql)]:
            connection.execute(statement.encode())
