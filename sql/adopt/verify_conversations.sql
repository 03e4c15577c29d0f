-- verify_conversations
-- The originals, each of which has to be adopted or kept aside, and not both; unless it was written since.

select
    count(*) as originals,
    count(*) filter (where a.id is not null) as adopted,
    count(*) filter (where k.id is not null) as aside,
    count(*) filter (where a.id is null and k.id is null) as remaining,
    count(*) filter (where c.user_id is distinct from a.user_id and a.id is not null) as changed
from pg_temp.original_conversations as c
left join chatdb_adopt.conversations as a on a.id = c.id
left join chatdb_adopt.aside_conversations as k on k.id = c.id
