-- create_conversation_messages
-- What sql/create_conversation_messages.sql does, in a database that has chatdb.create_conversation_v1.

select
    id, user_id, key, title, metadata, last_seq, head_seq, revision,
    created_at, updated_at, archived_at, pinned_at, refusal
from chatdb.create_conversation_v1(
    $1::text, $2::text, $3::text, $4::text, $5::bool, $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
    $11::text[]
)
