-- count_adopted
-- How many conversations and messages have been adopted.

select
    (select count(*) from chatdb_adopt.conversations) as conversations,
    (select count(*) from chatdb_adopt.messages) as messages
