-- check_schema
-- The columns and valid indexes that the database has in chatdb's schema.
--
-- returns many SchemaPart

select c.relname::text as relation, a.attname::text as name, format_type(a.atttypid, a.atttypmod) as type
from pg_catalog.pg_namespace as n
inner join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relkind in ('r', 'p')
inner join pg_catalog.pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
where n.nspname = 'chatdb'
union all
select t.relname::text as relation, c.relname::text as name, 'index' as type
from pg_catalog.pg_namespace as n
inner join pg_catalog.pg_class as c on c.relnamespace = n.oid
inner join pg_catalog.pg_index as i on i.indexrelid = c.oid and i.indisvalid
inner join pg_catalog.pg_class as t on t.oid = i.indrelid
where n.nspname = 'chatdb'
