-- replace_messages_after
-- The messages after a position deleted, on every branch, and others appended, if the conversation is as expected; the
-- stored ones if all of them are stored after that position with the same bodies. The new ones follow the last message
-- of the head's line that remains.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 after_seq int8
-- $5 expected_id int8
-- $6 expected_revision int8
-- $7 roles text[]
-- $8 contents text[]
-- $9 payloads text[] null    with null for each message without one
-- $10 metadatas text[] null    with null for each message without one
-- $11 token_counts text[] null    with null for each message without one
-- $12 keys text[] null    with null for each message without one
--
-- returns many Message without user_id, role, content and payload, or an existence row: if the batch is empty
-- refuses with stale, again, suppressed
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- ix_messages_user_id_conversation_id_seq_branches

with recursive seen as (
    select
        id, last_seq + edits as revision,
        case when head_last_seq = last_seq then head_seq else last_seq end as head_seq
    from chatdb.conversations
    where user_id = $1 and id = $5::int8 and (id = $2::int8 or key = $3)
),

place as (
    select id, $4::int8 as seq
    from seen
),

-- the head, then the parent of each branch of its line that begins after the position
ancestor as (
    select head_seq as seq
    from seen
    union all
    select m.parent_seq
    from ancestor as a
    cross join place as p
    cross join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = p.id and seq <= a.seq and parent_seq is not null
        order by seq desc
        limit 1
    ) as m
    where a.seq > p.seq and m.seq > p.seq
),

-- the newest message of that line up to the position, and the newest of all, if they may differ
branched as (
    select
        coalesce((
            select seq from chatdb.messages
            where user_id = $1 and conversation_id = p.id and seq <= (select pg_catalog.min(seq) from ancestor)
            order by seq desc
            limit 1
        ), 0) as head_seq,
        coalesce((
            select seq from chatdb.messages
            where user_id = $1 and conversation_id = p.id and seq <= p.seq
            order by seq desc
            limit 1
        ), 0) as newest_seq
    from place as p
    where p.seq > (select pg_catalog.min(seq) from ancestor)
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
        end,
        -- an appended message becomes the head without writing this
        head_seq = case
            when s.head_seq > $4 and pg_catalog.cardinality($7::text[]) = 0 then coalesce(
                b.head_seq,
                (
                    select seq from chatdb.messages
                    where user_id = $1 and conversation_id = s.id and seq <= $4 -- noqa: RF01
                    order by seq desc
                    limit 1
                ),
                0
            )
            else c.head_seq
        end,
        head_last_seq = case
            when s.head_seq > $4 and pg_catalog.cardinality($7::text[]) = 0 then c.last_seq
            else c.head_last_seq
        end,
        head_is_newest = case
            when s.head_seq > $4 and pg_catalog.cardinality($7::text[]) = 0
                then b.head_seq is not distinct from b.newest_seq
            else c.head_is_newest
        end
    from seen as s
    left join branched as b on true
    where c.user_id = $1 and c.id = s.id and c.last_seq + c.edits = $6::int8 and s.revision = $6
    returning
        c.id, c.last_seq - pg_catalog.cardinality($7::text[]) as previous_seq, c.updated_at,
        nullif(b.head_seq, b.newest_seq) as parent_seq
),

removed as (
    delete from chatdb.messages as m
    using conversation as c
    where m.user_id = $1 and m.conversation_id = c.id and m.seq > $4
    returning m.seq
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at, parent_seq
    )
    select
        $1, c.id, c.previous_seq + b.ordinality, b.role, b.content, b.payload::json, b.metadata, b.token_count,
        b.key, c.updated_at, case when b.ordinality = 1 then c.parent_seq end
    from conversation as c
    cross join batch as b
    -- counting first deletes the messages whose keys may come again
    where (select pg_catalog.count(*) from removed) >= 0
    returning id, conversation_id, seq, parent_seq, metadata, token_count, key, state, created_at
),

-- read only if the conversation was not as expected
addressed as (
    select id, last_seq + edits as revision
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
),

-- for a retry whose first try succeeded: the conversation is no longer as expected, but the messages are stored
earlier as (
    select m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata, m.token_count, m.key, m.state, m.created_at
    from batch as b
    -- with the limit, each key is looked up: a join could read all messages of the conversation
    cross join lateral (
        select
            id, conversation_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at
        from chatdb.messages
        where user_id = $1 and conversation_id = (select id from addressed) and key = b.key
        limit 1 -- noqa: AM09
    ) as m
    where not exists (select from conversation)
      and m.seq > $4 and m.role = b.role and m.content = b.content and m.state is distinct from 'streaming'
      and m.payload::text is not distinct from b.payload and m.metadata is not distinct from b.metadata
)

select
    id, conversation_id, seq, parent_seq, metadata::text as metadata, token_count, key, state, created_at,
    null as refusal
from message
union all
select id, conversation_id, seq, parent_seq, metadata::text as metadata, token_count, key, state, created_at, null
from earlier
where (select pg_catalog.count(*) from earlier) = pg_catalog.cardinality($7::text[])
union all
select
    null, null, null, null, null, null, null, null, null,
    case when pg_catalog.cardinality($7::text[]) > 0 then 'suppressed' end
from conversation
where not exists (select from message)
union all
select
    null, null, null, null, null, null, null, null, null,
    -- another write came first: look again, it may have been the first try
    case when id = $5 and revision = $6 then 'again' else 'stale' end
from addressed
where not exists (select from conversation)
  and (
      pg_catalog.cardinality($7::text[]) = 0
      or (select pg_catalog.count(*) from earlier) <> pg_catalog.cardinality($7::text[])
  )
