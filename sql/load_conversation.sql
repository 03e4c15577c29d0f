-- load_conversation
-- A conversation and its newest messages, newest first.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 row_limit int8
--
-- returns one Conversation, then many Message without user_id and conversation_id
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key

(
    select
        id, user_id, key, title, metadata::text as metadata, last_seq, last_seq + edits as revision, created_at,
        updated_at, archived_at, pinned_at,
        null::int8 as message_id, null::int8 as message_seq, null as message_role, null as message_content,
        null as message_payload, null as message_metadata, null::int4 as message_token_count, null as message_key,
        null::timestamptz as message_created_at
    from chatdb.conversations
    where user_id = $1
      and id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
    -- without a limit of its own this branch could be read in parallel to the other, and come after it
    limit 1 -- noqa: AM09
)
union all
(
    select
        null, null, null, null, null, null, null, null, null, null, null,
        id, seq, role, content, payload::text, metadata::text, token_count, key, created_at
    from chatdb.messages
    where user_id = $1
      and conversation_id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
    order by seq desc
    limit $4
)
