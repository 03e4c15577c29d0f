-- verify_messages
-- The originals, each of which has to be adopted or kept aside, and not both; unless it was written since.

select
    pg_catalog.count(*) as originals,
    pg_catalog.count(*) filter (where a.id is not null) as adopted,
    pg_catalog.count(*) filter (where k.id is not null) as aside,
    pg_catalog.count(*) filter (where a.id is null and k.id is null) as remaining
from pg_temp.original_messages as m
left join chatdb_adopt.messages as a on a.id = m.id
left join chatdb_adopt.aside_messages as k on k.id = m.id
