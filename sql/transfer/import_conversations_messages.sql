-- import_conversations_messages
-- Adds messages from a file; used where row-level security rules out COPY.
--
-- $1 user_id text
-- $2 conversation_ids text[]
-- $3 seqs text[]
-- $4 roles text[]
-- $5 contents text[]
-- $6 payloads text[]    null where a message has none
-- $7 metadatas text[]    null where a message has none
-- $8 token_counts text[]    null where a message has none
-- $9 keys text[]    null where a message has none
-- $10 created_ats text[]
-- $11 parent_seqs text[]    null where a message follows the one before it
-- $12 states text[]    null where a message is complete
--
-- returns one ImportedMessages

with message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at, parent_seq,
        state
    )
    select
        $1, conversation_id, seq, role, content, payload::json, metadata::jsonb, token_count, key, created_at,
        parent_seq, state
    from unnest(
        $2::text[]::int8[], $3::text[]::int8[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[]::int4[],
        $9::text[], $10::text[]::timestamptz[], $11::text[]::int8[], $12::text[]
    ) as m (conversation_id, seq, role, content, payload, metadata, token_count, key, created_at, parent_seq, state)
    returning seq
)

select pg_catalog.count(*) as messages
from message
