-- record_messages
-- Records the batch's messages as adopted.

insert into chatdb_adopt.messages (id, conversation_id, seq)
select id, conversation_id, seq
from pg_temp.batch_seqs
order by id
