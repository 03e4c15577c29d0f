-- A column for the parent of a message that does not follow the message before it. Nothing is rewritten.
--
-- depends: 0006.chatdb-add-heads

set local lock_timeout = '2s';
set local statement_timeout = '1min';

-- one statement, which adds the column and its CHECK or neither; the next migration validates the CHECK under a weaker
-- lock
do $$
begin
    if not exists (
        select from pg_catalog.pg_attribute as a
        inner join pg_catalog.pg_class as c on c.oid operator(pg_catalog.=) a.attrelid
        inner join pg_catalog.pg_namespace as n on n.oid operator(pg_catalog.=) c.relnamespace
        where n.nspname operator(pg_catalog.=) 'chatdb'
          and c.relname operator(pg_catalog.=) 'messages'
          and a.attname operator(pg_catalog.=) 'parent_seq'
    ) then
        alter table chatdb.messages
        add column parent_seq bigint,
        add constraint ck_messages_parent_seq check (parent_seq >= 0 and parent_seq < seq) not valid;
    end if;
end $$;

comment on column chatdb.messages.parent_seq is
'The seq of the message that this one follows, 0 if none; null if it follows the stored message with the next lower seq.';
