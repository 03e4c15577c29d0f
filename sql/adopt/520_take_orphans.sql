-- take_orphans
-- Loads the messages that are not adopted and whose conversation does not exist.

insert into pg_temp.batch_messages (id, conversation_id, user_id, role, content, created_at, reason)
select
    m.id, m.conversation_id, m.user_id, m.role, m.content, m.created_at,
    'its conversation is missing' as reason
from pg_temp.original_messages as m
where not exists (
    select from chatdb_adopt.messages as a
    where a.id = m.id
)
and not exists (
    select from pg_temp.original_conversations as c
    where c.id = m.conversation_id
)
