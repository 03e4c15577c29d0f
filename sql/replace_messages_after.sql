-- replace_messages_after
-- The messages after a position deleted and others appended, if the conversation is as expected; the stored ones if
-- all of them are stored after that position with the same bodies.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 after_seq int8
-- $5 expected_id int8
-- $6 expected_revision int8
-- $7 roles text[]
-- $8 contents text[]
-- $9 payloads text[]    null where a message has none
-- $10 metadatas text[]    null where a message has none
-- $11 token_counts text[]    null where a message has none
-- $12 keys text[]    null where a message has none
--
-- returns many Message without user_id, role, content and payload, or an existence row: if the batch is empty
-- refuses with stale, again, suppressed
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key

with seen as (
    select id, last_seq + edits as revision
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
),

batch as (
    select role, content, payload, metadata::jsonb as metadata, token_count, key, ordinality
    from unnest($7::text[], $8::text[], $9::text[], $10::text[], $11::text[]::int4[], $12::text[])
        with ordinality as m (role, content, payload, metadata, token_count, key, ordinality)
),

conversation as (
    update chatdb.conversations as c
    set last_seq = c.last_seq + pg_catalog.cardinality($7::text[]),
        edits = c.edits + 1,
        updated_at = case
            when pg_catalog.cardinality($7::text[]) = 0 then c.updated_at
            else greatest(c.updated_at, pg_catalog.statement_timestamp())
        end
    from seen as s
    where c.user_id = $1 and c.id = s.id and c.id = $5::int8 and c.last_seq + c.edits = $6::int8
      and s.revision = $6
    returning c.id, c.last_seq - pg_catalog.cardinality($7::text[]) as previous_seq, c.updated_at
),

removed as (
    delete from chatdb.messages as m
    using conversation as c
    where m.user_id = $1 and m.conversation_id = c.id and m.seq > $4
    returning m.seq
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at
    )
    select
        $1, c.id, c.previous_seq + b.ordinality, b.role, b.content, b.payload::json, b.metadata, b.token_count,
        b.key, c.updated_at
    from conversation as c
    cross join batch as b
    -- counting first deletes the messages whose keys may come again
    where (select pg_catalog.count(*) from removed) >= 0
    returning id, conversation_id, seq, metadata, token_count, key, created_at
),

-- for a retry whose first try succeeded: the conversation is no longer as expected, but the messages are stored
earlier as (
    select m.id, m.conversation_id, m.seq, m.metadata, m.token_count, m.key, m.created_at
    from batch as b
    -- with the limit, each key is looked up: a join could read all messages of the conversation
    cross join lateral (
        select id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at
        from chatdb.messages
        where user_id = $1 and conversation_id = (select id from seen) and key = b.key
        limit 1 -- noqa: AM09
    ) as m
    where not exists (select from conversation)
      and m.seq > $4 and m.role = b.role and m.content = b.content
      and m.payload::text is not distinct from b.payload and m.metadata is not distinct from b.metadata
)

select id, conversation_id, seq, metadata::text as metadata, token_count, key, created_at, null as refusal
from message
union all
select id, conversation_id, seq, metadata::text as metadata, token_count, key, created_at, null
from earlier
where (select pg_catalog.count(*) from earlier) = pg_catalog.cardinality($7::text[])
union all
select
    null, null, null, null, null, null, null,
    case when pg_catalog.cardinality($7::text[]) > 0 then 'suppressed' end
from conversation
where not exists (select from message)
union all
select
    null, null, null, null, null, null, null,
    -- another write came first: look again, it may have been the first try
    case when id = $5 and revision = $6 then 'again' else 'stale' end
from seen
where not exists (select from conversation)
  and (
      pg_catalog.cardinality($7::text[]) = 0
      or (select pg_catalog.count(*) from earlier) <> pg_catalog.cardinality($7::text[])
  )
