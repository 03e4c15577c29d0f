-- extend_conversations
-- Updates last_seq and updated_at of conversations adopted in earlier batches or runs.

with fitting as (
    select conversation_id, pg_catalog.count(*) as messages
    from pg_temp.batch_messages
    where reason is null
    group by conversation_id
)

update chatdb.conversations as d
set last_seq = d.last_seq + coalesce(n.messages, 0), updated_at = greatest(d.updated_at, b.updated_at)
from pg_temp.batch_conversations as b
left join fitting as n on n.conversation_id = b.id
where d.user_id = b.user_id and d.id = b.id
  and b.is_adopted
  and (n.messages > 0 or b.updated_at > d.updated_at)
