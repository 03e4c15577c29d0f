-- Deletes the text of the messages that are still streaming.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

-- squawk-ignore ban-drop-table
drop table if exists chatdb.message_parts;
