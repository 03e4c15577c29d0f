-- lock_deleted_upstream
-- Locks conversations with upstream deletions against appends.

select d.id
from chatdb_adopt.conversations as a
inner join chatdb.conversations as d on d.user_id = a.user_id and d.id = a.id
where a.id in (
    select id
    from pg_temp.deleted_upstream_conversations
    union all
    select conversation_id
    from pg_temp.deleted_upstream_messages
)
order by d.user_id, d.id
for update of d
