-- Columns for the head of a conversation: the newest message of the line that readers follow. Nothing is rewritten.
--
-- depends: 0005.chatdb-index-lists

set local lock_timeout = '2s';
set local statement_timeout = '1min';

alter table chatdb.conversations
add column if not exists head_seq bigint,
add column if not exists head_last_seq bigint,
add column if not exists head_is_newest boolean;

comment on column chatdb.conversations.head_seq is
'The seq of the head while head_last_seq = last_seq; otherwise the head is last_seq. 0 if no message is left.';
comment on column chatdb.conversations.head_last_seq is
'last_seq when head_seq was set. The next append raises last_seq, and so becomes the head without writing this.';
comment on column chatdb.conversations.head_is_newest is
'True if no message was stored after the head when head_seq was set: the next append needs no parent_seq.';
