-- list_previews
-- A page of a user's conversations, without the archived ones, latest activity first, each with its head.
--
-- $1 user_id text
-- $2 after_updated_at timestamptz null
-- $3 after_id int8 null
-- $4 after_key text null
-- $5 row_limit int8
--
-- returns many Conversation and Message, then an existence row: if the page is not full
-- served by ix_conversations_user_id_active_on_listed, uq_conversations_user_id_key, pk_messages, pk_message_parts

with place as (
    select coalesce($2::timestamptz, 'infinity') as updated_at, coalesce($3::int8, 9223372036854775807) as id
    where $4::text is null
    union all
    select updated_at, id
    from chatdb.conversations
    where user_id = $1 and key = $4
)

(
    select
        c.id, c.user_id, c.key, c.title, c.metadata::text as metadata, c.last_seq,
        case when c.head_last_seq = c.last_seq then c.head_seq else c.last_seq end as head_seq,
        c.last_seq + c.edits as revision, c.created_at, c.updated_at, c.archived_at, c.pinned_at,
        m.id as message_id, m.seq as message_seq, m.parent_seq as message_parent_seq, m.role as message_role,
        case
            when m.state = 'streaming' then (
                select pg_catalog.string_agg(p.content, '' order by p.start)
                from chatdb.message_parts as p
                where p.user_id = $1 and p.conversation_id = c.id and p.seq = m.seq
            )
            else m.content
        end as message_content,
        m.payload::text as message_payload, m.metadata::text as message_metadata, m.token_count as message_token_count,
        m.key as message_key, m.state as message_state, m.created_at as message_created_at
    from (
        select
            id,
            user_id,
            key,
            title,
            metadata,
            last_seq,
            head_seq,
            head_last_seq,
            edits,
            created_at,
            updated_at,
            archived_at,
            pinned_at,
            active_on
        from chatdb.conversations
        where user_id = $1
          and archived_at is null
          -- the index has only the day: it bounds the scan, and the pair finds the position within the day
          and active_on <= ((select updated_at from place) at time zone 'UTC')::date
          and (updated_at, id) < ((select updated_at from place), (select id from place))
        order by active_on desc, updated_at desc, id desc
        limit $5
    ) as c
    left join lateral (
        select id, seq, parent_seq, role, content, payload, metadata, token_count, key, state, created_at
        from chatdb.messages
        where user_id = $1 and conversation_id = c.id
          and seq <= case when c.head_last_seq = c.last_seq then c.head_seq else c.last_seq end
        order by seq desc
        limit 1
    ) as m on true
    order by c.active_on desc, c.updated_at desc, c.id desc
    limit $5
)
union all
select
    null, null, null, null, null, null, null, null, null, null, null, null,
    null, null, null, null, null, null, null, null, null, null, null
from place
-- a full page ends before this branch is read
limit $5
