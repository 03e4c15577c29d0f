-- import_conversations_find
-- Which of a file's conversations the user has already: by key, or where there is none by the time of creation, of
-- which the first in the file is the first in the table, and so on. With each the last message, by which to tell
-- whether the file's is the same conversation, only longer.
--
-- $1 user_id text
-- $2 keys text[]    null where a conversation has none
-- $3 created_ats timestamptz[]    null where the file has no times
-- $4 occurrences int8[]    how many conversations before it in the file have no key and this time
--
-- returns many StoredConversation
-- served by uq_conversations_user_id_key, ix_conversations_user_id_active_on, pk_messages

with wanted as (
    select key, created_at, occurrence, place
    from unnest($2::text[], $3::timestamptz[], $4::int8[])
        with ordinality as w (key, created_at, occurrence, place)
),

unkeyed as (
    select
        id, last_seq, created_at,
        row_number() over (partition by created_at order by id) - 1 as occurrence
    from chatdb.conversations
    where user_id = $1 and key is null and created_at = any($3)
      and exists (
          select from wanted
          where key is null
      )
),

found as (
    select w.place, c.id, c.last_seq, c.created_at
    from wanted as w
    inner join chatdb.conversations as c on c.user_id = $1 and c.key = w.key
    union all
    select w.place, u.id, u.last_seq, u.created_at
    from wanted as w
    inner join unkeyed as u on u.created_at = w.created_at and u.occurrence = w.occurrence
    where w.key is null
)

select f.place, f.id, f.last_seq, f.created_at, m.key as last_key, m.created_at as last_created_at
from found as f
left join chatdb.messages as m on m.user_id = $1 and m.conversation_id = f.id and m.seq = f.last_seq
