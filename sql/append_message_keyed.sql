-- append_message_keyed
-- Appends a message to a conversation, or returns the stored one if it has the same key and body.
--
-- $1 user_id text
-- $2 conversation_id int8
-- $3 role text
-- $4 content text
-- $5 payload text null
-- $6 metadata text null
-- $7 token_count int4 null
-- $8 key text
--
-- returns one Message, or an existence row: the key is stored with another body
-- served by pk_conversations, uq_messages_user_id_conversation_id_key

-- locks the row before looking up the key, so that a caller who waited finds what the other one stored
with conversation as (
    select user_id, id, last_seq, greatest(updated_at, pg_catalog.statement_timestamp()) as appended_at
    from chatdb.conversations
    where user_id = $1 and id = $2
    for no key update
),

message as (
    insert into chatdb.messages (
        user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at
    )
    select user_id, id, last_seq + 1, $3, $4, $5::text::json, $6::text::jsonb, $7, $8, appended_at
    from conversation
    -- a no-op that, unlike DO NOTHING, returns a row that this statement's snapshot cannot see
    on conflict (user_id, conversation_id, key) where key is not null do update set key = excluded.key
    returning id, conversation_id, user_id, seq, role, content, payload, metadata, token_count, key, created_at
),

raised as (
    update chatdb.conversations as c
    set last_seq = message.seq, updated_at = message.created_at
    from conversation, message
    where c.user_id = $1 and c.id = $2 and message.seq = conversation.last_seq + 1
),

same as (
    select id, conversation_id, user_id, seq, role, content, payload, metadata, token_count, key, created_at
    from message
    where role = $3 and content = $4
      and payload::text is not distinct from $5 and metadata is not distinct from $6::text::jsonb
)

select
    id, conversation_id, user_id, seq, role, content, payload::text as payload, metadata::text as metadata,
    token_count, key, created_at
from same
union all
select null, null, null, null, null, null, null, null, null, null, null
from conversation
where not exists (select from same)
