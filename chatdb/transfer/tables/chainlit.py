"""The tables of Chainlit's official data layer: User, Thread, Step, Element and Feedback."""

from __future__ import annotations

import json
from typing import Any, Final

from chatdb._core.validate import MAX_TITLE
from chatdb.formats import chainlit, items
from chatdb.transfer.tables.source import Head, Row, Source, checked_metadata

_TABLES: Final = ("User", "Thread", "Step", "Element", "Feedback")

# Steps have times in UTC. The server writes the time of a thread, in the connection's TimeZone. Chainlit sorts steps by
# "startTime", which has milliseconds; "createdAt" is when a step was stored, which keeps the order of equal times.
_ROWS: Final = """
with threads as (
    select
        t.id,
        t."createdAt"::timestamptz at time zone 'UTC' as began_at,
        pg_catalog.jsonb_build_object('name', t.name, 'tags', t.tags, 'metadata', t.metadata)::text as about
    from {Thread} as t
    inner join {User} as u on u.id = t."userId"
    where
        u.identifier = %(user)s and t."deletedAt" is null
        and (%(sessions)s::text[] is null or t.id = any(%(sessions)s::text[]))
),

steps as materialized (
    select
        s.id, s."threadId", s."startTime" as written_at, s."createdAt" as stored_at,
        pg_catalog.octet_length(pg_catalog.to_jsonb(s)::text) + coalesce((
            select pg_catalog.sum(pg_catalog.octet_length(pg_catalog.to_jsonb(e)::text))
            from {Element} as e
            where e."stepId" = s.id
        ), 0) + coalesce((
            select pg_catalog.sum(pg_catalog.octet_length(pg_catalog.to_jsonb(f)::text))
            from {Feedback} as f
            where f."stepId" = s.id
        ), 0) as size
    from {Step} as s
    where s."threadId" in (select t.id from threads as t)
)

select
    t.id,
    t.began_at,
    greatest(t.began_at, pg_catalog.max(s.written_at) over whole),
    pg_catalog.count(s.id) over whole,
    s.id, s.written_at, s.size,
    case
        when pg_catalog.row_number() over (whole order by s.written_at, s.stored_at, s.id) = 1 then t.about
    end
from threads as t
left join steps as s on s."threadId" = t.id
window whole as (partition by t.id)
order by t.began_at, t.id, s.written_at, s.stored_at, s.id
"""
_TEXTS: Final = """
select
    s.id,
    (
        pg_catalog.to_jsonb(s)
        || coalesce((
            select pg_catalog.jsonb_build_object('feedback', pg_catalog.jsonb_agg(pg_catalog.to_jsonb(f) order by f.id))
            from {Feedback} as f
            where f."stepId" = s.id
            having pg_catalog.count(*) > 0
        ), '{{}}')
        || coalesce((
            select pg_catalog.jsonb_build_object('elements', pg_catalog.jsonb_agg(pg_catalog.to_jsonb(e) order by e.id))
            from {Element} as e
            where e."stepId" = s.id
            having pg_catalog.count(*) > 0
        ), '{{}}')
    )::text
from {Step} as s
where s.id = any(%s::text[])
"""


def _head(row: Row) -> Head:
    thread = items.as_object(json.loads(row.about or "{}")) or {}
    metadata = checked_metadata("metadata", chainlit.thread_metadata(row.session, thread))
    name = thread.get("name")
    return Head(chainlit.thread_key(row.session), name[:MAX_TITLE] if isinstance(name, str) else None, metadata)


def _step_id(row: Row, _step: dict[str, Any]) -> str:
    return items.name_of(row.id)


SOURCE: Final = Source(
    name="chainlit",
    tables=_TABLES,
    label="Step",
    looked_for=f"{', '.join(_TABLES)} on the search_path",
    rows=_ROWS,
    texts=_TEXTS,
    head=_head,
    parse=chainlit.parse_step,
    framework=chainlit.FRAMEWORK,
    key=_step_id,
    names_user=True,
)
