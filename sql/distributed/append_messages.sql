-- append_messages
-- What sql/append_messages.sql does, in a database that has chatdb.append_messages_v1.

select id, conversation_id, seq, parent_seq, metadata, state, created_at
from chatdb.append_messages_v1(
    $1::text, $2::int8, $3::text, $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], null, false, false, null,
    null, null, null, null
)
