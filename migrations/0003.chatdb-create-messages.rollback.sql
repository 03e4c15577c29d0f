-- Deletes every message of every user.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

-- squawk-ignore ban-drop-table
drop table if exists chatdb.messages;
