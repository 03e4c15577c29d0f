-- record_moves
-- The new seq of the messages that have moved.

update chatdb_adopt.messages as a
set seq = v.seq
from pg_temp.batch_moves as v
where v.old_seq <> v.seq and a.id = v.id
