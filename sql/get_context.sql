-- get_context
-- The newest messages of the head's line that fit a number of tokens, without those that are streaming, newest first,
-- then its leading system or developer message. They begin with the line or a message of the user, and have no result
-- of a tool without its call.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 max_tokens int8
-- $5 row_limit int8
--
-- returns many Message without user_id and conversation_id, then an existence row
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key,
-- ix_messages_user_id_conversation_id_seq_branches

with recursive conversation as (
    select id, case when head_last_seq = last_seq then head_seq else last_seq end as top
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
),

-- the runs of the line, as in get_branch
run as (
    select c.id, c.top, coalesce(b.seq, 0) as bottom, b.parent_seq
    from conversation as c
    left join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = c.id and seq <= c.top and parent_seq is not null
        order by seq desc
        limit 1
    ) as b on true
    union all
    select r.id, r.parent_seq as top, coalesce(b.seq, 0) as bottom, b.parent_seq
    from run as r
    left join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = r.id and seq <= r.parent_seq and parent_seq is not null
        order by seq desc
        limit 1
    ) as b on true
    where r.parent_seq > 0
),

first as (
    select
        m.id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata, m.token_count, m.key, m.state,
        m.created_at, coalesce(m.token_count, pg_catalog.octet_length(m.content) / 4 + 1) as tokens
    from run as r
    cross join lateral (
        select id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at
        from chatdb.messages
        where user_id = $1 and conversation_id = r.id and seq >= r.bottom and seq <= r.top
        order by seq
        limit 1
    ) as m
    where coalesce(r.parent_seq, 0) = 0
),

opening as (
    select id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at, tokens
    from first
    where role in ('system', 'developer') and state is distinct from 'streaming'
),

newest as (
    select
        m.id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata, m.token_count, m.key, m.state,
        m.created_at, m.tokens
    from run as r
    cross join lateral (
        select
            id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at,
            coalesce(token_count, pg_catalog.octet_length(content) / 4 + 1) as tokens
        from chatdb.messages
        where user_id = $1 and conversation_id = r.id and seq >= r.bottom and seq <= r.top
          and seq > coalesce((select seq from opening), 0) and state is distinct from 'streaming'
        order by seq desc
        limit $5
    ) as m
    limit $5 -- noqa: AM09
),

-- in the order of newest, which is that of its rows: to order by seq would sort, and so read, all of them
summed as (
    select
        id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at, tokens,
        coalesce((select tokens from opening), 0) + pg_catalog.sum(tokens) over newest_first as total
    from newest
    window newest_first as (order by null rows unbounded preceding)
),

-- a count only grows: PostgreSQL 15 and later stop reading at the first message that is too much
counted as (
    select
        id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at,
        pg_catalog.count(*) filter (where total > $4) over newest_first as too_much
    from summed
    window newest_first as (order by null rows unbounded preceding)
),

fitting as (
    select
        id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at,
        -- of the messages from this one on, the oldest of each role
        pg_catalog.min(seq) filter (where role = 'tool') over later as tool_seq,
        pg_catalog.min(seq) filter (where role = 'assistant') over later as assistant_seq
    from counted
    where too_much <= 0
    window later as (order by seq desc rows unbounded preceding)
),

start as (
    select pg_catalog.min(seq) as seq
    from fitting
    where (tool_seq is null or assistant_seq < tool_seq)
      and (
          role = 'user'
          -- all that follows the leading message, or the whole line
          or (
              seq = (select pg_catalog.min(seq) from fitting)
              and coalesce(parent_seq, (
                  select m.seq from chatdb.messages as m
                  where m.user_id = $1 and m.conversation_id = (select id from conversation) and m.seq < fitting.seq
                  order by m.seq desc
                  limit 1
              ), 0) = coalesce((select seq from opening), 0)
          )
      )
)

select
    id, seq, parent_seq, role, content, payload::text as payload, metadata::text as metadata, token_count, key, state,
    created_at
from fitting
where seq >= (select seq from start)
union all
select
    id, seq, parent_seq, role, content, payload::text, metadata::text, token_count, key, state, created_at
from opening
where tokens <= $4
union all
-- its seq is the id of the conversation
select null, id, null, null, null, null, null, null, null, null, null
from conversation
