-- find_columns
-- Returns a table's columns in order, and whether each is the whole primary key.
--
-- $1 name text    qualified by schema

select
    a.attname as name,
    pg_catalog.quote_ident(a.attname::text) as identifier,
    pg_catalog.format_type(a.atttypid, null) as type,
    coalesce(i.indkey::text = a.attnum::text, false) as is_primary_key
from pg_catalog.pg_attribute as a
left join pg_catalog.pg_index as i on i.indrelid = a.attrelid and i.indisprimary and i.indisvalid
where a.attrelid = pg_catalog.to_regclass($1) and a.attnum > 0 and not a.attisdropped
order by a.attnum
