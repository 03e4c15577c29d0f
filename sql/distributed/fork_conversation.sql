-- fork_conversation
-- What sql/fork_conversation.sql does, in a database that has chatdb.fork_conversation_v1.

select
    id, user_id, key, title, metadata, last_seq, head_seq, revision,
    created_at, updated_at, archived_at, pinned_at, refusal
from chatdb.fork_conversation_v1($1::text, $2::int8, $3::text, $4::int8, $5::text, $6::text)
