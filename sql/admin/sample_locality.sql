-- Returns on how many blocks the newest 100 messages of a conversation are, summed over up to 16 conversations of at
-- least 20 messages, how many messages a block of the table holds, and whether the table exceeds shared_buffers. Takes
-- the conversations of messages in 16 blocks, chosen at random. Reads at most 1,600 blocks. Served by pk_messages.

with size as (
    select
        pg_catalog.pg_relation_size('chatdb.messages') as bytes,
        pg_catalog.pg_relation_size('chatdb.messages') / pg_catalog.current_setting('block_size')::int8 as blocks
),

block as (
    select distinct pg_catalog.trunc(pg_catalog.random() * size.blocks)::int8 as number
    from size
    cross join pg_catalog.generate_series(1, 16)
),

place as (
    select pg_catalog.format('(%s,%s)', block.number, line.number)::pg_catalog.tid as ctid
    from block
    cross join pg_catalog.generate_series(1, 8) as line (number)
),

conversation as (
    select distinct on ((ctid::text::pg_catalog.point)[0]) user_id, conversation_id
    from chatdb.messages
    where ctid = any(array(select ctid from place))
    order by (ctid::text::pg_catalog.point)[0], pg_catalog.random()
),

message as (
    select chosen.user_id, chosen.conversation_id, newest.block
    from (select distinct user_id, conversation_id from conversation) as chosen
    cross join lateral (
        select (m.ctid::text::pg_catalog.point)[0] as block
        from chatdb.messages as m
        where m.user_id = chosen.user_id and m.conversation_id = chosen.conversation_id
        order by m.seq desc
        limit 100
    ) as newest
),

history as (
    select pg_catalog.count(*) as messages, pg_catalog.count(distinct block) as blocks
    from message
    group by user_id, conversation_id
    having pg_catalog.count(*) >= 20
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
    (
        select size.bytes > pg_catalog.pg_size_bytes(pg_catalog.current_setting('shared_buffers'))
        from size
    ) as exceeds_buffers
from history
