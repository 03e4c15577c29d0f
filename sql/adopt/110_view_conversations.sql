-- view_conversations
-- Makes a view of the older system's conversations that has one type for each column. The ids keep their type, so that
-- indexes on them are used.

create temporary view original_conversations as
select
    id,
    user_id::text collate "C" as user_id,
    created_at::timestamp at time zone 'UTC' as created_at,
    updated_at::timestamp at time zone 'UTC' as updated_at
from public.conversations
