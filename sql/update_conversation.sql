-- update_conversation
-- Another title, metadata, archive or pin. The conversation keeps its place in the list: updated_at is the last
-- append's. The revision rises only if a value changes.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 set_title bool
-- $5 title text null
-- $6 set_metadata bool
-- $7 metadata text null
-- $8 metadata_patch text null    merged into the top level
-- $9 removed_keys text[] null
-- $10 archived bool null
-- $11 pinned bool null
-- $12 expected_id int8 null
-- $13 expected_revision int8 null
--
-- returns one Conversation
-- refuses with stale, again
-- served by pk_conversations, uq_conversations_user_id_key

-- in a WITH query, because Citus calls no function of the time in an update's CASE
with clock as (
    select pg_catalog.statement_timestamp() as now
),

changed as (
    update chatdb.conversations as c
    set title = case when $4::bool then $5 else title end,
        metadata = case
            when $6::bool then $7::text::jsonb
            when $8::text is not null
                then nullif((coalesce(metadata, '{}') || $8::text::jsonb) - $9::text[], '{}')
            else metadata
        end,
        archived_at = case
            when $10::bool then coalesce(archived_at, (select now from clock))
            when $10::bool is null then archived_at
        end,
        pinned_at = case
            when $11::bool then coalesce(pinned_at, (select now from clock))
            when $11::bool is null then pinned_at
        end,
        edits = edits + (
            ($4::bool and title is distinct from $5)
            or ($6::bool and metadata is distinct from $7::text::jsonb)
            or (
                $8::text is not null
                and metadata is distinct from
                nullif((coalesce(metadata, '{}') || $8::text::jsonb) - $9::text[], '{}')
            )
            or coalesce($10::bool <> (archived_at is not null), false)
            or coalesce($11::bool <> (pinned_at is not null), false)
        )::int
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
      and ($12::int8 is null or (id = $12 and last_seq + edits = $13::int8))
    returning
        id, user_id, key, title, metadata, last_seq, head_seq, head_last_seq, edits, created_at, updated_at,
        archived_at, pinned_at
)

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at, null as refusal
from changed
union all
select
    null, null, null, null, null, null, null, null, null, null, null, null,
    -- deleted or changed while this statement waited
    case when $12::int8 is null or (id = $12 and last_seq + edits = $13::int8) then 'again' else 'stale' end
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
  and not exists (select from changed)
