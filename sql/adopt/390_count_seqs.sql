-- count_seqs
-- Counts renumbered and late messages.

select
    (
        select pg_catalog.count(*)
        from pg_temp.batch_moves
        where old_seq <> seq
    ) as renumbered,
    pg_catalog.count(*) filter (where is_late) as late
from pg_temp.batch_seqs
