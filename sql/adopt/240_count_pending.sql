-- count_pending
-- Counts the batches, their messages, and the missing conversations that messages refer to.

select
    pg_catalog.count(distinct batch) as batches,
    coalesce(pg_catalog.sum(messages) filter (where batch is not null), 0)::int8 as total,
    pg_catalog.count(*) filter (where batch is null) as orphans
from pg_temp.pending
