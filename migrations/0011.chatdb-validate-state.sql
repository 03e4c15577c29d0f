-- transactional: false
-- Checks the state of the stored messages, of which none has one. Writers go on meanwhile.
--
-- depends: 0010.chatdb-create-message-parts

set lock_timeout = '2s';
-- as long as it takes
set statement_timeout = 0;

-- can run again: a constraint that is valid stays valid
-- squawk-ignore prefer-robust-stmts
alter table chatdb.messages validate constraint ck_messages_state;
