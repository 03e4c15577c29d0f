-- get_conversation
-- One conversation of a user, by its id or its key.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
--
-- returns one Conversation
-- served by pk_conversations, uq_conversations_user_id_key

select
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
from chatdb.conversations
where user_id = $1
  -- with an id, the inner subquery is never executed; without the outer one, row-level security would keep coalesce
  -- from being an index condition
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
