-- view_messages
-- Makes a view of the older system's messages that has one type for each column. The ids keep their type, so that
-- indexes on them are used.

create temporary view original_messages as
select
    id,
    conversation_id,
    user_id::text collate "C" as user_id,
    role::text as role,
    content::text as content,
    created_at::timestamp at time zone 'UTC' as created_at
from public.messages
