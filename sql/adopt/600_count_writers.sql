-- count_writers
-- Counts the open transactions that have written or are about to write to the originals.

select pg_catalog.count(distinct virtualtransaction) as writers
from pg_catalog.pg_locks
where locktype = 'relation'
  and database = (
      select oid
      from pg_catalog.pg_database
      where datname = pg_catalog.current_database()
  )
  and relation in (
      pg_catalog.to_regclass('public.conversations')::oid, pg_catalog.to_regclass('public.messages')::oid
  )
  and mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
  and pid is distinct from pg_catalog.pg_backend_pid()
