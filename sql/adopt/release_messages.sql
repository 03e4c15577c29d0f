-- release_messages
-- What was kept aside and has been adopted now, because it was mended, leaves its place there.

delete from chatdb_adopt.aside_messages as k
using pg_temp.batch_messages as m
where m.id = k.id and m.reason is null
