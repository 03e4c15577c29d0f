-- Forgets which version of each conversation was selected.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

alter table chatdb.conversations
-- squawk-ignore ban-drop-column
drop column if exists head_seq,
-- squawk-ignore ban-drop-column
drop column if exists head_last_seq,
-- squawk-ignore ban-drop-column
drop column if exists head_is_newest;
