-- get_branch_top
-- The newest messages of a line before a position, newest first: the line of the head, or of another message. The
-- conversation is found by its id or its key.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 top_seq int8 null    the head if null
-- $5 before_seq int8
-- $6 row_limit int8
--
-- returns many Message without user_id and conversation_id, then an existence row: if the page is not full
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key,
-- ix_messages_user_id_conversation_id_seq_branches, pk_message_parts

with recursive conversation as (
    select
        c.id,
        coalesce($4::int8, case when c.head_last_seq = c.last_seq then c.head_seq else c.last_seq end) as top
    from chatdb.conversations as c
    where c.user_id = $1
      and c.id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
      and ($4::int8 is null or exists (
          select from chatdb.messages as m
          where m.user_id = $1 and m.conversation_id = c.id and m.seq = $4
      ))
),

-- the runs of the line, as in get_branch
run as (
    select c.id, c.top, coalesce(b.seq, 0) as bottom, b.parent_seq
    from conversation as c
    left join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = c.id and seq <= c.top and parent_seq is not null
        order by seq desc
        limit 1
    ) as b on true
    union all
    select r.id, r.parent_seq as top, coalesce(b.seq, 0) as bottom, b.parent_seq
    from run as r
    left join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = r.id and seq <= r.parent_seq and parent_seq is not null
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
                where p.user_id = $1 and p.conversation_id = r.id and p.seq = m.seq
            )
            else m.content
        end as content,
        m.payload::text as payload, m.metadata::text as metadata, m.token_count, m.key, m.state, m.created_at
    from run as r
    cross join lateral (
        select id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at
        from chatdb.messages
        where user_id = $1 and conversation_id = r.id and seq <= r.top and seq >= r.bottom and seq < $5
        order by seq desc
        limit $6
    ) as m
    limit $6 -- noqa: AM09
)
union all
-- its seq is the id of the conversation; its key is null if top_seq is not stored
select
    null, id, null, null, null, null, null, null,
    (
        select '' from conversation
    ),
    null, null
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
-- a full page ends before this branch is read, so that it costs nothing there; without the id, the caller needs it
limit $6 + case when $2::int8 is null then 1 else 0 end
