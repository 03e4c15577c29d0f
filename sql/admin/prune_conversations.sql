-- Deletes the conversations $3 of the users $2 that were last active before $1, and their messages. Waits for no lock
-- on a conversation: leaves alone what another transaction locks, what became active again, and what a stream extends.
-- Served by pk_conversations, pk_messages, pk_message_parts.

with old as (
    select pg_catalog.unnest($2::text[]) as user_id, pg_catalog.unnest($3::int8[]) as id
),

locked as (
    select c.user_id, c.id
    from old
    inner join chatdb.conversations as c on c.user_id = old.user_id and c.id = old.id
    where c.updated_at < $1::timestamptz
      and not exists (
          select
          from chatdb.message_parts as p
          where p.user_id = c.user_id and p.conversation_id = c.id and p.start = -1 and p.flushed_at >= $1::timestamptz
      )
    for update of c skip locked
),

conversation as (
    delete from chatdb.conversations as c
    using locked
    where c.user_id = locked.user_id and c.id = locked.id
    returning c.user_id, c.id
),

message as (
    delete from chatdb.messages as m
    using conversation
    where m.user_id = conversation.user_id and m.conversation_id = conversation.id
    returning m.seq
)

select
    (select pg_catalog.count(*) from conversation) as conversations,
    (select pg_catalog.count(*) from message) as messages,
    array(
        select distinct user_id
        from conversation
        order by user_id
    ) as users,
    -- as they were when the statement began
    (
        select pg_catalog.count(*)
        from old
        inner join chatdb.conversations as c on c.user_id = old.user_id and c.id = old.id
    ) as existing
