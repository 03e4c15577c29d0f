-- verify_messages
-- Counts the original messages. Each must be either adopted or quarantined, unless it was written since.

select
    pg_catalog.count(*) as originals_messages,
    pg_catalog.count(*) filter (where a.id is not null) as adopted_messages,
    pg_catalog.count(*) filter (where q.id is not null) as quarantined_messages,
    pg_catalog.count(*) filter (where a.id is null and q.id is null) as remaining_messages,
    (
        select pg_catalog.count(*)
        from chatdb_adopt.messages
    ) - pg_catalog.count(*) filter (where a.id is not null) as deleted_upstream_messages
from pg_temp.original_messages as m
left join chatdb_adopt.messages as a on a.id = m.id
left join chatdb_adopt.quarantine_messages as q on q.id = m.id
