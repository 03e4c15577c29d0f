-- count_adopted
-- Counts the conversations and messages that have been adopted.

select
    (select pg_catalog.count(*) from chatdb_adopt.conversations) as adopted_before_conversations,
    (select pg_catalog.count(*) from chatdb_adopt.messages) as adopted_before_messages
