-- export_user_messages
-- A page of a user's messages, in order of conversation and seq, from after one message to another one. The page ends
-- early after the message that brings its texts to the given number of bytes.
--
-- $1 user_id text
-- $2 after_conversation_id int8
-- $3 after_seq int8
-- $4 max_conversation_id int8
-- $5 max_seq int8
-- $6 row_limit int8
-- $7 max_bytes int8
--
-- returns many Message
-- served by pk_messages, pk_message_parts

with page as (
    select
        id, conversation_id, user_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
        created_at,
        -- only a compressed payload is read, which may be many times as long as it is stored
        pg_catalog.octet_length(content) + coalesce(pg_catalog.pg_column_size(metadata), 0)
        + case
            when payload is null then 0
            when pg_catalog.pg_column_compression(payload) is null then pg_catalog.pg_column_size(payload)
            else pg_catalog.octet_length(payload::text)
        end
        + case
            when state = 'streaming' then coalesce((
                select p.bytes
                from chatdb.message_parts as p
                where p.user_id = $1 and p.conversation_id = messages.conversation_id and p.seq = messages.seq
                  and p.start = -1
            ), 0)
            else 0
        end as bytes
    from chatdb.messages
    where user_id = $1
      and (conversation_id, seq) > ($2::int8, $3::int8) and (conversation_id, seq) <= ($4::int8, $5::int8)
    order by conversation_id, seq
    limit $6
),

summed as (
    select
        id, conversation_id, user_id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
        created_at,
        pg_catalog.sum(bytes) over (
            order by conversation_id, seq
            rows between unbounded preceding and 1 preceding
        ) as bytes_before
    from page
)

select
    id, conversation_id, user_id, seq, parent_seq, role,
    case
        when state = 'streaming' then (
            select pg_catalog.string_agg(p.content, '' order by p.start)
            from chatdb.message_parts as p
            where p.user_id = $1 and p.conversation_id = summed.conversation_id and p.seq = summed.seq
        )
        else content
    end as content,
    payload::text as payload, metadata::text as metadata, token_count, key, state, created_at
from summed
where coalesce(bytes_before, 0)::int8 < $7::int8
order by conversation_id, seq
