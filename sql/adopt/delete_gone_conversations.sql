-- delete_gone_conversations
-- Deletes the gone conversations from chatdb, with their messages.

delete from chatdb.conversations as d
using pg_temp.gone_conversations as g, chatdb_adopt.conversations as a
where a.id = g.id and d.user_id = a.user_id and d.id = a.id
