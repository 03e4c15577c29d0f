-- append_messages_keyed
-- Appends messages to a conversation, some of them with keys. Writes nothing unless all are new or all are stored with
-- the same bodies.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 roles text[]
-- $4 contents text[]
-- $5 payloads text[]    null where a message has none
-- $6 metadatas text[]    null where a message has none
-- $7 token_counts text[]    null where a message has none
-- $8 keys text[]    null where a message has none
--
-- returns many Message, or an existence row: some keys are new and some stored, or a body differs
-- served by pk_conversations, uq_messages_user_id_conversation_id_key

with batch as (
    select role, content, payload, metadata::jsonb as metadata, token_count, key, ordinality
    from unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::text[]::int4[], $8::text[])
        with ordinality as m (role, content, payload, metadata, token_count, key, ordinality)
),

conversation as (
    select user_id, id, last_seq, greatest(updated_at, pg_catalog.statement_timestamp()) as appended_at
    from chatdb.conversations
    where user_id = $1 and id = $2
    for no key update
),

stored as (
    select pg_catalog.count(*) as total
    from batch as b
    inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = $2 and m.key = b.key
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at
    )
    select
        c.user_id, c.id, c.last_seq + b.ordinality, b.role, b.content, b.payload::json, b.metadata, b.token_count,
        b.key, c.appended_at
    from conversation as c
    cross join batch as b
    where (select total from stored) in (0, pg_catalog.cardinality($3::text[]))
    on conflict (user_id, conversation_id, key) where key is not null do update set key = excluded.key
    returning id, conversation_id, user_id, seq, role, content, payload, metadata, token_count, key, created_at
),

fresh as (
    select pg_catalog.count(*) as total
    from message
    where seq > (select last_seq from conversation)
),

raised as (
    update chatdb.conversations as c
    -- "stored" misses keys that another caller stored after this statement began; -1 violates the CHECK on last_seq,
    -- which then rolls back the statement
    set last_seq = case when fresh.total = pg_catalog.cardinality($3::text[]) then c.last_seq + fresh.total else -1 end,
        updated_at = conversation.appended_at
    from conversation, fresh
    where c.user_id = $1 and c.id = $2 and fresh.total > 0
),

same as (
    select m.id, m.conversation_id, m.user_id, m.seq, m.role, m.content, m.payload, m.metadata, m.token_count,
        m.key, m.created_at
    from message as m
    where m.seq > (select last_seq from conversation)
       or exists (
           select from batch as b
           where b.key = m.key and b.role = m.role and b.content = m.content
             and b.payload is not distinct from m.payload::text and b.metadata is not distinct from m.metadata
       )
)

select
    id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
    token_count, key, created_at
from same
where (select pg_catalog.count(*) from same) = pg_catalog.cardinality($3::text[])
union all
select null, null, null, null, null, null, null, null, null, null, null
from conversation
where (select pg_catalog.count(*) from same) <> pg_catalog.cardinality($3::text[])
