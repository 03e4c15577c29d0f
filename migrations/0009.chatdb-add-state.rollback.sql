-- Forgets which messages are incomplete.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

alter table chatdb.messages
-- squawk-ignore ban-drop-column
drop column if exists state;
