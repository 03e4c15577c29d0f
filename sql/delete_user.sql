-- delete_user
-- Every conversation of a user and their messages, counted.
--
-- $1 user_id text
--
-- returns one Deleted
-- served by ix_conversations_user_id_active_on, pk_conversations, pk_messages

with locked as (
    -- in one order, or two deletions of a user could each wait for the other
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
    -- counting first locks the conversations before the messages, in the order of an append
    where user_id = $1 and (select pg_catalog.count(*) from conversation) > 0
    returning seq
)

select
    (select pg_catalog.count(*) from conversation) as conversations,
    (select pg_catalog.count(*) from message) as messages
