-- Forgets which messages begin a branch: every conversation becomes one line, in order of seq.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

alter table chatdb.messages
-- squawk-ignore ban-drop-column
drop column if exists parent_seq;
