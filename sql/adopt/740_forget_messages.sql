-- forget_messages
-- Removes the deleted messages from the record of adopted messages.

delete from chatdb_adopt.messages as a
using pg_temp.deleted_upstream_messages as g
where g.id = a.id
