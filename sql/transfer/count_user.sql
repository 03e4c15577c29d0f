-- count_user
-- How many conversations and messages a user has, for who is asked whether to delete them.
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
