-- transactional: false
-- Keeps all rows; the lists get slower.

set lock_timeout = '2s';
-- as long as it takes: writers go on meanwhile
set statement_timeout = 0;

drop index concurrently if exists chatdb.ix_conversations_user_id_active_on_listed;
drop index concurrently if exists chatdb.ix_conversations_user_id_active_on_archived;
drop index concurrently if exists chatdb.ix_conversations_user_id_created_at_id;
drop index concurrently if exists chatdb.ix_conversations_user_id_pinned_at;

comment on index chatdb.ix_conversations_user_id_active_on is
'Serves list_conversations and list_conversations_before, the newest days first, sorted within the day; delete_user, imports.';
comment on index chatdb.uq_conversations_user_id_key is
'Serves get_conversation_by_key, create_conversation_keyed and imports; one conversation per key of a user.';
comment on index chatdb.uq_messages_user_id_conversation_id_key is
'Serves get_message_by_key, append_message_keyed and append_messages_keyed; one message per key of a conversation.';
