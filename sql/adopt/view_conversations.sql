-- view_conversations
-- The older system's conversations, with one type for each column. Ids keep theirs, by which indexes are found.

create temporary view original_conversations as
select
    id,
    user_id::text collate "C" as user_id,
    created_at::timestamp at time zone 'UTC' as created_at,
    updated_at::timestamp at time zone 'UTC' as updated_at
from public.conversations
