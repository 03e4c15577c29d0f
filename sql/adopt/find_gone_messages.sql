-- find_gone_messages
-- The messages that have been adopted and are gone from the originals.

insert into pg_temp.gone_messages (id, conversation_id)
select a.id, a.conversation_id
from chatdb_adopt.messages as a
where not exists (
    select from pg_temp.original_messages as m
    where m.id = a.id
)
