-- forget_conversations
-- Removes the deleted conversations from what is recorded as adopted.

delete from chatdb_adopt.conversations as a
using pg_temp.deleted_upstream_conversations as g
where g.id = a.id
