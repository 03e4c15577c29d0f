-- finish_message
-- A message that is streamed gets its text, from its parts or as given, and their rows go; the stored message if it is
-- not streaming.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 seq int8 null
-- $5 key text null
-- $6 content text null    the text of its parts if null
-- $7 payload text null    the stored one if null
-- $8 metadata text null    the stored one if null
-- $9 token_count int4 null    the stored one if null
-- $10 aborted bool
--
-- returns one Message
-- refuses with missing, again
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- pk_message_parts

with conversation as (
    select id
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
    for no key update
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
    select
        m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata,
        m.token_count, m.key, m.state, m.created_at
    from place as p
    inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = p.id and m.seq = p.seq
),

seen as (
    select
        pg_catalog.string_agg(p.content, '' order by p.start) as content,
        pg_catalog.max(p.flushed_at) as flushed_at
    from chatdb.message_parts as p
    -- a join could read the parts of all conversations of the user
    where p.user_id = $1 and p.conversation_id = (select conversation_id from target)
      and p.seq = (select seq from target)
),

stream as (
    delete from chatdb.message_parts as p
    using seen as s
    where p.user_id = $1 and p.conversation_id = (select conversation_id from target)
      and p.seq = (select seq from target) and p.start = -1
      -- if another flush came first, this statement does not see its text
      and p.flushed_at = s.flushed_at
    returning p.conversation_id, p.seq
),

message as (
    update chatdb.messages as m
    set state = case when $10::bool then 'aborted' end,
        content = coalesce($6, seen.content, m.content),
        payload = coalesce($7::text::json, m.payload),
        metadata = coalesce($8::text::jsonb, m.metadata),
        token_count = coalesce($9, m.token_count)
    from target as t, seen
    where m.user_id = $1 and m.conversation_id = t.conversation_id and m.seq = t.seq and m.state = 'streaming'
      -- without any part, as after a rollback of the migration that made their table, there is no text to wait for
      and (seen.flushed_at is null or exists (select from stream))
    returning
        m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata,
        m.token_count, m.key, m.state, m.created_at
),

part as (
    delete from chatdb.message_parts as p
    where p.user_id = $1 and p.conversation_id = (select conversation_id from message)
      and p.seq = (select seq from message) and p.start >= 0
),

raised as (
    update chatdb.conversations as c
    set edits = c.edits + 1
    -- a join could read all conversations of the user
    where c.user_id = $1 and c.id = (select conversation_id from message)
)

select
    id, conversation_id, user_id, seq, parent_seq, role,
    content,
    payload::text as payload, metadata::text as metadata, token_count, key, state, created_at, null as refusal
from message
union all
select
    id, conversation_id, user_id, seq, parent_seq, role,
    content,
    payload::text as payload, metadata::text as metadata, token_count, key, state, created_at, null
from target
where state is distinct from 'streaming'
union all
select
    null, null, null, null, null, null, null, null, null, null, null, null, null,
    case when exists (select from target) then 'again' else 'missing' end
from conversation
where not exists (select from message)
  and not exists (
      select from target
      where state is distinct from 'streaming'
  )
union all
-- deleted while this statement waited
select null, null, null, null, null, null, null, null, null, null, null, null, null, 'again'
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
  and not exists (select from conversation)
