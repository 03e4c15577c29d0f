-- create_state
-- Creates the tables that record adopted and quarantined rows, in a separate schema that the operator drops after the
-- cut-over. Several statements, each safe to repeat.

create schema if not exists chatdb_adopt;

create table if not exists chatdb_adopt.conversations (
    id bigint primary key,
    updated_at timestamptz not null,
    last_seq bigint not null,
    last_created_at timestamptz,
    last_id bigint,
    user_id text collate "C" not null
);

comment on table chatdb_adopt.conversations is 'One row per conversation that has been adopted.';
comment on column chatdb_adopt.conversations.updated_at is 'The original''s, when it was last looked at.';
comment on column chatdb_adopt.conversations.last_seq is
'How often a seq was given to a message of the original: chatdb''s last_seq, while nobody appends there.';
comment on column chatdb_adopt.conversations.last_id is 'With last_created_at the last of the adopted messages.';

create table if not exists chatdb_adopt.messages (
    id bigint primary key,
    conversation_id bigint not null,
    seq bigint not null
);

comment on table chatdb_adopt.messages is 'One row per message that has been adopted.';

alter table if exists chatdb_adopt.aside_conversations rename to quarantine_conversations;

create table if not exists chatdb_adopt.quarantine_conversations (
    id bigint primary key,
    user_id text,
    created_at timestamptz,
    updated_at timestamptz,
    reason text not null
);

comment on table chatdb_adopt.quarantine_conversations is
'The conversations that chatdb cannot take, whole, with the reason.';

alter table if exists chatdb_adopt.aside_messages rename to quarantine_messages;

create table if not exists chatdb_adopt.quarantine_messages (
    id bigint primary key,
    conversation_id bigint,
    user_id text,
    role text,
    content text,
    created_at timestamptz,
    reason text not null
);

comment on table chatdb_adopt.quarantine_messages is
'The messages that chatdb cannot take, whole, with the reason.';

revoke all on schema chatdb_adopt from public;

revoke all on all tables in schema chatdb_adopt from public;
