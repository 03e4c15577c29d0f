-- fill_times
-- Sets a missing message time to that of the previous message by id or, if there is none, to the creation time of the
-- conversation, so that the message keeps its position.

with runs as (
    select
        m.id,
        m.conversation_id,
        m.created_at,
        pg_catalog.count(*) filter (
            where m.created_at between '0001-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        ) over (partition by m.conversation_id order by m.id) as run
    from pg_temp.original_messages as m
    where m.conversation_id in (
        select b.conversation_id
        from pg_temp.batch_messages as b
        where b.created_at is null
    )
),

timed as (
    select
        id,
        pg_catalog.max(created_at) filter (
            where created_at between '0001-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
        ) over (partition by conversation_id, run) as created_at
    from runs
)

update pg_temp.batch_messages as m
set created_at = coalesce(t.created_at, b.created_at)
from timed as t, pg_temp.batch_conversations as b
where m.created_at is null and m.reason is null and t.id = m.id and b.id = m.conversation_id
