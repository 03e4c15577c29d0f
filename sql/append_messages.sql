-- append_messages
-- Appends messages to a conversation, after its head, all or nothing.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 roles text[]
-- $5 contents text[]
-- $6 payloads text[] null    with null for each message without one
-- $7 metadatas text[] null    with null for each message without one
-- $8 token_counts text[] null    with null for each message without one
--
-- returns many Message without user_id, role, content, payload, token_count and key
-- served by pk_conversations, uq_conversations_user_id_key

with conversation as (
    update chatdb.conversations
    set last_seq = last_seq + pg_catalog.cardinality($4::text[]),
        updated_at = greatest(updated_at, pg_catalog.statement_timestamp())
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
    returning
        user_id, id, last_seq - pg_catalog.cardinality($4::text[]) as previous_seq, updated_at,
        -- null if the head is the newest message, as it is unless another line was selected
        case
            when head_last_seq = last_seq - pg_catalog.cardinality($4::text[]) and not head_is_newest then head_seq
        end as parent_seq
)

insert into chatdb.messages (
    user_id, conversation_id, seq, role, content, payload, metadata, token_count, created_at, parent_seq
)
select
    c.user_id, c.id, c.previous_seq + m.ordinality, m.role, m.content, m.payload::json, m.metadata::jsonb,
    m.token_count, c.updated_at, case when m.ordinality = 1 then c.parent_seq end
from conversation as c
cross join unnest($4::text[], $5::text[], $6::text[], $7::text[], $8::text[]::int4[])
    with ordinality as m (role, content, payload, metadata, token_count, ordinality)
returning id, conversation_id, seq, parent_seq, metadata::text as metadata, state, created_at
