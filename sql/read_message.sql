-- read_message
-- The text of a message from an offset, and its length and state. Of a message that is streamed, only the parts from
-- there on are read.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 seq int8 null
-- $5 key text null
-- $6 start int8
--
-- returns one MessageTail, or an existence row: if there is no such message
-- served by pk_conversations, pk_messages, uq_conversations_user_id_key, uq_messages_user_id_conversation_id_key,
-- pk_message_parts

with place as (
    select coalesce((select $2::int8), (
        select id from chatdb.conversations
        where user_id = $1 and key = $3
    )) as id
),

message as (
    select conversation_id, seq, content, state
    from chatdb.messages
    where user_id = $1 and conversation_id = (select id from place)
      and seq = (select coalesce((select $4::int8), (
          select k.seq from chatdb.messages as k
          where k.user_id = $1 and k.conversation_id = (select id from place) and k.key = $5
      )))
)

select
    coalesce(
        case
            when m.state = 'streaming' then (
                select
                    pg_catalog.string_agg(
                        pg_catalog.substr(p.content, greatest(least($6::int8, 2147483645) - p.start + 1, 1)::int), ''
                        order by p.start
                    )
                from chatdb.message_parts as p
                where p.user_id = $1 and p.conversation_id = m.conversation_id and p.seq = m.seq
                  and p.start >= (
                      select b.start
                      from chatdb.message_parts as b
                      where b.user_id = $1 and b.conversation_id = m.conversation_id and b.seq = m.seq and b.start <= $6
                      order by b.start desc
                      limit 1
                  )
            )
            else pg_catalog.substr(m.content, least($6, 2147483646)::int + 1)
        end,
        ''
    ) as text,
    coalesce(
        (
            select p.length
            from chatdb.message_parts as p
            where p.user_id = $1 and p.conversation_id = m.conversation_id and p.seq = m.seq and p.start = -1
        ),
        pg_catalog.char_length(m.content)::int8
    ) as "offset",
    m.state
from message as m
union all
select null, null, null
from chatdb.conversations
where user_id = $1 and id = (select id from place) and not exists (select from message)
