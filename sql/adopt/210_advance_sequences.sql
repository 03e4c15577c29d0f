-- advance_sequences
-- Advances chatdb's id sequences past the originals' ids, and never moves them back. The gap of 10,000 leaves room for
-- ids that a service is drawing right now and for rows that the older system is about to write.

select pg_catalog.setval(s.sequence, s.highest + 10000)
from (
    select
        pg_catalog.pg_get_serial_sequence('chatdb.conversations', 'id')::regclass as sequence,
        (select pg_catalog.max(id) from pg_temp.original_conversations)::int8 as highest
    union all
    select
        pg_catalog.pg_get_serial_sequence('chatdb.messages', 'id')::regclass as sequence,
        (select pg_catalog.max(id) from pg_temp.original_messages)::int8 as highest
) as s
where s.highest > coalesce(pg_catalog.pg_sequence_last_value(s.sequence), 0)
