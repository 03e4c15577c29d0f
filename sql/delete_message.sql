-- delete_message
-- One message, counted. Its seq stays unused: last_seq is not lowered.
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
    select m.seq
    from place as p
    inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = p.id and m.seq = p.seq
),

conversation as (
    update chatdb.conversations as c
    set edits = c.edits + 1
    from seen as s, target as t
    -- if another write came first, this statement does not see what it wrote
    where c.user_id = $1 and c.id = s.id and c.last_seq + c.edits = s.revision
    returning c.id, t.seq
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
