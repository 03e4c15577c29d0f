-- stub_conversations
-- Creates an empty table in place of the older system's conversations, if those do not exist.

create temporary table original_conversations (
    id bigint,
    user_id text collate "C",
    created_at timestamptz,
    updated_at timestamptz
)
