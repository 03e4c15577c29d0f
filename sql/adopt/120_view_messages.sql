-- view_messages
-- Creates a view of the older system's messages with fixed column types. The ids keep their type, so that the
-- planner can use indexes on them.

create temporary view original_messages as
select
    id,
    conversation_id,
    user_id::text collate "C" as user_id,
    role::text as role,
    content::text as content,
    created_at::timestamp at time zone 'UTC' as created_at
from public.messages
