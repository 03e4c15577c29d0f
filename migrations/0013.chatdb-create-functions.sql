-- Functions for the statements that Citus would otherwise split into several commands between its nodes: a function
-- with the user's id goes as a whole to the node with the user's rows. Does nothing in a database without Citus.
--
-- depends: 0012.chatdb-set-autovacuum

set local lock_timeout = '2s';
set local statement_timeout = '1min';

do $install$
begin
    if not exists (select from pg_catalog.pg_extension as e where e.extname operator(pg_catalog.=) 'citus') then
        return;
    end if;

    execute $function$
    create or replace function chatdb.append_messages_v1(
        p_user_id text,
        p_conversation_id int8,
        p_conversation_key text,
        p_roles text[],
        p_contents text[],
        p_payloads text[],
        p_metadatas text[],
        p_token_counts text[],
        p_keys text[],
        p_skip_stored bool,
        p_create_missing bool,
        p_expected_id int8,
        p_expected_revision int8,
        p_metadata_patch text,
        p_removed_keys text[],
        p_parent_seq int8
    )
    returns table (
        id int8, conversation_id int8, seq int8, parent_seq int8, metadata text, token_count int4, key text,
        state text, created_at timestamptz, refusal text
    )
    language plpgsql
    set search_path to pg_catalog, pg_temp
    as $body$
    #variable_conflict use_column
    declare
        v_count int := cardinality(p_roles);
        v_id int8;
        v_conversation record;
        v_new record;
        v_is_found bool := false;
        v_is_created bool := false;
        v_is_expected bool := true;
        v_has_parent bool := true;
        v_known text[] := '{}';
        v_wanted int := v_count;
        v_same int;
        v_rows int;
        v_inserted int := 0;
        -- the row is locked only by the update
        v_is_plain bool := p_keys is null and not p_create_missing and p_expected_id is null
            and p_metadata_patch is null and p_parent_seq is null;
    begin
        for v_attempt in 1 .. 3 loop
            v_id := p_conversation_id;
            if v_id is null then
                select c.id into v_id
                from chatdb.conversations as c
                where c.user_id = p_user_id and c.key = p_conversation_key;
            end if;
            if v_is_plain then
                update chatdb.conversations as c
                set last_seq = c.last_seq + v_count, updated_at = greatest(c.updated_at, statement_timestamp())
                where c.user_id = p_user_id and c.id = v_id
                returning
                    c.id, c.last_seq - v_count as last_seq, c.updated_at as appended_at,
                    case when c.head_last_seq = c.last_seq - v_count and not c.head_is_newest then c.head_seq end
                        as parent_seq
                into v_conversation;
            else
                select
                    c.id, c.last_seq, c.last_seq + c.edits as revision,
                    greatest(c.updated_at, statement_timestamp()) as appended_at,
                    nullif(
                        nullif(
                            coalesce(p_parent_seq, case when c.head_last_seq = c.last_seq then c.head_seq end),
                            c.last_seq
                        ),
                        case when c.head_last_seq = c.last_seq and c.head_is_newest then c.head_seq end
                    ) as parent_seq
                into v_conversation
                from chatdb.conversations as c
                where c.user_id = p_user_id and c.id = v_id
                for no key update;
            end if;
            v_is_found := found;
            exit when v_is_found;
            if p_create_missing then
                if coalesce(p_parent_seq, 0) <> 0 then
                    refusal := 'missing';
                    return next;
                    return;
                end if;
                insert into chatdb.conversations as c (user_id, key, last_seq, metadata)
                values (p_user_id, p_conversation_key, v_count, nullif(p_metadata_patch::jsonb, '{}'))
                on conflict (user_id, key) where key is not null do nothing
                returning c.id, 0::int8 as last_seq, c.updated_at as appended_at, null::int8 as parent_seq
                into v_conversation;
                v_is_found := found;
                v_is_created := found;
                exit when v_is_found;
            else
                -- by its key, it may have been deleted and created again
                exit when v_id is null or p_conversation_id is not null;
            end if;
        end loop;
        if not v_is_found then
            if p_create_missing then
                refusal := 'again';
                return next;
            end if;
            return;
        end if;

        if not v_is_plain and not v_is_created then
            v_is_expected := p_expected_id is null
                or (v_conversation.id = p_expected_id and v_conversation.revision = p_expected_revision);
            if coalesce(p_parent_seq, 0) <> 0 then
                perform from chatdb.messages as m
                where m.user_id = p_user_id and m.conversation_id = v_conversation.id and m.seq = p_parent_seq
                for key share;
                v_has_parent := found;
            end if;
            if p_keys is not null then
                select coalesce(array_agg(m.key), '{}') into v_known
                from chatdb.messages as m
                where m.user_id = p_user_id and m.conversation_id = v_conversation.id and m.key = any(p_keys);
            end if;
            if p_skip_stored then
                v_wanted := v_count - cardinality(v_known);
            elsif cardinality(v_known) > 0 then
                select count(*) into v_same
                from chatdb.messages as m
                inner join unnest(p_keys, p_roles, p_contents, p_payloads, p_metadatas)
                    as b (key, role, content, payload, metadata) on b.key = m.key
                where m.user_id = p_user_id and m.conversation_id = v_conversation.id
                  and m.role = b.role and m.content = b.content and m.state is distinct from 'streaming'
                  and m.payload::text is not distinct from b.payload
                  and m.metadata is not distinct from b.metadata::jsonb;
                if v_same < v_count then
                    refusal := 'conflict';
                    return next;
                    return;
                end if;
                return query
                select
                    m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata::text, m.token_count, m.key, m.state,
                    m.created_at, null::text
                from chatdb.messages as m
                where m.user_id = p_user_id and m.conversation_id = v_conversation.id and m.key = any(p_keys);
                return;
            end if;
            if not v_is_expected or not v_has_parent then
                refusal := case
                    when v_count > 0 and v_wanted = 0 then null
                    when v_is_expected then 'missing'
                    else 'stale'
                end;
                return next;
                return;
            end if;
            if v_count = 0 and p_metadata_patch is not null then
                update chatdb.conversations as c
                set metadata = nullif((coalesce(c.metadata, '{}') || p_metadata_patch::jsonb) - p_removed_keys, '{}'),
                    edits = c.edits + (
                        c.metadata is distinct from
                        nullif((coalesce(c.metadata, '{}') || p_metadata_patch::jsonb) - p_removed_keys, '{}')
                    )::int
                where c.user_id = p_user_id and c.id = v_conversation.id;
            end if;
        end if;
        if v_wanted = 0 then
            return next;
            return;
        end if;

        for v_new in
            select
                b.role, b.content, b.payload::json as payload, b.metadata::jsonb as metadata, b.token_count, b.key,
                row_number() over (order by b.ordinality) as place
            from unnest(p_roles, p_contents, p_payloads, p_metadatas, p_token_counts::int4[], p_keys)
                with ordinality as b (role, content, payload, metadata, token_count, key, ordinality)
            where b.key is null or b.key <> all(v_known)
            order by b.ordinality
        loop
            return query
            insert into chatdb.messages as m (
                user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at,
                parent_seq
            )
            values (
                p_user_id, v_conversation.id, v_conversation.last_seq + v_new.place, v_new.role, v_new.content,
                v_new.payload, v_new.metadata, v_new.token_count, v_new.key, v_conversation.appended_at,
                case when v_new.place = 1 then v_conversation.parent_seq end
            )
            returning
                m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata::text, m.token_count, m.key, m.state,
                m.created_at, null::text;
            get diagnostics v_rows = row_count;
            v_inserted := v_inserted + v_rows;
        end loop;
        if v_is_plain or v_is_created then
            return;
        end if;
        if v_inserted = 0 then
            refusal := 'suppressed';
            return next;
            return;
        end if;
        update chatdb.conversations as c
        -- -1 violates a CHECK: a trigger suppressed some of the messages
        set last_seq = case when v_inserted = v_wanted then v_conversation.last_seq + v_inserted else -1 end,
            updated_at = v_conversation.appended_at,
            metadata = case
                when p_metadata_patch is null then c.metadata
                else nullif((coalesce(c.metadata, '{}') || p_metadata_patch::jsonb) - p_removed_keys, '{}')
            end
        where c.user_id = p_user_id and c.id = v_conversation.id;
    end $body$
    $function$;

    execute $function$
    create or replace function chatdb.create_conversation_v1(
        p_user_id text,
        p_title text,
        p_metadata text,
        p_key text,
        p_must_be_new bool,
        p_roles text[],
        p_contents text[],
        p_payloads text[],
        p_metadatas text[],
        p_token_counts text[],
        p_keys text[]
    )
    returns table (
        id int8, user_id text, key text, title text, metadata text, last_seq int8, head_seq int8, revision int8,
        created_at timestamptz, updated_at timestamptz, archived_at timestamptz, pinned_at timestamptz, refusal text
    )
    language plpgsql
    set search_path to pg_catalog, pg_temp
    as $body$
    #variable_conflict use_column
    declare
        v_created record;
        v_new record;
    begin
        if p_key is not null then
            return query
            select
                c.id, c.user_id, c.key, c.title, c.metadata::text, c.last_seq,
                case when c.head_last_seq = c.last_seq then c.head_seq else c.last_seq end, c.last_seq + c.edits,
                c.created_at, c.updated_at, c.archived_at, c.pinned_at, null::text
            from chatdb.conversations as c
            where c.user_id = p_user_id and c.key = p_key and not p_must_be_new;
            if found then
                return;
            end if;
            if p_must_be_new then
                perform from chatdb.conversations as c where c.user_id = p_user_id and c.key = p_key;
                if found then
                    refusal := 'stale';
                    return next;
                    return;
                end if;
            end if;
        end if;
        -- no row if another caller has just stored the key: the caller runs it again
        insert into chatdb.conversations as c (user_id, title, metadata, key, last_seq)
        values (p_user_id, p_title, p_metadata::jsonb, p_key, cardinality(p_roles))
        on conflict (user_id, key) where key is not null do nothing
        returning
            c.id, c.user_id, c.key, c.title, c.metadata::text, c.last_seq, c.last_seq as head_seq,
            c.last_seq + c.edits as revision, c.created_at, c.updated_at, c.archived_at, c.pinned_at,
            null::text as refusal
        into v_created;
        if not found then
            return;
        end if;
        for v_new in
            select
                b.role, b.content, b.payload::json as payload, b.metadata::jsonb as metadata, b.token_count, b.key,
                b.ordinality
            from unnest(p_roles, p_contents, p_payloads, p_metadatas, p_token_counts::int4[], p_keys)
                with ordinality as b (role, content, payload, metadata, token_count, key, ordinality)
        loop
            insert into chatdb.messages (
                user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at
            )
            values (
                p_user_id, v_created.id, v_new.ordinality, v_new.role, v_new.content, v_new.payload, v_new.metadata,
                v_new.token_count, v_new.key, v_created.created_at
            );
        end loop;
        return query
        select
            v_created.id, v_created.user_id, v_created.key, v_created.title, v_created.metadata, v_created.last_seq,
            v_created.head_seq, v_created.revision, v_created.created_at, v_created.updated_at,
            v_created.archived_at, v_created.pinned_at, v_created.refusal;
    end $body$
    $function$;

    execute $function$
    create or replace function chatdb.upsert_message_v1(
        p_user_id text,
        p_conversation_id int8,
        p_conversation_key text,
        p_role text,
        p_content text,
        p_payload text,
        p_metadata text,
        p_token_count int4,
        p_key text,
        p_expected_id int8,
        p_expected_revision int8
    )
    returns table (
        id int8, conversation_id int8, seq int8, parent_seq int8, metadata text, state text, created_at timestamptz,
        refusal text
    )
    language plpgsql
    set search_path to pg_catalog, pg_temp
    as $body$
    #variable_conflict use_column
    declare
        v_id int8;
        v_conversation record;
        v_stored record;
    begin
        for v_attempt in 1 .. 3 loop
            v_id := p_conversation_id;
            if v_id is null then
                select c.id into v_id
                from chatdb.conversations as c
                where c.user_id = p_user_id and c.key = p_conversation_key;
            end if;
            select
                c.id, c.last_seq, c.last_seq + c.edits as revision,
                greatest(c.updated_at, statement_timestamp()) as appended_at,
                case when c.head_last_seq = c.last_seq and not c.head_is_newest then c.head_seq end as parent_seq
            into v_conversation
            from chatdb.conversations as c
            where c.user_id = p_user_id and c.id = v_id
            for no key update;
            exit when found;
            -- by its key, it may have been deleted and created again
            if v_id is null or p_conversation_id is not null or v_attempt = 3 then
                return;
            end if;
        end loop;
        select
            m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata::text as metadata, m.state, m.created_at,
            m.role = p_role and m.content = p_content and m.payload::text is not distinct from p_payload
            and m.metadata is not distinct from p_metadata::jsonb
            and m.token_count is not distinct from p_token_count
            and m.state is distinct from 'streaming' as is_same
        into v_stored
        from chatdb.messages as m
        where m.user_id = p_user_id and m.conversation_id = v_conversation.id and m.key = p_key;
        if not found then
            if not (p_expected_id is null
                or (v_conversation.id = p_expected_id and v_conversation.revision = p_expected_revision)) then
                refusal := 'stale';
                return next;
                return;
            end if;
            return query
            insert into chatdb.messages as m (
                user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at,
                parent_seq
            )
            values (
                p_user_id, v_conversation.id, v_conversation.last_seq + 1, p_role, p_content, p_payload::json,
                p_metadata::jsonb, p_token_count, p_key, v_conversation.appended_at, v_conversation.parent_seq
            )
            returning
                m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata::text, m.state, m.created_at, null::text;
            if not found then
                refusal := 'suppressed';
                return next;
                return;
            end if;
            update chatdb.conversations as c
            set last_seq = v_conversation.last_seq + 1, updated_at = v_conversation.appended_at
            where c.user_id = p_user_id and c.id = v_conversation.id;
            return;
        end if;
        if v_stored.is_same then
            return query
            select
                v_stored.id, v_stored.conversation_id, v_stored.seq, v_stored.parent_seq, v_stored.metadata,
                v_stored.state, v_stored.created_at, null::text;
            return;
        end if;
        refusal := case
            when not (p_expected_id is null
                or (v_conversation.id = p_expected_id and v_conversation.revision = p_expected_revision)) then 'stale'
            when v_stored.state = 'streaming' then 'streaming'
        end;
        if refusal is not null then
            return next;
            return;
        end if;
        return query
        update chatdb.messages as m
        set role = p_role, content = p_content, payload = p_payload::json, metadata = p_metadata::jsonb,
            token_count = p_token_count
        where m.user_id = p_user_id and m.conversation_id = v_conversation.id and m.seq = v_stored.seq
        returning m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata::text, m.state, m.created_at, null::text;
        if not found then
            refusal := 'suppressed';
            return next;
            return;
        end if;
        update chatdb.conversations as c
        set edits = c.edits + 1
        where c.user_id = p_user_id and c.id = v_conversation.id;
    end $body$
    $function$;

    execute $function$
    create or replace function chatdb.start_message_v1(
        p_user_id text,
        p_conversation_id int8,
        p_conversation_key text,
        p_role text,
        p_metadata text,
        p_key text,
        p_parent_seq int8
    )
    returns table (
        id int8, conversation_id int8, user_id text, seq int8, parent_seq int8, role text, content text, payload text,
        metadata text, token_count int4, key text, state text, created_at timestamptz, refusal text
    )
    language plpgsql
    set search_path to pg_catalog, pg_temp
    as $body$
    #variable_conflict use_column
    declare
        v_id int8;
        v_conversation record;
        v_role text;
    begin
        for v_attempt in 1 .. 3 loop
            v_id := p_conversation_id;
            if v_id is null then
                select c.id into v_id
                from chatdb.conversations as c
                where c.user_id = p_user_id and c.key = p_conversation_key;
            end if;
            select
                c.id, c.last_seq, greatest(c.updated_at, statement_timestamp()) as appended_at,
                nullif(
                    nullif(
                        coalesce(p_parent_seq, case when c.head_last_seq = c.last_seq then c.head_seq end),
                        c.last_seq
                    ),
                    case when c.head_last_seq = c.last_seq and c.head_is_newest then c.head_seq end
                ) as parent_seq
            into v_conversation
            from chatdb.conversations as c
            where c.user_id = p_user_id and c.id = v_id
            for no key update;
            exit when found;
            -- by its key, it may have been deleted and created again
            if v_id is null or p_conversation_id is not null or v_attempt = 3 then
                return;
            end if;
        end loop;
        if p_key is not null then
            select m.role into v_role
            from chatdb.messages as m
            where m.user_id = p_user_id and m.conversation_id = v_conversation.id and m.key = p_key;
            if found then
                if v_role <> p_role then
                    refusal := 'conflict';
                    return next;
                    return;
                end if;
                return query
                select
                    m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role,
                    case
                        when m.state = 'streaming' then (
                            select coalesce(string_agg(p.content, '' order by p.start), '')
                            from chatdb.message_parts as p
                            where p.user_id = p_user_id and p.conversation_id = m.conversation_id and p.seq = m.seq
                        )
                        else m.content
                    end,
                    m.payload::text, m.metadata::text, m.token_count, m.key, m.state, m.created_at, null::text
                from chatdb.messages as m
                where m.user_id = p_user_id and m.conversation_id = v_conversation.id and m.key = p_key;
                return;
            end if;
        end if;
        if coalesce(p_parent_seq, 0) <> 0 then
            perform from chatdb.messages as m
            where m.user_id = p_user_id and m.conversation_id = v_conversation.id and m.seq = p_parent_seq
            for key share;
            if not found then
                refusal := 'missing';
                return next;
                return;
            end if;
        end if;
        return query
        insert into chatdb.messages as m (
            user_id, conversation_id, seq, role, content, metadata, key, state, created_at, parent_seq
        )
        values (
            p_user_id, v_conversation.id, v_conversation.last_seq + 1, p_role, '', p_metadata::jsonb, p_key,
            'streaming', v_conversation.appended_at, v_conversation.parent_seq
        )
        returning
            m.id, m.conversation_id, m.user_id, m.seq, m.parent_seq, m.role, m.content, m.payload::text,
            m.metadata::text, m.token_count, m.key, m.state, m.created_at, null::text;
        if not found then
            refusal := 'suppressed';
            return next;
            return;
        end if;
        insert into chatdb.message_parts (
            user_id, conversation_id, seq, start, content, length, bytes, last_start, last_start_bytes, flushed_at
        )
        values (
            p_user_id, v_conversation.id, v_conversation.last_seq + 1, -1, '', 0, 0, 0, 0, statement_timestamp()
        );
        update chatdb.conversations as c
        set last_seq = v_conversation.last_seq + 1, updated_at = v_conversation.appended_at
        where c.user_id = p_user_id and c.id = v_conversation.id;
    end $body$
    $function$;

    execute $function$
    create or replace function chatdb.extend_message_v1(
        p_user_id text,
        p_conversation_id int8,
        p_conversation_key text,
        p_seq int8,
        p_key text,
        p_start int8,
        p_content text
    )
    returns table (length int8, refusal text)
    language plpgsql
    set search_path to pg_catalog, pg_temp
    as $body$
    #variable_conflict use_column
    declare
        v_id int8 := p_conversation_id;
        v_message record;
        v_stream record;
        v_length int8;
        v_bytes int8;
        v_before int8;
        v_now timestamptz;
    begin
        if v_id is null then
            select c.id into v_id
            from chatdb.conversations as c
            where c.user_id = p_user_id and c.key = p_conversation_key;
        end if;
        if p_seq is not null then
            select m.seq, m.state into v_message
            from chatdb.messages as m
            where m.user_id = p_user_id and m.conversation_id = v_id and m.seq = p_seq
            for key share;
        else
            select m.seq, m.state into v_message
            from chatdb.messages as m
            where m.user_id = p_user_id and m.conversation_id = v_id and m.key = p_key
            for key share;
        end if;
        if not found then
            return query
            select null::int8, 'missing'::text
            from chatdb.conversations as c
            where c.user_id = p_user_id and c.id = v_id;
            return;
        end if;
        select p.length, p.bytes, p.last_start, p.last_start_bytes into v_stream
        from chatdb.message_parts as p
        where p.user_id = p_user_id and p.conversation_id = v_id and p.seq = v_message.seq and p.start = -1
        for no key update;
        if not found then
            -- another caller may have finished it while this statement waited
            refusal := case when v_message.state = 'streaming' then 'again' else 'finished' end;
            return next;
            return;
        end if;
        length := v_stream.length;
        v_before := case when p_start = v_stream.length then v_stream.bytes else v_stream.last_start_bytes end;
        v_bytes := octet_length(p_content) + v_before;
        if p_start <> v_stream.length and p_start <> v_stream.last_start then
            refusal := 'offset';
        elsif v_bytes > 4194304 then
            refusal := 'length';
        end if;
        if refusal is not null then
            return next;
            return;
        end if;
        v_length := p_start + char_length(p_content);
        v_now := clock_timestamp();
        update chatdb.message_parts as p
        set length = v_length, bytes = v_bytes, last_start = p_start, last_start_bytes = v_before, flushed_at = v_now
        where p.user_id = p_user_id and p.conversation_id = v_id and p.seq = v_message.seq and p.start = -1;
        insert into chatdb.message_parts (user_id, conversation_id, seq, start, content)
        values (p_user_id, v_id, v_message.seq, p_start, p_content)
        on conflict (user_id, conversation_id, seq, start) do update set content = excluded.content;
        length := v_length;
        return next;
    end $body$
    $function$;

    execute $function$
    create or replace function chatdb.replace_messages_after_v1(
        p_user_id text,
        p_conversation_id int8,
        p_conversation_key text,
        p_after_seq int8,
        p_expected_id int8,
        p_expected_revision int8,
        p_roles text[],
        p_contents text[],
        p_payloads text[],
        p_metadatas text[],
        p_token_counts text[],
        p_keys text[]
    )
    returns table (
        id int8, conversation_id int8, seq int8, parent_seq int8, metadata text, token_count int4, key text,
        state text, created_at timestamptz, refusal text
    )
    language plpgsql
    set search_path to pg_catalog, pg_temp
    as $body$
    #variable_conflict use_column
    declare
        v_count int := cardinality(p_roles);
        v_id int8;
        v_conversation record;
        v_ancestor int8;
        v_head int8;
        v_newest int8;
        v_parent record;
        v_new record;
        v_same int;
        v_rows int;
        v_inserted int := 0;
    begin
        for v_attempt in 1 .. 3 loop
            v_id := p_conversation_id;
            if v_id is null then
                select c.id into v_id
                from chatdb.conversations as c
                where c.user_id = p_user_id and c.key = p_conversation_key;
            end if;
            select
                c.id, c.last_seq, c.last_seq + c.edits as revision,
                greatest(c.updated_at, statement_timestamp()) as appended_at,
                case when c.head_last_seq = c.last_seq then c.head_seq else c.last_seq end as head_seq
            into v_conversation
            from chatdb.conversations as c
            where c.user_id = p_user_id and c.id = v_id
            for no key update;
            exit when found;
            -- by its key, it may have been deleted and created again
            if v_id is null or p_conversation_id is not null or v_attempt = 3 then
                return;
            end if;
        end loop;

        -- for a retry whose first try succeeded: the conversation is no longer as expected, but the messages are stored
        if v_conversation.id <> p_expected_id or v_conversation.revision <> p_expected_revision then
            select count(*) into v_same
            from chatdb.messages as m
            inner join unnest(p_keys, p_roles, p_contents, p_payloads, p_metadatas)
                as b (key, role, content, payload, metadata) on b.key = m.key
            where m.user_id = p_user_id and m.conversation_id = v_id and m.seq > p_after_seq
              and m.role = b.role and m.content = b.content and m.state is distinct from 'streaming'
              and m.payload::text is not distinct from b.payload
              and m.metadata is not distinct from b.metadata::jsonb;
            if v_count = 0 or v_same < v_count then
                refusal := 'stale';
                return next;
                return;
            end if;
            return query
            select
                m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata::text, m.token_count, m.key, m.state,
                m.created_at, null::text
            from chatdb.messages as m
            where m.user_id = p_user_id and m.conversation_id = v_id and m.key = any(p_keys);
            return;
        end if;

        -- the head, then the parent of each branch of its line that begins after the position
        v_ancestor := v_conversation.head_seq;
        while v_ancestor > p_after_seq loop
            select m.seq, m.parent_seq into v_parent
            from chatdb.messages as m
            where m.user_id = p_user_id and m.conversation_id = v_id and m.seq <= v_ancestor
              and m.parent_seq is not null
            order by m.seq desc
            limit 1;
            exit when not found or v_parent.seq <= p_after_seq;
            v_ancestor := v_parent.parent_seq;
        end loop;
        delete from chatdb.messages as m
        where m.user_id = p_user_id and m.conversation_id = v_id and m.seq > p_after_seq;
        if v_conversation.head_seq > p_after_seq or v_ancestor < p_after_seq then
            select coalesce(max(m.seq), 0) into v_newest
            from chatdb.messages as m
            where m.user_id = p_user_id and m.conversation_id = v_id;
            -- the newest message of that line up to the position
            v_head := v_newest;
            if v_ancestor < p_after_seq then
                select coalesce(max(m.seq), 0) into v_head
                from chatdb.messages as m
                where m.user_id = p_user_id and m.conversation_id = v_id and m.seq <= v_ancestor;
            end if;
        end if;
        update chatdb.conversations as c
        set last_seq = c.last_seq + v_count,
            edits = c.edits + 1,
            updated_at = case when v_count = 0 then c.updated_at else v_conversation.appended_at end,
            -- an appended message becomes the head without writing this
            head_seq = case
                when v_conversation.head_seq > p_after_seq and v_count = 0 then v_head else c.head_seq
            end,
            head_last_seq = case
                when v_conversation.head_seq > p_after_seq and v_count = 0 then c.last_seq else c.head_last_seq
            end,
            head_is_newest = case
                when v_conversation.head_seq > p_after_seq and v_count = 0 then v_head = v_newest
                else c.head_is_newest
            end
        where c.user_id = p_user_id and c.id = v_id;
        if v_count = 0 then
            return next;
            return;
        end if;
        for v_new in
            select
                b.role, b.content, b.payload::json as payload, b.metadata::jsonb as metadata, b.token_count, b.key,
                b.ordinality
            from unnest(p_roles, p_contents, p_payloads, p_metadatas, p_token_counts::int4[], p_keys)
                with ordinality as b (role, content, payload, metadata, token_count, key, ordinality)
        loop
            return query
            insert into chatdb.messages as m (
                user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, created_at,
                parent_seq
            )
            values (
                p_user_id, v_id, v_conversation.last_seq + v_new.ordinality, v_new.role, v_new.content, v_new.payload,
                v_new.metadata, v_new.token_count, v_new.key, v_conversation.appended_at,
                case when v_new.ordinality = 1 and v_ancestor < p_after_seq then nullif(v_head, v_newest) end
            )
            returning
                m.id, m.conversation_id, m.seq, m.parent_seq, m.metadata::text, m.token_count, m.key, m.state,
                m.created_at, null::text;
            get diagnostics v_rows = row_count;
            v_inserted := v_inserted + v_rows;
        end loop;
        if v_inserted = 0 then
            refusal := 'suppressed';
            return next;
        end if;
    end $body$
    $function$;

    execute $function$
    create or replace function chatdb.fork_conversation_v1(
        p_user_id text,
        p_conversation_id int8,
        p_conversation_key text,
        p_seq int8,
        p_key text,
        p_new_key text
    )
    returns table (
        id int8, user_id text, key text, title text, metadata text, last_seq int8, head_seq int8, revision int8,
        created_at timestamptz, updated_at timestamptz, archived_at timestamptz, pinned_at timestamptz, refusal text
    )
    language plpgsql
    set search_path to pg_catalog, pg_temp
    as $body$
    #variable_conflict use_column
    declare
        v_id int8 := p_conversation_id;
        v_conversation record;
        v_top int8;
        v_created int8;
        v_count int8 := 0;
        v_message record;
    begin
        if v_id is null then
            select c.id into v_id
            from chatdb.conversations as c
            where c.user_id = p_user_id and c.key = p_conversation_key;
        end if;
        -- the lock keeps the messages as they are until they are copied
        select
            c.id, c.title, c.metadata,
            case when c.head_last_seq = c.last_seq then c.head_seq else c.last_seq end as head_seq
        into v_conversation
        from chatdb.conversations as c
        where c.user_id = p_user_id and c.id = v_id
        for share;
        if not found then
            return;
        end if;
        v_top := v_conversation.head_seq;
        if p_seq is not null or p_key is not null then
            select m.seq into v_top
            from chatdb.messages as m
            where m.user_id = p_user_id and m.conversation_id = v_id
              and case when p_seq is not null then m.seq = p_seq else m.key = p_key end;
            if not found then
                refusal := 'missing';
                return next;
                return;
            end if;
        end if;
        insert into chatdb.conversations as c (user_id, key, title, metadata)
        values (p_user_id, p_new_key, v_conversation.title, v_conversation.metadata)
        on conflict (user_id, key) where key is not null do nothing
        returning c.id into v_created;
        if not found then
            refusal := case when p_new_key is null then 'suppressed' else 'conflict' end;
            return next;
            return;
        end if;
        for v_message in
            -- the runs of the line, as in get_branch
            with recursive run as (
                select null::int8 as top, null::int8 as bottom, v_top as parent_seq
                union all
                select r.parent_seq as top, coalesce(b.seq, 0) as bottom, b.parent_seq
                from run as r
                left join lateral (
                    select m.seq, m.parent_seq
                    from chatdb.messages as m
                    where m.user_id = p_user_id and m.conversation_id = v_id and m.seq <= r.parent_seq
                      and m.parent_seq is not null
                    order by m.seq desc
                    limit 1
                ) as b on true
                where r.parent_seq > 0
            )
            select m.role, m.content, m.payload, m.metadata, m.token_count, m.key, m.state, m.created_at
            from run as r
            cross join lateral (
                select
                    n.seq, n.role, n.content, n.payload, n.metadata, n.token_count, n.key, n.state, n.created_at
                from chatdb.messages as n
                where n.user_id = p_user_id and n.conversation_id = v_id and n.seq <= r.top and n.seq >= r.bottom
                offset 0
            ) as m
            where m.state is distinct from 'streaming'
            order by m.seq
        loop
            v_count := v_count + 1;
            insert into chatdb.messages (
                user_id, conversation_id, seq, role, content, payload, metadata, token_count, key, state, created_at
            )
            values (
                p_user_id, v_created, v_count, v_message.role, v_message.content, v_message.payload,
                v_message.metadata, v_message.token_count, v_message.key, v_message.state, v_message.created_at
            );
        end loop;
        return query
        update chatdb.conversations as c
        set last_seq = v_count
        where c.user_id = p_user_id and c.id = v_created
        returning
            c.id, c.user_id, c.key, c.title, c.metadata::text, c.last_seq, c.last_seq, c.last_seq + c.edits,
            c.created_at, c.updated_at, c.archived_at, c.pinned_at, null::text;
    end $body$
    $function$;
    -- not sent to a node, because the two users can be on different ones
    execute $function$
    create or replace function chatdb.move_user_v1(p_user_id text, p_to_user_id text)
    returns table (conversations int8, messages int8, refusal text)
    language plpgsql
    set search_path to pg_catalog, pg_temp
    as $body$
    #variable_conflict use_column
    declare
        v_ids int8[];
    begin
        if row_security_active('chatdb.conversations'::regclass) or row_security_active('chatdb.messages'::regclass)
            or row_security_active('chatdb.message_parts'::regclass) then
            return query select 0::int8, 0::int8, 'protected'::text;
            return;
        end if;
        -- in the order of every write: conversations, then messages that are streaming, then their streams
        select coalesce(array_agg(locked.id), '{}') into v_ids
        from (
            select c.id
            from chatdb.conversations as c
            where c.user_id = p_user_id
            order by c.id
            for update
        ) as locked;
        perform from chatdb.messages as m
        where m.user_id = p_user_id and m.conversation_id = any(v_ids) and m.state = 'streaming'
        order by m.conversation_id, m.seq
        for update;
        perform from chatdb.message_parts as p
        where p.user_id = p_user_id and p.conversation_id = any(v_ids) and p.start = -1
        for update;
        insert into chatdb.conversations (
            user_id, id, key, title, metadata, last_seq, edits, created_at, updated_at, archived_at, pinned_at,
            head_seq, head_last_seq, head_is_newest
        )
        select
            p_to_user_id, c.id, case when t.key is null then c.key end, c.title, c.metadata, c.last_seq, c.edits,
            c.created_at, c.updated_at, c.archived_at, c.pinned_at, c.head_seq, c.head_last_seq, c.head_is_newest
        from chatdb.conversations as c
        left join (
            select o.key
            from chatdb.conversations as o
            where o.user_id = p_to_user_id and o.key is not null
        ) as t on t.key = c.key
        where c.user_id = p_user_id and c.id = any(v_ids);
        get diagnostics conversations = row_count;
        insert into chatdb.messages (
            user_id, conversation_id, id, seq, parent_seq, role, content, payload, metadata, token_count, key, state,
            created_at
        )
        select
            p_to_user_id, m.conversation_id, m.id, m.seq, m.parent_seq, m.role, m.content, m.payload, m.metadata,
            m.token_count, m.key, m.state, m.created_at
        from chatdb.messages as m
        where m.user_id = p_user_id and m.conversation_id = any(v_ids);
        get diagnostics messages = row_count;
        insert into chatdb.message_parts (
            user_id, conversation_id, seq, start, content, length, bytes, last_start, last_start_bytes, flushed_at
        )
        select
            p_to_user_id, p.conversation_id, p.seq, p.start, p.content, p.length, p.bytes, p.last_start,
            p.last_start_bytes, p.flushed_at
        from chatdb.message_parts as p
        where p.user_id = p_user_id and p.conversation_id = any(v_ids);
        delete from chatdb.conversations as c
        where c.user_id = p_user_id and c.id = any(v_ids);
        return next;
    end $body$
    $function$;
end $install$;
