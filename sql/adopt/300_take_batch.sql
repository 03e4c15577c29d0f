-- take_batch
-- Loads the next batch of conversations with their state, recorded and in chatdb, and any reason for quarantine.

with taken as (
    delete from pg_temp.pending
    where batch = (select pg_catalog.min(t.batch) from pg_temp.pending as t)
    returning id
)

insert into pg_temp.batch_conversations (
    id, user_id, created_at, updated_at, reason, is_adopted, adopted_seq, last_created_at, last_id, last_seq, active_at
)
select
    c.id,
    coalesce(a.user_id, c.user_id) as user_id,
    case when a.id is null then coalesce(c.created_at, c.updated_at) else d.created_at end as created_at,
    case
        when a.id is null then coalesce(c.updated_at, c.created_at)
        when c.updated_at between '0001-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00' then c.updated_at
        else a.updated_at
    end as updated_at,
    case
        when a.id is not null then null
        when coalesce(c.user_id, '') = '' then 'it has no user'
        when pg_catalog.char_length(c.user_id) > 255 then 'its user has more than 255 characters'
        when coalesce(c.created_at, c.updated_at) is null then 'it has no time'
        when
            c.created_at not between '0001-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
            or c.updated_at not between '0001-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
            then 'its time is infinite or not in the years 1 to 9999'
        when d.id is not null then 'chatdb has another conversation of this user and id'
    end as reason,
    a.id is not null as is_adopted,
    a.last_seq as adopted_seq,
    a.last_created_at,
    a.last_id,
    d.last_seq,
    d.updated_at as active_at
from taken as t
inner join pg_temp.original_conversations as c on c.id = t.id
left join chatdb_adopt.conversations as a on a.id = c.id
left join chatdb.conversations as d on d.user_id = coalesce(a.user_id, c.user_id) and d.id = c.id
