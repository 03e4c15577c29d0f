-- start_message
-- A message that is streamed, after the head or another message; the stored one, in any state, if its key is stored.
-- The part with start -1 stands for the stream: it has the length so far, which extend_message checks and raises.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 role text
-- $5 metadata text null
-- $6 key text null
-- $7 parent_seq int8 null    0 for another first message
--
-- returns one Message
-- refuses with conflict, missing, again, suppressed
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- pk_message_parts

with stored as (
    select
        user_id, id, last_seq, last_seq + edits as revision,
        greatest(updated_at, pg_catalog.statement_timestamp()) as appended_at,
        -- the parent to write: null if it is the newest message
        nullif(
            nullif(coalesce($7::int8, case when head_last_seq = last_seq then head_seq end), last_seq),
            case when head_last_seq = last_seq and head_is_newest then head_seq end
        ) as parent_seq
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
    for no key update
),

parent as (
    select seq
    from chatdb.messages
    where user_id = $1 and conversation_id = (select id from stored) and seq = $7::int8
    -- the row as it is now: another caller may have deleted it after this statement began
    for key share
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, metadata, key, state, created_at, parent_seq
    )
    select user_id, id, last_seq + 1, $4, '', $5::text::jsonb, $6, 'streaming', appended_at, parent_seq
    from stored
    where coalesce($7::int8, 0) = 0 or exists (select from parent)
    -- changes nothing, but unlike DO NOTHING it returns a row that this statement's snapshot cannot see
    on conflict (user_id, conversation_id, key) where key is not null do update set key = excluded.key
    returning
        id, conversation_id, user_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
        created_at
),

part as (
    insert into chatdb.message_parts (
        user_id, conversation_id, seq, start, content, length, bytes, last_start, last_start_bytes, flushed_at
    )
    select m.user_id, m.conversation_id, m.seq, -1, '', 0, 0, 0, 0, pg_catalog.statement_timestamp()
    from message as m
    inner join stored as s on m.seq = s.last_seq + 1
),

raised as (
    update chatdb.conversations as c
    set last_seq = message.seq, updated_at = message.created_at
    from stored, message
    where c.user_id = $1 and c.id = stored.id and message.seq = stored.last_seq + 1
),

-- the parent is missing, but the message may be stored
earlier as (
    select
        m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata,
        m.token_count, m.key, m.state, m.created_at
    from chatdb.messages as m
    where m.user_id = $1
      and m.conversation_id = (
          select id from stored
          where not exists (select from message)
      )
      and m.key = $6
),

found as (
    select
        id, conversation_id, user_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
        created_at
    from message
    where role = $4
    union all
    select
        id, conversation_id, user_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
        created_at
    from earlier
    where role = $4
)

select
    id, conversation_id, user_id, seq, parent_seq, role,
    case
        -- this statement does not see a part that it has added
        when state = 'streaming' then (
            select coalesce(pg_catalog.string_agg(p.content, '' order by p.start), '')
            from chatdb.message_parts as p
            where p.user_id = $1 and p.conversation_id = found.conversation_id and p.seq = found.seq
        )
        else content
    end as content,
    payload::text as payload, metadata::text as metadata, token_count, key, state, created_at, null as refusal
from found
union all
select
    null, null, null, null, null, null, null, null, null, null, null, null, null,
    case
        when exists (select from message) or exists (select from earlier) then 'conflict'
        when coalesce($7::int8, 0) = 0 or exists (select from parent) then 'suppressed'
        -- the message or its parent may have been stored after this statement began
        when stored.revision <> (
            select last_seq + edits
            from chatdb.conversations
            where user_id = $1 and id = stored.id
        ) then 'again'
        else 'missing'
    end
from stored
where not exists (select from found)
union all
-- deleted while this statement waited
select null, null, null, null, null, null, null, null, null, null, null, null, null, 'again'
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
  and not exists (select from stored)
