-- quarantine_batch
-- Quarantines the batch's invalid conversations and messages. Several statements.

insert into chatdb_adopt.quarantine_conversations as q (id, user_id, created_at, updated_at, reason)
select c.id, c.user_id, c.created_at, c.updated_at, b.reason
from pg_temp.batch_conversations as b
inner join pg_temp.original_conversations as c on c.id = b.id
where b.reason is not null
on conflict (id) do update
set user_id = excluded.user_id,
created_at = excluded.created_at,
updated_at = excluded.updated_at,
reason = excluded.reason
where (q.user_id, q.created_at, q.updated_at, q.reason)
    is distinct from (excluded.user_id, excluded.created_at, excluded.updated_at, excluded.reason);

insert into chatdb_adopt.quarantine_messages as q (id, conversation_id, user_id, role, content, created_at, reason)
select id, conversation_id, user_id, role, content, created_at, reason
from pg_temp.batch_messages
where reason is not null
on conflict (id) do update
set conversation_id = excluded.conversation_id,
user_id = excluded.user_id,
role = excluded.role,
content = excluded.content,
created_at = excluded.created_at,
reason = excluded.reason
where (q.conversation_id, q.user_id, q.role, q.content, q.created_at, q.reason)
    is distinct from (
        excluded.conversation_id, excluded.user_id, excluded.role, excluded.content, excluded.created_at,
        excluded.reason
    );
