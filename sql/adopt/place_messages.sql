-- place_messages
-- Gives the messages that fit their seq, after what the conversation has; late are those that belong before that.

insert into pg_temp.batch_places (id, conversation_id, seq, is_late)
select
    m.id,
    m.conversation_id,
    coalesce(b.last_seq, 0) + pg_catalog.row_number() over (partition by b.id order by m.created_at, m.id) as seq,
    b.is_adopted and (
        coalesce((m.created_at, m.id) < (b.last_created_at, b.last_id), false)
        or (b.last_seq > b.given_seq and m.created_at < b.active_at)
    ) as is_late
from pg_temp.batch_messages as m
inner join pg_temp.batch_conversations as b on b.id = m.conversation_id
where m.reason is null and not b.is_renumbered
