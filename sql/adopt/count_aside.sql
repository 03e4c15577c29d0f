-- count_aside
-- Why conversations and messages are kept aside, each with how many.

select reason, pg_catalog.sum(conversations)::int8 as conversations, pg_catalog.sum(messages)::int8 as messages
from (
    select reason, pg_catalog.count(*) as conversations, 0 as messages
    from chatdb_adopt.aside_conversations
    group by reason
    union all
    select reason, 0 as conversations, pg_catalog.count(*) as messages
    from chatdb_adopt.aside_messages
    group by reason
) as aside
group by reason
order by reason
