-- Returns on how many blocks the newest 100 messages of up to 12 conversations are, summed over the conversations, how
-- many messages a block of the table holds, and whether the table exceeds shared_buffers. Reads at most 32 blocks of
-- the conversations, chosen at random, and 1,200 of the messages. Served by pk_messages.

with size as (
    select
        pg_catalog.pg_relation_size('chatdb.conversations')
        / pg_catalog.current_setting('block_size')::int8 as blocks
),

block as (
    select distinct pg_catalog.trunc(pg_catalog.random() * size.blocks)::int8 as number
    from size
    cross join pg_catalog.generate_series(1, 32)
),

place as (
    select pg_catalog.format('(%s,%s)', block.number, line.number)::pg_catalog.tid as ctid
    from block
    cross join pg_catalog.generate_series(1, 50) as line (number)
),

conversation as (
    select user_id, id
    from chatdb.conversations
    where ctid = any(array(select ctid from place)) and last_seq >= 20
    order by pg_catalog.random()
    limit 12
),

message as (
    select conversation.user_id, conversation.id, newest.block
    from conversation
    cross join lateral (
        select (m.ctid::text::pg_catalog.point)[0] as block
        from chatdb.messages as m
        where m.user_id = conversation.user_id and m.conversation_id = conversation.id
        order by m.seq desc
        limit 100
    ) as newest
),

history as (
    select pg_catalog.count(*) as messages, pg_catalog.count(distinct block) as blocks
    from message
    group by user_id, id
)

select
    pg_catalog.count(*)::int8 as conversations,
    coalesce(pg_catalog.sum(messages), 0)::int8 as messages,
    coalesce(pg_catalog.sum(blocks), 0)::int8 as blocks,
    (
        select case when reltuples > 0 and relpages > 0 then (reltuples / relpages)::pg_catalog.float8 end
        from pg_catalog.pg_class
        where oid = 'chatdb.messages'::regclass
    ) as messages_per_block,
    pg_catalog.pg_relation_size('chatdb.messages')
    > pg_catalog.pg_size_bytes(pg_catalog.current_setting('shared_buffers')) as exceeds_buffers
from history
