-- delete_gone_messages
-- Deletes the gone messages from chatdb.

delete from chatdb.messages as d
using pg_temp.gone_messages as g, chatdb_adopt.messages as a, chatdb_adopt.conversations as c
where a.id = g.id and c.id = a.conversation_id
  and d.user_id = c.user_id and d.conversation_id = c.id and d.seq = a.seq and d.id = a.id
