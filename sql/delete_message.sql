-- delete_message
-- One message, counted. Its seq stays unused: last_seq is not lowered. The messages that follow it then follow its
-- parent, and if it is the head, its parent becomes the head.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 seq int8 null
-- $5 key text null
-- $6 expected_id int8 null
-- $7 expected_revision int8 null
--
-- returns one Deleted
-- refuses with stale, missing, again
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- ix_messages_user_id_conversation_id_seq_branches

with seen as (
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
    select
        p.id, m.seq, m.parent_seq,
        coalesce(
            m.parent_seq,
            (
                select seq from chatdb.messages
                where user_id = $1 and conversation_id = p.id and seq < m.seq
                order by seq desc
                limit 1
            ),
            0
        ) as follows
    from place as p
    inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = p.id and m.seq = p.seq
),

conversation as (
    update chatdb.conversations as c
    set edits = c.edits + 1,
        head_seq = case when s.head_seq = t.seq then t.follows else c.head_seq end,
        head_last_seq = case when s.head_seq = t.seq then c.last_seq else c.head_last_seq end,
        head_is_newest = case
            when s.head_seq = t.seq then not exists (
                select from chatdb.messages
                where user_id = $1 and conversation_id = t.id and seq > t.follows and seq <> t.seq -- noqa: RF01
            )
            else c.head_is_newest
        end
    from seen as s, target as t
    -- if another write came first, this statement does not see what it wrote
    where c.user_id = $1 and c.id = s.id and c.last_seq + c.edits = s.revision
    returning c.id, t.seq, t.follows
),

-- the messages that follow the deleted one, of which only the next in order of seq may not say so
child as (
    select seq
    from chatdb.messages
    -- a join could read the branches of all conversations of the user
    where user_id = $1 and conversation_id = (select id from target) and parent_seq = (select seq from target)
    union all
    select m.seq
    from target as t
    cross join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = t.id and seq > t.seq
        order by seq
        limit 1
    ) as m
    where t.parent_seq is not null and m.parent_seq is null
),

handed_over as (
    update chatdb.messages as m
    set parent_seq = c.follows
    from conversation as c
    where m.user_id = $1 and m.conversation_id = c.id and m.seq = any(array(select seq from child))
),

message as (
    delete from chatdb.messages as m
    using conversation as c
    where m.user_id = $1 and m.conversation_id = c.id and m.seq = c.seq
    returning m.seq
)

select 0::int8 as conversations, (select pg_catalog.count(*) from message) as messages, null as refusal
from conversation
union all
select
    0, 0,
    case
        when $6::int8 is not null and (id <> $6 or revision <> $7::int8) then 'stale'
        when exists (select from target) then 'again'
        else 'missing'
    end
from seen
where not exists (select from conversation)
