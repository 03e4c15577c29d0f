-- move_messages
-- Renumbers the moved messages in two steps, because seq must be unique at every moment, and records their new seq.
-- Several statements.

update chatdb.messages as d
set seq = d.seq + 1099511627776
from pg_temp.batch_moves as v
where v.old_seq <> v.seq
  and d.user_id = v.user_id and d.conversation_id = v.conversation_id and d.seq = v.old_seq;

update chatdb.messages as d
set seq = v.seq
from pg_temp.batch_moves as v
where v.old_seq <> v.seq
  and d.user_id = v.user_id and d.conversation_id = v.conversation_id and d.seq = v.old_seq + 1099511627776;

update chatdb_adopt.messages as a
set seq = v.seq
from pg_temp.batch_moves as v
where v.old_seq <> v.seq and a.id = v.id;
