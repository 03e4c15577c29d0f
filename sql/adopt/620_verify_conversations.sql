-- verify_conversations
-- Counts the original conversations. Each must be either adopted or quarantined, unless it was written since.

select
    pg_catalog.count(*) as originals_conversations,
    pg_catalog.count(*) filter (where a.id is not null) as adopted_conversations,
    pg_catalog.count(*) filter (where q.id is not null) as quarantined_conversations,
    pg_catalog.count(*) filter (where a.id is null and q.id is null) as remaining_conversations,
    (
        select pg_catalog.count(*)
        from chatdb_adopt.conversations
    ) - pg_catalog.count(*) filter (where a.id is not null) as deleted_upstream_conversations,
    pg_catalog.count(*) filter (where c.user_id is distinct from a.user_id and a.id is not null) as changed_users
from pg_temp.original_conversations as c
left join chatdb_adopt.conversations as a on a.id = c.id
left join chatdb_adopt.quarantine_conversations as q on q.id = c.id
