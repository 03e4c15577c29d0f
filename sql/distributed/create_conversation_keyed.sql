-- create_conversation_keyed
-- What sql/create_conversation_keyed.sql does, in a database that has chatdb.create_conversation_v1.

select
    id, user_id, key, title, metadata, last_seq, head_seq, revision,
    created_at, updated_at, archived_at, pinned_at
from chatdb.create_conversation_v1($1::text, $2::text, $3::text, $4::text, false, '{}', null, null, null, null, null)
