-- append_messages_two
-- Appends two messages, such as a question and its answer, to a conversation, after its head, all or nothing. Without
-- the arrays of append_messages and the subquery of a key, this takes an eighth less time.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 role text
-- $4 content text
-- $5 payload text null
-- $6 metadata text null
-- $7 token_count int4 null
-- $8 second_role text
-- $9 second_content text
-- $10 second_payload text null
-- $11 second_metadata text null
-- $12 second_token_count int4 null
--
-- returns many Message without user_id, role, content, payload, token_count and key
-- served by pk_conversations

with conversation as (
    update chatdb.conversations
    set last_seq = last_seq + 2, updated_at = greatest(updated_at, pg_catalog.statement_timestamp())
    where user_id = $1 and id = $2
    returning
        user_id, id, last_seq, updated_at,
        -- null if the head is the newest message, as it is unless another line was selected
        case when head_last_seq = last_seq - 2 and not head_is_newest then head_seq end as parent_seq
)

insert into chatdb.messages (
    user_id, conversation_id, seq, role, content, payload, metadata, token_count, created_at, parent_seq
)
select user_id, id, last_seq - 1, $3::text, $4::text, $5::text::json, $6::text::jsonb, $7::int4, updated_at, parent_seq
from conversation
union all
select user_id, id, last_seq, $8::text, $9::text, $10::text::json, $11::text::jsonb, $12::int4, updated_at, null
from conversation
returning id, conversation_id, seq, parent_seq, metadata::text as metadata, state, created_at
