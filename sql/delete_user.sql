-- delete_user
-- Every conversation of a user and their messages, counted.
--
-- $1 user_id text
--
-- returns one Deleted
-- served by ix_conversations_user_id_active_on, pk_messages

with conversation as (
    delete from chatdb.conversations
    where user_id = $1
    returning id
),

message as (
    delete from chatdb.messages
    -- counting first locks the conversations before the messages, in the order of an append
    where user_id = $1 and (select count(*) from conversation) > 0
    returning seq
)

select (select count(*) from conversation) as conversations, (select count(*) from message) as messages
