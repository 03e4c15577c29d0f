-- lock_gone
-- Keeps appends away from the conversations of which something is gone.

select d.id
from chatdb_adopt.conversations as a
inner join chatdb.conversations as d on d.user_id = a.user_id and d.id = a.id
where a.id in (
    select id
    from pg_temp.gone_conversations
    union all
    select conversation_id
    from pg_temp.gone_messages
)
order by d.user_id, d.id
for update of d
