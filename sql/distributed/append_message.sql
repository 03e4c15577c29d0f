-- append_message
-- What sql/append_message.sql does, in a database that has chatdb.append_messages_v1.

select id, conversation_id, seq, parent_seq, metadata, state, created_at
from chatdb.append_messages_v1(
    $1::text, $2::int8, $3::text, array[$4::text], array[$5::text], array[$6::text], array[$7::text],
    array[$8::int4::text], null, false, false, null, null, null, null, null
)
