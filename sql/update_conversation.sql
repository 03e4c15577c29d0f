-- update_conversation
-- Changes the title or metadata. The conversation keeps its position in the list: updated_at stays the same.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 set_title bool
-- $4 title text null
-- $5 set_metadata bool
-- $6 metadata text null
--
-- returns one Conversation
-- served by pk_conversations

update chatdb.conversations
set title = case when $3::bool then $4 else title end,
    metadata = case when $5::bool then $6::text::jsonb else metadata end
where user_id = $1 and id = $2
returning id, user_id, key, title, metadata::text as metadata, last_seq, created_at, updated_at
