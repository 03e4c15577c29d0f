-- stub_conversations
-- Replaces the older system's conversations table if it does not exist.

create temporary table original_conversations (
    id bigint,
    user_id text collate "C",
    created_at timestamptz,
    updated_at timestamptz
)
