"""The tables of DatabaseSessionService of Google's ADK: sessions and events, user_states and app_states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from chatdb.errors import InvalidInputError
from chatdb.formats import google_adk, items
from chatdb.transfer.tables.source import Execute, Head, Row, Source, checked_metadata

_TABLES: Final = ("sessions", "events", "user_states", "app_states", "adk_internal_metadata")

# The columns are those of schema 1, whose times are in UTC. A session is [app, id] as JSON; a message is found by its
# ctid, because the ids of events are unique only in their session. The columns of an event win over its JSON, as they
# do when ADK reads it.
_ROWS: Final = """
with wanted as (
    select app_name, id as session_id, state, create_time as began_at, update_time as ended_at
    from {sessions}
    where user_id = %(user)s and (%(sessions)s::text[] is null or id = any(%(sessions)s::text[]))
)

select
    pg_catalog.json_build_array(s.app_name, s.session_id)::text,
    s.began_at, s.ended_at,
    pg_catalog.count(e.id) over whole,
    e.ctid::text, e.timestamp,
    case when e.id is not null then pg_catalog.octet_length(coalesce(e.event_data, '{{}}')::text) end,
    case when pg_catalog.row_number() over (whole order by e.timestamp, e.id) = 1 then s.state::text end
from wanted as s
left join {events} as e
    on e.user_id = %(user)s and e.app_name = s.app_name and e.session_id = s.session_id
window whole as (partition by s.app_name, s.session_id)
order by s.began_at, s.app_name, s.session_id, e.timestamp, e.id
"""
_TEXTS: Final = """
select
    e.ctid::text,
    (
        pg_catalog.jsonb_build_object('timestamp', extract(epoch from e.timestamp)) || coalesce(e.event_data, '{{}}')
        || pg_catalog.jsonb_build_object('id', e.id, 'invocation_id', e.invocation_id)
    )::text
from {events} as e
where e.ctid = any(%s::pg_catalog.tid[])
"""
_STATES: Final = """
select app_name, state::text from {user_states} where user_id = %(user)s
union all
select app_name, state::text from {app_states} where %(user)s = %(app_owner)s
order by 1
"""
_IS_A_USER: Final = """
select pg_catalog.count(*) > 0
from (
    select user_id from {sessions}
    union all
    select user_id from {user_states}
) as users
where user_id = %(user)s
"""
_VERSION: Final = "select value from {adk_internal_metadata} where key = 'schema_version'"


def _shared_states(execute: Execute, user: str | None, has_sessions: bool) -> Iterator[items.Item]:
    """Check the version of the tables, and yield the states that a user's sessions share, unless some are chosen."""
    if [*execute(_VERSION, {})] != [("1",)]:
        problem = "does not have google-adk's schema 1: run `adk migrate session` of google-adk first"
        raise InvalidInputError("table", problem)
    # its sessions would be of no user, and its state would become that of all
    if user == google_adk.APP_OWNER and [*execute(_IS_A_USER, {"user": user})] == [(True,)]:
        problem = f"is the owner of the app: state, but ADK's tables have a user {user}: rename that user there first"
        raise InvalidInputError("user_id", problem)
    if has_sessions:
        return
    for app, state in execute(_STATES, {"user": user, "app_owner": google_adk.APP_OWNER}):
        values = _values(state)
        if not values:
            continue
        try:
            metadata = checked_metadata("state", google_adk.state_patch(values))
        except items.UnsupportedItemError as error:
            yield items.Skipped(str(error), conversations=1)
            continue
        key = google_adk.KEY_PREFIX + google_adk.session_name(app, "")
        yield items.SourceConversation(key, None, metadata, 0, None, None, items.UNKNOWN_TIME)


def _values(state: str | None) -> dict[str, Any]:
    return items.as_object(json.loads(state or "{}")) or {}


def _head(row: Row) -> Head:
    app, session_id = json.loads(row.session)
    metadata = google_adk.session_metadata(app, session_id, _values(row.about))
    key = google_adk.KEY_PREFIX + google_adk.session_name(app, session_id)
    return Head(key, metadata=checked_metadata("state", metadata))


def _session_id(session: str) -> str:
    _, session_id = json.loads(session)
    return str(session_id)


def _event_id(_row: Row, event: dict[str, Any]) -> str:
    return items.name_of(event["id"])


SOURCE: Final = Source(
    name="google-adk",
    tables=_TABLES,
    label="adk_internal_metadata",
    looked_for=f"{', '.join(_TABLES)} on the search_path",
    rows=_ROWS,
    texts=_TEXTS,
    head=_head,
    parse=google_adk.parse_event,
    framework=google_adk.FRAMEWORK,
    key=_event_id,
    session_id=_session_id,
    names_user=True,
    keeps_empty=True,
    before=_shared_states,
)
