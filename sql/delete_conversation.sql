-- delete_conversation
-- Deletes a conversation with its messages and counts them. Deletes the conversation first, because every append locks
-- its row. The cascade deletes, uncounted, what was appended after this statement began.
--
-- $1 user_id text
-- $2 conversation_id int8
--
-- returns one Deleted
-- served by pk_conversations, pk_messages

with conversation as (
    delete from chatdb.conversations
    where user_id = $1 and id = $2
    returning user_id, id
),

message as (
    delete from chatdb.messages as m
    using conversation as c
    where m.user_id = $1 and m.conversation_id = $2 and m.conversation_id = c.id
    returning m.seq
)

select 1::int8 as conversations, (select pg_catalog.count(*) from message) as messages
from conversation
