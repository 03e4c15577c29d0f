-- keep_messages
-- Keeps the batch's messages that do not fit aside.

insert into chatdb_adopt.aside_messages as k (id, conversation_id, user_id, role, content, created_at, reason)
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
where (k.conversation_id, k.user_id, k.role, k.content, k.created_at, k.reason)
    is distinct from (
        excluded.conversation_id, excluded.user_id, excluded.role, excluded.content, excluded.created_at,
        excluded.reason
    )
