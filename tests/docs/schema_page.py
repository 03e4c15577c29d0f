"""Write docs/schema.md from a live database: `python -m tests.docs.schema_page` or `nox -s schema_page`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import psycopg

from chatdb.admin.migrate import apply_migrations
from chatdb.embedded.server import EmbeddedServer
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "schema.md"

HEAD = """# Schema

`nox -s schema_page` generates this page from a fully migrated database; a test compares the two. All tables are in the
PostgreSQL schema `chatdb`. Every key starts with `user_id`.

```mermaid
erDiagram
    conversations ||--o{ messages : "ON DELETE CASCADE"
"""


def page(connection: psycopg.Connection) -> str:
    """Return the page that describes the database's schema."""
    connection.execute("set search_path = ''")
    tables = _rows(
        connection,
        "select relname, obj_description(oid) from pg_catalog.pg_class "
        "where relnamespace = 'chatdb'::regnamespace and relkind = 'r' and relname <> '_chatdb_migration' "
        "order by relname",
    )
    parts = [HEAD]
    columns = {table: _columns(connection, table) for table, _ in tables}
    for table, _ in tables:
        parts.append(f"    {table} {{\n")
        parts += [
            f"        {kind.split()[0]} {name}{' ' + ', '.join(keys) if keys else ''}\n"
            for name, kind, _, _, keys, _ in columns[table]
        ]
        parts.append("    }\n")
    parts.append("```\n")
    for table, comment in tables:
        parts.append(f"\n## {table}\n\n{comment}\n\n| column | type | null | default | |\n|---|---|---|---|---|\n")
        parts += [
            f"| `{name}` | {kind} | {'' if not_null else 'null'} | {default or ''} | {text or ''} |\n"
            for name, kind, not_null, default, _, text in columns[table]
        ]
        parts.append("\n| constraint or index | |\n|---|---|\n")
        parts += [f"| `{name}` | {text} |\n" for name, text in _constraints(connection, table)]
        parts += [f"| `{name}` | {text} |\n" for name, text in _indexes(connection, table)]
    return "".join(parts)


def main() -> None:
    """Migrate a temporary database and write the page from it."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "server") as server:
        apply_migrations(server.dsn)
        with psycopg.connect(server.dsn) as connection:
            PAGE.write_text(page(connection), encoding="utf-8")


def _rows(connection: psycopg.Connection, statement: str, *arguments: str) -> list[tuple]:
    return connection.execute(statement.encode(), arguments or None).fetchall()


def _columns(connection: psycopg.Connection, table: str) -> list[tuple]:
    return _rows(
        connection,
        """
        select a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
            case when a.attidentity <> '' then 'identity'
                when a.attgenerated <> '' then 'generated: `' || pg_get_expr(d.adbin, d.adrelid) || '`'
                else '`' || pg_get_expr(d.adbin, d.adrelid) || '`' end,
            array(select distinct case c.contype when 'p' then 'PK' else 'FK' end from pg_catalog.pg_constraint as c
                where c.conrelid = a.attrelid and a.attnum = any(c.conkey) and c.contype in ('p', 'f') order by 1 desc),
            col_description(a.attrelid, a.attnum)
        from pg_catalog.pg_attribute as a
        left join pg_catalog.pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attrelid = ('chatdb.' || %s)::regclass and a.attnum > 0 and not a.attisdropped
        order by a.attnum
        """,
        table,
    )


def _constraints(connection: psycopg.Connection, table: str) -> list[tuple]:
    return _rows(
        connection,
        """
        select conname, '`' || pg_get_constraintdef(oid) || '`' from pg_catalog.pg_constraint
        where conrelid = ('chatdb.' || %s)::regclass and contype in ('c', 'f') order by contype desc, conname
        """,
        table,
    )


def _indexes(connection: psycopg.Connection, table: str) -> list[tuple]:
    return _rows(
        connection,
        """
        select c.relname,
            '`' || case when i.indisprimary then 'PRIMARY KEY ' when i.indisunique then 'UNIQUE ' else 'INDEX ' end
                || regexp_replace(pg_get_indexdef(c.oid), '^.* USING btree ', '') || '`. ' || obj_description(c.oid)
        from pg_catalog.pg_index as i inner join pg_catalog.pg_class as c on c.oid = i.indexrelid
        where i.indrelid = ('chatdb.' || %s)::regclass order by not i.indisprimary, c.relname
        """,
        table,
    )


if __name__ == "__main__":
    main()
