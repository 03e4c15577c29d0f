-- Columns for the revision, the archive and the pins. PostgreSQL adds them without rewriting the table.
--
-- depends: 0003.chatdb-create-messages

set local lock_timeout = '2s';
set local statement_timeout = '1min';

alter table chatdb.conversations
add column if not exists edits bigint not null default 0,
add column if not exists archived_at timestamptz,
add column if not exists pinned_at timestamptz;

comment on column chatdb.conversations.edits is
'Counts the writes other than appends; last_seq + edits is the revision, which every write raises.';
comment on column chatdb.conversations.archived_at is 'When the conversation was archived; null if it is not.';
comment on column chatdb.conversations.pinned_at is 'When the conversation was pinned; null if it is not.';
