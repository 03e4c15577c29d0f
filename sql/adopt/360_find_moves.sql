-- find_moves
-- Lists the messages of renumbered conversations with their old and new seq.

insert into pg_temp.batch_moves (user_id, conversation_id, id, old_seq, seq)
with together as (
    select b.user_id, b.id as conversation_id, d.id, d.seq as old_seq, d.created_at
    from pg_temp.batch_conversations as b
    inner join chatdb.messages as d on d.user_id = b.user_id and d.conversation_id = b.id
    where b.is_renumbered
    union all
    select b.user_id, b.id as conversation_id, m.id, null as old_seq, m.created_at
    from pg_temp.batch_conversations as b
    inner join pg_temp.batch_messages as m on m.conversation_id = b.id
    where b.is_renumbered and m.reason is null
)

select
    user_id, conversation_id, id, old_seq,
    pg_catalog.row_number() over (partition by conversation_id order by created_at, id) as seq
from together
