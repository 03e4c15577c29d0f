"""The table of langchain-postgres' PostgresChatMessageHistory, which can have any name."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from chatdb.errors import InvalidInputError
from chatdb.formats.items import name_of
from chatdb.formats.langchain import parse_message
from chatdb.transfer.tables.source import Head, Row, Source

_TABLES: Final = """
select table_schema::text, table_name::text
from information_schema.columns
where (column_name = 'session_id' and data_type = 'uuid') or (column_name = 'message' and data_type = 'jsonb')
   or column_name in ('id', 'created_at')
group by table_schema, table_name
having pg_catalog.count(*) = 4
order by table_schema, table_name
"""
_ROWS: Final = """
with messages as materialized (
    select
        session_id, id,
        created_at::timestamptz at time zone 'UTC' as written_at,
        pg_catalog.octet_length(message::text) as size
    from {table}
    where %(sessions)s::uuid[] is null or session_id = any(%(sessions)s::uuid[])
)

select
    session_id::text,
    pg_catalog.min(written_at) over whole as began_at,
    pg_catalog.max(written_at) over whole as ended_at,
    pg_catalog.count(*) over whole,
    id, written_at, size
from messages
window whole as (partition by session_id)
order by began_at, session_id, id
"""
_TEXTS: Final = "select id, message::text from {table} where id = any(%s)"


def _head(row: Row) -> Head:
    return Head(name_of(row.session))


def _check_session(session: str) -> str:
    try:
        return str(UUID(session))
    except ValueError:
        problem = "must be a UUID, as all langchain session IDs are"
    raise InvalidInputError("session", problem)


SOURCE: Final = Source(
    name="langchain",
    find=_TABLES,
    looked_for="tables with the columns id, session_id uuid, message jsonb, created_at",
    rows=_ROWS,
    texts=_TEXTS,
    head=_head,
    parse=parse_message,
    check_session=_check_session,
)
