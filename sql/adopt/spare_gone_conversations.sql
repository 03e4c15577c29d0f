-- spare_gone_conversations
-- Leaves of the gone conversations those that can be deleted: nobody appended to them in chatdb, and the messages that
-- were adopted with them are gone, too.

delete from pg_temp.gone_conversations as g
where exists (
    select from chatdb_adopt.conversations as a
    inner join chatdb.conversations as d on d.user_id = a.user_id and d.id = a.id
    where a.id = g.id and d.last_seq <> a.last_seq
)
or exists (
    select from pg_temp.original_conversations as c
    where c.id = g.id
)
or g.id in (
    select a.conversation_id
    from chatdb_adopt.messages as a
    where not exists (
        select from pg_temp.gone_messages as m
        where m.id = a.id
    )
)
