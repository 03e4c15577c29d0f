-- append_message_conditional
-- What sql/append_message_conditional.sql does, in a database that has chatdb.append_messages_v1.

select id, conversation_id, seq, parent_seq, metadata, token_count, state, created_at, refusal
from chatdb.append_messages_v1(
    $1::text, $2::int8, $3::text, array[$4::text], array[$5::text], array[$6::text], array[$7::text],
    array[$8::int4::text], array[$9::text], false, $10::bool, $11::int8, $12::int8, $13::text, $14::text[], $15::int8
)
