-- The text of messages that are streamed, one row for each flush. Finishing a message merges them into it.
--
-- depends: 0009.chatdb-add-state

set local lock_timeout = '2s';
set local statement_timeout = '1min';

create table if not exists chatdb.message_parts (
    conversation_id bigint not null,
    seq bigint not null,
    start bigint not null,
    length bigint,
    bytes bigint,
    last_start bigint,
    last_start_bytes bigint,
    flushed_at timestamptz,
    user_id text collate "C" not null,
    content text not null,
    constraint pk_message_parts primary key (user_id, conversation_id, seq, start),
    constraint fk_message_parts_message foreign key (user_id, conversation_id, seq)
    references chatdb.messages (user_id, conversation_id, seq) on delete cascade
)
-- room on each page for the new versions of the row that each flush updates, without an index entry (HOT)
with (fillfactor = 50);

-- Few rows at a time, of which all soon go: with statistics of those, the server would estimate that each message that
-- is read has many parts, and plan get_message and update_message for each call.
alter table chatdb.message_parts
alter column user_id set statistics 0,
alter column conversation_id set statistics 0,
alter column seq set statistics 0,
alter column start set statistics 0;

comment on table chatdb.message_parts is
'The text of messages whose state is streaming: one row per flush, and one with start -1 for the stream itself.';
comment on column chatdb.message_parts.start is
'The offset of the part in the text, in characters; -1 for the row of the stream, which has the columns below.';
comment on column chatdb.message_parts.length is 'The length of the text so far, in characters.';
comment on column chatdb.message_parts.bytes is 'The length of the text so far, in bytes of UTF-8.';
comment on column chatdb.message_parts.last_start is 'The start of the last part, which may be sent again.';
comment on column chatdb.message_parts.last_start_bytes is 'The same in bytes.';
comment on column chatdb.message_parts.flushed_at is 'When the message was started or last extended.';
comment on index chatdb.pk_message_parts is
'Serves every statement on messages that are streamed, the text so far in every read, list_streaming, and the cascade.';

-- The roles that may use the messages may use their parts, and row-level security (chatdb protect) holds for both.
do $$
declare
    granted record;
begin
    for granted in
        select
            a.privilege_type, a.is_grantable,
            case
                when a.grantee operator(pg_catalog.=) 0::pg_catalog.oid then 'public'
                else pg_catalog.quote_ident(r.rolname::pg_catalog.text)
            end as grantee
        from pg_catalog.pg_class as c
        cross join lateral pg_catalog.aclexplode(c.relacl) as a
        left join pg_catalog.pg_roles as r on r.oid operator(pg_catalog.=) a.grantee
        where c.oid operator(pg_catalog.=) 'chatdb.messages'::pg_catalog.regclass
          and a.grantee operator(pg_catalog.<>) c.relowner
          and a.privilege_type operator(pg_catalog.=) any (array['SELECT', 'INSERT', 'UPDATE', 'DELETE'])
    loop
        execute pg_catalog.format(
            'grant %s on chatdb.message_parts to %s%s',
            granted.privilege_type, granted.grantee,
            case when granted.is_grantable then ' with grant option' else '' end
        );
    end loop;
    if exists (
        select from pg_catalog.pg_policy as p
        where p.polrelid operator(pg_catalog.=) 'chatdb.messages'::pg_catalog.regclass
          and p.polname operator(pg_catalog.=) 'rls_messages'
    ) and not exists (
        select from pg_catalog.pg_policy as p
        where p.polrelid operator(pg_catalog.=) 'chatdb.message_parts'::pg_catalog.regclass
          and p.polname operator(pg_catalog.=) 'rls_message_parts'
    ) then
        create policy rls_message_parts on chatdb.message_parts
        using (user_id operator(pg_catalog.=) (select chatdb.rls_user_id()))
        with check (user_id operator(pg_catalog.=) (select chatdb.rls_user_id()));
        alter table chatdb.message_parts enable row level security, force row level security;
    end if;
end $$;
