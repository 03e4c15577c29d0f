-- record_conversations
-- Records the batch's conversations as adopted, with their last adopted message.

insert into chatdb_adopt.conversations as a (id, user_id, updated_at, last_seq, last_created_at, last_id)
with fitting as (
    select
        conversation_id, created_at, id,
        pg_catalog.count(*) over (partition by conversation_id) as messages,
        pg_catalog.row_number() over (partition by conversation_id order by created_at desc, id desc) as rank
    from pg_temp.batch_messages
    where reason is null
)

select
    b.id, b.user_id, b.updated_at, coalesce(f.messages, 0) as last_seq, f.created_at as last_created_at, f.id as last_id
from pg_temp.batch_conversations as b
left join fitting as f on f.conversation_id = b.id and f.rank = 1
where b.reason is null
on conflict (id) do update
set updated_at = excluded.updated_at,
last_seq = a.last_seq + excluded.last_seq,
last_created_at = case
    when coalesce((excluded.last_created_at, excluded.last_id) < (a.last_created_at, a.last_id), false)
        then a.last_created_at
    else coalesce(excluded.last_created_at, a.last_created_at)
end,
last_id = case
    when coalesce((excluded.last_created_at, excluded.last_id) < (a.last_created_at, a.last_id), false)
        then a.last_id
    else coalesce(excluded.last_id, a.last_id)
end
