-- mark_renumbered
-- Marks conversations for renumbering: a new message precedes adopted ones, and every message in chatdb was adopted.

with early as materialized (
    select distinct b.id, b.user_id, b.last_seq
    from pg_temp.batch_conversations as b
    inner join pg_temp.batch_messages as m on m.conversation_id = b.id
    where b.is_adopted
      and b.last_seq = b.adopted_seq
      and m.reason is null
      and (m.created_at, m.id) < (b.last_created_at, b.last_id)
),

dense as (
    select e.id
    from early as e
    inner join chatdb.messages as d on d.user_id = e.user_id and d.conversation_id = e.id
    group by e.id, e.last_seq
    having pg_catalog.count(*) = e.last_seq
)

update pg_temp.batch_conversations as b
set is_renumbered = true
from dense as d
where d.id = b.id
