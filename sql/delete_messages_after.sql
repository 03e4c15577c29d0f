-- delete_messages_after
-- The messages after a position, counted, on every branch. Their seqs stay unused: last_seq is not lowered. If the head
-- is one of them, the last message before it that remains becomes the head.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 after_seq int8 null
-- $5 after_key text null
-- $6 expected_id int8 null
-- $7 expected_revision int8 null
--
-- returns one Deleted
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

place as (
    select
        c.id,
        coalesce((select $4::int8), (
            select m.seq
            from chatdb.messages as m
            where m.user_id = $1 and m.conversation_id = c.id and m.key = $5
        )) as seq
    from seen as c
),

tail as (
    select m.seq
    from place as p
    inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = p.id and m.seq > p.seq
    limit 1 -- noqa: AM09
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

-- the newest message of that line up to the position, and the newest of all
remaining as (
    select
        coalesce((
            select seq from chatdb.messages
            where user_id = $1 and conversation_id = p.id
              and seq <= least(p.seq, (select pg_catalog.min(seq) from ancestor))
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
),

conversation as (
    update chatdb.conversations as c
    -- the revision rises if there is a message to delete
    set edits = c.edits + (select pg_catalog.count(*) from tail),
        head_seq = case when s.head_seq > p.seq then r.head_seq else c.head_seq end,
        head_last_seq = case when s.head_seq > p.seq then c.last_seq else c.head_last_seq end,
        head_is_newest = case when s.head_seq > p.seq then r.head_seq = r.newest_seq else c.head_is_newest end
    from seen as s, place as p, remaining as r
    -- if another write came first, this statement does not see what it wrote
    where c.user_id = $1 and c.id = s.id and c.last_seq + c.edits = s.revision and p.seq is not null
      and ($6::int8 is null or (s.id = $6 and s.revision = $7::int8))
    returning c.id, p.seq
),

message as (
    delete from chatdb.messages as m
    using conversation as c
    where m.user_id = $1 and m.conversation_id = c.id and m.seq > c.seq
    returning m.seq
)

select 0::int8 as conversations, (select pg_catalog.count(*) from message) as messages, null as refusal
from conversation
union all
select
    0, 0,
    case
        when $6::int8 is not null and (s.id <> $6 or s.revision <> $7::int8) then 'stale'
        when p.seq is null then 'missing'
        else 'again'
    end
from seen as s
cross join place as p
where not exists (select from conversation)
