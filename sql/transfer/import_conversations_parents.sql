-- import_conversations_parents
-- Finds the messages that new ones from a file follow: those with these seqs or, where one was deleted since an earlier
-- import, the stored message before it. There is no row if no message is left there.
--
-- $1 user_id text
-- $2 conversation_ids text[]
-- $3 seqs text[]
--
-- returns many ImportedParent
-- served by pk_messages

with wanted as (
    select conversation_id, seq, ordinality
    from unnest($2::text[]::int8[], $3::text[]::int8[])
        with ordinality as w (conversation_id, seq, ordinality)
)

select w.ordinality, m.seq
from wanted as w
cross join lateral (
    select seq
    from chatdb.messages
    where user_id = $1 and conversation_id = w.conversation_id and seq <= w.seq
    order by seq desc
    limit 1
) as m
