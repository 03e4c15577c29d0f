-- append_messages_conditional
-- What sql/append_messages_conditional.sql does, in a database that has chatdb.append_messages_v1.

select id, conversation_id, seq, parent_seq, metadata, token_count, key, state, created_at, refusal
from chatdb.append_messages_v1(
    $1::text, $2::int8, $3::text, $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::bool,
    $11::bool, $12::int8, $13::int8, $14::text, $15::text[], $16::int8
)
