-- release_conversations
-- What was kept aside and has been adopted now, because it was mended, leaves its place there.

delete from chatdb_adopt.aside_conversations as k
using pg_temp.batch_conversations as b
where b.id = k.id and b.reason is null
