-- release_batch
-- Removes from quarantine the rows that were fixed and are now adopted. Several statements.

delete from chatdb_adopt.quarantine_conversations as q
using pg_temp.batch_conversations as b
where b.id = q.id and b.reason is null;

delete from chatdb_adopt.quarantine_messages as q
using pg_temp.batch_messages as m
where m.id = q.id and m.reason is null;
