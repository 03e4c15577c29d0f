-- Returns the next messages after ($2, $3, $4) that are streaming and were not extended since $1. Served by
-- pk_message_parts.

select user_id, conversation_id, seq, flushed_at
from chatdb.message_parts
where start = -1 and flushed_at <= $1::timestamptz and (user_id, conversation_id, seq) > ($2::text, $3::int8, $4::int8)
order by user_id, conversation_id, seq
limit $5::int8
