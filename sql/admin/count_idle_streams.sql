-- Counts the messages that are streaming and were not extended for the interval $1, and their users. The time that it
-- returns selects the same messages again.

select
    pg_catalog.count(*) as messages,
    pg_catalog.count(distinct user_id) as users,
    pg_catalog.statement_timestamp() - $1::interval as idle_since
from chatdb.message_parts
where start = -1 and flushed_at <= pg_catalog.statement_timestamp() - $1::interval
