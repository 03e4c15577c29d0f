-- list_conversations
-- Returns the first page of a user's conversations, latest activity first.
--
-- $1 user_id text
-- $2 row_limit int8
--
-- returns many Conversation
-- served by ix_conversations_user_id_active_on

select id, user_id, key, title, metadata::text as metadata, last_seq, created_at, updated_at
from chatdb.conversations
where user_id = $1
-- the index holds only active_on, the day of updated_at, so the rows are sorted within each day
order by active_on desc, updated_at desc, id desc
limit $2
