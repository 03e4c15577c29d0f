-- append_message_conditional
-- A message at the end of a conversation, after its head or another message, if its key is new and the conversation is
-- as expected; the stored message if its key is stored with the same body. With create, a missing conversation is
-- created.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 role text
-- $5 content text
-- $6 payload text null
-- $7 metadata text null
-- $8 token_count int4 null
-- $9 key text null
-- $10 create_missing bool
-- $11 expected_id int8 null    0 if the conversation must not exist
-- $12 expected_revision int8 null
-- $13 metadata_patch text null    merged into the conversation's metadata
-- $14 removed_keys text[] null
-- $15 parent_seq int8 null    0 for another first message
--
-- returns one Message without user_id, role, content, payload and key
-- refuses with conflict, stale, missing, again, suppressed
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key

-- the row is locked before the key is looked up: a caller that waited here finds what the other one stored
with stored as (
    select
        user_id, id, last_seq, last_seq + edits as revision,
        greatest(updated_at, pg_catalog.statement_timestamp()) as appended_at,
        -- the parent to write: null if it is the newest message
        nullif(
            nullif(coalesce($15::int8, case when head_last_seq = last_seq then head_seq end), last_seq),
            case when head_last_seq = last_seq and head_is_newest then head_seq end
        ) as parent_seq,
        $11::int8 is null or (id = $11 and last_seq + edits = $12::int8) as is_expected
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
    where user_id = $1 and conversation_id = (select id from stored) and seq = $15::int8
    -- the row as it is now: another caller may have deleted it after this statement began
    for key share
),

created as (
    insert into chatdb.conversations (user_id, key, last_seq, metadata)
    select $1, $3, 1, nullif($13::text::jsonb, '{}')
    where $10::bool and not exists (select from stored) and coalesce($15::int8, 0) = 0
    on conflict (user_id, key) where key is not null do nothing
    returning user_id, id, 0::int8 as last_seq, updated_at as appended_at
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at, parent_seq
    )
    select
        c.user_id, c.id, c.last_seq + 1, $4, $5, $6::text::json, $7::text::jsonb, $8, $9, c.appended_at, c.parent_seq
    from (
        select user_id, id, last_seq, appended_at, parent_seq
        from stored
        where is_expected and (coalesce($15::int8, 0) = 0 or exists (select from parent))
        union all
        select user_id, id, last_seq, appended_at, null
        from created
    ) as c
    -- changes nothing, but unlike DO NOTHING it returns a row that this statement's snapshot cannot see
    on conflict (user_id, conversation_id, key) where key is not null do update set key = excluded.key
    returning
        id, conversation_id, user_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
        created_at
),

raised as (
    update chatdb.conversations as c
    set last_seq = message.seq,
        updated_at = message.created_at,
        metadata = case
            when $13::text is null then c.metadata
            else nullif((coalesce(c.metadata, '{}') || $13::text::jsonb) - $14::text[], '{}')
        end
    from stored, message
    where c.user_id = $1 and c.id = stored.id and message.seq = stored.last_seq + 1
),

refused as (
    select id
    from stored
    where not is_expected or (coalesce($15::int8, 0) <> 0 and not exists (select from parent))
),

-- for a retry whose first try succeeded: the conversation is no longer as expected, but the message is stored
earlier as (
    select
        m.id, m.conversation_id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata, m.token_count,
        m.state, m.created_at
    from chatdb.messages as m
    -- a join could look for the key in all conversations of the user
    where m.user_id = $1 and m.conversation_id = (select id from refused) and m.key = $9
),

same as (
    select id, conversation_id, seq, parent_seq, metadata, token_count, state, created_at
    from message
    where role = $4 and content = $5 and state is distinct from 'streaming'
      and payload::text is not distinct from $6 and metadata is not distinct from $7::text::jsonb
    union all
    select id, conversation_id, seq, parent_seq, metadata, token_count, state, created_at
    from earlier
    where role = $4 and content = $5 and state is distinct from 'streaming'
      and payload::text is not distinct from $6 and metadata is not distinct from $7::text::jsonb
)

select id, conversation_id, seq, parent_seq, metadata::text as metadata, token_count, state, created_at, null as refusal
from same
union all
select
    null, null, null, null, null, null, null, null,
    case
        when exists (select from message) or exists (select from earlier) then 'conflict'
        when not exists (select from refused) then 'suppressed'
        -- the message or its parent may have been stored after this statement began
        when (stored.is_expected or $9::text is not null) and stored.revision <> (
            select last_seq + edits
            from chatdb.conversations
            where user_id = $1 and id = stored.id
        ) then 'again'
        when stored.is_expected then 'missing'
        else 'stale'
    end
from stored
where not exists (select from same)
union all
-- another caller created or deleted the conversation after this statement began
select
    null, null, null, null, null, null, null, null,
    case when $10::bool and coalesce($15, 0) <> 0 then 'missing' else 'again' end
where not exists (select from stored)
  and not exists (select from created)
  and ($10::bool or exists (
      select from chatdb.conversations
      where user_id = $1
        and id = (select coalesce((select $2::int8), (
            select id from chatdb.conversations
            where user_id = $1 and key = $3
        )))
  ))
