-- poll_conversations
-- What sql/poll_conversations.sql does on Citus, which would otherwise read all conversations: it does not join a
-- distributed table to the outer side of a join that has no table.

with found as (
    select w.ordinality, c.last_seq + c.edits as revision, c.last_seq
    from unnest($1::text[], $2::text[]::int8[]) with ordinality as w (user_id, conversation_id, ordinality)
    inner join chatdb.conversations as c on c.user_id = w.user_id and c.id = w.conversation_id
    -- for Citus, which then leaves the other shards alone
    where c.user_id = any($1::text[])
)

select w.ordinality, f.revision, f.last_seq
from pg_catalog.unnest($3::text[]::int8[]) with ordinality as w (revision, ordinality)
left join found as f on f.ordinality = w.ordinality
where f.ordinality is null or f.revision is distinct from w.revision
