-- get_conversation
-- Returns a conversation by its id.
--
-- $1 user_id text
-- $2 conversation_id int8
--
-- returns one Conversation
-- served by pk_conversations

select id, user_id, key, title, metadata::text as metadata, last_seq, created_at, updated_at
from chatdb.conversations
where user_id = $1 and id = $2
