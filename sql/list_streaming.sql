-- list_streaming
-- A user's messages that are streaming and have not been extended for some time, with the text so far.
--
-- $1 user_id text
-- $2 older_than interval
--
-- returns many Message
-- served by pk_messages, pk_message_parts

select
    m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role,
    (
        select pg_catalog.string_agg(p.content, '' order by p.start)
        from chatdb.message_parts as p
        where p.user_id = $1 and p.conversation_id = m.conversation_id and p.seq = m.seq
    ) as content,
    m.payload::text as payload, m.metadata::text as metadata, m.token_count, m.key, m.state, m.created_at
from chatdb.message_parts as s
-- a plain join could read all messages of the user
cross join lateral (
    select
        id, conversation_id, user_id, seq, parent_seq, role, payload, metadata, token_count, key, state, created_at
    from chatdb.messages
    where user_id = $1 and conversation_id = s.conversation_id and seq = s.seq
    order by seq
    limit 1
) as m
where s.user_id = $1 and s.start = -1 and s.flushed_at <= pg_catalog.statement_timestamp() - $2::interval
order by s.conversation_id, s.seq
