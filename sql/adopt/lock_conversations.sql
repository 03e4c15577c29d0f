-- lock_conversations
-- Keeps appends away from the batch's conversations that chatdb has. An append since the snapshot is an error here,
-- before the work is done, and the locks are taken in one order, so that two never wait for each other.

select d.id
from pg_temp.batch_conversations as b
inner join chatdb.conversations as d on d.user_id = b.user_id and d.id = b.id
where b.is_adopted
order by d.user_id, d.id
for update of d
