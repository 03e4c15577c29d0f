-- list_versions
-- The messages of a page of the head's line that have other versions, each with the seqs of all versions.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 before_seq int8
-- $5 row_limit int8
--
-- returns many MessageVersions, then an existence row
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

page as materialized (
    select m.seq
    from run as r
    cross join lateral (
        select seq
        from chatdb.messages
        where user_id = $1 and conversation_id = r.id and seq <= r.top and seq >= r.bottom and seq < $4
        order by seq desc
        limit $5
    ) as m
    limit $5 -- noqa: AM09
),

branch as (
    select conversation_id, seq, parent_seq
    from chatdb.messages
    -- a join could read the branches of all conversations of the user
    where user_id = $1 and conversation_id = (select id from conversation) and parent_seq is not null
),

child as (
    select seq, parent_seq
    from branch
    union all
    -- the next message in order of seq follows without saying so
    select m.seq, b.parent_seq
    from (select distinct conversation_id, parent_seq from branch) as b
    cross join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = b.conversation_id and seq > b.parent_seq
        order by seq
        limit 1
    ) as m
    where m.parent_seq is null
),

version as (
    select pg_catalog.array_agg(seq order by seq) as seqs
    from child
    group by parent_seq
    having pg_catalog.count(*) > 1
)

-- asyncpg would first ask the server what int8[] is
select p.seq, v.seqs::text[] as seqs
from version as v
cross join lateral pg_catalog.unnest(v.seqs) as e (seq)
inner join page as p on p.seq = e.seq
union all
select null, null
from conversation
