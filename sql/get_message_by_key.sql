-- get_message_by_key
-- Returns a message by its key.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 key text
--
-- returns one Message, or an existence row: if there is no such message
-- served by uq_messages_user_id_conversation_id_key

(
    select
        id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
        token_count, key, created_at
    from chatdb.messages
    where user_id = $1 and conversation_id = $2 and key = $3
    -- without its own limit, this branch could run in parallel with the other and return later
    limit 1 -- noqa: AM09
)
union all
select null, null, null, null, null, null, null, null, null, null, null
from chatdb.conversations
where user_id = $1 and id = $2
-- a found message ends the statement before this branch runs
limit 1
