-- record_messages
-- The batch's messages that have been adopted.

insert into chatdb_adopt.messages (id, conversation_id, seq)
select id, conversation_id, seq
from pg_temp.batch_places
order by id
