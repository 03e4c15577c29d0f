-- Returns to the server's own settings. What is frozen stays so.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

alter table chatdb.messages
reset (autovacuum_vacuum_insert_scale_factor, autovacuum_freeze_min_age);
