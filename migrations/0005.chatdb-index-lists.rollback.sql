-- transactional: false
-- Keeps all rows; the lists get slower.

set lock_timeout = '2s';
-- as long as it takes: writers go on meanwhile
set statement_timeout = 0;

drop index concurrently if exists chatdb.ix_conversations_user_id_active_on_listed;
drop index concurrently if exists chatdb.ix_conversations_user_id_active_on_archived;
drop index concurrently if exists chatdb.ix_conversations_user_id_created_at_id;
drop index concurrently if exists chatdb.ix_conversations_user_id_pinned_at;
