-- count_seqs
-- Counts the messages that get another seq, and those that are late.

select
    (
        select pg_catalog.count(*)
        from pg_temp.batch_moves
        where old_seq <> seq
    ) as renumbered,
    pg_catalog.count(*) filter (where is_late) as late
from pg_temp.batch_seqs
