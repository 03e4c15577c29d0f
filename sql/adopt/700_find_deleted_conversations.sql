-- find_deleted_conversations
-- Finds the adopted conversations that are no longer among the originals.

insert into pg_temp.deleted_upstream_conversations (id)
select a.id
from chatdb_adopt.conversations as a
where not exists (
    select from pg_temp.original_conversations as c
    where c.id = a.id
)
