-- list_conversations_created
-- A page of a user's conversations in order of creation, latest first.
--
-- $1 user_id text
-- $2 after_created_at timestamptz null
-- $3 after_id int8 null
-- $4 after_key text null
-- $5 archived bool null    null for both
-- $6 row_limit int8
--
-- returns many Conversation, then an existence row: if the page is not full
-- served by ix_conversations_user_id_created_at_id, uq_conversations_user_id_key

with place as (
    select coalesce($2::timestamptz, 'infinity') as created_at, coalesce($3::int8, 9223372036854775807) as id
    where $4::text is null
    union all
    select created_at, id
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
      and ($5::bool is null or (archived_at is not null) = $5)
      and (created_at, id) < ((select created_at from place), (select id from place))
    order by created_at desc, id desc
    limit $6
)
union all
select null, null, null, null, null, null, null, null, null, null, null, null
from place
-- a full page ends before this branch is read
limit $6
