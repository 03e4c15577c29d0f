-- move_away
-- Takes the messages that move to where no seq is, because each has to be unique at any moment.

update chatdb.messages as d
set seq = d.seq + 1099511627776
from pg_temp.batch_moves as v
where v.old_seq <> v.seq
  and d.user_id = v.user_id and d.conversation_id = v.conversation_id and d.seq = v.old_seq
