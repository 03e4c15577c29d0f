-- move_user
-- Moves all conversations of a user, with their messages, to another user, and counts them. A moved conversation loses
-- its key if the other user has a conversation with the same key. It locks the conversations, then the messages that
-- are streaming, then the rows of their streams.
--
-- $1 user_id text
-- $2 to_user_id text
--
-- returns one Moved
-- refuses with protected, again
-- served by ix_conversations_user_id_active_on, pk_conversations, pk_messages, pk_message_parts

with allowed as materialized (
    -- under row-level security, a statement reaches the rows of one user only
    select true not in (
        pg_catalog.row_security_active('chatdb.conversations'::pg_catalog.regclass),
        pg_catalog.row_security_active('chatdb.messages'::pg_catalog.regclass),
        pg_catalog.row_security_active('chatdb.message_parts'::pg_catalog.regclass)
    ) as is_allowed
),

locked as (
    -- the row as it is now: another caller may have written it after this statement began
    select last_seq + edits as revision
    from chatdb.conversations
    where user_id = $1 and (select is_allowed from allowed)
    order by id
    for update
),

stream as (
    select conversation_id, seq, flushed_at
    from chatdb.message_parts
    where user_id = $1 and start = -1 and (select is_allowed from allowed)
),

streaming as (
    select m.seq
    from chatdb.messages as m
    -- the count makes the conversations lock first
    where m.user_id = $1 and (select pg_catalog.count(*) from locked) > 0
      and (m.conversation_id, m.seq) in (select conversation_id, seq from stream)
    order by m.conversation_id, m.seq
    for update
),

locked_stream as (
    select conversation_id, seq, flushed_at
    from chatdb.message_parts
    where user_id = $1 and start = -1 and (select pg_catalog.count(*) from streaming) > 0
    for update
),

seen as (
    select pg_catalog.count(*) as conversations, coalesce(pg_catalog.sum(last_seq + edits), 0) as revisions
    from chatdb.conversations
    where user_id = $1 and (select is_allowed from allowed)
),

-- the locked rows are among the seen ones, and no revision falls: with equal sums, each is as it was seen
settled as materialized (
    select
        (select is_allowed from allowed)
        and s.conversations = (select pg_catalog.count(*) from locked)
        and s.revisions = (select coalesce(pg_catalog.sum(revision), 0) from locked)
        and not exists (
            select conversation_id, seq, flushed_at from stream
            except
            select conversation_id, seq, flushed_at from locked_stream
        ) as is_settled
    from seen as s
),

conversation as (
    update chatdb.conversations as c
    set user_id = $2,
        key = case
            when not exists (
                select from chatdb.conversations as t
                where t.user_id = $2 and t.key = c.key
            ) then c.key
        end
    where c.user_id = $1 and (select is_settled from settled)
    returning c.id
),

message as (
    update chatdb.messages
    set user_id = $2
    where user_id = $1 and (select pg_catalog.count(*) from conversation) > 0
    returning seq
),

part as (
    update chatdb.message_parts
    set user_id = $2
    where user_id = $1 and (select pg_catalog.count(*) from message) > 0
)

select
    (select pg_catalog.count(*) from conversation) as conversations,
    (select pg_catalog.count(*) from message) as messages,
    null as refusal
where (select is_settled from settled)
union all
select 0, 0, case when (select is_allowed from allowed) then 'again' else 'protected' end
where not (select is_settled from settled)
