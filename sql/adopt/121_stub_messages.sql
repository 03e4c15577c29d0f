-- stub_messages
-- Creates an empty table in place of the older system's messages, if those do not exist.

create temporary table original_messages (
    id bigint,
    conversation_id bigint,
    user_id text collate "C",
    role text,
    content text,
    created_at timestamptz
)
