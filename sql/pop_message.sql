-- pop_message
-- The newest message of a conversation, deleted. Its seq stays unused: last_seq is not lowered.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 expected_id int8 null
-- $5 expected_revision int8 null
--
-- returns one Message, or an existence row: if the conversation has no messages
-- refuses with stale, again, suppressed
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

newest as (
    select m.seq
    from seen as c
    cross join lateral (
        select seq
        from chatdb.messages
        where user_id = $1 and conversation_id = c.id
        order by seq desc
        limit 1
    ) as m
    where $4::int8 is null or (c.id = $4 and c.revision = $5::int8)
),

conversation as (
    update chatdb.conversations as c
    set edits = c.edits + 1
    from seen as s, newest as n
    -- if another write came first, there may be a newer message that this statement does not see
    where c.user_id = $1 and c.id = s.id and c.last_seq + c.edits = s.revision
    returning c.id, n.seq
),

message as (
    delete from chatdb.messages as m
    using conversation as c
    where m.user_id = $1 and m.conversation_id = c.id and m.seq = c.seq
    returning
        m.id, m.conversation_id, m.user_id, m.seq, m.role, m.content, m.payload, m.metadata, m.token_count, m.key,
        m.created_at
)

select
    id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
    token_count, key, created_at, null as refusal
from message
union all
select
    null, null, null, null, null, null, null, null, null, null, null,
    case
        when $4::int8 is not null and (id <> $4 or revision <> $5::int8) then 'stale'
        when exists (select from conversation) then 'suppressed'
        when exists (select from newest) then 'again'
    end
from seen
where not exists (select from message)
