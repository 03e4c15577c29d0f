-- import_conversations
-- Adds conversations from a file. Their ids ascend in the order of the arrays.
--
-- $1 user_id text
-- $2 keys text[]    null where a conversation has none
-- $3 titles text[]    null where a conversation has none
-- $4 metadatas text[]    null where a conversation has none
-- $5 last_seqs text[]
-- $6 created_ats text[]
-- $7 updated_ats text[]
-- $8 archived_ats text[]    null where a conversation is not archived
-- $9 pinned_ats text[]    null where a conversation is not pinned
-- $10 head_seqs text[]    last_seq where the head is the last message
--
-- returns many ImportedConversation

insert into chatdb.conversations (
    user_id, key, title, metadata, last_seq, created_at, updated_at, archived_at, pinned_at, head_seq, head_last_seq,
    head_is_newest
)
select
    $1, key, title, metadata::jsonb, last_seq, created_at, updated_at, archived_at, pinned_at,
    nullif(head_seq, last_seq), case when head_seq <> last_seq then last_seq end,
    case when head_seq <> last_seq then false end
from unnest(
    $2::text[], $3::text[], $4::text[], $5::text[]::int8[], $6::text[]::timestamptz[], $7::text[]::timestamptz[],
    $8::text[]::timestamptz[], $9::text[]::timestamptz[], $10::text[]::int8[]
)
    with ordinality as c (
        key, title, metadata, last_seq, created_at, updated_at, archived_at, pinned_at, head_seq, ordinality
    )
order by ordinality
returning id
