-- import_conversations_contents
-- Reads messages that differ from those of a later export, to see whether the user or the export changed them.
--
-- $1 user_id text
-- $2 conversation_ids text[]
-- $3 seqs text[]
--
-- returns many ImportedContent
-- served by pk_messages

select w.ordinality, m.content, m.payload::text as payload
from unnest($2::text[]::int8[], $3::text[]::int8[]) with ordinality as w (conversation_id, seq, ordinality)
inner join chatdb.messages as m on m.user_id = $1 and m.conversation_id = w.conversation_id and m.seq = w.seq
