-- import_conversations_extend
-- Updates last_seq and the head of conversations that have grown in the file or that the file holds in part, except
-- conversations that have received appends in the meantime.
--
-- $1 user_id text
-- $2 ids text[]
-- $3 old_last_seqs text[]
-- $4 new_last_seqs text[]
-- $5 updated_ats text[]
-- $6 head_seqs text[]    the new last_seq where the head is the last message
--
-- returns many ImportedConversation
-- served by pk_conversations

update chatdb.conversations as c
set last_seq = g.new_last_seq,
    updated_at = greatest(c.updated_at, g.updated_at),
    -- nulls too: a head that is void counts again if last_seq falls and rises to its head_last_seq
    head_seq = nullif(g.head_seq, g.new_last_seq),
    head_last_seq = case when g.head_seq <> g.new_last_seq then g.new_last_seq end,
    head_is_newest = case when g.head_seq <> g.new_last_seq then false end
from unnest($2::text[]::int8[], $3::text[]::int8[], $4::text[]::int8[], $5::text[]::timestamptz[], $6::text[]::int8[])
    as g (id, old_last_seq, new_last_seq, updated_at, head_seq)
where c.user_id = $1 and c.id = g.id and c.last_seq = g.old_last_seq
returning c.id
