-- Counts the conversations that were last active before the interval $1, their users, and the messages that they can
-- have at most. The time that it returns selects the same conversations again.

with cutoff as (
    select pg_catalog.statement_timestamp() - $1::interval as inactive_since
)

select
    pg_catalog.count(*) as conversations,
    coalesce(pg_catalog.sum(last_seq), 0)::int8 as messages,
    pg_catalog.count(distinct user_id) as users,
    (select inactive_since from cutoff) as inactive_since
from chatdb.conversations
where active_on <= ((select inactive_since from cutoff) at time zone 'UTC')::date
  and updated_at < (select inactive_since from cutoff)
