-- update_message
-- Changes a message's content, payload, metadata or token count; its seq and role stay the same.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 seq int8
-- $4 set_content bool
-- $5 content text null
-- $6 set_payload bool
-- $7 payload text null
-- $8 set_metadata bool
-- $9 metadata text null
-- $10 set_token_count bool
-- $11 token_count int4 null
--
-- returns one Message, or an existence row: the conversation has no such message
-- served by pk_messages

with message as (
    update chatdb.messages
    set content = case when $4::bool then $5 else content end,
        payload = case when $6::bool then $7::text::json else payload end,
        metadata = case when $8::bool then $9::text::jsonb else metadata end,
        token_count = case when $10::bool then $11 else token_count end
    where user_id = $1 and conversation_id = $2 and seq = $3
    returning id, conversation_id, user_id, seq, role, content, payload, metadata, token_count, key, created_at
)

select
    id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
    token_count, key, created_at
from message
union all
select null, null, null, null, null, null, null, null, null, null, null
from chatdb.conversations
where user_id = $1 and id = $2 and not exists (select from message)
