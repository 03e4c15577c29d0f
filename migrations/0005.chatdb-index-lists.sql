-- transactional: false
-- Indexes for the lists without archived conversations, of archived and of pinned ones, and in order of creation.
--
-- depends: 0004.chatdb-add-revision-archive-pins

set lock_timeout = '2s';
-- as long as it takes: writers go on meanwhile
set statement_timeout = 0;

create index concurrently if not exists ix_conversations_user_id_active_on_listed
on chatdb.conversations (user_id, active_on desc)
where archived_at is null;

comment on index chatdb.ix_conversations_user_id_active_on_listed is
'Serves list_conversations and list_previews, the newest days first, sorted within the day.';

create index concurrently if not exists ix_conversations_user_id_active_on_archived
on chatdb.conversations (user_id, active_on desc)
where archived_at is not null;

comment on index chatdb.ix_conversations_user_id_active_on_archived is
'Serves list_conversations_archived and list_previews_archived.';

create index concurrently if not exists ix_conversations_user_id_created_at_id
on chatdb.conversations (user_id, created_at, id);

comment on index chatdb.ix_conversations_user_id_created_at_id is
'Serves the lists in order of creation: list_conversations_created and list_previews_created, in both directions.';

create index concurrently if not exists ix_conversations_user_id_pinned_at
on chatdb.conversations (user_id, pinned_at desc)
where pinned_at is not null;

comment on index chatdb.ix_conversations_user_id_pinned_at is 'Serves list_pinned.';

-- what the older indexes serve now
comment on index chatdb.ix_conversations_user_id_active_on is
'Serves list_conversations_all and list_previews_all, the newest days first, sorted within the day; delete_user, imports.';
comment on index chatdb.uq_conversations_user_id_key is
'Serves every statement that names a conversation by its key, and imports; one conversation per key of a user.';
comment on index chatdb.uq_messages_user_id_conversation_id_key is
'Serves every statement that names a message by its key; one message per key of a conversation.';
