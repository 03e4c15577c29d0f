-- pop_message
-- The newest message of the head's line, deleted. Its seq stays unused: last_seq is not lowered. Its parent becomes the
-- head, and messages that follow it then follow its parent.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 expected_id int8 null
-- $5 expected_revision int8 null
--
-- returns one Message, or an existence row: if the conversation has no messages
-- refuses with stale, again, suppressed
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key,
-- ix_messages_user_id_conversation_id_seq_branches, pk_message_parts

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

target as (
    select
        c.id, m.seq, m.parent_seq,
        coalesce(
            m.parent_seq,
            (
                select seq from chatdb.messages
                where user_id = $1 and conversation_id = c.id and seq < m.seq
                order by seq desc
                limit 1
            ),
            0
        ) as follows
    from seen as c
    cross join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = c.id and seq <= c.head_seq
        order by seq desc
        limit 1
    ) as m
    where $4::int8 is null or (c.id = $4 and c.revision = $5::int8)
),

conversation as (
    update chatdb.conversations as c
    set edits = c.edits + 1,
        head_seq = t.follows,
        head_last_seq = c.last_seq,
        head_is_newest = case
            -- where the head was the newest message of all, so is the one before it
            when t.parent_seq is null and (c.head_is_newest or c.head_last_seq is distinct from c.last_seq) then true
            else not exists (
                select from chatdb.messages
                where user_id = $1 and conversation_id = t.id and seq > t.follows and seq <> t.seq -- noqa: RF01
            )
        end
    from seen as s, target as t
    -- if another write came first, there may be a newer message that this statement does not see
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
    returning
        m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata,
        m.token_count, m.key, m.state, m.created_at
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
select
    null, null, null, null, null, null, null, null, null, null, null, null, null,
    case
        when $4::int8 is not null and (id <> $4 or revision <> $5::int8) then 'stale'
        when exists (select from conversation) then 'suppressed'
        when exists (select from target) then 'again'
    end
from seen
where not exists (select from message)
