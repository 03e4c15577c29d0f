-- count_adopted
-- How many conversations and messages have been adopted.

select
    (select pg_catalog.count(*) from chatdb_adopt.conversations) as conversations,
    (select pg_catalog.count(*) from chatdb_adopt.messages) as messages
