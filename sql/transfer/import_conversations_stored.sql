-- import_conversations_stored
-- Reads the conversations that a later export may extend, each with its messages, and a row without a message if it
-- has none.
--
-- $1 user_id text
-- $2 ids text[]
--
-- returns many ImportedMessage
-- served by pk_conversations, pk_messages

select
    c.id, c.last_seq, c.edits, c.title,
    pg_catalog.jsonb_extract_path_text(c.metadata, 'imported_title'::text) as imported_title,
    c.archived_at, c.pinned_at,
    pg_catalog.jsonb_extract_path_text(c.metadata, 'imported_archived'::text) as imported_archived,
    pg_catalog.jsonb_extract_path_text(c.metadata, 'imported_pinned'::text) as imported_pinned,
    case when c.head_last_seq = c.last_seq then c.head_seq else c.last_seq end as head_seq,
    m.seq, m.key, m.state,
    pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(m.content, 'UTF8'::name)), 'hex'::text) as digest
from chatdb.conversations as c
left join chatdb.messages as m on m.user_id = $1 and m.conversation_id = c.id
where c.user_id = $1 and c.id = any($2::text[]::int8[])
