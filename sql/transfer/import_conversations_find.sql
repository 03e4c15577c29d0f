-- import_conversations_find
-- Finds the file's conversations that the user already has. Without a key, conversations match by creation time: the
-- first in the file is the first in the table, and so on. Each row has the last stored message within the file's range,
-- to check whether the file has the same conversation, equally long or longer.
--
-- $1 user_id text
-- $2 keys text[]    null where a conversation has none
-- $3 created_ats text[]    null where the file has no times
-- $4 occurrences text[]    number of earlier conversations in the file with this time and no key
-- $5 last_seqs text[]
--
-- returns many StoredConversation
-- served by uq_conversations_user_id_key, ix_conversations_user_id_active_on, pk_messages

with wanted as (
    select key, created_at, occurrence, last_seq, ordinality
    from unnest($2::text[], $3::text[]::timestamptz[], $4::text[]::int8[], $5::text[]::int8[])
        with ordinality as w (key, created_at, occurrence, last_seq, ordinality)
),

unkeyed as (
    select
        id, last_seq, created_at,
        pg_catalog.row_number() over (partition by created_at order by id) - 1 as occurrence
    from chatdb.conversations
    where user_id = $1 and key is null and created_at = any($3::text[]::timestamptz[])
      and exists (
          select from wanted
          where key is null
      )
),

found as (
    select w.ordinality, w.last_seq as file_last_seq, c.id, c.last_seq, c.created_at
    from wanted as w
    inner join chatdb.conversations as c on c.user_id = $1 and c.key = w.key
    union all
    select w.ordinality, w.last_seq as file_last_seq, u.id, u.last_seq, u.created_at
    from wanted as w
    inner join unkeyed as u on u.created_at = w.created_at and u.occurrence = w.occurrence
    where w.key is null
)

select
    f.ordinality, f.id, f.last_seq, f.created_at, m.seq as final_seq, m.key as final_key,
    m.created_at as final_created_at
from found as f
left join lateral (
    select seq, key, created_at
    from chatdb.messages
    where user_id = $1 and conversation_id = f.id and seq <= f.file_last_seq
    order by seq desc
    limit 1
) as m on true
