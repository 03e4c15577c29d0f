-- load_conversation
-- A conversation and the newest messages of its head's line, newest first.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 row_limit int8
--
-- returns one Conversation, then many Message without user_id and conversation_id
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key,
-- ix_messages_user_id_conversation_id_seq_branches, pk_message_parts

with recursive conversation as (
    select
        id, user_id, key, title, metadata, last_seq,
        case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
        created_at, updated_at, archived_at, pinned_at
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
),

-- the runs of the line, as in get_branch
run as (
    select c.id, c.head_seq as top, coalesce(b.seq, 0) as bottom, b.parent_seq
    from conversation as c
    left join lateral (
        select seq, parent_seq
        from chatdb.messages
        where user_id = $1 and conversation_id = c.id and seq <= c.head_seq and parent_seq is not null
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
        id, user_id, key, title, metadata::text as metadata, last_seq, head_seq, revision, created_at, updated_at,
        archived_at, pinned_at,
        null::int8 as message_id, null::int8 as message_seq, null::int8 as message_parent_seq, null as message_role,
        null as message_content, null as message_payload, null as message_metadata, null::int4 as message_token_count,
        null as message_key, null as message_state, null::timestamptz as message_created_at
    from conversation
    -- without a limit of its own this branch could be read in parallel to the other, and come after it
    limit 1 -- noqa: AM09
)
union all
(
    select
        null, null, null, null, null, null, null, null, null, null, null, null,
        m.id, m.seq, m.parent_seq, m.role,
        case
            when m.state = 'streaming' then (
                select pg_catalog.string_agg(p.content, '' order by p.start)
                from chatdb.message_parts as p
                where p.user_id = $1 and p.conversation_id = r.id and p.seq = m.seq
            )
            else m.content
        end,
        m.payload::text, m.metadata::text, m.token_count, m.key, m.state, m.created_at
    from run as r
    cross join lateral (
        select id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at
        from chatdb.messages
        where user_id = $1 and conversation_id = r.id and seq <= r.top and seq >= r.bottom
        order by seq desc
        limit $4
    ) as m
    limit $4 -- noqa: AM09
)
