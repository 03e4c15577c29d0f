-- list_conversations
-- The first page of a user's conversations, without the archived ones, latest activity first.
--
-- $1 user_id text
-- $2 row_limit int8
--
-- returns many Conversation
-- served by ix_conversations_user_id_active_on_listed

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
from chatdb.conversations
where user_id = $1 and archived_at is null
-- active_on follows from updated_at, but the index has only the day: within each one the rows are sorted
order by active_on desc, updated_at desc, id desc
limit $2
