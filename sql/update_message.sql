-- update_message
-- Other values in a message; its seq, role, key and time stay. The conversation's revision rises if a value changes.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 seq int8 null
-- $5 key text null
-- $6 set_content bool
-- $7 content text null
-- $8 set_payload bool
-- $9 payload text null
-- $10 set_metadata bool
-- $11 metadata text null
-- $12 metadata_patch text null    merged into the top level
-- $13 removed_keys text[] null
-- $14 set_token_count bool
-- $15 token_count int4 null
-- $16 expected_id int8 null
-- $17 expected_revision int8 null
--
-- returns one Message
-- refuses with stale, missing, streaming, again
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- pk_message_parts

with conversation as (
    select
        user_id, id, last_seq + edits as revision,
        $16::int8 is null or (id = $16 and last_seq + edits = $17::int8) as is_expected
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
    where c.is_expected
),

target as (
    select
        m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata,
        m.token_count, m.key, m.state, m.created_at
    from place as p
    inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = p.id and m.seq = p.seq
),

-- a message whose text is in its parts
growing as (
    select id
    from target
    where $6::bool and state = 'streaming'
),

message as (
    update chatdb.messages as m
    set content = case when $6::bool then $7 else m.content end,
        payload = case when $8::bool then $9::text::json else m.payload end,
        metadata = case
            when $10::bool then $11::text::jsonb
            when $12::text is not null
                then nullif((coalesce(m.metadata, '{}') || $12::text::jsonb) - $13::text[], '{}')
            else m.metadata
        end,
        token_count = case when $14::bool then $15 else m.token_count end
    from target as t
    where m.user_id = $1 and m.conversation_id = t.conversation_id and m.seq = t.seq
      and not exists (select from growing)
      and (
          ($6::bool and m.content is distinct from $7)
          or ($8::bool and m.payload::text is distinct from $9)
          or ($10::bool and m.metadata is distinct from $11::text::jsonb)
          or (
              $12::text is not null
              and m.metadata is distinct from
              nullif((coalesce(m.metadata, '{}') || $12::text::jsonb) - $13::text[], '{}')
          )
          or ($14::bool and m.token_count is distinct from $15)
      )
    returning
        m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata,
        m.token_count, m.key, m.state, m.created_at
),

raised as (
    update chatdb.conversations as c
    set edits = c.edits + 1
    -- a join could read all conversations of the user
    where c.user_id = $1 and c.id = (select conversation_id from message)
),

-- another write came first, and this statement does not see what it wrote
overtaken as (
    select c.id
    from conversation as c
    where not exists (select from message)
      and c.revision <> (
          select last_seq + edits
          from chatdb.conversations
          where user_id = $1 and id = c.id
      )
)

select
    id, conversation_id, user_id, seq, parent_seq, role,
    case
        when state = 'streaming' then (
            select pg_catalog.string_agg(p.content, '' order by p.start)
            from chatdb.message_parts as p
            where p.user_id = $1 and p.conversation_id = message.conversation_id and p.seq = message.seq
        )
        else content
    end as content,
    payload::text as payload, metadata::text as metadata, token_count, key, state, created_at, null as refusal
from message
union all
-- with the same values nothing is written
select
    id, conversation_id, user_id, seq, parent_seq, role,
    case
        when state = 'streaming' then (
            select pg_catalog.string_agg(p.content, '' order by p.start)
            from chatdb.message_parts as p
            where p.user_id = $1 and p.conversation_id = target.conversation_id and p.seq = target.seq
        )
        else content
    end as content,
    payload::text as payload, metadata::text as metadata, token_count, key, state, created_at, null
from target
where not exists (select from message) and not exists (select from overtaken) and not exists (select from growing)
union all
select
    null, null, null, null, null, null, null, null, null, null, null, null, null,
    case
        when not is_expected then 'stale'
        when exists (select from overtaken) then 'again'
        when exists (select from growing) then 'streaming'
        else 'missing'
    end
from conversation
where not exists (select from target) or exists (select from overtaken) or exists (select from growing)
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
