-- count_batch
-- What becomes of the batch, in numbers.

select
    (
        select count(*)
        from pg_temp.batch_conversations
        where reason is null and not is_adopted
    ) as conversations,
    count(*) filter (where reason is null) as messages,
    count(*) filter (where created_at is null and reason is null) as without_time,
    count(*) as rows
from pg_temp.batch_messages
