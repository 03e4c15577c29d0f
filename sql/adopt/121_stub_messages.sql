-- stub_messages
-- Replaces the older system's messages table if it does not exist.

create temporary table original_messages (
    id bigint,
    conversation_id bigint,
    user_id text collate "C",
    role text,
    content text,
    created_at timestamptz
)
