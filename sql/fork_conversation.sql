-- fork_conversation
-- A new conversation with a copy of a line: that of the head, or up to another message. Its messages are numbered
-- from 1; those that are streaming are left out.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 seq int8 null
-- $5 key text null
-- $6 new_key text null
--
-- returns one Conversation
-- refuses with conflict, missing, suppressed
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- ix_messages_user_id_conversation_id_seq_branches

with recursive conversation as (
    select id, title, metadata, case when head_last_seq = last_seq then head_seq else last_seq end as head_seq
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
),

-- materialized: row-level security allows only a column as the index condition of target
place as materialized (
    select
        c.id,
        coalesce((select $4::int8), (
            select k.seq from chatdb.messages as k
            where k.user_id = $1 and k.conversation_id = c.id and k.key = $5
        )) as seq
    from conversation as c
),

target as (
    select p.id, m.seq as top
    from place as p
    inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = p.id and m.seq = p.seq
    union all
    select id, head_seq
    from conversation
    -- as subqueries they leave the server no reason to plan each call
    where (select $4::int8) is null and (select $5::text) is null
),

-- the runs of the line, as in get_branch
run as (
    select c.id, c.top, coalesce(b.seq, 0) as bottom, b.parent_seq
    from target as c
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

line as (
    select
        m.role, m.content, m.payload, m.metadata, m.token_count, m.key, m.state, m.created_at,
        pg_catalog.row_number() over (order by m.seq) as seq
    from run as r
    -- a join could read the whole conversation again for each run
    cross join lateral (
        select seq, role, content, payload, metadata, token_count, key, state, created_at
        from chatdb.messages
        where user_id = $1 and conversation_id = r.id and seq <= r.top and seq >= r.bottom
        offset 0 -- noqa: AM09
    ) as m
    where m.state is distinct from 'streaming'
),

created as (
    insert into chatdb.conversations (user_id, key, title, metadata, last_seq)
    select $1, $6, c.title, c.metadata, (select pg_catalog.count(*) from line)
    from conversation as c
    inner join target as t on t.id = c.id
    on conflict (user_id, key) where key is not null do nothing
    returning
        id, user_id, key, title, metadata, last_seq, head_seq, head_last_seq, edits, created_at, updated_at,
        archived_at, pinned_at
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, state, created_at
    )
    select $1, c.id, l.seq, l.role, l.content, l.payload, l.metadata, l.token_count, l.key, l.state, l.created_at
    from created as c
    cross join line as l
)

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at, null as refusal
from created
union all
select
    null, null, null, null, null, null, null, null, null, null, null, null,
    case
        when not exists (select from target) then 'missing'
        when $6::text is not null then 'conflict'
        else 'suppressed'
    end
from conversation
where not exists (select from created)
