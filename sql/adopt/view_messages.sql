-- view_messages
-- The older system's messages, with one type for each column. Ids keep theirs, by which indexes are found.

create temporary view original_messages as
select
    id,
    conversation_id,
    user_id::text collate "C" as user_id,
    role::text as role,
    content::text as content,
    created_at::timestamp at time zone 'UTC' as created_at
from public.messages
