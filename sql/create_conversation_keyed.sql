-- create_conversation_keyed
-- The user's conversation with this key: the stored one, unchanged, otherwise a new one.
-- No row if another caller stored the key after this statement began: run it again.
--
-- $1 user_id text
-- $2 title text null
-- $3 metadata text null
-- $4 key text
--
-- returns many Conversation
-- served by uq_conversations_user_id_key

with stored as (
    select
        id, user_id, key, title, metadata, last_seq, head_seq, head_last_seq, edits, created_at, updated_at,
        archived_at, pinned_at
    from chatdb.conversations
    where user_id = $1 and key = $4
),

created as (
    insert into chatdb.conversations (user_id, title, metadata, key)
    select $1, $2, $3::text::jsonb, $4
    where not exists (select from stored)
    on conflict (user_id, key) where key is not null do nothing
    returning
        id, user_id, key, title, metadata, last_seq, head_seq, head_last_seq, edits, created_at, updated_at,
        archived_at, pinned_at
)

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
from stored
union all
select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
from created
