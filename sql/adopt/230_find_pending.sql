-- find_pending
-- Finds the pending conversations and divides them into batches. A conversation is pending if it is not adopted, has
-- messages that are not adopted, or has been active since. Quarantined rows are pending because they may be fixed now.
--
-- $1 size int8    approximate messages per batch; larger in a large table, so that no index is needed

insert into pg_temp.pending (batch, id, messages)
with unadopted as (
    select m.conversation_id as id, pg_catalog.count(*) as messages
    from pg_temp.original_messages as m
    where not exists (
        select from chatdb_adopt.messages as a
        where a.id = m.id
    )
    group by m.conversation_id
),

active as (
    select c.id, coalesce(u.messages, 0) as messages
    from pg_temp.original_conversations as c
    left join chatdb_adopt.conversations as a on a.id = c.id
    left join unadopted as u on u.id = c.id
    where a.id is null or u.messages > 0 or c.updated_at > a.updated_at
)

select
    pg_catalog.div(
        pg_catalog.sum(messages + 1) over (order by id rows unbounded preceding),
        greatest($1::int8, pg_catalog.sum(messages + 1) over () / 200)
    ) as batch,
    id,
    messages
from active
union all
select null as batch, u.id, u.messages
from unadopted as u
where not exists (
    select from pg_temp.original_conversations as c
    where c.id = u.id
)
