-- upsert_conversation
-- The user's conversation with this key, created, or with its title and metadata replaced.
--
-- $1 user_id text
-- $2 key text
-- $3 title text null
-- $4 metadata text null
--
-- returns many Conversation
-- served by uq_conversations_user_id_key

insert into chatdb.conversations as c (user_id, key, title, metadata)
values ($1, $2, $3, $4::text::jsonb)
on conflict (user_id, key) where key is not null do update
set title = excluded.title,
    metadata = excluded.metadata,
    edits = c.edits + (
        c.title is distinct from excluded.title or c.metadata is distinct from excluded.metadata
    )::int
returning
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
