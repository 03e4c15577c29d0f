"""
Write docs/reference/schema.md and its diagram from a live database: `nox -s schema_page`.
"""

from __future__ import annotations

import tempfile
from html import escape
from pathlib import Path

import psycopg

from chatdb.admin.migrate import apply_migrations
from chatdb.embedded.server import EmbeddedServer
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "reference" / "schema.md"
DIAGRAM = ROOT / "docs" / "images" / "schema.svg"

HEAD = """# Schema

`nox -s schema_page` generates this page from a fully migrated database; a test compares the two. All tables are in the
PostgreSQL schema `chatdb`. Every key starts with `user_id`.

![The tables with their columns and keys: conversations have messages, and messages that are streaming have
parts](../images/schema.svg)
"""
ORDER = ("conversations", "messages", "message_parts")
"""The tables of the diagram. Each has a foreign key to the one before it."""


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
    for table, comment in tables:
        parts.append(f"\n## {table}\n\n{comment}\n\n| column | type | meaning |\n|---|---|---|\n")
        for name, kind, not_null, default, _, text in columns[table]:
            described = ", ".join([kind, *["null"] * (not not_null), *filter(None, [default])])
            parts.append(f"| `{name}` | {described} | {text or ''} |\n")
        parts.append("\nConstraints and indexes:\n\n")
        parts += [f"- `{name}`: {text}\n" for name, text in _constraints(connection, table)]
        parts += [f"- `{name}`: {text}\n" for name, text in _indexes(connection, table)]
    return "".join(parts)


def diagram(connection: psycopg.Connection) -> str:
    """Return an SVG with a box for each table, and an arrow for each foreign key."""
    width, row, gap, top = 290, 20, 90, 34
    parts: list[str] = []
    height = 0
    for number, table in enumerate(ORDER):
        columns = _columns(connection, table)
        left, box = 10 + number * (width + gap), top + row * len(columns) + 8
        height = max(height, box)
        parts.append(
            f'<rect x="{left}" y="10" width="{width}" height="{box}" rx="4" fill="#fff" stroke="#57606a"/>\n'
            f'<rect x="{left}" y="10" width="{width}" height="26" rx="4" fill="#dbe5ff" stroke="#57606a"/>\n'
            f'<text x="{left + 10}" y="28" font-weight="bold">{table}</text>\n'
        )
        for line, (name, kind, _, _, keys, _) in enumerate(columns):
            y = 10 + top + row * line + 12
            short = kind.replace("timestamp with time zone", "timestamptz")
            parts.append(
                f'<text x="{left + 10}" y="{y}">{escape(name)}</text>\n'
                f'<text x="{left + 140}" y="{y}" fill="#57606a">{escape(short)}</text>\n'
                f'<text x="{left + 235}" y="{y}" fill="#0550ae">{" ".join(keys)}</text>\n'
            )
        if number:
            parts.append(
                f'<path d="M {left} 60 H {left - gap + 4}" fill="none" stroke="#24292f" marker-end="url(#end)"/>\n'
                f'<text x="{left - gap / 2:g}" y="50" text-anchor="middle" font-size="11">cascade</text>\n'
                f'<text x="{left - 8}" y="76" text-anchor="end" font-size="11">0..n</text>\n'
                f'<text x="{left - gap + 8}" y="76" font-size="11">1</text>\n'
            )
    total = 20 + len(ORDER) * width + (len(ORDER) - 1) * gap
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height + 20}" width="{total}" '
        f'font-family="ui-monospace, monospace" font-size="13" fill="#24292f">\n'
        '<defs><marker id="end" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">'
        '<path d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Migrate a temporary database and write the page from it."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "server") as server:
        apply_migrations(server.dsn)
        with psycopg.connect(server.dsn) as connection:
            PAGE.write_text(page(connection), encoding="utf-8")
            DIAGRAM.write_text(diagram(connection), encoding="utf-8")


def _rows(connection: psycopg.Connection, statement: str, *arguments: str) -> list[tuple]:
    return connection.execute(statement.encode(), arguments or None).fetchall()


def _columns(connection: psycopg.Connection, table: str) -> list[tuple]:
    return _rows(
        connection,
        """
        select a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
            case when a.attidentity <> '' then 'identity'
                when a.attgenerated <> '' then 'generated: `' || pg_get_expr(d.adbin, d.adrelid) || '`'
                else 'default `' || pg_get_expr(d.adbin, d.adrelid) || '`' end,
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
