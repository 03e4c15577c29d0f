-- search_messages_conversation
-- A conversation's messages that contain a text in any case, newest first, without those that are streaming. Each
-- has the part of its text around the first place found.
--
-- $1 user_id text
-- $2 conversation_id int8 null
-- $3 conversation_key text null
-- $4 query text
-- $5 after_created_at timestamptz null
-- $6 after_conversation_id int8 null
-- $7 after_seq int8 null
-- $8 row_limit int8
--
-- returns many FoundMessage, then an existence row: if the page is not full
-- served by pk_messages, uq_conversations_user_id_key

with search as (
    select
        pg_catalog.lower($4) as query,
        -- not a constant, with which other encodings reject the statement
        pg_catalog.chr(case pg_catalog.getdatabaseencoding() when 'UTF8' then 304 else 1 end) as dotted
),

page as (
    select conversation_id, seq, role, created_at, content
    from chatdb.messages
    where user_id = $1
      and conversation_id = (select coalesce((select $2::int8), (
          select id from chatdb.conversations
          where user_id = $1 and key = $3
      )))
      and state is distinct from 'streaming'
      and (created_at, conversation_id, seq) < (
          (select coalesce($5::timestamptz, 'infinity')),
          (select coalesce($6::int8, 9223372036854775807)),
          (select coalesce($7::int8, 9223372036854775807))
      )
      and pg_catalog.strpos(pg_catalog.lower(content), (select query from search)) > 0
    order by created_at desc, conversation_id desc, seq desc
    limit $8
),

located as materialized (
    select
        conversation_id, seq, role, created_at, content, pg_catalog.char_length(content) as length,
        -- ICU makes two characters of chr(304) in lower case, which would move the place
        pg_catalog.strpos(
            pg_catalog.lower(pg_catalog.replace(content, (select dotted from search), 'i')),
            pg_catalog.lower(pg_catalog.replace($4, (select dotted from search), 'i'))
        ) as place
    from page
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
        pg_catalog.substr(content, start, 260) as text
    from begun
    order by created_at desc, conversation_id desc, seq desc
    limit $8
)
union all
select null, null, null, null, null, null, null
from chatdb.conversations
where user_id = $1
  and id = (select coalesce((select $2::int8), (
      select id from chatdb.conversations
      where user_id = $1 and key = $3
  )))
-- a full page ends before this branch is read
limit $8
