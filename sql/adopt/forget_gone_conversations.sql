-- forget_gone_conversations
-- The gone conversations are not adopted any more.

delete from chatdb_adopt.conversations as a
using pg_temp.gone_conversations as g
where g.id = a.id
