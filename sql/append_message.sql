-- append_message
-- Appends a message to a conversation. Updating last_seq locks the row, so seq has no gaps and follows commit order.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 role text
-- $4 content text
-- $5 payload text null
-- $6 metadata text null
-- $7 token_count int4 null
--
-- returns one Message
-- served by pk_conversations

with conversation as (
    update chatdb.conversations
    -- greatest(), because statements may not get the row lock in the order in which they began
    set last_seq = last_seq + 1, updated_at = greatest(updated_at, pg_catalog.statement_timestamp())
    where user_id = $1 and id = $2
    returning user_id, id, last_seq, updated_at
)

insert into chatdb.messages (user_id, conversation_id, seq, role, content, payload, metadata, token_count, created_at)
select user_id, id, last_seq, $3, $4, $5::text::json, $6::text::jsonb, $7, updated_at
from conversation
returning
    id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
    token_count, key, created_at
