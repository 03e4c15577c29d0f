-- find_deleted_messages
-- Finds the adopted messages that are no longer among the originals.

insert into pg_temp.deleted_upstream_messages (id, conversation_id)
select a.id, a.conversation_id
from chatdb_adopt.messages as a
where not exists (
    select from pg_temp.original_messages as m
    where m.id = a.id
)
