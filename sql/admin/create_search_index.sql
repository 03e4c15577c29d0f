-- Creates the index for mode "words" of search_messages. Writers go on meanwhile.
-- New messages wait in a list, which every search reads too: 192 kB are 24 blocks, the default of 4 MB are 512.
--
-- The expression must be the one in search_messages_words.sql. It takes the first 100,000 characters, because a larger
-- text could exceed the 1 MiB that a tsvector may have, and the message could not be stored. It replaces the characters
-- that PostgreSQL's parser joins to compound words, addresses and paths: reading those can take quadratic time (26 s
-- for 65,536 times "a_").

create index concurrently ix_messages_search
on chatdb.messages using gin (
    user_id,
    pg_catalog.to_tsvector(
        'pg_catalog.simple'::pg_catalog.regconfig,
        pg_catalog.translate(pg_catalog."left"(content, 100000), '_-+./:@~&<', '          ')
    )
)
with (gin_pending_list_limit = 192)
