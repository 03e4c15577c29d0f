-- Returns the next conversations that were last active before $1: those of the user $2 after the day $3 and the id $4,
-- the newest days first, then those of the next users. Served by ix_conversations_user_id_active_on, whose order is
-- that of the users and days: only the conversations of one day are sorted.

select user_id, id, last_seq, day
from (
    (
        select user_id, id, last_seq, active_on, active_on::text as day
        from chatdb.conversations
        where user_id = $2::text and active_on <= $3::date and updated_at < $1::timestamptz
          and (active_on < $3::date or id > $4::int8)
        order by active_on desc, id asc
        limit $5::int8
    )
    union all
    (
        select user_id, id, last_seq, active_on, active_on::text as day
        from chatdb.conversations
        where user_id > $2::text and active_on <= ($1::timestamptz at time zone 'UTC')::date
          and updated_at < $1::timestamptz
        order by user_id asc, active_on desc, id asc
        limit $5::int8
    )
) as old
order by user_id asc, active_on desc, id asc
limit $5::int8
