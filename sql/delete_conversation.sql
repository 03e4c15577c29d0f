-- delete_conversation
-- A conversation and its messages, counted. The conversation is deleted first, because every write locks its row first.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 expected_id int8 null
-- $5 expected_revision int8 null
--
-- returns one Deleted
-- refuses with stale, again
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key

with seen as (
    select id, last_seq + edits as revision
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
),

conversation as (
    delete from chatdb.conversations as c
    using seen as s
    -- if another write came first, its messages are not in this statement's snapshot
    where c.user_id = $1 and c.id = s.id and c.last_seq + c.edits = s.revision
      and ($4::int8 is null or (s.id = $4 and s.revision = $5::int8))
    returning c.user_id, c.id
),

message as (
    delete from chatdb.messages as m
    using conversation as c
    where m.user_id = $1 and m.conversation_id = c.id
    returning m.seq
)

select 1::int8 as conversations, (select pg_catalog.count(*) from message) as messages, null as refusal
from conversation
union all
select 0, 0, case when $4::int8 is null or (id = $4 and revision = $5::int8) then 'again' else 'stale' end
from seen
where not exists (select from conversation)
