"""The tables of openai-agents' SQLAlchemySession: agent_sessions and agent_messages."""

from __future__ import annotations

from typing import Final

from chatdb.formats import openai
from chatdb.formats.items import conversation_of, metadata_of
from chatdb.transfer.tables.source import Head, Row, Source

# A time without a zone is in the connection's TimeZone, as CURRENT_TIMESTAMP wrote it.
_ROWS: Final = """
with sessions as (
    select
        session_id,
        created_at::timestamptz at time zone 'UTC' as began_at,
        updated_at::timestamptz at time zone 'UTC' as ended_at
    from {agent_sessions}
    where %(sessions)s::text[] is null or session_id = any(%(sessions)s::text[])
),

messages as materialized (
    select
        session_id, id, created_at,
        created_at::timestamptz at time zone 'UTC' as written_at,
        pg_catalog.octet_length(message_data::text) as size
    from {agent_messages}
    where %(sessions)s::text[] is null or session_id = any(%(sessions)s::text[])
)

select
    session_id,
    coalesce(s.began_at, pg_catalog.min(m.written_at) over whole) as began_at,
    coalesce(s.ended_at, pg_catalog.max(m.written_at) over whole) as ended_at,
    pg_catalog.count(m.id) over whole,
    m.id, m.written_at, m.size
from sessions as s
full join messages as m using (session_id)
window whole as (partition by session_id)
order by began_at, session_id, m.created_at, m.id
"""
_TEXTS: Final = "select id, message_data::text from {agent_messages} where id = any(%s)"


def _head(row: Row) -> Head:
    key, metadata = conversation_of(openai.FRAMEWORK, row.session, openai.KEY_PREFIX)
    return Head(key, metadata=metadata_of(**metadata) if metadata else None)


SOURCE: Final = Source(
    name="openai-agents",
    tables=("agent_sessions", "agent_messages"),
    label="agent_messages",
    looked_for="agent_sessions and agent_messages on the search_path",
    rows=_ROWS,
    texts=_TEXTS,
    head=_head,
    parse=openai.parse_message,
    framework=openai.FRAMEWORK,
)
