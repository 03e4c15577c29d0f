-- get_history_before_key
-- The newest messages of a conversation before the message with a key, newest first.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 before_key text
-- $5 row_limit int8
--
-- returns many Message without user_id and conversation_id, then an existence row: if the page is not full
-- served by pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key, pk_message_parts

(
    select
        id, seq, parent_seq, role,
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
      -- with an id, the subquery is never executed
      and conversation_id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
      and seq < (
          select seq from chatdb.messages
          where user_id = $1
            and conversation_id = (select coalesce((select $2::int8), (
                select id from chatdb.conversations
                where user_id = $1 and key = $3
            )))
            and key = $4
      )
    order by seq desc
    limit $5
)
union all
-- its seq is the id of the conversation; its key is null if no message has that key
select
    null, id, null, null, null, null, null, null,
    (
        select m.key from chatdb.messages as m
        where m.user_id = $1 and m.conversation_id = conversations.id and m.key = $4
    ),
    null, null
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
-- a full page ends before this branch is read, so that it costs nothing there; without the id, the caller needs it
limit $5 + case when $2::int8 is null then 1 else 0 end
