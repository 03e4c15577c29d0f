-- create_conversation_messages
-- A new conversation and its first messages, or the stored conversation with this key, unchanged.
-- No row if another caller stored the key after this statement began: run it again.
--
-- $1 user_id text
-- $2 title text null
-- $3 metadata text null
-- $4 key text null
-- $5 must_be_new bool    refuses a stored key
-- $6 roles text[]
-- $7 contents text[]
-- $8 payloads text[] null    with null for each message without one
-- $9 metadatas text[] null    with null for each message without one
-- $10 token_counts text[] null    with null for each message without one
-- $11 keys text[] null    with null for each message without one
--
-- returns many Conversation
-- refuses with stale
-- served by uq_conversations_user_id_key

with stored as (
    select
        id, user_id, key, title, metadata, last_seq, head_seq, head_last_seq, edits, created_at, updated_at,
        archived_at, pinned_at
    from chatdb.conversations
    where user_id = $1 and key = $4
),

created as (
    insert into chatdb.conversations (user_id, title, metadata, key, last_seq)
    select $1, $2, $3::text::jsonb, $4, pg_catalog.cardinality($6::text[])
    where not exists (select from stored)
    on conflict (user_id, key) where key is not null do nothing
    returning
        id, user_id, key, title, metadata, last_seq, head_seq, head_last_seq, edits, created_at, updated_at,
        archived_at, pinned_at
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at
    )
    select
        c.user_id, c.id, m.ordinality, m.role, m.content, m.payload::json, m.metadata::jsonb, m.token_count, m.key,
        c.created_at
    from created as c
    cross join unnest($6::text[], $7::text[], $8::text[], $9::text[], $10::text[]::int4[], $11::text[])
        with ordinality as m (role, content, payload, metadata, token_count, key, ordinality)
)

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at, null as refusal
from stored
where not $5::bool
union all
select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at, null
from created
union all
select null, null, null, null, null, null, null, null, null, null, null, null, 'stale'
from stored
where $5::bool
