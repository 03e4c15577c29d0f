-- count_batch
-- Counts the batch's conversations and messages to adopt.

select
    (
        select pg_catalog.count(*)
        from pg_temp.batch_conversations
        where reason is null and not is_adopted
    ) as adopted_conversations,
    pg_catalog.count(*) filter (where reason is null) as adopted_messages,
    pg_catalog.count(*) filter (where created_at is null and reason is null) as without_time,
    pg_catalog.count(*) as rows
from pg_temp.batch_messages
