-- forget_gone_messages
-- The gone messages are not adopted any more.

delete from chatdb_adopt.messages as a
using pg_temp.gone_messages as g
where g.id = a.id
