-- transactional: false
-- The index of the messages that begin a branch. It is empty while no conversation is branched.
--
-- depends: 0007.chatdb-add-parents

set lock_timeout = '2s';
-- as long as it takes: writers go on meanwhile
set statement_timeout = 0;

create index concurrently if not exists ix_messages_user_id_conversation_id_seq_branches
on chatdb.messages (user_id, conversation_id, seq) include (parent_seq)
where parent_seq is not null;

comment on index chatdb.ix_messages_user_id_conversation_id_seq_branches is
'Serves every statement that follows a line of a conversation, or finds the messages that follow another.';

-- can run again: a constraint that is valid stays valid
-- squawk-ignore prefer-robust-stmts
alter table chatdb.messages validate constraint ck_messages_parent_seq;
