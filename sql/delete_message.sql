-- delete_message
-- Deletes a message and counts it. Its seq is not reused: last_seq stays the same.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 seq int8
--
-- returns one Deleted
-- served by pk_messages, pk_conversations

with message as (
    delete from chatdb.messages
    where user_id = $1 and conversation_id = $2 and seq = $3
    returning seq
)

select 0::int8 as conversations, (select pg_catalog.count(*) from message) as messages
from chatdb.conversations
where user_id = $1 and id = $2
