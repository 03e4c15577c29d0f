-- append_messages_conditional
-- Messages at the end of a conversation, after its head or another message, if all their keys are new and the
-- conversation is as expected; the stored ones if all are stored with the same bodies. With skip, those whose keys are
-- new. With create, a missing conversation is created.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 roles text[]
-- $5 contents text[]
-- $6 payloads text[] null    with null for each message without one
-- $7 metadatas text[] null    with null for each message without one
-- $8 token_counts text[] null    with null for each message without one
-- $9 keys text[] null    with null for each message without one
-- $10 skip_stored bool
-- $11 create_missing bool
-- $12 expected_id int8 null    0 if the conversation must not exist
-- $13 expected_revision int8 null
-- $14 metadata_patch text null    merged into the conversation's metadata
-- $15 removed_keys text[] null
-- $16 parent_seq int8 null    of the first message; 0 for another first message
--
-- returns many Message without user_id, role, content and payload, or an existence row: if nothing is new
-- refuses with conflict, stale, missing, again, suppressed
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key

with batch as (
    select role, content, payload, metadata::jsonb as metadata, token_count, key, ordinality
    -- the subquery hides the number of keys from the planner, which would otherwise plan every call for it
    from unnest($4::text[], $5::text[], $6::text[], $7::text[], $8::text[]::int4[], (select $9::text[]))
        with ordinality as m (role, content, payload, metadata, token_count, key, ordinality)
),

stored as (
    select
        user_id, id, last_seq, last_seq + edits as revision,
        greatest(updated_at, pg_catalog.statement_timestamp()) as appended_at,
        -- the parent to write: null if it is the newest message
        nullif(
            nullif(coalesce($16::int8, case when head_last_seq = last_seq then head_seq end), last_seq),
            case when head_last_seq = last_seq and head_is_newest then head_seq end
        ) as parent_seq,
        $12::int8 is null or (id = $12 and last_seq + edits = $13::int8) as is_expected
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
    for no key update
),

known as (
    select b.ordinality
    from batch as b
    -- Only the index on the key has this order, so each key is looked up in it. With a join or conditions of equality,
    -- PostgreSQL may read the whole conversation for each key if the table has no statistics.
    cross join lateral (
        select conversation_id, key
        from chatdb.messages
        where user_id = $1 and (conversation_id, key) >= ((select id from stored), b.key) and key is not null
        order by conversation_id, key
        limit 1
    ) as m
    where m.conversation_id = (select id from stored) and m.key = b.key
),

wanted as (
    select
        role, content, payload, metadata, token_count, key, ordinality,
        pg_catalog.row_number() over (order by ordinality) as place
    from batch
    where not $10::bool or ordinality not in (select ordinality from known)
),

parent as (
    select seq
    from chatdb.messages
    where user_id = $1 and conversation_id = (select id from stored) and seq = $16::int8
    -- the row as it is now: another caller may have deleted it after this statement began
    for key share
),

created as (
    insert into chatdb.conversations (user_id, key, last_seq, metadata)
    select $1, $3, pg_catalog.cardinality($4::text[]), nullif($14::text::jsonb, '{}')
    where $11::bool and not exists (select from stored) and coalesce($16::int8, 0) = 0
    on conflict (user_id, key) where key is not null do nothing
    returning user_id, id, 0::int8 as last_seq, updated_at as appended_at
),

conversation as (
    select user_id, id, last_seq, appended_at, parent_seq, is_expected
    from stored
    -- if another write came first, this statement does not see which keys it stored
    where not $10::bool
       or revision = (
           select last_seq + edits
           from chatdb.conversations
           where user_id = $1 and id = stored.id
       )
    union all
    select user_id, id, last_seq, appended_at, null, true
    from created
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at, parent_seq
    )
    select
        c.user_id, c.id, c.last_seq + b.place, b.role, b.content, b.payload::json, b.metadata, b.token_count, b.key,
        c.appended_at, case when b.place = 1 then c.parent_seq end
    from conversation as c
    cross join wanted as b
    where c.is_expected
      and (coalesce($16::int8, 0) = 0 or exists (select from parent))
      and ($10::bool or (select pg_catalog.count(*) from known) in (0, pg_catalog.cardinality($4::text[])))
    on conflict (user_id, conversation_id, key) where key is not null do update set key = excluded.key
    returning
        id, conversation_id, user_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
        created_at
),

refused as (
    select id
    from stored
    where not is_expected or (coalesce($16::int8, 0) <> 0 and not exists (select from parent))
),

fresh as (
    select pg_catalog.count(*) as total
    from message
    where seq > (select last_seq from conversation)
),

raised as (
    update chatdb.conversations as c
    -- if another caller stored some of the keys after this statement began, the CHECK on last_seq undoes all of it
    set last_seq = case
            when fresh.total = (select pg_catalog.count(*) from wanted) then c.last_seq + fresh.total
            else -1
        end,
        updated_at = case when fresh.total > 0 then stored.appended_at else c.updated_at end,
        -- an append raises the revision by last_seq; a patch without messages is an edit if it changes something
        edits = c.edits + (
            fresh.total = 0 and c.metadata is distinct from
            nullif((coalesce(c.metadata, '{}') || $14::text::jsonb) - $15::text[], '{}')
        )::int,
        metadata = case
            when $14::text is null then c.metadata
            else nullif((coalesce(c.metadata, '{}') || $14::text::jsonb) - $15::text[], '{}')
        end
    from stored, fresh
    where c.user_id = $1 and c.id = stored.id
      and (
          fresh.total > 0
          or (
              $14::text is not null and not exists (select from refused)
              and pg_catalog.cardinality($4::text[]) = 0
          )
      )
),

-- for a retry whose first try succeeded: the conversation is no longer as expected, but the messages are stored
earlier as (
    select
        m.id, m.conversation_id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata, m.token_count, m.key,
        m.state, m.created_at
    from batch as b
    -- looked up as in known
    cross join lateral (
        select
            id, conversation_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at
        from chatdb.messages
        where user_id = $1 and (conversation_id, key) >= ((select id from refused), b.key) and key is not null
        order by conversation_id, key
        limit 1
    ) as m
    where m.conversation_id = (select id from refused) and m.key = b.key
),

same as (
    select m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata, m.token_count, m.key, m.state, m.created_at
    from message as m
    where m.seq > (select last_seq from conversation)
    union all
    -- not an alternative of the condition above, for which the batch would be read once per message
    select m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata, m.token_count, m.key, m.state, m.created_at
    from message as m
    where not $10::bool and m.seq <= (select last_seq from conversation) and m.state is distinct from 'streaming'
      and exists (
          select from batch as b
          where b.key = m.key and b.role = m.role and b.content = m.content
            and b.payload is not distinct from m.payload::text and b.metadata is not distinct from m.metadata
      )
    union all
    select m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata, m.token_count, m.key, m.state, m.created_at
    from earlier as m
    where not $10::bool and m.state is distinct from 'streaming'
      and exists (
          select from batch as b
          where b.key = m.key and b.role = m.role and b.content = m.content
            and b.payload is not distinct from m.payload::text and b.metadata is not distinct from m.metadata
      )
)

select
    id, conversation_id, seq, parent_seq, metadata::text as metadata, token_count, key, state, created_at,
    null as refusal
from same
where $10::bool or (select pg_catalog.count(*) from same) = pg_catalog.cardinality($4::text[])
union all
select
    null, null, null, null, null, null, null, null, null,
    case
        -- only the parent is missing; another caller may have stored it after this statement began
        when stored.is_expected and exists (select from refused)
            and (pg_catalog.cardinality($4::text[]) = 0 or exists (select from wanted))
            and ($10::bool or not exists (select from known))
            then case
                when stored.revision <> (
                    select last_seq + edits
                    from chatdb.conversations
                    where user_id = $1 and id = stored.id
                ) then 'again'
                else 'missing'
            end
        when stored.is_expected and pg_catalog.cardinality($4::text[]) = 0 then null
        when stored.is_expected and $10::bool then
            case when exists (select from wanted) and not exists (select from conversation) then 'again' end
        when stored.is_expected and not exists (select from message) and not exists (select from known)
            then 'suppressed'
        when stored.is_expected then 'conflict'
        when $10::bool and pg_catalog.cardinality($4::text[]) > 0 and not exists (select from wanted) then null
        when not $10::bool and exists (select from earlier) then 'conflict'
        -- the messages may have been stored after this statement began
        when stored.revision <> (
            select last_seq + edits
            from chatdb.conversations
            where user_id = $1 and id = stored.id
        ) then 'again'
        else 'stale'
    end
from stored
where not exists (select from same)
   or (not $10::bool and (select pg_catalog.count(*) from same) <> pg_catalog.cardinality($4::text[]))
union all
select null, null, null, null, null, null, null, null, null, null
from created
where pg_catalog.cardinality($4::text[]) = 0
union all
-- another caller created or deleted the conversation after this statement began
select
    null, null, null, null, null, null, null, null, null,
    case when $11::bool and coalesce($16, 0) <> 0 then 'missing' else 'again' end
where not exists (select from stored)
  and not exists (select from created)
  and ($11::bool or exists (
      select from chatdb.conversations
      where user_id = $1
        and id = (select coalesce((select $2::int8), (
            select id from chatdb.conversations
            where user_id = $1 and key = $3
        )))
  ))
