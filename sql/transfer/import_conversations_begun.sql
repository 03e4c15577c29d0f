-- import_conversations_begun
-- Finds the stored conversations that are the beginning of those in a file: an earlier export of a list of messages
-- without an id, which has grown since.
--
-- $1 user_id text
-- $2 keys text[]    those that the beginnings of the file's conversations would have
--
-- returns many BegunConversation
-- served by uq_conversations_user_id_key

select w.ordinality, c.id, c.last_seq, c.created_at
from pg_catalog.unnest($2::text[]) with ordinality as w (key, ordinality)
inner join chatdb.conversations as c on c.user_id = $1 and c.key = w.key
