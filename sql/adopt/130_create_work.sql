-- create_work
-- Creates the temporary tables of a run. Several statements.

create temporary table pending (
    batch bigint,
    id bigint,
    messages bigint not null
);

comment on column pg_temp.pending.batch is 'Null for messages whose conversation is missing.';

create temporary table batch_conversations (
    id bigint not null,
    user_id text collate "C",
    created_at timestamptz,
    updated_at timestamptz,
    reason text,
    is_adopted boolean not null,
    adopted_seq bigint,
    last_created_at timestamptz,
    last_id bigint,
    last_seq bigint,
    active_at timestamptz,
    is_renumbered boolean not null default false
) on commit delete rows;

comment on column pg_temp.batch_conversations.adopted_seq is 'last_seq as adopting left it; last_seq is chatdb''s now.';

create temporary table batch_messages (
    id bigint not null,
    conversation_id bigint,
    user_id text collate "C",
    role text,
    content text,
    created_at timestamptz,
    reason text
) on commit delete rows;

create temporary table batch_seqs (
    id bigint not null,
    conversation_id bigint not null,
    seq bigint not null,
    is_late boolean not null
) on commit delete rows;

create temporary table batch_moves (
    user_id text collate "C" not null,
    conversation_id bigint not null,
    id bigint not null,
    old_seq bigint,
    seq bigint not null
) on commit delete rows;

create temporary table deleted_upstream_conversations (
    id bigint not null
);

create temporary table deleted_upstream_messages (
    id bigint not null,
    conversation_id bigint not null
);
