-- export_conversations_messages
-- Returns all messages of a user, grouped by conversation.
--
-- $1 user_id text
--
-- returns many Message
-- served by pk_messages

select
    id, conversation_id, user_id, seq, parent_seq, role, content, payload::text as payload,
    metadata::text as metadata, token_count, key, created_at
from chatdb.messages
where user_id = $1
order by conversation_id, seq
