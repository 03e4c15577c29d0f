"""
The databases of tests: a migrated template, clones of it, and the removal of what killed runs left.

Each process holds an advisory lock whose key is in the names of its databases. The server releases the lock however the
process ends, on whichever host, so a database without its lock is left over. A template is made under such a name and
then renamed, so a template that exists is complete.

Decision: docs/decisions/0026-databases-of-tests-are-named-after-a-lock.md
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Final, Self
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from chatdb._core.dsn import connect_arguments, server_of
from chatdb.admin.connection import (
    advisory_lock,
    errors,
    fetch_value,
    is_pooled,
    map_psycopg_error,
    open_connection,
    prepare_session,
    psycopg,
)
from chatdb.admin.migrate import apply_migrations, migration_files
from chatdb.errors import ConfigurationError

PREFIX: Final = "chatdb_testing_"
TEMPLATE: Final = f"{PREFIX}template_"
_NAME: Final = re.compile(rf"{PREFIX}([0-9a-f]{{8}})_[0-9]+")

_RUNS: Final = 0x63746462  # "ctdb": the first half of the key of each process's lock
_TEMPLATES: Final = 0x6374656D706C  # "ctempl"
_TEMPLATE_WAIT: Final = 120.0
"""Maximum wait, in seconds, while another process makes the template."""

_DATABASES: Final = """
    select d.datname from pg_catalog.pg_database as d
    where pg_catalog.starts_with(d.datname, %s)
    and not exists (select from pg_catalog.pg_stat_activity as a where a.datid = d.oid)
"""
_LOCKS: Final = """
    select l.objid::int8 from pg_catalog.pg_locks as l
    where l.locktype = 'advisory' and l.objsubid = 2 and l.classid::int8 = %s and l.granted
"""


def database_of(server: str, name: str) -> str:
    """Return the DSN of another database on the same server."""
    parts = urlsplit(server)
    options = parts.query
    if "dbname=" in options:  # it would take precedence
        kept = [(key, value) for key, value in parse_qsl(options, keep_blank_values=True) if key != "dbname"]
        options = urlencode(kept, quote_via=quote, safe="")
    netloc = parts.netloc
    made = urlunsplit(parts._replace(path=f"/{name}", query=options))
    return made if netloc else made.replace(f"{parts.scheme}:/{name}", f"{parts.scheme}:///{name}", 1)


class Databases:
    """
    Creates databases on a server, and drops them.

    `server` is the DSN of a direct connection, as a role that may create databases. The first use drops what killed
    runs left on the server. Not for use by several threads.

    Raises ConfigurationError or UnavailableError, which name the server and the reason.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self._run = secrets.randbits(31)
        self._serial = itertools.count(1)
        self._session: psycopg.Connection | None = None
        self._template: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the session. Databases that still exist then count as left over."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def template(self) -> str:
        """
        Return the name of this release's migrated template. The first process on a server makes it.

        The name has a hash of the migrations, the release and the role, which owns the tables. Nobody can connect to
        the template, so it never changes and can always be copied.
        """
        if self._template is None:
            parts = [version("chatdb"), self._open().info.user, *(file.checksum for file in migration_files())]
            name = TEMPLATE + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
            if not self._exists(name):
                with advisory_lock(self.server, wait=_TEMPLATE_WAIT, key=_TEMPLATES):
                    if not self._exists(name):
                        self._make_template(name)
            self._template = name
        return self._template

    @contextmanager
    def new(self, template: str = "template0", options: str = "") -> Generator[str]:
        """
        Create a copy of a database, yield its DSN, and drop it, even if connections to it are still open.

        `options` are those of CREATE DATABASE, such as `owner somebody`.
        """
        name = self._next_name()
        self._create(name, template, options)
        try:
            yield database_of(self.server, name)
        finally:
            self._execute(f"drop database if exists {name} with (force)")

    def drop_leftovers(self) -> list[str]:
        """Drop the databases of processes that are gone, and return their names. Never drops one in use."""
        session = self._open()
        dropped: list[str] = []
        # the databases before the locks: a process takes its lock before it creates a database
        found = [name for (name,) in session.execute(_DATABASES, [PREFIX])]
        alive = {key for (key,) in session.execute(_LOCKS, [_RUNS])}
        for name in found:
            of_run = _NAME.fullmatch(name)
            if of_run and int(of_run[1], 16) not in alive:
                # in use after all, dropped by another process, or another role's
                with suppress(errors.ObjectInUse, errors.InvalidCatalogName, errors.InsufficientPrivilege):
                    session.execute(f"drop database {name}".encode())
                    dropped.append(name)
        return dropped

    def _make_template(self, name: str) -> None:
        with self.new() as dsn:
            apply_migrations(dsn)
            made = urlsplit(dsn).path[1:]
            self._execute(f"alter database {made} with allow_connections false")
            # by a process that connects to another database, whose advisory locks are others
            with suppress(errors.DuplicateDatabase):
                self._open().execute(f"alter database {made} rename to {name}".encode())

    def _next_name(self) -> str:
        return f"{PREFIX}{self._run:08x}_{next(self._serial)}"

    def _exists(self, name: str) -> bool:
        statement = "select true from pg_catalog.pg_database where datname operator(pg_catalog.=) %s"
        return fetch_value(self._open(), statement, name) is not None

    def _create(self, name: str, template: str, options: str) -> None:
        # copying the files takes a third of the default's time; older servers always copy them
        strategy = "strategy file_copy" if self._open().info.server_version >= 150_000 else ""
        try:
            self._execute(" ".join((f"create database {name} template {template}", options, strategy)))
        except errors.InsufficientPrivilege:
            role = self._open().info.user
            raise ConfigurationError(
                f"the role {role} may not create databases at {self._where()}: run ALTER ROLE with CREATEDB as a "
                "superuser, or choose another server with CHATDB_TEST_DSN"
            ) from None

    def _execute(self, statement: str) -> None:
        try:
            self._open().execute(statement.encode())
        except errors.InsufficientPrivilege:
            raise
        except psycopg.Error as error:
            raise map_psycopg_error(error, self._where()) from None

    def _where(self) -> str:
        return server_of(connect_arguments(self.server))

    def _open(self) -> psycopg.Connection:
        """Return the session that holds the lock. Connect again if a test has restarted the server."""
        if self._session is not None:
            with suppress(psycopg.OperationalError):
                self._session.execute("select")
                return self._session
            self._session.close()
        session = open_connection(self.server, autocommit=True, application_name="chatdb testing")
        try:
            self._check_direct(session)
            prepare_session(session)
            session.execute("select pg_catalog.pg_advisory_lock(%s, %s)", [_RUNS, self._run])
        except BaseException:
            session.close()
            raise
        is_first, self._session = self._session is None, session
        if is_first:
            self.drop_leftovers()
        return session

    def _check_direct(self, session: psycopg.Connection) -> None:
        if is_pooled(self.server, session):
            raise ConfigurationError(
                f"{self._where()} is a transaction pooler, which cannot create databases for tests: set "
                "CHATDB_TEST_DSN to a direct connection"
            )
