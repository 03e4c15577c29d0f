-- delete_messages_after
-- Deletes the messages after a seq and counts them. Their seqs are not reused: last_seq stays the same.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 seq int8
--
-- returns one Deleted
-- served by pk_conversations, pk_messages

-- an append locks this row before messages with its keys; the same order here prevents deadlocks
with conversation as (
    select id
    from chatdb.conversations
    where user_id = $1 and id = $2
    for no key update
),

message as (
    delete from chatdb.messages as m
    using conversation as c
    where m.user_id = $1 and m.conversation_id = $2 and m.conversation_id = c.id and m.seq > $3
    returning m.seq
)

select 0::int8 as conversations, (select pg_catalog.count(*) from message) as messages
from conversation
