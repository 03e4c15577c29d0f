-- poll_conversations
-- The watched conversations whose revision is another one than the watcher knows, and those that are missing.
--
-- $1 user_ids text[]
-- $2 conversation_ids text[]
-- $3 revisions text[]    null where none is known
--
-- returns many WatchedRevision
-- served by pk_conversations

select w.ordinality, c.last_seq + c.edits as revision, c.last_seq
from unnest($1::text[], $2::text[]::int8[], $3::text[]::int8[])
    with ordinality as w (user_id, conversation_id, revision, ordinality)
left join chatdb.conversations as c on c.user_id = w.user_id and c.id = w.conversation_id
where c.id is null or c.last_seq + c.edits is distinct from w.revision
