-- exclude_extended
-- Excludes from deletion the conversations that received appends in chatdb, with their messages, and conversations with
-- an adopted message that is still among the originals. Several statements.

delete from pg_temp.deleted_upstream_messages as g
where exists (
    select from chatdb_adopt.conversations as a
    inner join chatdb.conversations as d on d.user_id = a.user_id and d.id = a.id
    where a.id = g.conversation_id and d.last_seq <> a.last_seq
)
or exists (
    select from pg_temp.original_messages as m
    where m.id = g.id
);

delete from pg_temp.deleted_upstream_conversations as g
where exists (
    select from chatdb_adopt.conversations as a
    inner join chatdb.conversations as d on d.user_id = a.user_id and d.id = a.id
    where a.id = g.id and d.last_seq <> a.last_seq
)
or exists (
    select from pg_temp.original_conversations as c
    where c.id = g.id
)
or g.id in (
    select a.conversation_id
    from chatdb_adopt.messages as a
    where not exists (
        select from pg_temp.deleted_upstream_messages as m
        where m.id = a.id
    )
);
