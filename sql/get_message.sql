-- get_message
-- Returns a message by its seq.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 seq int8
--
-- returns one Message, or an existence row: if there is no such message
-- served by pk_messages

(
    select
        id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
        token_count, key, created_at
    from chatdb.messages
    where user_id = $1 and conversation_id = $2 and seq = $3
    -- without its own limit, this branch could run in parallel with the other and return later
    limit 1 -- noqa: AM09
)
union all
select null, null, null, null, null, null, null, null, null, null, null
from chatdb.conversations
where user_id = $1 and id = $2
-- a found message ends the statement before this branch runs
limit 1
