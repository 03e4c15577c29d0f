-- view_conversations
-- Creates a view of the older system's conversations with fixed column types. The ids keep their type, so that
-- the planner can use indexes on them.

create temporary view original_conversations as
select
    id,
    user_id::text collate "C" as user_id,
    created_at::timestamp at time zone 'UTC' as created_at,
    updated_at::timestamp at time zone 'UTC' as updated_at
from public.conversations
