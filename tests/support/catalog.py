"""The catalog of a migrated database, for the drift checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import psycopg
from psycopg import sql
from psycopg.pq import ExecStatus

from chatdb._core.query import data_folder
from tests.support.sqlfiles import Columns, SqlFile

DATA = """
    insert into chatdb.conversations (user_id, id, key, updated_at, last_seq, archived_at, pinned_at)
    select 'user ' || u, n * 100 + u, 'key ' || n, now() - n * interval '3 hours', 3,
        case n % 2 when 0 then now() end, case n % 4 when 0 then null else now() - n * interval '1 hour' end
    from generate_series(1, 150) as n, generate_series(1, 20) as u;

    insert into chatdb.messages (user_id, conversation_id, seq, role, key, content, created_at)
    select user_id, id, n, 'user', 'key ' || n, 'hello', updated_at
    from chatdb.conversations, generate_series(1, 3) as n;

    update chatdb.messages set state = 'streaming', content = '' where conversation_id % 500 < 20 and seq = 3;

    insert into chatdb.message_parts (
        user_id, conversation_id, seq, start, content, length, bytes, last_start, last_start_bytes, flushed_at
    )
    select user_id, conversation_id, seq, -1, '', 100, 100, 95, 95, created_at
    from chatdb.messages
    where state = 'streaming';

    insert into chatdb.message_parts (user_id, conversation_id, seq, start, content)
    select user_id, conversation_id, seq, n, 'hello'
    from chatdb.messages, generate_series(0, 95, 5) as n
    where state = 'streaming';

    analyze chatdb.conversations, chatdb.messages, chatdb.message_parts;

    -- as on an SSD; with the default, the choice of an index depends on the server's settings
    set random_page_cost = 1.1;
"""
"""Enough rows for realistic plans."""


class Live:
    """A live database. Catalog queries are cached: create another `Live` after a change."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection

    def rows(self, statement: str) -> list[Any]:
        """Run a statement and return its rows."""
        return self.connection.execute(statement).fetchall()

    @cached_property
    def columns(self) -> Columns:
        """The columns of each table, with type and NOT NULL."""
        rows = self.rows(
            """
            select relnamespace::regnamespace::text, relname, attname, format_type(atttypid, atttypmod), attnotnull
            from pg_class join pg_attribute on attrelid = pg_class.oid and attnum > 0 and not attisdropped
            where relkind = 'r' and relnamespace in ('chatdb'::regnamespace, 'pg_catalog'::regnamespace)
                and relname <> '_chatdb_migration'
            """
        )
        found: Columns = defaultdict(dict)
        for schema, table, column, kind, not_null in rows:
            found[schema, table][column] = (kind, not_null)
        return found

    @cached_property
    def indexes(self) -> dict[str, tuple[str, bool]]:
        """The valid indexes, with table and uniqueness."""
        rows = self.rows(
            """
            select i.relname, t.relname, indisunique
            from pg_index join pg_class i on i.oid = indexrelid join pg_class t on t.oid = indrelid
            where i.relnamespace = 'chatdb'::regnamespace and indisvalid and t.relname <> '_chatdb_migration'
            """
        )
        return {name: (table, unique) for name, table, unique in rows}

    @cached_property
    def comments(self) -> dict[str, str | None]:
        """The comments of tables and indexes."""
        rows = self.rows(
            r"""
            select relname, obj_description(oid, 'pg_class') from pg_class
            where relnamespace = 'chatdb'::regnamespace and relkind in ('r', 'p', 'i', 'I')
                and relname not like '\_chatdb\_%'
            """
        )
        return dict(rows)

    @cached_property
    def constraints(self) -> dict[str, tuple[list[str], str]]:
        """The constraints except NOT NULL, with columns and definition without parentheses."""
        rows = self.rows(
            r"""
            select conname,
                array(select attname::text from pg_attribute where attrelid = conrelid and attnum = any(conkey)),
                trim(regexp_replace(pg_get_constraintdef(oid), '(CHECK|[()]|::text|\s)+', ' ', 'g'))
            from pg_constraint
            where connamespace = 'chatdb'::regnamespace and contype <> 'n'
                and conrelid <> coalesce(to_regclass('chatdb._chatdb_migration'), 0)
            """
        )
        return {name: (columns, definition) for name, columns, definition in rows}

    def described(self, statement: str) -> tuple[list[str], list[tuple[str, str, bool | None]]]:
        """
        Return the types of a statement's parameters, and the name, type and NOT NULL of each result column.

        NOT NULL is None where the server reports no origin, as for an expression or a UNION.
        """
        libpq = self.connection.pgconn
        result = libpq.prepare(b"", statement.encode())
        assert result.status == ExecStatus.COMMAND_OK, result.get_error_message()
        result = libpq.describe_prepared(b"")
        places = range(result.nfields)
        names = [(result.fname(place) or b"").decode() for place in places]
        kinds = [self._type(result.ftype(place)) for place in places]
        origins = [self._not_null.get((result.ftable(place), result.ftablecol(place))) for place in places]
        parameters = [self._type(result.param_type(place)) for place in range(result.nparams)]
        return parameters, list(zip(names, kinds, origins, strict=True))

    @cached_property
    def _not_null(self) -> dict[tuple[int, int], bool]:
        rows = self.rows("select attrelid, attnum, attnotnull from pg_attribute where attnum > 0")
        return {(table, column): not_null for table, column, not_null in rows}

    def _type(self, oid: int) -> str:
        info = self.connection.adapters.types[oid]
        return f"{info.name}[]" if oid == info.array_oid else info.name

    def plan(self, file: SqlFile) -> list[dict[str, Any]]:
        """Return the nodes of a statement's generic plan."""
        return self._explained("format json", file, ["null"] * len(file.parameters))

    def executed(self, file: SqlFile, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Run a statement's generic plan with these values of its parameters, undo it, and return the plan's nodes."""
        arguments = [sql.Literal(values.get(each.name)).as_string(self.connection) for each in file.parameters]
        with self.connection.transaction(force_rollback=True):
            return self._explained("analyze, format json", file, arguments)

    def _explained(self, options: str, file: SqlFile, arguments: list[str]) -> list[dict[str, Any]]:
        self.connection.execute("set plan_cache_mode = force_generic_plan")
        self.connection.execute(f"prepare drift as {file.sql}")
        listed = f"({', '.join(arguments)})" if arguments else ""
        ((plan,),) = self.rows(f"explain ({options}) execute drift {listed}")
        self.connection.execute("deallocate drift")
        return list(_nodes(plan[0]["Plan"]))


SEARCH_INDEX = (data_folder("sql") / "admin" / "create_search_index.sql").read_text(encoding="utf-8")
"""The statement of chatdb search-index create, without the extension that it needs."""


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)
