-- switch_branch
-- The newest message that follows a version, or the version itself, becomes the head. The revision rises if it was not.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 seq int8 null
-- $5 key text null
-- $6 expected_id int8 null
-- $7 expected_revision int8 null
--
-- returns one Conversation
-- refuses with stale, missing, again
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- ix_messages_user_id_conversation_id_seq_branches

with recursive seen as (
    select
        id, last_seq + edits as revision,
        case when head_last_seq = last_seq then head_seq else last_seq end as head_seq
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
    from seen as c
    where $6::int8 is null or (c.id = $6 and c.revision = $7::int8)
),

target as (
    select p.id, m.seq
    from place as p
    inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = p.id and m.seq = p.seq
),

-- the version and all that follows it, as ranges of seq
subtree as (
    select
        t.id, t.seq as low,
        coalesce((
            select seq - 1 from chatdb.messages
            where user_id = $1 and conversation_id = t.id and seq > t.seq and parent_seq is not null
            order by seq
            limit 1
        ), 9223372036854775807) as high
    from target as t
    union all
    select
        b.conversation_id, b.seq,
        coalesce((
            select seq - 1 from chatdb.messages
            where user_id = $1 and conversation_id = b.conversation_id and seq > b.seq and parent_seq is not null
            order by seq
            limit 1
        ), 9223372036854775807)
    from (
        select m.conversation_id, m.seq
        from subtree as s
        inner join chatdb.messages as m
            -- a join on the id could read the branches of all conversations of the user
            on m.user_id = $1 and m.conversation_id = (select id from target)
                and m.seq > s.low and m.parent_seq between s.low and s.high
    ) as b
),

newest as (
    select pg_catalog.max(m.seq) as seq
    from subtree as s
    cross join lateral (
        select seq
        from chatdb.messages
        where user_id = $1 and conversation_id = s.id and seq between s.low and s.high
        order by seq desc
        limit 1
    ) as m
),

changed as (
    update chatdb.conversations as c
    set head_seq = n.seq,
        head_last_seq = c.last_seq,
        head_is_newest = not exists (
            select from chatdb.messages
            where user_id = $1 and conversation_id = s.id and seq > n.seq -- noqa: RF01
        ),
        edits = c.edits + (n.seq <> s.head_seq)::int
    from seen as s, newest as n
    -- if another write came first, this statement does not see what it wrote
    where c.user_id = $1 and c.id = s.id and c.last_seq + c.edits = s.revision and n.seq is not null
    returning
        c.id, c.user_id, c.key, c.title, c.metadata, c.last_seq, c.head_seq, c.head_last_seq, c.edits, c.created_at,
        c.updated_at, c.archived_at, c.pinned_at
)

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at, null as refusal
from changed
union all
select
    null, null, null, null, null, null, null, null, null, null, null, null,
    case
        when $6::int8 is not null and (id <> $6 or revision <> $7::int8) then 'stale'
        when exists (select from target) then 'again'
        else 'missing'
    end
from seen
where not exists (select from changed)
