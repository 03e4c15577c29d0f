-- count_adopted
-- Counts the adopted conversations and messages.

select
    (select pg_catalog.count(*) from chatdb_adopt.conversations) as adopted_before_conversations,
    (select pg_catalog.count(*) from chatdb_adopt.messages) as adopted_before_messages
