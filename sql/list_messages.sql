-- list_messages
-- The messages of a conversation after a position, oldest first.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 after_seq int8
-- $4 row_limit int8
--
-- returns many Message, or an existence row: the conversation has none there
-- served by pk_messages

with page as (
    select id, conversation_id, user_id, seq, role, content, payload, metadata, token_count, key, created_at
    from chatdb.messages
    where user_id = $1 and conversation_id = $2 and seq > $3
    order by seq
    limit $4
)

select
    id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
    token_count, key, created_at
from page
union all
select null, null, null, null, null, null, null, null, null, null, null
from chatdb.conversations
where user_id = $1 and id = $2 and not exists (select from page)
