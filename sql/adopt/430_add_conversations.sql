-- add_conversations
-- Adds the batch's new conversations.

insert into chatdb.conversations (id, user_id, last_seq, created_at, updated_at)
with fitting as (
    select conversation_id, pg_catalog.count(*) as messages
    from pg_temp.batch_messages
    where reason is null
    group by conversation_id
)

select b.id, b.user_id, coalesce(n.messages, 0) as last_seq, b.created_at, b.updated_at
from pg_temp.batch_conversations as b
left join fitting as n on n.conversation_id = b.id
where b.reason is null and not b.is_adopted
order by b.id
