-- Forgets which conversations are archived and pinned, and their revisions.

set local lock_timeout = '2s';
set local statement_timeout = '1min';

alter table chatdb.conversations
-- squawk-ignore ban-drop-column
drop column if exists edits,
-- squawk-ignore ban-drop-column
drop column if exists archived_at,
-- squawk-ignore ban-drop-column
drop column if exists pinned_at;
