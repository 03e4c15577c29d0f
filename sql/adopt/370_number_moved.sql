-- number_moved
-- Numbers the new messages of renumbered conversations.

insert into pg_temp.batch_seqs (id, conversation_id, seq, is_late)
select id, conversation_id, seq, false as is_late
from pg_temp.batch_moves
where old_seq is null
