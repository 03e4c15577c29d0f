-- find_gone_conversations
-- The conversations that have been adopted and are gone from the originals.

insert into pg_temp.gone_conversations (id)
select a.id
from chatdb_adopt.conversations as a
where not exists (
    select from pg_temp.original_conversations as c
    where c.id = a.id
)
