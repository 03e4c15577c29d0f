-- add_messages
-- Adds the batch's valid messages, grouped by conversation.

insert into chatdb.messages (id, conversation_id, user_id, seq, role, content, created_at)
select m.id, m.conversation_id, m.user_id, p.seq, m.role, m.content, m.created_at
from pg_temp.batch_messages as m
inner join pg_temp.batch_seqs as p on p.id = m.id
order by p.conversation_id, p.seq
