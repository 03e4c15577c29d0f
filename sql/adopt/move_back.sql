-- move_back
-- Takes the messages that move to their new seq.

update chatdb.messages as d
set seq = v.seq
from pg_temp.batch_moves as v
where v.old_seq <> v.seq
  and d.user_id = v.user_id and d.conversation_id = v.conversation_id and d.seq = v.old_seq + 1099511627776
