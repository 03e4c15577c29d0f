"""Databases with the functions for Citus: on a plain PostgreSQL, or distributed on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit, urlunsplit

import psycopg

from chatdb.admin.citus import distribute_tables
from chatdb.admin.migrate import apply_migrations
from chatdb.testing.databases import Databases, database_of
from tests.support.databases import execute
from tests.support.paths import ROOT

MIGRATION = ROOT / "migrations" / "0013.chatdb-create-functions.sql"
_CONDITION = "if not exists (select from pg_catalog.pg_extension as e where e.extname operator(pg_catalog.=) 'citus')"


def install_functions(dsn: str) -> None:
    """Create the functions whether the database has Citus or not."""
    sql = MIGRATION.read_text(encoding="utf-8")
    assert _CONDITION in sql
    execute(dsn, f"begin; {sql.replace(_CONDITION, 'if false')}; commit")


@contextmanager
def distributed_template(databases: Databases) -> Generator[str]:
    """Yield the name of a database that tests clone, with the functions and, on a cluster, distributed tables."""
    with databases.new() as dsn:
        apply_migrations(dsn)
        if isinstance(databases, ClusterDatabases):
            distribute_tables(dsn, shards=4)
        else:
            install_functions(dsn)
        yield urlsplit(dsn).path[1:]


class ClusterDatabases(Databases):
    """Creates each database on all nodes of a Citus cluster."""

    @contextmanager
    def new(self, template: str = "template0", options: str = "") -> Generator[str]:
        """Create a copy of a database, or an empty one, yield the coordinator's DSN and drop it."""
        name = self._next_name()
        is_empty = template == "template0"
        with cluster_database(self.server, name) if is_empty else _clone(self.server, name, template) as dsn:
            yield dsn


def nodes(server: str) -> list[str]:
    """Return the DSN of each node of a Citus cluster, the coordinator first."""
    with psycopg.connect(server) as connection:
        rows = connection.execute(
            "select nodename, nodeport from pg_dist_node where isactive order by groupid, nodeport"
        ).fetchall()
    parts = urlsplit(server)
    user = parts.netloc.rpartition("@")[0]
    hosts = [f"{user}@{host}:{port}" if user else f"{host}:{port}" for host, port in rows]
    return [server, *(urlunsplit(parts._replace(netloc=host)) for host in hosts if host != parts.netloc)]


def _drop(everywhere: list[str], name: str) -> None:
    """Drop a database on each node, where Citus's maintenance of the other nodes may just connect to it."""
    for node in everywhere:
        with suppress(psycopg.errors.InvalidCatalogName):
            execute(node, f"alter database {name} allow_connections false")
    for node in everywhere:
        for is_last in (False, False, True):
            try:
                execute(node, f"drop database if exists {name} with (force)")
                break
            except psycopg.errors.ObjectInUse:
                if is_last:
                    raise


@contextmanager
def cluster_database(server: str, name: str, workers: list[str] | None = None) -> Iterator[str]:
    """
    Create an empty database on each node of a Citus cluster, yield the coordinator's DSN and drop them.

    `workers` are the DSNs of the workers, if no cluster was made of the servers yet.
    """
    everywhere = nodes(server) if workers is None else [server, *workers]
    dsn = database_of(server, name)
    try:
        for node in everywhere:
            execute(node, f"create database {name}")
            execute(database_of(node, name), "create extension citus")
        coordinator = urlsplit(server)
        execute(dsn, f"select citus_set_coordinator_host('{coordinator.hostname}', {coordinator.port})")
        for node in everywhere[1:]:
            execute(dsn, f"select citus_add_node('{urlsplit(node).hostname}', {urlsplit(node).port})")
        yield dsn
    finally:
        _drop(everywhere, name)


@contextmanager
def _clone(server: str, name: str, template: str) -> Iterator[str]:
    """Copy a database on each node of a Citus cluster, yield the coordinator's DSN and drop the copies."""
    everywhere = nodes(server)
    try:
        for node in everywhere:
            # Citus's maintenance connects to each database, from each node
            end = f"select pg_terminate_backend(pid, 10000) from pg_stat_activity where datname = '{template}'"
            execute(node, f"alter database {template} allow_connections false", end)
        for node in everywhere:
            execute(node, f"create database {name} template {template} strategy file_copy")
            execute(node, f"alter database {name} allow_connections true")
        yield database_of(server, name)
    finally:
        _drop(everywhere, name)
