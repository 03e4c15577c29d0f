"""
Checks whether a database has what this release needs, and says how to fix what differs, for `chatdb check`.

Compares the catalog as `check_schema` does, then checks the server, the roles' privileges, the migrations, and the
indexes that the planner uses for the statements under `sql/`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from chatdb.admin.check.findings import (
    DIFFERENT,
    MISSING,
    NOTE,
    OK,
    Finding,
    check_locality,
    check_schema_objects,
    check_search_index,
)
from chatdb.admin.check.plans import check_plans, statements_by_index
from chatdb.admin.check.replicas import check_replicas
from chatdb.admin.connection import (
    connected,
    errors,
    fetch_value,
    is_distributed,
    is_pooled,
    pinned_transaction,
    psycopg,
)
from chatdb.admin.locality import Leftovers, read_leftovers, read_scatter
from chatdb.admin.migrate import applied_migrations, migration_files
from chatdb.admin.ownership import foreign_objects, host_objects, may_create_schemas, public_is_writable
from chatdb.admin.row_security import missing_function, missing_statements, read_protection
from chatdb.admin.search_index import read_search_index
from chatdb.errors import ConfigurationError, SchemaError
from chatdb.records import SchemaPart
from chatdb.schema import CHECK_SCHEMA_SQL, EXPECTED_SCHEMA

OLDEST, NEWEST = 14, 18
"""The oldest and newest major version of PostgreSQL that this release supports."""

PRIVILEGES = ["select", "insert", "update", "delete"]


def inspect(
    dsn: str, *, role: str | None = None, replicas: Sequence[str] = (), folder: Path | None = None
) -> list[Finding]:
    """
    Return the findings, problems last. Blocks; in a coroutine, call it with `asyncio.to_thread`.

    `role` names a second role whose privileges are checked, such as the service's. `replicas` are the DSNs of replicas
    whose role and lag are checked. Writes nothing: statements are
    planned, not run, in transactions that are rolled back.

    Raises ConfigurationError or UnavailableError if no connection can be made.
    """
    with connected(dsn) as connection:
        pooler = _pooler(dsn, connection)
    migrations = [*_migrations(dsn, folder)]
    with pinned_transaction(dsn) as connection:
        own = fetch_value(connection, "select current_user")
        roles = [own] if role is None else [own, role]
        findings = [*_server(connection), pooler, *migrations, *_search_paths(connection, own, role)]
        rows = connection.execute(CHECK_SCHEMA_SQL.encode()).fetchall()
        parts = [SchemaPart(relation=relation, name=name, definition=text) for relation, name, text in rows]
        if parts:
            unapplied = any(finding.state == MISSING for finding in migrations)
            of_catalog = [*check_schema_objects(parts, served=statements_by_index(), unapplied=unapplied)]
            findings += of_catalog
            findings += _search_index(connection)
            for name in roles:
                findings += _privileges(connection, name)
            findings += _row_security(connection, roles)
            findings += _owners(connection)
            findings += _clock(connection)
            if is_distributed(connection):
                detail = "the tables are distributed: how scattered messages are and the plans were not checked"
                findings.append(Finding("Citus", NOTE, detail))
            else:
                findings += _locality(connection)
                findings += _statements(connection, suffer=any(map(is_wrong, of_catalog)))
        else:
            findings.append(Finding("schema chatdb", MISSING, "the database has no chatdb tables", "chatdb migrate"))
    findings += check_replicas(dsn, replicas)
    return sorted(findings, key=is_wrong)


def is_wrong(finding: Finding) -> bool:
    """Return whether the finding needs a fix."""
    return finding.state in {MISSING, DIFFERENT}


def _server(connection: psycopg.Connection) -> Iterator[Finding]:
    major = connection.info.server_version // 10_000
    version = f"PostgreSQL {fetch_value(connection, 'show server_version')}"
    encoding = fetch_value(connection, "show server_encoding")
    if major < OLDEST:
        yield Finding("server", DIFFERENT, version, f"upgrade the server to PostgreSQL {OLDEST} or later")
    elif major > NEWEST:
        yield Finding("server", NOTE, f"{version}, which this release was not tested with")
    else:
        yield Finding("server", OK, version)
    yield Finding("extensions", OK, "none needed")
    if encoding == "UTF8":
        yield Finding("encoding", OK, "UTF8")
    else:
        hint = "create database ... encoding 'UTF8' template template0, and move the tables there"
        yield Finding("encoding", DIFFERENT, f"{encoding}, which cannot store every character", hint)
    isolation = fetch_value(connection, "show default_transaction_isolation")
    if isolation != "read committed":
        detail = f"{isolation} by default: concurrent appends to one conversation fail and are retried"
        hint = "change it for the role: alter role ... set default_transaction_isolation = 'read committed'"
        yield Finding("isolation", NOTE, detail, hint)
    if fetch_value(connection, "show default_transaction_read_only") == "on":
        yield Finding("read only", NOTE, "default_transaction_read_only is on: the server rejects writes")
    if fetch_value(connection, "select pg_catalog.pg_is_in_recovery()"):
        yield Finding("standby", NOTE, "the server is a standby, which rejects writes")


def _row_security(connection: psycopg.Connection, roles: list[str]) -> list[Finding]:
    """Return the state of row-level security, and to which of the roles it applies."""
    what = "row-level security"
    try:
        tables = read_protection(connection)
        if not any(table.is_on or table.is_forced or table.policy for table in tables):
            return [Finding(what, OK, "off")]
        if any(table.is_on and table.is_forced and not table.policy and not table.others for table in tables):
            return [Finding(what, DIFFERENT, "on without a policy: no row is visible", "chatdb protect")]
        if not any(table.policy for table in tables):
            return [Finding(what, NOTE, "on, but without chatdb's policies")]
        if missing_function(connection) or any(map(missing_statements, tables)):
            return [Finding(what, DIFFERENT, "only partly set up", "chatdb protect")]
    except SchemaError:  # the missing table is a finding of its own
        return []
    except ConfigurationError as error:
        return [Finding(what, DIFFERENT, str(error), "drop the policy, or run chatdb protect --off")]
    statement = "select rolname, rolsuper or rolbypassrls from pg_catalog.pg_roles where rolname = any(%s)"
    return [
        Finding(f"{what} for {name}", NOTE, "on, but the role bypasses it: a superuser, or has BYPASSRLS")
        if is_above
        else Finding(f"{what} for {name}", OK, "on: a transaction sees only the rows of the user that it names")
        for name, is_above in connection.execute(statement, [roles])
    ]


def _search_index(connection: psycopg.Connection) -> list[Finding]:
    try:
        return [*check_search_index(read_search_index(connection))]
    except SchemaError:  # the missing table is a finding of its own
        return []


def _owners(connection: psycopg.Connection) -> Iterator[Finding]:
    """Yield objects that an untrusted role owns, and a host's additions to chatdb's tables."""
    may_create = may_create_schemas(connection)
    foreign = foreign_objects(connection)
    for what, owner in foreign:
        # a service's role cannot tell which owner the schema should have
        state = DIFFERENT if may_create or not what.startswith("schema ") else NOTE
        detail = f"the role {owner}, which can change it and run code of its own when other roles use it"
        yield Finding(f"owner of {what}", state, detail, f"inspect it, then: alter {what} owner to ...")
    if not foreign:
        yield Finding("owners", OK, "the schema chatdb and all objects in it belong to its owner")
    for what, detail in host_objects(connection):
        yield Finding(what, NOTE, detail)
    if public_is_writable(connection):
        detail = "every role may create functions in it, which other roles' statements can call by mistake"
        yield Finding("schema public", NOTE, detail, "revoke create on schema public from public")


def _clock(connection: psycopg.Connection) -> list[Finding]:
    """Return a note if conversations are ahead of the server's clock."""
    try:
        with connection.transaction():
            connection.execute("set local statement_timeout = '5s'")
            if fetch_value(connection, "select pg_catalog.row_security_active('chatdb.conversations')"):
                return []
            ahead = fetch_value(
                connection,
                "select pg_catalog.count(*) from chatdb.conversations "
                "where updated_at > pg_catalog.now() + interval '5 minutes'",
            )
    except (errors.QueryCanceled, errors.InsufficientPrivilege, errors.UndefinedTable, errors.UndefinedColumn):
        return []
    if not ahead:
        return []
    detail = f"{ahead} conversations are ahead of the server's clock, so messages appended to them get a future time"
    hint = (
        "update chatdb.messages set created_at = pg_catalog.now() where created_at > pg_catalog.now(); "
        "update chatdb.conversations set updated_at = pg_catalog.now() where updated_at > pg_catalog.now()"
    )
    return [Finding("clock", NOTE, detail, hint)]


def _locality(connection: psycopg.Connection) -> list[Finding]:
    """Return how scattered the messages are, except where this role cannot know, and what a killed pg_repack left."""
    unknown = (
        *(errors.QueryCanceled, errors.InsufficientPrivilege, errors.FeatureNotSupported),
        *(errors.UndefinedTable, errors.UndefinedColumn),
    )
    leftovers, scatter = Leftovers((), is_running=False), None
    with suppress(*unknown), connection.transaction():
        connection.execute("set local statement_timeout = '5s'")
        leftovers = read_leftovers(connection)
        if not fetch_value(connection, _ROW_SECURITY):
            scatter = read_scatter(connection)
    return [*check_locality(scatter, leftovers)]


_ROW_SECURITY = """
    select pg_catalog.row_security_active('chatdb.conversations')
        or pg_catalog.row_security_active('chatdb.messages')
"""


def _pooler(dsn: str, connection: psycopg.Connection) -> Finding:
    if is_pooled(dsn, connection):
        detail = "the connection goes through a transaction pooler: a service can work through it"
        return Finding("pooler", NOTE, detail, "for chatdb migrate, set CHATDB_MIGRATE_URL to a direct connection")
    return Finding("pooler", OK, "none in transaction mode")


def _search_paths(connection: psycopg.Connection, own: str, role: str | None) -> list[Finding]:
    """Return a finding for each search_path that names pg_catalog after another schema."""
    default = "select reset_val from pg_catalog.pg_settings where name = 'search_path'"
    paths = {own: fetch_value(connection, default)}
    if role is not None:
        # a login gets the most specific setting; not every role can see the server's own
        rows = connection.execute(
            """
            select pg_catalog.substr(p.setting, pg_catalog.strpos(p.setting, '=') + 1)
            from pg_catalog.pg_db_role_setting as s
            cross join pg_catalog.unnest(s.setconfig) as p (setting)
            where s.setdatabase in (
                  0, (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
              )
              and s.setrole in (0, (select oid from pg_catalog.pg_roles where rolname = %s))
              and p.setting like 'search_path=%%'
            order by s.setrole <> 0 desc, s.setdatabase <> 0 desc
            """,
            [role],
        ).fetchall()
        if rows:
            paths[role] = rows[0][0]
    return [
        Finding(
            f"search_path of {name}",
            DIFFERENT,
            f"{path}: a schema before pg_catalog can replace =, text and every other operator and type",
            "remove pg_catalog from it, or put it first: alter role ... set search_path = ...",
        )
        for name, path in paths.items()
        if "pg_catalog" in [schema.strip(' "').lower() for schema in str(path).split(",")][1:]
    ]


def _migrations(dsn: str, folder: Path | None) -> Iterator[Finding]:
    try:
        files = migration_files(folder)
    except ConfigurationError as error:
        yield Finding("migration files", DIFFERENT, str(error), "restore the file, or reinstall chatdb")
        return
    try:
        applied = applied_migrations(dsn, folder=folder)
    except ConfigurationError:
        yield Finding("migrations", NOTE, "this role may not read chatdb._chatdb_migration: run this as its owner")
        return
    for file in files:
        what = f"migration {file.name}"
        if file.name not in applied:
            yield Finding(what, MISSING, "not applied", "chatdb migrate")
        elif applied[file.name] is None:
            yield Finding(what, OK, "applied by yoyo, which records no checksum")
        elif applied[file.name] == file.checksum:
            yield Finding(what, OK, "applied as it was released")
        else:
            hint = "use the release that applied it, or roll it back with that release's chatdb rollback"
            yield Finding(what, DIFFERENT, "was applied with different content than this release's", hint)
    for name in sorted(applied.keys() - {file.name for file in files}):
        yield Finding(f"migration {name}", NOTE, "applied by another release, probably a newer one")


def _statements(connection: psycopg.Connection, *, suffer: bool) -> list[Finding]:
    """Return the findings on plans. If wrong tables make the plans `suffer`, one note replaces the problems."""
    findings = check_plans(connection)
    hurt = [finding.what.removeprefix("statement ") for finding in findings if is_wrong(finding)]
    if not suffer or not hurt:
        return findings
    detail = f"{len(hurt)} are affected by the problems of the tables: {', '.join(hurt)}"
    return [finding for finding in findings if not is_wrong(finding)] + [Finding("statements", NOTE, detail)]


def _privileges(connection: psycopg.Connection, role: str) -> list[Finding]:
    what = f"privileges of {role}"
    grantee = fetch_value(connection, "select pg_catalog.quote_ident(%s::text)", role)
    if fetch_value(connection, "select 1 from pg_catalog.pg_roles where rolname = %s", role) is None:
        return [Finding(what, MISSING, "the role does not exist", f"create role {grantee} login")]
    rows = connection.execute(
        """
        select c.relname, p.privilege, pg_catalog.has_table_privilege(%(role)s, c.oid, p.privilege)
        from pg_catalog.pg_class as c, pg_catalog.unnest(%(privileges)s::text[]) as p (privilege)
        where c.relnamespace = 'chatdb'::regnamespace and c.relname = any(%(tables)s)
        union all
        select null, 'usage', pg_catalog.has_schema_privilege(%(role)s, 'chatdb', 'usage')
        """,
        {"role": role, "privileges": PRIVILEGES, "tables": [*EXPECTED_SCHEMA]},
    )
    lacking: dict[str | None, list[str]] = defaultdict(list)
    for table, privilege, is_granted in rows:
        if not is_granted:
            lacking[table].append(privilege)
    if not lacking:
        detail = f"usage on the schema, {', '.join(PRIVILEGES)} on {', '.join(EXPECTED_SCHEMA)}"
        return [Finding(what, OK, detail)]
    return [
        Finding(
            what,
            MISSING,
            f"{', '.join(privileges)} on {table or 'the schema'}",
            f"grant {', '.join(privileges)} on {f'chatdb.{table}' if table else 'schema chatdb'} to {grantee}",
        )
        for table, privileges in lacking.items()
    ]
