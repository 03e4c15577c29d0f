-- verify_chatdb
-- Counts the adopted conversations and messages that are no longer in chatdb.

select
    (
        select pg_catalog.count(*)
        from chatdb_adopt.conversations as a
        where not exists (
            select from chatdb.conversations as d
            where d.user_id = a.user_id and d.id = a.id
        )
    ) as deleted_in_chatdb_conversations,
    (
        select pg_catalog.count(*)
        from chatdb_adopt.messages as a
        inner join chatdb_adopt.conversations as c on c.id = a.conversation_id
        where not exists (
            select from chatdb.messages as d
            where d.user_id = c.user_id and d.conversation_id = a.conversation_id and d.seq = a.seq
        )
    ) as deleted_in_chatdb_messages
