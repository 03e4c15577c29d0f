-- export_conversations_messages
-- Returns all messages of a user, grouped by conversation.
--
-- $1 user_id text
--
-- returns many Message
-- served by pk_messages, pk_message_parts

select
    id, conversation_id, user_id, seq, parent_seq, role,
    case
        when state = 'streaming' then (
            select pg_catalog.string_agg(p.content, '' order by p.start)
            from chatdb.message_parts as p
            where p.user_id = $1 and p.conversation_id = messages.conversation_id and p.seq = messages.seq
        )
        else content
    end as content,
    payload::text as payload, metadata::text as metadata, token_count, key, state, created_at
from chatdb.messages
where user_id = $1
order by conversation_id, seq
