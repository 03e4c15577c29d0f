-- stub_conversations
-- Stands in for the older system's conversations where that table does not exist.

create temporary table original_conversations (
    id bigint,
    user_id text collate "C",
    created_at timestamptz,
    updated_at timestamptz
)
