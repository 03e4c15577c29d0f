-- view_no_conversations
-- Stands for the older system's conversations where that table is not there.

create temporary table original_conversations (
    id bigint,
    user_id text collate "C",
    created_at timestamptz,
    updated_at timestamptz
)
