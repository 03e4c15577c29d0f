-- start_message
-- What sql/start_message.sql does, in a database that has chatdb.start_message_v1.

select
    id, conversation_id, user_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
    created_at, refusal
from chatdb.start_message_v1($1::text, $2::int8, $3::text, $4::text, $5::text, $6::text, $7::int8)
