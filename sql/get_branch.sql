-- get_branch
-- The newest messages of the head's line before a position, newest first.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 before_seq int8
-- $4 row_limit int8
--
-- returns many Message without user_id and conversation_id, then an existence row: if the page is not full
-- served by pk_conversations, pk_messages, ix_messages_user_id_conversation_id_seq_branches, pk_message_parts

with recursive conversation as (
    select case when head_last_seq = last_seq then head_seq else last_seq end as head_seq
    from chatdb.conversations
    where user_id = $1 and id = $2
),

-- the runs of the line, newest first: messages in order of seq, the oldest of which names its parent unless it is the
-- first of the conversation. An empty run comes first: with one subquery for all of them the statement starts sooner.
-- bottom is never null, so that it needs no coalesce: row-level security would not take that as an index condition
run as (
    select null::int8 as top, null::int8 as bottom, head_seq as parent_seq
    from conversation
    union all
    select r.parent_seq as top, coalesce(b.seq, 0) as bottom, b.parent_seq
    from run as r
    left join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = $2 and seq <= r.parent_seq and parent_seq is not null
        order by seq desc
        limit 1
    ) as b on true
    where r.parent_seq > 0
)

(
    select
        m.id, m.seq, m.parent_seq, m.role,
        case
            when m.state = 'streaming' then (
                select pg_catalog.string_agg(p.content, '' order by p.start)
                from chatdb.message_parts as p
                where p.user_id = $1 and p.conversation_id = $2 and p.seq = m.seq
            )
            else m.content
        end as content,
        m.payload::text as payload, m.metadata::text as metadata, m.token_count, m.key, m.state, m.created_at
    from run as r
    cross join lateral (
        select id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at
        from chatdb.messages
        where user_id = $1 and conversation_id = $2 and seq <= r.top and seq >= r.bottom and seq < $3
        order by seq desc
        limit $4
    ) as m
)
union all
select null, null, null, null, null, null, null, null, null, null, null
from conversation
-- a full page ends before further runs and this branch are read
limit $4
