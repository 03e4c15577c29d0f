-- Refuses, and so keeps the data, while anything is left in the schema.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

-- squawk-ignore ban-drop-table
drop table if exists chatdb._chatdb_migration;

-- That of row-level security, which chatdb protect creates.
-- squawk-ignore ban-drop-function
drop function if exists chatdb.rls_user_id();

-- squawk-ignore ban-drop-schema
drop schema if exists chatdb restrict;
