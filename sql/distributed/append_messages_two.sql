-- append_messages_two
-- What sql/append_messages_two.sql does, in a database that has chatdb.append_messages_v1.

select id, conversation_id, seq, parent_seq, metadata, state, created_at
from chatdb.append_messages_v1(
    $1::text, $2::int8, null, array[$3::text, $8::text], array[$4::text, $9::text], array[$5::text, $10::text],
    array[$6::text, $11::text], array[$7::int4::text, $12::int4::text], null, false, false, null, null, null, null, null
)
