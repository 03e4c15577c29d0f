-- count_batch_quarantine
-- Counts the batch's invalid conversations and messages by reason.

select reason, pg_catalog.sum(conversations)::int8 as conversations, pg_catalog.sum(messages)::int8 as messages
from (
    select reason, 1 as conversations, 0 as messages
    from pg_temp.batch_conversations
    where reason is not null
    union all
    select reason, 0 as conversations, 1 as messages
    from pg_temp.batch_messages
    where reason is not null
) as quarantine
group by reason
order by reason
