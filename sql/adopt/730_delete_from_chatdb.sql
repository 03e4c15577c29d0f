-- delete_from_chatdb
-- Deletes from chatdb what was deleted upstream; messages cascade. Several statements.

delete from chatdb.conversations as d
using pg_temp.deleted_upstream_conversations as g, chatdb_adopt.conversations as a
where a.id = g.id and d.user_id = a.user_id and d.id = a.id;

delete from chatdb.messages as d
using pg_temp.deleted_upstream_messages as g, chatdb_adopt.messages as a, chatdb_adopt.conversations as c
where a.id = g.id and c.id = a.conversation_id
  and d.user_id = c.user_id and d.conversation_id = c.id and d.seq = a.seq and d.id = a.id;
