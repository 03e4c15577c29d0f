-- import_conversations_change
-- Updates conversations that a later export extends or changes, except those that were written to in the meantime.
--
-- $1 user_id text
-- $2 ids text[]
-- $3 old_last_seqs text[]
-- $4 old_edits text[]
-- $5 new_last_seqs text[]
-- $6 new_edits text[]
-- $7 updated_ats text[]
-- $8 head_seqs text[]    taken only where last_seq rises
-- $9 titles text[]    null where the title stays
-- $10 archived_ats text[]    null where it stays archived or not, infinity where it is no longer archived
-- $11 pinned_ats text[]    null where it stays pinned or not, infinity where it is no longer pinned
-- $12 metadatas text[]    null where the metadata stay, or what to merge into them
--
-- returns many ImportedConversation
-- served by pk_conversations

update chatdb.conversations as c
set last_seq = g.new_last_seq,
    edits = g.new_edits,
    updated_at = greatest(c.updated_at, g.updated_at),
    head_seq = case when g.new_last_seq > g.old_last_seq then nullif(g.head_seq, g.new_last_seq) else c.head_seq end,
    head_last_seq = case
        when g.new_last_seq = g.old_last_seq then c.head_last_seq
        when g.head_seq <> g.new_last_seq then g.new_last_seq
    end,
    head_is_newest = case
        when g.new_last_seq = g.old_last_seq then c.head_is_newest
        when g.head_seq <> g.new_last_seq then false
    end,
    title = coalesce(g.title, c.title),
    archived_at = nullif(coalesce(g.archived_at, c.archived_at), 'infinity'),
    pinned_at = nullif(coalesce(g.pinned_at, c.pinned_at), 'infinity'),
    metadata = case
        when g.metadata is null then c.metadata
        else coalesce(c.metadata, '{}') || g.metadata::jsonb
    end
from unnest(
    $2::text[]::int8[], $3::text[]::int8[], $4::text[]::int8[], $5::text[]::int8[], $6::text[]::int8[],
    $7::text[]::timestamptz[], $8::text[]::int8[], $9::text[], $10::text[]::timestamptz[], $11::text[]::timestamptz[],
    $12::text[]
)
    as g (
        id, old_last_seq, old_edits, new_last_seq, new_edits, updated_at, head_seq, title, archived_at, pinned_at,
        metadata
    )
where c.user_id = $1 and c.id = g.id and c.last_seq = g.old_last_seq and c.edits = g.old_edits
returning c.id
