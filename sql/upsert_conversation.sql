-- upsert_conversation
-- The user's conversation with this key, created, or with its title and metadata replaced, or with a patch merged into
-- its metadata.
--
-- $1 user_id text
-- $2 key text
-- $3 title text null
-- $4 metadata text null
-- $5 metadata_patch text null    merged into the top level of the stored metadata
-- $6 removed_keys text[] null
-- $7 archived bool null
--
-- returns many Conversation
-- served by uq_conversations_user_id_key

insert into chatdb.conversations as c (user_id, key, title, metadata, archived_at)
values (
    $1, $2, $3, coalesce($4::text::jsonb, nullif($5::text::jsonb, '{}')),
    case when $7::bool then pg_catalog.statement_timestamp() end
)
on conflict (user_id, key) where key is not null do update
set title = excluded.title,
    metadata = case
        when $5::text is null then excluded.metadata
        else nullif((coalesce(c.metadata, '{}') || $5::text::jsonb) - $6::text[], '{}')
    end,
    archived_at = case
        when $7::bool then coalesce(c.archived_at, excluded.archived_at)
        when $7::bool is null then c.archived_at
    end,
    edits = c.edits + (
        c.title is distinct from excluded.title
        or c.metadata is distinct from case
            when $5::text is null then excluded.metadata
            else nullif((coalesce(c.metadata, '{}') || $5::text::jsonb) - $6::text[], '{}')
        end
        or coalesce($7::bool <> (c.archived_at is not null), false)
    )::int
returning
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
