-- upsert_message
-- What sql/upsert_message.sql does, in a database that has chatdb.upsert_message_v1.

select id, conversation_id, seq, parent_seq, metadata, state, created_at, refusal
from chatdb.upsert_message_v1(
    $1::text, $2::int8, $3::text, $4::text, $5::text, $6::text, $7::text, $8::int4, $9::text, $10::int8, $11::int8
)
