-- create_conversation
-- Creates a conversation.
--
-- $1 user_id text
-- $2 title text null
-- $3 metadata text null
--
-- returns one Conversation

insert into chatdb.conversations (user_id, title, metadata)
values ($1, $2, $3::text::jsonb)
returning
    id, user_id, key, title, metadata::text as metadata, last_seq,
    case when head_last_seq = last_seq then head_seq else last_seq end as head_seq, last_seq + edits as revision,
    created_at, updated_at, archived_at, pinned_at
