-- get_conversation_by_key
-- Returns a conversation by its key.
--
-- $1 user_id text
-- $2 key text
--
-- returns one Conversation
-- served by uq_conversations_user_id_key

select id, user_id, key, title, metadata::text as metadata, last_seq, created_at, updated_at
from chatdb.conversations
where user_id = $1 and key = $2
