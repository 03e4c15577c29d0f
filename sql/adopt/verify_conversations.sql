-- verify_conversations
-- The originals, each of which has to be adopted or kept aside, and not both; unless it was written since.

select
    pg_catalog.count(*) as originals,
    pg_catalog.count(*) filter (where a.id is not null) as adopted,
    pg_catalog.count(*) filter (where k.id is not null) as aside,
    pg_catalog.count(*) filter (where a.id is null and k.id is null) as remaining,
    pg_catalog.count(*) filter (where c.user_id is distinct from a.user_id and a.id is not null) as changed
from pg_temp.original_conversations as c
left join chatdb_adopt.conversations as a on a.id = c.id
left join chatdb_adopt.aside_conversations as k on k.id = c.id
