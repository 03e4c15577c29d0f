-- get_message
-- One message of a conversation, by its seq or its key.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 seq int8 null
-- $5 key text null
--
-- returns one Message, or an existence row: if there is no such message
-- served by pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key, pk_message_parts

(
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
      and conversation_id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
      and seq = (select coalesce((select $4::int8), (
          select seq from chatdb.messages
          where user_id = $1
            and conversation_id = (select coalesce((select $2::int8), (
                select id from chatdb.conversations
                where user_id = $1 and key = $3
            )))
            and key = $5
      )))
    -- without a limit of its own this branch could be read in parallel to the other, and come after it
    limit 1 -- noqa: AM09
)
union all
select null, null, null, null, null, null, null, null, null, null, null, null, null
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
-- a message found ends the statement before this branch is read
limit 1
