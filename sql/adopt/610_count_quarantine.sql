-- count_quarantine
-- Counts the quarantined conversations and messages by reason.

select reason, pg_catalog.sum(conversations)::int8 as conversations, pg_catalog.sum(messages)::int8 as messages
from (
    select reason, pg_catalog.count(*) as conversations, 0 as messages
    from chatdb_adopt.quarantine_conversations
    group by reason
    union all
    select reason, 0 as conversations, pg_catalog.count(*) as messages
    from chatdb_adopt.quarantine_messages
    group by reason
) as quarantine
group by reason
order by reason
