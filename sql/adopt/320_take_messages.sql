-- take_messages
-- Loads the messages of the batch that are not adopted, with any reason for quarantine. A batch is a range of
-- conversations, so that with an index the server does not read all messages up to it.

insert into pg_temp.batch_messages (id, conversation_id, user_id, role, content, created_at, reason)
select
    m.id,
    m.conversation_id,
    m.user_id,
    m.role,
    m.content,
    m.created_at,
    case
        when b.reason is not null then 'its conversation is quarantined'
        when b.is_adopted and b.last_seq is null then 'its conversation was deleted in chatdb'
        when m.user_id is null then 'it has no user'
        when m.user_id <> b.user_id then 'its user is not its conversation''s'
        when m.role is null then 'it has no role'
        when m.role not in ('user', 'assistant', 'system', 'developer', 'tool') then 'its role is none of chatdb''s'
        when m.content is null then 'it has no text'
        when pg_catalog.octet_length(m.content) > 4194304 then 'its text is longer than 4 MiB'
        when
            m.created_at not between '0001-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00'
            then 'its time is infinite or not in the years 1 to 9999'
    end as reason
from pg_temp.batch_conversations as b
inner join pg_temp.original_messages as m on m.conversation_id = b.id
where m.conversation_id between (
    select pg_catalog.min(r.id)
    from pg_temp.batch_conversations as r
) and (
    select pg_catalog.max(r.id)
    from pg_temp.batch_conversations as r
)
and not exists (
    select from chatdb_adopt.messages as a
    where a.id = m.id
)
