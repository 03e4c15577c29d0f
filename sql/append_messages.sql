-- append_messages
-- Appends messages to a conversation, all or nothing.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 roles text[]
-- $4 contents text[]
-- $5 payloads text[]    null where a message has none
-- $6 metadatas text[]    null where a message has none
-- $7 token_counts text[]    null where a message has none
--
-- returns many Message
-- served by pk_conversations

with conversation as (
    update chatdb.conversations
    set last_seq = last_seq + pg_catalog.cardinality($3::text[]),
        updated_at = greatest(updated_at, pg_catalog.statement_timestamp())
    where user_id = $1 and id = $2
    returning user_id, id, last_seq - pg_catalog.cardinality($3::text[]) as previous_seq, updated_at
)

insert into chatdb.messages (user_id, conversation_id, seq, role, content, payload, metadata, token_count, created_at)
select
    c.user_id, c.id, c.previous_seq + m.ordinality, m.role, m.content, m.payload::json, m.metadata::jsonb,
    m.token_count, c.updated_at
from conversation as c
cross join unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::text[]::int4[])
    with ordinality as m (role, content, payload, metadata, token_count, ordinality)
returning
    id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
    token_count, key, created_at
