-- lock_conversations
-- Locks the batch's conversations in chatdb against appends, in a fixed order to prevent deadlocks. Fails early if an
-- append happened after the snapshot.

select d.id
from pg_temp.batch_conversations as b
inner join chatdb.conversations as d on d.user_id = b.user_id and d.id = b.id
where b.is_adopted
order by d.user_id, d.id
for update of d
