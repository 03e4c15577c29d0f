-- import_conversations_extend
-- Updates last_seq of conversations that have grown in the file or that the file holds in part, except conversations
-- that have received appends in the meantime.
--
-- $1 user_id text
-- $2 ids text[]
-- $3 old_last_seqs text[]
-- $4 new_last_seqs text[]
-- $5 updated_ats text[]
--
-- returns many ImportedConversation
-- served by pk_conversations

update chatdb.conversations as c
set last_seq = g.new_last_seq, updated_at = greatest(c.updated_at, g.updated_at)
from unnest($2::text[]::int8[], $3::text[]::int8[], $4::text[]::int8[], $5::text[]::timestamptz[])
    as g (id, old_last_seq, new_last_seq, updated_at)
where c.user_id = $1 and c.id = g.id and c.last_seq = g.old_last_seq
returning c.id
