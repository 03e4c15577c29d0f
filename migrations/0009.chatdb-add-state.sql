-- A column for the state of a message that is streamed. Nothing is rewritten.
--
-- depends: 0008.chatdb-index-branches

set local lock_timeout = '2s';
set local statement_timeout = '1min';

-- one statement, which adds the column and its CHECK or neither; 0011 validates the CHECK under a weaker lock
do $$
begin
    if not exists (
        select from pg_catalog.pg_attribute as a
        inner join pg_catalog.pg_class as c on c.oid operator(pg_catalog.=) a.attrelid
        inner join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) c.relnamespace
        where n.nspname operator(pg_catalog.=) 'chatdb'
          and c.relname operator(pg_catalog.=) 'messages'
          and a.attname operator(pg_catalog.=) 'state'
    ) then
        alter table chatdb.messages
        add column state text collate "C",
        add constraint ck_messages_state check (state in ('streaming', 'aborted')) not valid;
    end if;
end $$;

comment on column chatdb.messages.state is
'streaming while the text grows in message_parts, aborted if it was given up; null if the message is complete.';
