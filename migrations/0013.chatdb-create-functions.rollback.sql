-- The pools that use the functions go on with the statements that they replace.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

-- squawk-ignore ban-drop-function
drop function if exists chatdb.append_messages_v1;
-- squawk-ignore ban-drop-function
drop function if exists chatdb.create_conversation_v1;
-- squawk-ignore ban-drop-function
drop function if exists chatdb.upsert_message_v1;
-- squawk-ignore ban-drop-function
drop function if exists chatdb.start_message_v1;
-- squawk-ignore ban-drop-function
drop function if exists chatdb.extend_message_v1;
-- squawk-ignore ban-drop-function
drop function if exists chatdb.replace_messages_after_v1;
-- squawk-ignore ban-drop-function
drop function if exists chatdb.fork_conversation_v1;
-- squawk-ignore ban-drop-function
drop function if exists chatdb.move_user_v1;
