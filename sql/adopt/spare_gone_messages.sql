-- spare_gone_messages
-- Leaves of the gone messages those that can be deleted: nobody appended to their conversation in chatdb.

delete from pg_temp.gone_messages as g
where exists (
    select from chatdb_adopt.conversations as a
    inner join chatdb.conversations as d on d.user_id = a.user_id and d.id = a.id
    where a.id = g.conversation_id and d.last_seq <> a.last_seq
)
or exists (
    select from pg_temp.original_messages as m
    where m.id = g.id
)
