-- keep_conversations
-- Keeps the batch's conversations that do not fit aside.

insert into chatdb_adopt.aside_conversations as k (id, user_id, created_at, updated_at, reason)
select c.id, c.user_id, c.created_at, c.updated_at, b.reason
from pg_temp.batch_conversations as b
inner join pg_temp.original_conversations as c on c.id = b.id
where b.reason is not null
on conflict (id) do update
set user_id = excluded.user_id,
created_at = excluded.created_at,
updated_at = excluded.updated_at,
reason = excluded.reason
where (k.user_id, k.created_at, k.updated_at, k.reason)
    is distinct from (excluded.user_id, excluded.created_at, excluded.updated_at, excluded.reason)
