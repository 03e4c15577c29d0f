-- list_conversations_before
-- Returns a later page of a user's conversations, latest activity first.
--
-- $1 user_id text
-- $2 before_updated_at timestamptz    with before_id, the last row of the previous page
-- $3 before_id int8
-- $4 row_limit int8
--
-- returns many Conversation
-- served by ix_conversations_user_id_active_on

select id, user_id, key, title, metadata::text as metadata, last_seq, created_at, updated_at
from chatdb.conversations
where user_id = $1
  -- the day bounds the index scan, and the pair finds the position within the day
  and active_on <= ($2::timestamptz at time zone 'UTC')::date
  and (updated_at, id) < ($2::timestamptz, $3)
order by active_on desc, updated_at desc, id desc
limit $4
