-- list_conversations_all
-- A page of a user's conversations, the archived ones included, latest activity first.
--
-- $1 user_id text
-- $2 after_updated_at timestamptz null
-- $3 after_id int8 null
-- $4 after_key text null
-- $5 row_limit int8
--
-- returns many Conversation, then an existence row: if the page is not full
-- served by ix_conversations_user_id_active_on, uq_conversations_user_id_key

with place as (
    select coalesce($2::timestamptz, 'infinity') as updated_at, coalesce($3::int8, 9223372036854775807) as id
    where $4::text is null
    union all
    select updated_at, id
    from chatdb.conversations
    where user_id = $1 and key = $4
)

(
    select
        id, user_id, key, title, metadata::text as metadata, last_seq,
        case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
        created_at, updated_at, archived_at, pinned_at
    from chatdb.conversations
    where user_id = $1
      -- the index has only the day: it bounds the scan, and the pair finds the position within the day
      and active_on <= ((select updated_at from place) at time zone 'UTC')::date
      and (updated_at, id) < ((select updated_at from place), (select id from place))
    order by active_on desc, updated_at desc, id desc
    limit $5
)
union all
select null, null, null, null, null, null, null, null, null, null, null, null
from place
-- a full page ends before this branch is read
limit $5
