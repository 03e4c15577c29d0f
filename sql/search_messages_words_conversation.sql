-- search_messages_words_conversation
-- A conversation's messages that have the words of a query in their first 100,000 characters, newest first, without
-- those that are streaming. Each has the part of its text around the first place found.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 query text
-- $5 words text[]
-- $6 after_created_at timestamptz null
-- $7 after_conversation_id int8 null
-- $8 after_seq int8 null
-- $9 row_limit int8
--
-- returns many FoundMessage, then an existence row: if the page is not full
-- refuses with index, words
-- served by ix_messages_search, uq_conversations_user_id_key

with search as (
    select
        pg_catalog.websearch_to_tsquery('pg_catalog.simple'::pg_catalog.regconfig, $4) as query,
        coalesce((
            select indisvalid from pg_catalog.pg_index
            where indexrelid = pg_catalog.to_regclass('chatdb.ix_messages_search')::oid
        ), false) as is_ready,
        -- not constants, with which other encodings reject the statement
        pg_catalog.chr(case pg_catalog.getdatabaseencoding() when 'UTF8' then 304 else 1 end) as dotted,
        pg_catalog.chr(case pg_catalog.getdatabaseencoding() when 'UTF8' then 160 else 32 end) as blank
),

page as (
    select conversation_id, seq, role, created_at, content
    from chatdb.messages
    where user_id = $1
      -- plus 0: through pk_messages each message of the conversation would be parsed, which takes about 0.4 ms
      and conversation_id + 0 = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
      and state is distinct from 'streaming'
      and (created_at, conversation_id, seq) < (
          (select coalesce($6::timestamptz, 'infinity')),
          (select coalesce($7::int8, 9223372036854775807)),
          (select coalesce($8::int8, 9223372036854775807))
      )
      -- without the index nothing is read
      and (select is_ready from search)
      and pg_catalog.to_tsvector(
          'pg_catalog.simple'::pg_catalog.regconfig,
          pg_catalog.translate(pg_catalog."left"(content, 100000), '_-+./:@~&<', '          ')
      ) @@ (select query from search)
    order by created_at desc, conversation_id desc, seq desc
    limit $9
),

spaced as materialized (
    select
        conversation_id, seq, role, created_at, content, pg_catalog.char_length(content) as length,
        -- ICU makes two characters of chr(304) in lower case, which would move the place
        pg_catalog.translate(
            pg_catalog.lower(
                pg_catalog.replace(pg_catalog."left"(content, 100000), (select dotted from search), 'i')
            ),
            '!"#$%&()*+,-./:;<=>?@[]^_`{|}~' || pg_catalog.chr(39) || pg_catalog.chr(92)
            || pg_catalog.chr(9) || pg_catalog.chr(10) || pg_catalog.chr(13) || (select blank from search),
            pg_catalog.repeat(' ', 40)
        ) as spaced
    from page
),

located as materialized (
    select
        s.conversation_id, s.seq, s.role, s.created_at, s.content, s.length,
        -- the first word of the query that is a word of the text, or else a part of one
        coalesce(
            (
                select pg_catalog.strpos(' ' || s.spaced || ' ', ' ' || pg_catalog.lower(w.word) || ' ')
                from pg_catalog.unnest($5::text[]) with ordinality as w (word, ordinality)
                where pg_catalog.strpos(' ' || s.spaced || ' ', ' ' || pg_catalog.lower(w.word) || ' ') > 0
                order by w.ordinality
                limit 1
            ),
            (
                select pg_catalog.strpos(s.spaced, pg_catalog.lower(w.word))
                from pg_catalog.unnest($5::text[]) with ordinality as w (word, ordinality)
                where pg_catalog.strpos(s.spaced, pg_catalog.lower(w.word)) > 0
                order by w.ordinality
                limit 1
            ),
            1
        ) as place
    from spaced as s
),

begun as (
    select
        conversation_id, seq, role, created_at, content, length,
        -- 80 characters before the place; search.py shows 200, and completes the last one from 60 more
        greatest(1, least(place - 80, length - 199)) as start
    from located
)

(
    select
        conversation_id, seq, role, created_at, length, start,
        pg_catalog.substr(content, start, 260) as text,
        null as refusal
    from begun
    order by created_at desc, conversation_id desc, seq desc
    limit $9
)
union all
select
    null, null, null, null, null, null, null,
    case
        when not (select is_ready from search) then 'index'
        when (select pg_catalog.numnode(query) from search) = 0 then 'words'
    end
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
-- a full page ends before this branch is read
limit $9
