-- list_pinned
-- A user's pinned conversations that are not archived, latest pin first.
--
-- $1 user_id text
-- $2 row_limit int8
--
-- returns many Conversation
-- served by ix_conversations_user_id_pinned_at

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
from chatdb.conversations
where user_id = $1 and pinned_at is not null and archived_at is null
order by pinned_at desc, id desc
limit $2
