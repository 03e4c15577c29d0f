-- export_user
-- A page of a user's conversations, in order of id.
--
-- $1 user_id text
-- $2 min_id int8
-- $3 row_limit int8
--
-- returns many Conversation
-- served by pk_conversations

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
from chatdb.conversations
where user_id = $1 and id >= $2
order by id
limit $3
