-- export_conversations
-- Returns all conversations of a user.
--
-- $1 user_id text
--
-- returns many Conversation
-- served by pk_conversations

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
from chatdb.conversations
where user_id = $1
order by id
