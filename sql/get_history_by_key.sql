-- get_history_by_key
-- The newest messages of a conversation, found by its key, before a position, newest first.
--
-- $1 user_id text
-- $2 conversation_key text
-- $3 before_seq int8
-- $4 row_limit int8
--
-- returns many Message without user_id, then an existence row: if the page is not full
-- served by pk_messages, uq_conversations_user_id_key, pk_message_parts

(
    select
        id, conversation_id, seq, parent_seq, role,
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
      and conversation_id = (
          select id from chatdb.conversations
          where user_id = $1 and key = $2
      )
      and seq < $3
    order by seq desc
    limit $4
)
union all
select null, null, null, null, null, null, null, null, null, null, null, null
from chatdb.conversations
where user_id = $1 and key = $2
-- a full page ends before this branch is read, so that it costs nothing there
limit $4
