-- append_message
-- Appends a message to a conversation, after its head. Updating last_seq locks the row, so seq has no gaps and follows
-- commit order.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 role text
-- $5 content text
-- $6 payload text null
-- $7 metadata text null
-- $8 token_count int4 null
--
-- returns one Message without user_id, role, content, payload, token_count and key
-- served by pk_conversations, uq_conversations_user_id_key

with conversation as (
    update chatdb.conversations
    -- greatest(), because statements may not get the row lock in the order in which they began
    set last_seq = last_seq + 1, updated_at = greatest(updated_at, pg_catalog.statement_timestamp())
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
    returning
        user_id, id, last_seq, updated_at,
        -- null if the head is the newest message, as it is unless another line was selected
        case when head_last_seq = last_seq - 1 and not head_is_newest then head_seq end as parent_seq
)

insert into chatdb.messages (
    user_id, conversation_id, seq, role, content, payload, metadata, token_count, created_at, parent_seq
)
select user_id, id, last_seq, $4, $5, $6::text::json, $7::text::jsonb, $8, updated_at, parent_seq
from conversation
returning id, conversation_id, seq, parent_seq, metadata::text as metadata, state, created_at
