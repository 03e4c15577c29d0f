-- count_user
-- Counts a user's conversations and messages, for the confirmation before a deletion.
--
-- $1 user_id text
--
-- returns one Deleted
-- served by ix_conversations_user_id_active_on, pk_messages

select
    (
        select pg_catalog.count(*)
        from chatdb.conversations
        where user_id = $1
    ) as conversations,
    (
        select pg_catalog.count(*)
        from chatdb.messages
        where user_id = $1
    ) as messages
