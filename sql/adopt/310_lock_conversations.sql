-- lock_conversations
-- Locks the batch's conversations that chatdb has against appends. After an append since the snapshot this fails,
-- before the work is done. The locks are taken in one order, so that two transactions never wait for each other.

select d.id
from pg_temp.batch_conversations as b
inner join chatdb.conversations as d on d.user_id = b.user_id and d.id = b.id
where b.is_adopted
order by d.user_id, d.id
for update of d
