-- replace_messages_after
-- What sql/replace_messages_after.sql does, in a database that has chatdb.replace_messages_after_v1.

select id, conversation_id, seq, parent_seq, metadata, token_count, key, state, created_at, refusal
from chatdb.replace_messages_after_v1(
    $1::text, $2::int8, $3::text, $4::int8, $5::int8, $6::int8, $7::text[], $8::text[], $9::text[], $10::text[],
    $11::text[], $12::text[]
)
