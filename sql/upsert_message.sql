-- upsert_message
-- The message with this key, appended, or with its role and values replaced. Nothing is written if it is stored as
-- given.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 role text
-- $5 content text
-- $6 payload text null
-- $7 metadata text null
-- $8 token_count int4 null
-- $9 key text
-- $10 expected_id int8 null
-- $11 expected_revision int8 null
--
-- returns one Message without user_id, role, content, payload, token_count and key
-- refuses with stale, streaming, again, suppressed
-- served by pk_conversations, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key

with conversation as (
    select
        id, last_seq, last_seq + edits as revision,
        greatest(updated_at, pg_catalog.statement_timestamp()) as appended_at,
        case when head_last_seq = last_seq and not head_is_newest then head_seq end as parent_seq,
        $10::int8 is null or (id = $10 and last_seq + edits = $11::int8) as is_expected
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
    for no key update
),

same as (
    select m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata, m.state, m.created_at
    from chatdb.messages as m
    -- a join could look for the key in all conversations of the user
    where m.user_id = $1 and m.conversation_id = (select id from conversation) and m.key = $9
      and m.role = $4 and m.content = $5 and m.payload::text is not distinct from $6
      and m.metadata is not distinct from $7::text::jsonb and m.token_count is not distinct from $8
      and m.state is distinct from 'streaming'
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at, parent_seq
    )
    select $1, id, last_seq + 1, $4, $5, $6::text::json, $7::text::jsonb, $8, $9, appended_at, parent_seq
    from conversation
    where is_expected and not exists (select from same)
    on conflict (user_id, conversation_id, key) where key is not null do update
    set role = excluded.role, content = excluded.content, payload = excluded.payload, metadata = excluded.metadata,
        token_count = excluded.token_count
    -- while it is streaming, its text is not in this row
    where messages.state is distinct from 'streaming'
    returning id, conversation_id, seq, parent_seq, metadata, state, created_at
),

raised as (
    update chatdb.conversations as c
    set last_seq = greatest(c.last_seq, m.seq),
        updated_at = case when m.seq > c.last_seq then m.created_at else c.updated_at end,
        edits = c.edits + (m.seq <= c.last_seq)::int
    from message as m
    -- a join on it could read all conversations of the user
    where c.user_id = $1 and c.id = (select conversation_id from message)
)

select id, conversation_id, seq, parent_seq, metadata::text as metadata, state, created_at, null as refusal
from message
union all
select id, conversation_id, seq, parent_seq, metadata::text as metadata, state, created_at, null
from same
union all
select
    null, null, null, null, null, null, null,
    case
        when c.is_expected and exists (
            select from chatdb.messages
            where user_id = $1 and conversation_id = c.id and key = $9 and state = 'streaming'
        ) then 'streaming'
        -- the message may have been stored or started after this statement began
        when c.revision <> (
            select last_seq + edits
            from chatdb.conversations
            where user_id = $1 and id = c.id
        ) then 'again'
        when c.is_expected then 'suppressed'
        else 'stale'
    end
from conversation as c
where not exists (select from same) and not exists (select from message)
union all
-- deleted while this statement waited
select null, null, null, null, null, null, null, 'again'
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
  and not exists (select from conversation)
