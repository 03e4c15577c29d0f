-- forget_conversations
-- Removes the deleted conversations from the record of adopted conversations.

delete from chatdb_adopt.conversations as a
using pg_temp.deleted_upstream_conversations as g
where g.id = a.id
