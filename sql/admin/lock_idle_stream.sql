-- Locks the conversation $2 of the user $1, then the stream of its message $3 if it was last extended at $4. Waits for
-- nobody: idle without locked means that another transaction has one of the locks.

with conversation as (
    select id
    from chatdb.conversations
    where user_id = $1::text and id = $2::int8
    for no key update skip locked
),

stream as (
    select seq
    from chatdb.message_parts
    where user_id = $1::text and conversation_id = (select id from conversation) and seq = $3::int8 and start = -1
      and flushed_at = $4::timestamptz
    for update skip locked
)

select
    (select pg_catalog.count(*) from stream) as locked,
    (
        select pg_catalog.count(*)
        from chatdb.message_parts
        where user_id = $1::text and conversation_id = $2::int8 and seq = $3::int8 and start = -1
          and flushed_at = $4::timestamptz
    ) as idle
