-- Lets autovacuum visit new messages in small steps, and freeze them at once: messages are hardly ever changed, and a
-- row that is frozen soon after its insert costs little WAL. docs/decisions/0020 has the figures.
--
-- depends: 0011.chatdb-validate-state

set local lock_timeout = '2s';
set local statement_timeout = '1min';

alter table chatdb.messages
set (autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_freeze_min_age = 0);
