-- extend_message
-- More text of a message that is streamed, after its length so far, or instead of its last part. It locks the message,
-- then the part that stands for the stream, and leaves the conversation alone.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 seq int8 null
-- $5 key text null
-- $6 start int8
-- $7 content text
--
-- returns one MessageLength
-- refuses with missing, finished, offset, length, again
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- pk_message_parts

with place as (
    select coalesce((select $2::int8), (
        select id from chatdb.conversations
        where user_id = $1 and key = $3
    )) as id
),

message as (
    select conversation_id, seq, state
    from chatdb.messages
    where user_id = $1 and conversation_id = (select id from place)
      and seq = (select coalesce((select $4::int8), (
          select k.seq from chatdb.messages as k
          where k.user_id = $1 and k.conversation_id = (select id from place) and k.key = $5
      )))
    for key share
),

-- the conditions hold for the row as it is now, even if another flush came first
stream as (
    update chatdb.message_parts
    -- not $6 plus a length: the planner would compute that, and fail if it overflows
    set length = case when $6 = length then length else last_start end + pg_catalog.char_length($7::text),
        bytes = pg_catalog.octet_length($7) + case when $6 = length then bytes else last_start_bytes end,
        last_start = $6,
        last_start_bytes = case when $6 = length then bytes else last_start_bytes end,
        flushed_at = pg_catalog.clock_timestamp()
    -- a join could read the streams of all conversations of the user
    where user_id = $1 and conversation_id = (select conversation_id from message)
      and seq = (select seq from message) and start = -1
      and $6 in (length, last_start)
      and pg_catalog.octet_length($7) + case when $6 = length then bytes else last_start_bytes end <= 4194304
    returning conversation_id, seq, length
),

part as (
    insert into chatdb.message_parts (user_id, conversation_id, seq, start, content)
    select $1, conversation_id, seq, $6, $7
    from stream
    on conflict (user_id, conversation_id, seq, start) do update set content = excluded.content
)

select length, null as refusal
from stream
union all
select
    p.length,
    case
        when coalesce(m.state, '') <> 'streaming' then 'finished'
        when $6 <> p.length and $6 <> p.last_start then 'offset'
        when pg_catalog.octet_length($7) + case when $6 = p.length then p.bytes else p.last_start_bytes end > 4194304
            then 'length'
        -- another caller has finished or extended it after this statement began
        else 'again'
    end
from message as m
left join chatdb.message_parts as p
    on p.user_id = $1 and p.conversation_id = (select conversation_id from message)
        and p.seq = (select seq from message) and p.start = -1
where not exists (select from stream)
union all
select null, 'missing' as refusal
from chatdb.conversations
where user_id = $1 and id = (select id from place) and not exists (select from message)
