-- transactional: false
-- Keeps all rows; branched conversations are read more slowly.

set lock_timeout = '2s';
-- as long as it takes: writers go on meanwhile
set statement_timeout = 0;

drop index concurrently if exists chatdb.ix_messages_user_id_conversation_id_seq_branches;
