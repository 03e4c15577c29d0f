-- delete_user
-- Deletes all conversations and messages of a user and counts them.
--
-- $1 user_id text
--
-- returns one Deleted
-- served by ix_conversations_user_id_active_on, pk_conversations, pk_messages

with locked as (
    -- a fixed order prevents deadlocks between two deletions of the same user
    select id
    from chatdb.conversations
    where user_id = $1
    order by id
    for update
),

conversation as (
    delete from chatdb.conversations
    where user_id = $1 and id in (select id from locked)
    returning id
),

message as (
    delete from chatdb.messages
    -- the count makes the conversations lock first, in the same order as an append
    where user_id = $1 and (select pg_catalog.count(*) from conversation) > 0
    returning seq
)

select
    (select pg_catalog.count(*) from conversation) as conversations,
    (select pg_catalog.count(*) from message) as messages
