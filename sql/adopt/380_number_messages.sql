-- number_messages
-- Numbers the other new messages after the existing ones. A message that belongs before an existing one is marked late.

insert into pg_temp.batch_seqs (id, conversation_id, seq, is_late)
select
    m.id,
    m.conversation_id,
    coalesce(b.last_seq, 0) + pg_catalog.row_number() over (partition by b.id order by m.created_at, m.id) as seq,
    b.is_adopted and (
        coalesce((m.created_at, m.id) < (b.last_created_at, b.last_id), false)
        or (b.last_seq > b.adopted_seq and m.created_at < b.active_at)
    ) as is_late
from pg_temp.batch_messages as m
inner join pg_temp.batch_conversations as b on b.id = m.conversation_id
where m.reason is null and not b.is_renumbered
