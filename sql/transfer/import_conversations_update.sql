-- import_conversations_update
-- Updates messages that a later export has in another version, such as an answer that is complete now.
--
-- $1 user_id text
-- $2 conversation_ids text[]
-- $3 seqs text[]
-- $4 contents text[]
-- $5 payloads text[]    null where a message has none
-- $6 metadatas text[]    null where a message has none; the user's own fields stay
-- $7 states text[]    null where a message is complete
--
-- returns many ImportedParent
-- served by pk_messages

update chatdb.messages as m
set content = g.content,
    payload = g.payload::json,
    metadata = nullif((coalesce(m.metadata, '{}') - 'hidden'::text) || coalesce(g.metadata::jsonb, '{}'), '{}'),
    state = g.state
from unnest(
    $2::text[]::int8[], $3::text[]::int8[], $4::text[], $5::text[], $6::text[], $7::text[]
)
    with ordinality as g (conversation_id, seq, content, payload, metadata, state, ordinality)
where m.user_id = $1 and m.conversation_id = g.conversation_id and m.seq = g.seq
returning g.ordinality, m.seq
